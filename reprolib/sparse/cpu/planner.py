"""From the operations of a graph to work: where values lie, and what is done, in order, for one bundle of images.

A linear layer is a convolution with a kernel as large as its map. Channels that are concatenated lie in one buffer from
the beginning, where that can be. An activation other than ReLU is applied to what a layer has just written.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from reprolib.sparse import operations
from reprolib.sparse.cpu import geometry
from reprolib.sparse.cpu.geometry import Stage, Taps, Window
from reprolib.sparse.cpu.layout import Layout
from reprolib.sparse.cpu.shapes import Shape, Weights, pool_window, shapes, window
from reprolib.sparse.operations import (
    Activation,
    Concatenation,
    Convolution,
    Flatten,
    Graph,
    Linear,
    MaxPool,
    Mean,
    Operation,
    Product,
    Sum,
)

# Kinds of work. A bundle are the images that share a vector, or the few that share positions.
INPUT = 0  # images come in
FILL = 1  # zeros around maps, or the floor below a max-pool
LAYER = 2  # a convolution or linear layer, then an activation: numbers[0]
VIEW = 3  # some pixels, in order: stride and first pixel of rows and columns
MAX_POOL = 4  # kernel, stride, padding, of rows and columns
MEAN = 5  # of each map
ELEMENTWISE = 6  # numbers[0], then an activation: numbers[1]
OUTPUT = 7  # a bundle goes out

COPY, ADD, MULTIPLY = range(3)  # what is done elementwise
ACTIVATIONS = (None, *operations.ACTIVATIONS)
WIDEST = 8192  # numbers in a row of a map


@dataclass(frozen=True, eq=False)
class Work:
    """What is done for a bundle of images: `source`, `other` and `target` are places; `operation`: for which one."""

    kind: int
    operation: int
    target: int = -1
    source: int = -1
    other: int = -1
    numbers: tuple[int, ...] = ()
    stage: Stage | None = None
    zeros: np.ndarray | None = None  # what is filled in


@dataclass(frozen=True, eq=False)
class Plan:
    """`places` are layouts, each with the number of the buffer that it is a part of; `work` is done in order."""

    places: tuple[tuple[Layout, int], ...]
    work: tuple[Work, ...]
    images: int

    @property
    def stages(self) -> list[Stage]:
        """Of its layers."""
        return [work.stage for work in self.work if work.stage]


# --- Where values lie -------------------------------------------------------------------------------------------------


def plan(graph: Graph, weights: Weights, inputs: list[Shape], images: int, lanes: int, pairs: bool = False) -> Plan:
    """Plan a graph for `images` (1 to `lanes`) images at a time; `inputs` are the shapes ``[C, H, W]`` of its inputs.

    `weights` are float32, as `operations` describes them. `pairs`: activations between layers are bfloat16, two
    channels in 32 bits. Sums, and what only goes out, are float32 always. Raises ValueError for what does not fit.
    """
    return _Draft(graph, weights, shapes(graph, weights, inputs), images, lanes, pairs).finished()


class _Draft:
    """A plan in the making."""

    def __init__(self, graph: Graph, weights: Weights, shapes: list[Shape], images: int, lanes: int, pairs: bool):
        self.graph, self.weights, self.shapes = graph, weights, shapes
        self.images, self.lanes, self.pairs, self.interleaved = images, lanes, pairs, images == lanes
        self.places: list[tuple[Layout, int]] = []
        self.buffers: dict[object, int] = {}  # numbers, by the value whose buffer it is
        self.work: list[Work] = []
        self.place_of: dict[int, int] = {}  # of a value
        self.value = -1  # whose work is drafted
        self.operation_of = dict(graph.numbered())
        self.taps = self._taps()
        self.homes = self._homes()
        self.halos = self._halos()
        read = {source for operation in graph.operations for source in operations.sources(operation)}
        self.only_out = {value for value in self.taps if value not in read}

    def finished(self) -> Plan:
        for value in range(len(self.graph.inputs)):
            self._add(INPUT, self._place(value), numbers=(value,))
        for value, operation in self.graph.numbered():
            self.value = value
            self._draft(operation)
        for number, value in enumerate(self.graph.outputs):
            self.work.append(Work(OUTPUT, len(self.shapes), source=self.place_of[value], numbers=(number,)))
        if not self.taps:
            raise ValueError("a graph without layers has no weights to make code for: leave it to torch")
        return Plan(tuple(self.places), tuple(self.work), self.images)

    def _taps(self) -> dict[int, Taps]:
        """Of each layer, by its value."""
        found = {}
        for value, operation in self.graph.numbered():
            if isinstance(operation, (Convolution, Linear)):
                source = self.shapes[operation.source]
                reads = window(operation, self.weights[operation.weight][0], source)
                found[value] = geometry.taps(reads, source[1:], self.interleaved)
        return found

    def _homes(self) -> dict[int, tuple[int, int]]:
        """Values that lie among others from the beginning: the concatenation that holds them, and their first channel.

        From the last concatenation to the first: of those that grow, the last one holds all.
        """
        homes: dict[int, tuple[int, int]] = {}
        for value, operation in reversed(self.graph.numbered()):
            if not isinstance(operation, Concatenation) or self._splits_pairs(operation):
                continue
            parts = operation.sources
            begins = [0, *itertools.accumulate(self.shapes[part][0] for part in parts)]
            root, first = homes.get(parts[0], (None, 0))
            if value not in homes and all(
                homes.get(p) == (root, first + at) for p, at in zip(parts, begins, strict=False)
            ):
                homes[value] = root, first
                continue
            root, first = homes.setdefault(value, (value, 0))
            for part, at in zip(parts, begins, strict=False):
                if self._may_move(part):
                    homes.setdefault(part, (root, first + at))
        return homes

    def _splits_pairs(self, operation: Concatenation) -> bool:
        """Whether a part begins with the second channel of a pair."""
        return self.pairs and any(self.shapes[part][0] % 2 for part in operation.sources[:-1])

    def _may_move(self, value: int) -> bool:
        """Whether a value may lie among others. The floor below a max-pool would fill all of their channels."""
        operation = self.operation_of.get(value)
        pooled = self.interleaved and isinstance(operation, Convolution) and operation.pool
        return not (pooled or isinstance(operation, Flatten))

    def _halos(self) -> dict[int, int]:
        """Zeros around the maps of each value: what its readers, and those of its neighbours in a buffer, need."""
        needed: dict[int, int] = {}
        for value, taps in self.taps.items():
            if not taps.views:
                root = self._root(self._unflattened(self.operation_of[value].source))
                needed[root] = max(needed.get(root, 0), taps.halo)
        return {value: needed.get(self._root(value), 0) for value in range(len(self.shapes))}

    def _root(self, value: int) -> int:
        return self.homes.get(value, (value, 0))[0]

    def _unflattened(self, value: int) -> int:
        while isinstance(self.operation_of.get(value), Flatten):
            value = self.operation_of[value].source
        return value

    def _add(self, kind: int, target: int, source: int = -1, other: int = -1, numbers=(), stage=None) -> None:
        """Work, and before it zeros around its target, or the floor below a max-pool."""
        layout, _ = self.places[target]
        floor = (0.0 if stage.relu else -np.inf) if stage and stage.pool else None
        if len(zeros := layout.zeros(floor)):
            self.work.append(Work(FILL, self.value, target, zeros=zeros))
        self.work.append(Work(kind, self.value, target, source, other, tuple(numbers), stage))

    def _place(self, value: int) -> int:
        """A new place for a value."""
        root, channel = self.homes.get(value, (value, 0))
        self.place_of[value] = self._among(root, self.shapes[value][0], channel, self.shapes[value], value)
        return self.place_of[value]

    def _among(self, root: object, channels: int, begin: int, shape: Shape, value: int) -> int:
        """A place for channels of the buffer of `root`."""
        pairs = self.pairs and value not in self.only_out
        of = self.shapes[root][0] if root != value or value in self.homes else 0
        share = 1 + pairs
        layout = Layout(
            channels, *shape[1:], self.halos[value], self.images, self.lanes, pairs, begin // share, -(-of // share)
        )
        return self._put(layout, root)

    def _put(self, layout: Layout, buffer: object) -> int:
        self.places.append((layout, self.buffers.setdefault(buffer, len(self.buffers))))
        return len(self.places) - 1

    # --- What is done for an operation --------------------------------------------------------------------------------

    def _draft(self, operation: Operation) -> None:
        given = [self.place_of[source] for source in operations.sources(operation)]
        match operation:
            case Convolution() | Linear():
                self._layer(operation)
            case Flatten():
                self.place_of[self.value] = given[0]
            case Concatenation():
                self._concatenation(operation)
            case MaxPool():
                self._max_pool(given[0], self._place(self.value), pool_window(operation))
            case Mean():
                self._add(MEAN, self._place(self.value), given[0])
            case Activation():
                numbers = COPY, ACTIVATIONS.index(operation.activation)
                self._add(ELEMENTWISE, self._place(self.value), given[0], given[0], numbers)
            case Sum() | Product():
                large, small = sorted(given, key=lambda place: -self.places[place][0].pixels)
                numbers = ADD if isinstance(operation, Sum) else MULTIPLY, 0
                self._add(ELEMENTWISE, self._place(self.value), large, small, numbers)

    def _concatenation(self, operation: Concatenation) -> None:
        if self._splits_pairs(operation):
            return self._by_layers(operation)
        root, first = self.homes[self.value]
        self._place(self.value)
        for part in operation.sources:
            if self.homes.get(part) != (root, first):
                target = self._among(root, self.shapes[part][0], first, self.shapes[part], self.value)
                self._add(ELEMENTWISE, target, self.place_of[part], self.place_of[part], (COPY, 0))
            first += self.shapes[part][0]

    def _by_layers(self, operation: Concatenation) -> None:
        """Concatenate by 1x1 layers of ones: each puts a part in its place, and adds what the ones before have put."""
        (channels, *size), reads, first = self.shapes[self.value], Window((1, 1)), 0
        taps, target = geometry.taps(reads, tuple(size), self.interleaved), self._place(self.value)
        for part in operation.sources:
            ones = np.eye(channels, self.shapes[part][0], -first, np.float32)[:, :, None, None]
            source, addend = self.place_of[part], target if first else -1
            layouts = [self.places[place][0] if place >= 0 else None for place in (source, target, addend)]
            no_bias = np.zeros(channels, np.float32)
            stage = geometry.stage(ones, no_bias, reads, taps, layouts, False, False, tuple(size))
            self._add(LAYER, target, source, addend, (0,), stage)
            first += self.shapes[part][0]

    def _max_pool(self, source: int, target: int, window: Window) -> None:
        layout = self.places[source][0]
        if layout.width * layout.images > WIDEST:
            raise ValueError(f"maps {layout.width} pixels wide are too wide for the max-pool of {WIDEST} numbers a row")
        self._add(MAX_POOL, target, source, numbers=(*window.kernel, *window.stride, *window.padding))

    def _layer(self, operation: Convolution | Linear) -> None:
        taps, (weight, bias) = self.taps[self.value], self.weights[operation.weight]
        shape = self.shapes[operation.source]
        reads = window(operation, weight, shape)
        out = reads.out(shape[1:])
        if isinstance(operation, Linear):
            weight = weight.reshape(len(weight), *shape)
        else:
            weight = geometry.without_groups(weight, operation.groups)
        source = self._views(self.place_of[operation.source], taps, out)
        pool, simple = getattr(operation, "pool", False), operation.activation in (None, "relu")
        apart = pool and not (self.interleaved and simple)
        target = self._place(self.value)
        addend = None if operation.addend is None else self.place_of[operation.addend]
        raw = target
        if apart:
            raw = self._put(Layout(len(weight), *out, 0, self.images, self.lanes), ("raw", self.value))
        layouts = [None if place is None else self.places[place][0] for place in (source, raw, addend)]
        relu, later = operation.activation == "relu", 0 if simple else ACTIVATIONS.index(operation.activation)
        stage = geometry.stage(weight, bias, reads, taps, layouts, relu, pool and not apart, out)
        self._add(LAYER, raw, source, -1 if addend is None else addend, (later,), stage)
        if apart:
            self._max_pool(raw, target, Window((2, 2), (2, 2)))

    def _views(self, source: int, taps: Taps, out: tuple[int, int]) -> int:
        """Where a layer finds its input: in `source`, or in views of it."""
        layout, buffer = self.places[source][0], ("views", self.value)
        of = len(taps.views) * layout.words
        for i, view in enumerate(taps.views):
            part = Layout(layout.channels, *out, taps.halo, self.images, self.lanes, layout.pairs, i * layout.words, of)
            self._add(VIEW, self._put(part, buffer), source, numbers=view)
        if not taps.views:
            return source
        whole = Layout(of * (1 + layout.pairs), *out, taps.halo, self.images, self.lanes, layout.pairs)
        return self._put(whole, buffer)
