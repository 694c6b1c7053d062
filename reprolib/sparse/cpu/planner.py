"""From pruned layers to a program: where activations lie, the code of every layer, and the order of the work.

**Layouts.** Either 16 images share a vector, ``[y][x][channel][16 images]`` with a halo of zeros, or, with fewer
images, a vector holds neighbouring positions, ``[channel][y][x][image]`` with a row of zeros between channels; lanes
that would reach over the left or right edge are masked.

**Order.** Early layers run *depth first*: a thread takes 16 images through all of them in two buffers of its own. Where
maps have become small, threads share each layer, for all images at once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

LANES = 16
BAND = 32  # output vectors of a band: a multiple of the four that a max-pool takes
TASKS_PER_THREAD = 4  # of a layer that threads share
SMALL_MAP = 16  # pixels: layers of smaller maps run for all images at once

# Kinds of steps, and what one task of them is: 16 images, or fewer that share a vector, come in; go through a stretch;
# get their zeros; a band of output vectors times a group of output channels; some channels are pooled; images go out.
INPUT, STRETCH, FILL, LAYER, POOL, OUTPUT = range(6)
POOL_CHANNELS = 16


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution: ``weight [C_out, C_in, K_h, K_w]`` and ``bias [C_out]``, float32, then ReLU and 2x2 max-pool.

    A linear layer behind a flattened map is a convolution with a kernel as large as the map.
    """

    weight: np.ndarray
    bias: np.ndarray
    relu: bool
    pool: bool
    padding: int


@dataclass(frozen=True)
class Layout:
    """How the activations of `images` images lie in memory; strides and sizes in bytes."""

    channels: int
    height: int
    width: int
    halo: int
    images: int  # 16: they share a vector; fewer: positions do

    @property
    def interleaved(self) -> bool:
        return self.images == LANES

    @property
    def column(self) -> int:
        return 4 * (self.channels * LANES if self.interleaved else self.images)

    @property
    def row(self) -> int:
        return self.column * (self.width + 2 * self.halo if self.interleaved else self.width)

    @property
    def channel(self) -> int:
        return 4 * LANES if self.interleaved else self.row * (self.height + self.halo)

    @property
    def first(self) -> int:
        """Where the pixel 0, 0 of channel 0 lies."""
        inner = self.halo * (self.row + self.column)
        return inner if self.interleaved else -(-inner // 64) * 64

    @property
    def size(self) -> int:
        if self.interleaved:
            return self.row * (self.height + 2 * self.halo)
        end = self.first + self.channels * self.channel + self.row + self.column  # what a masked load may touch
        return -(-end // 64) * 64 + 64

    def zeros(self, interior: float | None) -> np.ndarray:
        """``[ranges, 3]``: start and stop in numbers, and what to fill in: zeros around maps, `interior` inside."""
        if not self.interleaved:
            starts = self.first + np.arange(self.channels) * self.channel + self.height * self.row
            ranges = [(0, self.first, 0), *((start, start + self.row * self.halo, 0) for start in starts)]
        else:
            edge, line = self.halo * self.column, self.width * self.column
            inner = [self.first + y * self.row for y in range(self.height)]
            ends = [0, *itertools.chain(*((start, start + line) for start in inner)), self.size]
            ranges = [(a, b, 0) for a, b in zip(ends[::2], ends[1::2], strict=True)] if edge else []
            if interior is not None:
                ranges += [(start, start + line, interior) for start in inner]
        return np.array([(a // 4, b // 4, value) for a, b, value in ranges if b > a], float).reshape(-1, 3)


@dataclass(frozen=True, eq=False)
class Stage:
    """A layer in its place: what it reads and writes, and where its output vectors lie.

    ``places [vectors, 2]``: bytes from the start of the source and of the target; ``masks [vectors, 4]``: lanes that
    may read to their left and to their right, lanes that are written (and nothing). `raw` is what is calculated; it
    differs from `target` where a max-pool is a step of its own.
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


def stages(layers: list[Layer], height: int, width: int, images: int) -> list[Stage]:
    """Put layers in their places for `images` (1 to 16) images ``[C_in, height, width]``.

    Raises ValueError where a layer does not fit its input.
    """
    source = Layout(layers[0].weight.shape[1], height, width, layers[0].padding, images)
    found = []
    for layer, follower in itertools.zip_longest(layers, layers[1:]):
        c_out, c_in, *kernel = layer.weight.shape
        out = [size + 2 * layer.padding - k + 1 for size, k in zip((source.height, source.width), kernel, strict=True)]
        if c_in != source.channels or min(out) < 1 + layer.pool:
            what = f"{tuple(layer.weight.shape)}{' with a max-pool' * layer.pool}"
            raise ValueError(f"a layer {what} does not fit maps of {source.channels}x{source.height}x{source.width}")
        if (kernel, layer.padding) not in (([3, 3], 1), ([1, 1], 0)) and (out != [1, 1] or layer.padding):
            raise ValueError(f"a kernel {kernel} with padding {layer.padding} is none of the engine's")
        raw = Layout(c_out, *out, 0, images)
        pooled = replace(raw, height=out[0] // 2, width=out[1] // 2) if layer.pool else raw
        target = replace(pooled, halo=follower.padding if follower else 0)
        found.append(_stage(layer, source, raw, target))
        source = target
    return found


def _stage(layer: Layer, source: Layout, raw: Layout, target: Layout) -> Stage:
    if source.interleaved:
        y, x = _pixels(raw.height, raw.width, layer.pool)
        shrink = 1 + layer.pool
        to = target.first + y // shrink * target.row + x // shrink * target.column
        places = np.stack([y * source.row + x * source.column, to], axis=1)
        return Stage(layer, source, raw, target, LANES, places, np.zeros((len(y), 4), np.uint16))
    positions = raw.height * raw.width * raw.images
    lanes = next((lanes for lanes in (4, 8) if positions <= lanes), LANES)
    position = np.arange(-(-positions // lanes) * lanes).reshape(-1, lanes)
    line = raw.width * raw.images
    allowed = [position % line >= raw.images, position % line < line - raw.images, position < positions]
    masks = np.stack([(each << np.arange(lanes)).sum(axis=1) for each in allowed] + [0 * position[:, 0]], axis=1)
    first = source.first - layer.padding * (source.row + source.column)
    written = raw if layer.pool else target
    places = np.stack([4 * position[:, 0] + first, 4 * position[:, 0] + written.first], axis=1)
    return Stage(layer, source, raw, target, lanes, places, masks.astype(np.uint16))


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

    Activations lie in one arena: those of bundle i of images at ``source + i * source_stride`` (bytes), likewise the
    target. `bundle` is the first one that takes part, `bundles` how many do, `band` the output vectors of a task.
    """

    kind: int
    tasks: int
    stage: int
    source: int
    source_stride: int
    target: int
    target_stride: int
    bundle: int
    bundles: int
    band: int


def stretch(stages: list[Stage]) -> int:
    """How many layers run depth first: all up to the first one whose map is small."""
    if not stages[0].source.interleaved:
        return 0
    small = (i for i, stage in enumerate(stages) if stage.raw.height * stage.raw.width < SMALL_MAP)
    return next(small, len(stages))


def schedule(stages: list[Stage], groups: list[int], bundles: int, threads: int) -> tuple[list[Step], int]:
    """Steps for `bundles` of images, and the bytes of their arena. `groups` of output channels has each stage."""
    layouts = [stages[0].source, *(stage.target for stage in stages)]
    deep = stretch(stages)
    alone = bundles - bundles % threads if deep else 0  # bundles that one thread each takes through the stretch
    own = max(layout.size for layout in layouts[: deep + 1]) if deep else 0
    late = max([layout.size for layout in layouts[deep:]] + [s.raw.size for s in stages[deep:] if s.pools_apart])
    tail = 2 * threads * own
    steps = []

    def shared(first: int, last: int, bundle: int, count: int, buffers: tuple[int, int], stride: int, end: tuple):
        """Layers that threads share; the last one writes to buffer and stride `end`."""
        at, other = buffers
        for i in range(first, last):
            stage = stages[i]
            target, target_stride = end if i == last - 1 and end else (other, stride)
            tasks = dict(stage=i, bundle=bundle, bundles=count)
            fill = Step(FILL, count, source=0, source_stride=0, target=target, target_stride=target_stride, band=0, **tasks)
            vectors = count * len(stage.places)
            band = _band(vectors, groups[i], threads)
            work = dict(source=at, source_stride=stride, band=band, **tasks)
            many = -(-vectors // band) * groups[i]
            if stage.pools_apart:
                steps.append(Step(LAYER, many, target=other, target_stride=stride, **work))
                pool = dict(source=other, source_stride=stride, target=at, target_stride=stride, band=0, **tasks)
                steps.append(Step(FILL, count, **(pool | dict(source=0))))
                steps.append(Step(POOL, -(-stage.raw.channels // POOL_CHANNELS), **pool))
            else:
                steps.append(fill)
                steps.append(Step(LAYER, many, target=target, target_stride=target_stride, **work))
                at, other = target, at
        return at

    def come_in(bundle: int, count: int, target: int, stride: int):
        steps.append(Step(INPUT, count, 0, 0, 0, target, stride, bundle, count, 0))

    if alone:
        steps.append(Step(STRETCH, alone, deep, 0, own, tail, late, 0, alone, threads))
    rest = bundles - alone
    if rest and deep:
        come_in(alone, rest, 0, own)
        shared(0, deep, alone, rest, (0, threads * own), own, (tail + alone * late, late))
    elif rest:
        come_in(0, rest, tail, late)
    at = shared(deep, len(stages), 0, bundles, (tail, tail + bundles * late), late, ())
    steps.append(Step(OUTPUT, bundles, len(stages), at, late, 0, 0, 0, bundles, 0))
    return steps, tail + 2 * bundles * late


def _band(vectors: int, groups: int, threads: int) -> int:
    """Output vectors of a task: whole bands, unless there would be too few tasks for all threads."""
    tasks = max(1, TASKS_PER_THREAD * threads // groups)
    return min(BAND, max(4, -(-vectors // tasks // 4) * 4))
