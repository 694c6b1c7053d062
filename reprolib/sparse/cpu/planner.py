"""From pruned layers to a program: where activations lie, the code of every layer, and the order of the work.

**Layouts.** Either as many images as a vector has lanes share it, ``[y][x][channel][image]`` with a halo of zeros; or,
with fewer images, a vector holds neighbouring positions, ``[channel][y][x][image]`` with a row of zeros between
channels; lanes that would reach over the left or right edge are masked.

**Order.** Early layers run *depth first*: a thread takes a bundle of images, those that share vectors, through all of
them in two buffers of its own. Where maps have become small, threads share each layer, for all images at once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

BAND = 32  # output vectors of a band: a multiple of the four that a max-pool takes
TASKS_PER_THREAD = 4  # of a layer that threads share
FEWEST = 16  # output vectors of such a task that does all groups: each thread reads all code
SMALL_MAP = 256  # numbers, of all images of a bundle: layers of smaller maps run for all bundles at once

PARTS = 8  # of a bundle: tasks of steps that only move numbers
# Kinds of steps, and what their tasks are. A bundle are the images that share a vector.
INPUT = 0  # rows of a bundle come in
STRETCH = 1  # a bundle runs through all layers of the stretch
FILL = 2  # zeros around the maps of a bundle, or the floor below a max-pool
LAYER = 3  # output vectors times groups of output channels
POOL = 4  # channels of a bundle
OUTPUT = 5  # a bundle goes out


@dataclass(frozen=True, eq=False)
class Layer:
    """``weight [C_out, C_in, K, K]`` or ``[out, in]`` and ``bias``, float32; then ReLU and a 2x2 max-pool if asked.

    A linear layer is a convolution with a kernel as large as its map.
    """

    weight: np.ndarray
    bias: np.ndarray
    relu: bool
    pool: bool
    padding: int = 0


@dataclass(frozen=True)
class Layout:
    """How the activations of `images` images lie in memory; strides and sizes in bytes."""

    channels: int
    height: int
    width: int
    halo: int
    images: int  # as many as `lanes`: they share a vector; fewer: positions do
    lanes: int
    pairs: bool = False  # bfloat16 numbers of two channels, an even and the next one, share 32 bits

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    @property
    def words(self) -> int:
        """Numbers of 32 bits that hold the channels of a pixel."""
        return -(-self.channels // 2) if self.pairs else self.channels

    @property
    def interleaved(self) -> bool:
        return self.images == self.lanes

    @property
    def column(self) -> int:
        return 4 * (self.words * self.lanes if self.interleaved else self.images)

    @property
    def row(self) -> int:
        return self.column * (self.width + 2 * self.halo if self.interleaved else self.width)

    @property
    def channel(self) -> int:
        return 4 * self.lanes if self.interleaved else self.row * (self.height + self.halo)

    @property
    def first(self) -> int:
        """Where the pixel 0, 0 of channel 0 lies."""
        inner = self.halo * (self.row + self.column)
        return inner if self.interleaved else -(-inner // 64) * 64

    @property
    def size(self) -> int:
        if self.interleaved:
            return self.row * (self.height + 2 * self.halo)
        end = self.first + self.words * self.channel + self.row + self.column  # what a masked load may touch
        return -(-end // 64) * 64 + 64

    def to_channel(self, channel):
        """Bytes from channel 0 to another."""
        return channel // (1 + self.pairs) * self.channel

    def zeros(self, interior: float | None) -> np.ndarray:
        """``[ranges, 3]``: start and stop in numbers, and 32 bits to fill in: zeros around maps, `interior` inside."""
        if not self.interleaved:
            starts = self.first + np.arange(self.words) * self.channel + self.height * self.row
            ranges = [(0, self.first, 0), *((start, start + self.row * self.halo, 0) for start in starts)]
        else:
            edge, line = self.halo * self.column, self.width * self.column
            inner = [self.first + y * self.row for y in range(self.height)]
            ends = [0, *itertools.chain(*((start, start + line) for start in inner)), self.size]
            ranges = [(a, b, 0) for a, b in zip(ends[::2], ends[1::2], strict=True)] if edge else []
            if interior is not None:
                bits = int(np.float32(interior).view(np.uint32))  # 0 or infinity: its upper half is the bfloat16
                ranges += [(start, start + line, bits | bits >> 16 if self.pairs else bits) for start in inner]
        return np.array([(a // 4, b // 4, bits) for a, b, bits in ranges if b > a], np.int64).reshape(-1, 3)


@dataclass(frozen=True, eq=False)
class Stage:
    """A layer in its place: what it reads and writes, and where its output vectors lie.

    ``places [vectors, 2]``: bytes from the start of the source and of the target; ``masks [vectors, 3, lanes]``: lanes
    that may read to their left and to their right, and lanes that are written; none where images share a vector. `raw`
    is what is calculated; it differs from `target` where a max-pool is a step of its own.
    """

    layer: Layer
    source: Layout
    raw: Layout
    target: Layout
    lanes: int
    places: np.ndarray
    masks: np.ndarray

    @property
    def pools_apart(self) -> bool:
        return self.layer.pool and not self.source.interleaved


def stages(layers: list[Layer], height: int, width: int, images: int, lanes: int, pairs: bool = False) -> list[Stage]:
    """Put layers in their places for `images` (1 to `lanes`) images ``[C_in, height, width]``; a vector has `lanes`.

    `pairs`: activations between layers are bfloat16, two channels in 32 bits. Sums, and what the last layer gives, are
    float32 always. Raises ValueError where a layer does not fit its input.
    """
    channels = layers[0].weight.shape[1]
    source = Layout(channels, height, width, layers[0].padding, images, lanes, pairs)
    found = []
    for layer, follower in itertools.zip_longest(layers, layers[1:]):
        if layer.weight.ndim == 2:
            layer = replace(layer, weight=layer.weight.reshape(len(layer.weight), channels, *source.shape[1:]))
        c_out, c_in, *kernel = layer.weight.shape
        out = [size + 2 * layer.padding - k + 1 for size, k in zip((source.height, source.width), kernel, strict=True)]
        if c_in != channels or min(out) < 1 + layer.pool:
            what = f"{tuple(layer.weight.shape)}{' with a max-pool' * layer.pool}"
            raise ValueError(f"a layer {what} does not fit maps of {channels}x{source.height}x{source.width}")
        if (kernel, layer.padding) not in (([3, 3], 1), ([1, 1], 0)) and (out != [1, 1] or layer.padding):
            raise ValueError(f"a kernel {kernel} with padding {layer.padding} is none of the engine's")
        if pairs:
            layer = _even(layer, outputs=follower is not None)
        raw = Layout(len(layer.weight), *out, 0, images, lanes)
        pooled = replace(raw, height=out[0] // 2, width=out[1] // 2) if layer.pool else raw
        target = replace(pooled, halo=follower.padding, pairs=pairs) if follower else pooled
        found.append(_stage(layer, source, raw, target))
        source, channels = target, c_out
    return found


def _even(layer: Layer, outputs: bool) -> Layer:
    """A layer with a channel of zeros more where its input channels, and if asked its outputs, make no pairs."""
    rows, channels = len(layer.weight) % 2 * outputs, layer.weight.shape[1] % 2
    weight = np.pad(layer.weight, ((0, rows), (0, channels), (0, 0), (0, 0)))
    return replace(layer, weight=weight, bias=np.pad(layer.bias, (0, rows)))


def _stage(layer: Layer, source: Layout, raw: Layout, target: Layout) -> Stage:
    if source.interleaved:
        y, x = _pixels(raw.height, raw.width, layer.pool)
        shrink = 1 + layer.pool
        to = target.first + y // shrink * target.row + x // shrink * target.column
        places = np.stack([y * source.row + x * source.column, to], axis=1)
        return Stage(layer, source, raw, target, source.lanes, places, np.zeros((0, 3, source.lanes), bool))
    positions = raw.height * raw.width * raw.images
    lanes = next(lanes for lanes in (4, 8, source.lanes) if positions <= lanes or lanes == source.lanes)
    position = np.arange(-(-positions // lanes) * lanes).reshape(-1, lanes)
    line = raw.width * raw.images
    allowed = [position % line >= raw.images, position % line < line - raw.images, position < positions]
    masks = np.pad(np.stack(allowed, axis=1), ((0, 0), (0, 0), (0, source.lanes - lanes)))
    first = source.first - layer.padding * (source.row + source.column)
    written = raw if layer.pool else target
    places = np.stack([4 * position[:, 0] + first, 4 * position[:, 0] + written.first], axis=1)
    return Stage(layer, source, raw, target, lanes, places, masks)


def _pixels(height: int, width: int, pooled: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of output pixels; where a max-pool follows, only those that it takes, four after four."""
    if not pooled:
        return tuple(index.ravel() for index in np.indices((height, width)))
    upper, left, dy, dx = (index.ravel() for index in np.indices((height // 2, width // 2, 2, 2)))
    return 2 * upper + dy, 2 * left + dx


# --- The order of the work --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """`tasks` that any thread may do, in any order; the next step begins when all are done.

    Activations lie in one arena: those of bundle i at ``source + i * source_stride`` (bytes), likewise the target.
    `bundle` is the first one that takes part, `bundles` how many do. A task of a layer does `band` output vectors of
    one of `parts` of its groups; other tasks do one of `parts` of a bundle.
    """

    kind: int
    tasks: int
    stage: int = 0
    source: int = 0
    source_stride: int = 0
    target: int = 0
    target_stride: int = 0
    bundle: int = 0
    bundles: int = 1
    band: int = 0
    parts: int = 1


def stretch(stages: list[Stage]) -> int:
    """How many layers run depth first: all up to the first one whose map is small."""
    if not stages[0].source.interleaved:
        return 0
    sizes = (stage.raw.height * stage.raw.width * stage.raw.images for stage in stages)
    return next((i for i, size in enumerate(sizes) if size < SMALL_MAP), len(stages))


def schedule(stages: list[Stage], groups: list[int], bundles: int, threads: int) -> tuple[list[Step], int]:
    """Steps for `bundles` of images, and the bytes of their arena. `groups` of output channels has each stage."""
    layouts = [stages[0].source, *(stage.target for stage in stages)]
    deep = stretch(stages)
    own = max((layout.size for layout in layouts[: deep + 1]), default=0) if deep else 0
    late = max([layout.size for layout in layouts[deep:]] + [s.raw.size for s in stages[deep:] if s.pools_apart])
    tail = 2 * threads * own  # behind two buffers for every thread: two for all bundles
    alone = bundles - bundles % threads if deep else 0  # bundles that one thread each takes through the stretch
    rest = bundles - alone
    steps = []
    if alone:
        steps.append(Step(STRETCH, alone, deep, 0, own, tail, late, parts=threads))
    if rest:
        at, stride = (0, own) if deep else (tail, late)
        steps.append(Step(INPUT, rest * PARTS, target=at, target_stride=stride, bundle=alone, parts=PARTS))
    if rest and deep:
        end = tail + alone * late, late
        steps += _shared(stages[:deep], groups, 0, rest, (0, threads * own), own, end, threads)[0]
    last, at = _shared(stages[deep:], groups[deep:], deep, bundles, (tail, tail + bundles * late), late, None, threads)
    steps += [*last, Step(OUTPUT, bundles, source=at, source_stride=late)]
    return steps, tail + 2 * bundles * late


def apart(stages: list[Stage], groups: list[int], bundles: int, threads: int) -> tuple[list[Step], ...]:
    """Like `schedule`, in parts: images in, layers that threads share, images out; and the bytes of their arena."""
    size = max(layout.size for stage in stages for layout in (stage.source, stage.raw, stage.target))
    buffers = 0, bundles * size
    layers, at = _shared(stages, groups, 0, bundles, buffers, size, None, threads)
    come = Step(INPUT, bundles * PARTS, target=0, target_stride=size, parts=PARTS)
    return [come], layers, [Step(OUTPUT, bundles, source=at, source_stride=size)], 2 * bundles * size


def _shared(stages, groups, first, bundles, buffers, stride, end, threads) -> tuple[list[Step], int]:
    """Layers that threads share, in two buffers; the last one may write to another place and stride, `end`.

    Also returns where the activations behind the last layer lie.
    """
    at, other = buffers
    steps = []
    for i, stage in enumerate(stages):
        target, target_stride = end if end and i == len(stages) - 1 else (other, stride)
        work = _work(first + i, bundles * len(stage.places), groups[i], threads)
        work = replace(
            work, bundles=bundles, source=at, source_stride=stride, target=target, target_stride=target_stride
        )
        if stage.pools_apart:
            moves = Step(FILL, bundles * PARTS, first + i, other, stride, at, stride, bundles=bundles, parts=PARTS)
            steps += [work, moves, replace(moves, kind=POOL)]
        else:
            fill = Step(FILL, bundles * PARTS, first + i, 0, 0, target, target_stride, bundles=bundles, parts=PARTS)
            steps += [fill, work]
            at, other = target, at
    return steps, at


def _work(stage: int, vectors: int, groups: int, threads: int) -> Step:
    """How threads share a layer: by output vectors if there are many, else by groups, so that each reads other code."""
    if vectors >= FEWEST * threads:
        tasks, parts = min(TASKS_PER_THREAD * threads, vectors // FEWEST), 1
    else:
        tasks, parts = 1, groups
    band = -(-vectors // tasks // 4) * 4
    return Step(LAYER, -(-vectors // band) * parts, stage, band=band, parts=parts)
