"""How a convolution reads a map: which pixel each of its taps finds, and where output vectors lie.

Where images share a vector, a tap lies at a fixed distance from the place of an output pixel for any stride and
padding. Where neighbouring positions share one, that is so only if neighbours stay neighbours. Other pixels, such as
every second one, are copied into maps of the output's size before (*views*): of stride 2, one view holds the pixels of
even rows and columns, and a 3x3 convolution finds all its taps in four of them. Lanes of a tap that would reach over
the left or right edge are masked; above and below lie rows of zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reprolib.sparse.cpu.encoder import MOST_MASKS
from reprolib.sparse.cpu.layout import Layout


@dataclass(frozen=True)
class Window:
    """Kernel, stride, padding and dilation, each of rows and columns."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def out(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output on a map of this size; less than 1 where the map is too small."""
        parts = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((length + 2 * p - d * (k - 1) - 1) // s + 1 for length, k, s, p, d in parts)

    def offsets(self, axis: int) -> np.ndarray:
        """Pixels from `stride` times an output's place to what each tap reads."""
        return self.dilation[axis] * np.arange(self.kernel[axis]) - self.padding[axis]


@dataclass(frozen=True, eq=False)
class Taps:
    """Taps of a window that read any pixel: ``number [taps]`` in the kernel, in order; the view of each, and the shift
    ``[taps, 2]`` in it, of rows and columns. ``views``: stride and first pixel of rows and columns; none: the map
    itself. `halo`: how far beyond the edges of map or view they reach.
    """

    number: np.ndarray
    view: np.ndarray
    shift: np.ndarray
    views: tuple[tuple[int, int, int, int], ...]
    halo: int


def taps(window: Window, size: tuple[int, int], interleaved: bool) -> Taps:
    """What the taps of a window read on a map of this size, where images share a vector (`interleaved`) or not."""
    out = window.out(size)
    direct = interleaved or out == (1, 1)
    rows, columns = (_axis(window, axis, size[axis], out[axis], direct) for axis in (0, 1))
    starts, shift, used = (
        np.stack([np.repeat(y, len(x)), np.tile(x, len(y))], axis=1) for y, x in zip(rows, columns, strict=True)
    )
    used = used.all(axis=1)
    starts, shift, number = starts[used], shift[used], np.flatnonzero(used)
    if direct:
        last = shift + np.array(window.stride) * (np.array(out) - 1) - np.array(size) + 1
        return Taps(number, np.zeros(len(number), int), shift, (), int(max(-shift.min(initial=0), last.max(initial=0))))
    halo = int(np.abs(shift).max(initial=0))
    if not starts.any() and window.stride == (1, 1) and out == size:
        return Taps(number, np.zeros(len(number), int), shift, (), halo)
    distinct, view = np.unique(starts, axis=0, return_inverse=True)
    views = tuple((*window.stride, *map(int, start)) for start in distinct)
    return Taps(number, view.reshape(-1), shift, views, halo)


def _axis(window: Window, axis: int, size: int, out: int, direct: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each tap: the first pixel of its view, its shift there, whether it reads any pixel of the map."""
    offsets, stride = window.offsets(axis), window.stride[axis]
    pixels = offsets[:, None] + stride * np.arange(out)
    used = ((pixels >= 0) & (pixels < size)).any(axis=1)
    if direct:
        return np.zeros_like(offsets), offsets, used
    starts, shifts = offsets % stride, offsets // stride
    hidden = (shifts > 0) & (-(-(size - starts) // stride) > out)  # it would read pixels that its view has no room for
    if (hidden & used).any() or len(np.unique(shifts[shifts != 0])) > MOST_MASKS - 1:
        return offsets, np.zeros_like(offsets), used
    return starts, shifts, used


@dataclass(frozen=True, eq=False)
class Stage:
    """A layer in its place: what it reads and writes, and where its output vectors lie.

    ``weight [C_out, C_in, taps]``; ``reach [taps]``: bytes from an output vector's place to what a tap reads;
    ``masked [taps]``: which of ``masks [vectors, .., lanes]`` says what it may read, from 2 on, or 0; mask 1 says what
    is written; none where images share a vector. ``places [vectors, 3]``: bytes from the start of the source, the
    target and the addend. `pool`: the target holds the maximum of its pixels so far.
    """

    weight: np.ndarray
    bias: np.ndarray
    source: Layout
    target: Layout
    addend: Layout | None
    lanes: int
    places: np.ndarray
    reach: np.ndarray
    masked: np.ndarray
    masks: np.ndarray
    relu: bool = False
    pool: bool = False


def stage(weight, bias, window: Window, found: Taps, layouts, relu: bool, pool: bool, out: tuple[int, int]) -> Stage:
    """Put a layer, ``weight [C_out, C_in, K_h, K_w]``, in its place.

    `found` are its taps, `layouts` those of the source (which holds all views), the target and the addend or None,
    `out` the size of its map before the max-pool.
    """
    source, target, addend = layouts
    weight = weight.reshape(*weight.shape[:2], -1)[:, :, found.number]
    if source.pairs:
        weight, bias = _even(weight, bias, outputs=target.pairs)
    reach = found.shift @ np.array([source.row, source.column])
    reach += found.view * (-(-weight.shape[1] // (1 + source.pairs)) * source.channel)
    if source.interleaved:
        y, x = _pixels(*out, pool)
        stride = window.stride
        shrink = 1 + pool
        read = source.first + y * stride[0] * source.row + x * stride[1] * source.column
        written = target.first + y // shrink * target.row + x // shrink * target.column
        added = addend.first + y * addend.row + x * addend.column if addend else 0 * y
        masks, masked, lanes = np.zeros((0, 1, source.lanes), bool), np.zeros(len(reach), int), source.lanes
    else:
        first = (source.first, target.first, addend.first if addend else 0)
        position, lanes, masks, masked = _vectors(out, source, found.shift[:, 1])
        read, written, added = (start + 4 * position for start in first)
        if out == (1, 1):
            masked = 0 * masked
    places = np.stack([read, written, added], axis=1)
    return Stage(weight, bias, source, target, addend, lanes, places, reach, masked, masks, relu, pool)


def _vectors(out: tuple[int, int], source: Layout, shifts: np.ndarray):
    """Where output vectors of neighbouring positions begin, their lanes, their masks, and that of each tap."""
    positions, line = out[0] * out[1] * source.images, out[1] * source.images
    lanes = next(lanes for lanes in (4, 8, source.lanes) if positions <= lanes or lanes == source.lanes)
    position = np.arange(-(-positions // lanes) * lanes).reshape(-1, lanes)
    edges = np.unique(shifts[shifts != 0]) if out != (1, 1) else np.zeros(0, int)
    column = position % line // source.images
    allowed = [position < positions, *((column + shift >= 0) & (column + shift < out[1]) for shift in edges)]
    masks = np.pad(np.stack(allowed, axis=1), ((0, 0), (0, 0), (0, source.lanes - lanes)))
    return position[:, 0], lanes, masks, np.where(shifts != 0, np.searchsorted(edges, shifts) + 2, 0)


def _even(weight: np.ndarray, bias: np.ndarray, outputs: bool) -> tuple[np.ndarray, np.ndarray]:
    """A layer with a channel of zeros more where its input channels, and if asked its outputs, make no pairs."""
    rows, channels = len(weight) % 2 * outputs, weight.shape[1] % 2
    return np.pad(weight, ((0, rows), (0, channels), (0, 0))), np.pad(bias, (0, rows))


def without_groups(weight: np.ndarray, groups: int) -> np.ndarray:
    """``[C_out, C_in, ..]`` from the weight ``[C_out, C_in / groups, ..]`` of a convolution: zeros elsewhere."""
    if groups == 1:
        return weight
    rows, channels = weight.shape[:2]
    whole = np.zeros((groups, rows // groups, groups, *weight.shape[1:]), weight.dtype)
    each = np.arange(groups)
    whole[each, :, each] = weight.reshape(groups, rows // groups, *weight.shape[1:])
    return whole.reshape(rows, groups * channels, *weight.shape[2:])


def _pixels(height: int, width: int, pooled: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of output pixels; where a max-pool follows, only those that it takes, four after four."""
    if not pooled:
        return tuple(index.ravel() for index in np.indices((height, width)))
    upper, left, dy, dx = (index.ravel() for index in np.indices((height // 2, width // 2, 2, 2)))
    return 2 * upper + dy, 2 * left + dx
