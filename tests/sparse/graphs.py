"""Random graphs on whole numbers, what they give in float64, and what engines of float32 or pairs of bfloat16 give."""

import ctypes
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from x86 import Everything, Processor

from reprolib.sparse import cpu, operations
from reprolib.sparse.cpu import network
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

EXACT = 2**24  # whole numbers up to this one are float32
SIZES = [1, 2, 3, 4, 4, 5, 7, 8, 8, 11]  # of maps; the mean of a power of two is exact
KINDS = ["convolution"] * 6 + ["activation", "max-pool", "mean", "sum", "product", "concatenation", "concatenation"]
KINDS += ["flatten", "linear"]


@dataclass
class Case:
    """A graph with its weights; `inputs` are shapes, without the batch."""

    graph: Graph
    weights: dict[str, tuple[Tensor, Tensor]]
    inputs: list[tuple[int, ...]]

    def arrays(self):
        return {key: tuple(part.numpy() for part in pair) for key, pair in self.weights.items()}

    def images(self, batch, seed=0, top=3):
        rng = np.random.default_rng(seed + batch)
        return [rng.integers(-top, top + 1, (batch, *shape)).astype(np.float32) for shape in self.inputs]

    def expected(self, inputs):
        """In float64."""
        weights = {key: tuple(part.double() for part in pair) for key, pair in self.weights.items()}
        given = [torch.from_numpy(x).double() for x in inputs]
        return [y.numpy() for y in operations.interpret(self.graph, given, weights)]

    def expected_of_pairs(self, inputs, images, lanes):
        """Where activations between layers are bfloat16; bundles are of so many `images`."""
        return [y.numpy() for y in _interpret_pairs(self.graph, inputs, self.weights, images == lanes)]

    def expected_in_bundles(self, inputs, lanes):
        """Of pairs, for any number of images: as many as a vector has lanes at a time, then the rest."""
        batch = len(inputs[0])
        whole = batch - batch % lanes
        parts = [(0, whole, lanes)] * (whole > 0) + [(whole, batch, batch - whole)] * (whole < batch)
        each = [self.expected_of_pairs([x[a:b] for x in inputs], images, lanes) for a, b, images in parts]
        return [np.concatenate(part) for part in zip(*each, strict=True)]


def whole(seed, top, *shape):
    return torch.from_numpy(np.random.default_rng(seed).integers(-top, top + 1, shape).astype(np.float32))


class _Drafted:
    """A graph in the making. Of each value: the largest that its numbers may be; the part of one that they are whole
    multiples of, as a power of two; and the shape of the maps that it comes from."""

    def __init__(self, draw, inputs, top):
        self.draw, self.operations, self.weights = draw, [], {}
        self.inputs = inputs
        self.largest = [torch.full((1, *shape), float(top), dtype=torch.float64) for shape in inputs]
        self.parts = [0] * len(inputs)
        self.maps = [shape if len(shape) == 3 else (*shape, 1, 1) for shape in inputs]

    def graph(self, outputs):
        return Graph(tuple(len(shape) == 3 for shape in self.inputs), tuple(self.operations), tuple(outputs))

    def rows(self, value):
        return self.largest[value].dim() == 2

    def like(self, value):
        """Values with the same maps."""
        found = [v for v in range(len(self.maps)) if self.maps[v] == self.maps[value]]
        return [v for v in found if self.rows(v) == self.rows(value)]

    def add(self, operation, parts, weight=None):
        """Whether an operation fits and stays exact: then it is one of the graph."""
        if weight:
            self.weights[operation.weight] = weight
        sizes = {key: tuple(part.abs().double() for part in pair) for key, pair in self.weights.items()}
        try:
            largest = operations.calculate(operation, self.largest, sizes)
        except RuntimeError:
            return False
        if largest.max() * 2**parts >= EXACT or not largest.numel():
            return False
        flat = isinstance(operation, Flatten)
        self.operations.append(operation)
        self.largest.append(largest)
        self.parts.append(parts)
        rows = self.maps[operations.sources(operation)[0]] if self.rows(operations.sources(operation)[0]) else None
        shape = tuple(largest.shape[1:])
        if flat or (rows and not isinstance(operation, (Linear, Concatenation))):
            shape = self.maps[operations.sources(operation)[0]]
        elif isinstance(operation, Concatenation) and rows:
            shape = (sum(self.maps[part][0] for part in operation.sources), *rows[1:])
        self.maps.append(shape if len(shape) == 3 else (*shape, 1, 1))
        return True


few = st.sampled_from([1, 1, 1, 2, 3])
pair = st.tuples(few, few)


@st.composite
def cases(draw, most=8, top=3, size=11, channels=(1, 2, 3, 5, 8, 17), outputs=(1, 3, 8, 31, 40)):
    """Graphs with at least one layer."""
    height, width = (draw(st.sampled_from([n for n in SIZES if n <= size])) for _ in range(2))
    inputs = [(draw(st.sampled_from(channels)), height, width)]
    for kind in draw(st.lists(st.sampled_from(["same", "small", "rows"]), max_size=2)):
        count = draw(st.sampled_from([inputs[0][0], 4]))
        inputs.append({"same": (count, height, width), "small": (count, 1, 1), "rows": (count,)}[kind])
    drafted = _Drafted(draw, inputs, top)
    count = draw(st.integers(1, most))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=count - 1, max_size=count - 1))
    for i, kind in enumerate(["convolution", *kinds]):
        value = draw(st.integers(max(0, len(drafted.maps) - 4), len(drafted.maps) - 1)) if i else 0
        _STEPS[kind](draw, drafted, value, f"layer {i}", outputs)
    if not any(isinstance(operation, (Convolution, Linear)) for operation in drafted.operations):
        key = "last"
        drafted.add(Convolution(0, key), 0, (whole(0, 1, 2, inputs[0][0], 1, 1), whole(1, 1, 2)))
    last = len(drafted.maps) - 1
    more = draw(st.lists(st.integers(0, last), max_size=2))
    return Case(drafted.graph([last, *more]), drafted.weights, inputs)


def _convolution(draw, drafted, value, key, outputs):
    if drafted.rows(value):
        return
    channels, height, width = drafted.maps[value]
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 3), (2, 2), (5, 5), (1, 3), (7, 1), (4, 2)]))
    dilation, stride = draw(pair), draw(pair)
    same = tuple(d * (k // 2) for d, k in zip(dilation, kernel, strict=True))
    padding = draw(st.sampled_from([same, same, (0, 0), (1, 1), (2, 0)]))
    keeps = draw(st.booleans())  # the shape of its maps
    if keeps:
        kernel, padding = draw(st.sampled_from([((3, 3), (1, 1)), ((1, 1), (0, 0)), ((1, 5), (0, 2))]))
        stride = dilation = (1, 1)
    groups = draw(st.sampled_from([1, 1, 1, channels]))
    count = draw(st.sampled_from(outputs)) if groups == 1 else channels * draw(st.sampled_from([1, 2]))
    count = channels if keeps else count
    seed, density = draw(st.integers(0, 99)), draw(st.sampled_from([0.05, 0.3, 1]))
    weight = whole(seed, 2, count, channels // groups, *kernel)
    weight *= torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < density
    activation, pool = draw(st.sampled_from([None, "relu", "relu6"])), draw(st.booleans())
    layer = Convolution(value, key, stride, padding, dilation, groups, None, activation, pool)
    spans = (d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    out = tuple((length + 2 * p - span) // s + 1 for length, p, span, s in
                zip((height, width), padding, spans, stride, strict=True))  # fmt: skip
    fit = [v for v, maps in enumerate(drafted.maps) if maps == (count, *out) and not drafted.rows(v)]
    addend = draw(st.sampled_from([None, *fit]))
    parts = max(drafted.parts[v] for v in (value, addend) if v is not None)
    drafted.add(replace(layer, addend=addend), parts, (weight, whole(seed, 9, count)))


def _linear(draw, drafted, value, key, outputs):
    if not drafted.rows(value) and drafted.add(Flatten(value), drafted.parts[value]):
        value = len(drafted.maps) - 1
    count, features = draw(st.sampled_from(outputs)), drafted.largest[value].shape[1]
    weight = whole(draw(st.integers(0, 99)), 1, count, features)
    fit = [v for v, maps in enumerate(drafted.maps) if maps == (count, 1, 1) and drafted.rows(v)]
    addend = draw(st.sampled_from([None, *fit]))
    layer = Linear(value, key, addend, draw(st.sampled_from([None, "relu", "relu6"])))
    parts = max(drafted.parts[v] for v in (value, addend) if v is not None)
    drafted.add(layer, parts, (weight, whole(1, 9, count)))


def _activation(draw, drafted, value, *_):
    drafted.add(Activation(value, draw(st.sampled_from(["relu", "relu6"]))), drafted.parts[value])


def _max_pool(draw, drafted, value, *_):
    if not drafted.rows(value):
        kernel = draw(st.tuples(*[st.integers(1, 4)] * 2))
        padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
        drafted.add(MaxPool(value, kernel, draw(pair), padding), drafted.parts[value])


def _mean(draw, drafted, value, *_):
    count = np.prod(drafted.maps[value][1:])
    if not drafted.rows(value) and (count & (count - 1)) == 0:  # else it is not exact
        drafted.add(Mean(value), drafted.parts[value] + int(count).bit_length() - 1)


def _flatten(draw, drafted, value, key, outputs):
    if not drafted.rows(value):
        drafted.add(Flatten(value), drafted.parts[value])


def _sum(draw, drafted, value, *_):
    other = draw(st.sampled_from(drafted.like(value)))
    drafted.add(Sum(value, other), max(drafted.parts[value], drafted.parts[other]))


def _product(draw, drafted, value, *_):
    small = [v for v, maps in enumerate(drafted.maps) if maps == (drafted.maps[value][0], 1, 1)]
    small = [v for v in small if not drafted.rows(v) and not drafted.rows(value)]
    other = draw(st.sampled_from(drafted.like(value) + small))
    both = draw(st.permutations([value, other]))
    drafted.add(Product(*both), drafted.parts[value] + drafted.parts[other])


def _concatenation(draw, drafted, value, key, outputs):
    fit = [v for v, maps in enumerate(drafted.maps) if maps[1:] == drafted.maps[value][1:]]
    fit = [v for v in fit if drafted.rows(v) == drafted.rows(value)]
    others = draw(st.lists(st.sampled_from(fit), max_size=3))
    sources = draw(st.permutations([value, *others]))
    drafted.add(Concatenation(tuple(sources)), max(drafted.parts[part] for part in sources))


_STEPS = {
    "convolution": _convolution, "linear": _linear, "activation": _activation, "max-pool": _max_pool, "mean": _mean,
    "flatten": _flatten, "sum": _sum, "product": _product, "concatenation": _concatenation,
}  # fmt: skip


def chain(shape, steps, seed=0, density=0.3, whole=True):
    """A case of layers one after the other, from ``(C_out, kernel, relu, pool)``; a kernel of 0 is a linear layer."""
    rng = np.random.default_rng(seed)

    def numbers(*size):
        return (rng.integers(-3, 4, size) if whole else rng.standard_normal(size)).astype(np.float32)

    (channels, *size), found, weights = shape, [], {}
    for i, (count, kernel, relu, pool) in enumerate(steps):
        activation, key = "relu" if relu else None, str(i)
        if kernel:
            half = kernel // 2
            found.append(Convolution(len(found), key, padding=(half, half), activation=activation, pool=pool))
            weight, size = numbers(count, channels, kernel, kernel), [length // (1 + pool) for length in size]
        else:
            found += [Flatten(len(found)), Linear(len(found) + 1, key, activation=activation)]
            weight, size = numbers(count, channels * size[0] * size[1]), [1, 1]
        weight *= rng.random(weight.shape) < density
        weights[key] = torch.from_numpy(weight), torch.from_numpy(numbers(count))
        channels = count
    return Case(Graph((True,), tuple(found), (len(found),)), weights, [shape])


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


def rounded(x: Tensor) -> Tensor:
    return x.float().bfloat16().to(x.dtype)


def _interpret_pairs(graph, inputs, weights, interleaved):
    """All that a layer reads, and all weights, are rounded to bfloat16; sums and what only goes out are not."""
    weights = {key: (rounded(weight).double(), bias.double()) for key, (weight, bias) in weights.items()}
    read = {source for operation in graph.operations for source in operations.sources(operation)}
    values = [rounded(torch.from_numpy(x)).double() for x in inputs]
    for value, operation in graph.numbered():
        layer = isinstance(operation, (Convolution, Linear))
        stored = rounded if value in read or not layer else lambda y: y
        if layer:
            y = _layer(operation, values, weights, stored, interleaved)
        else:
            y = operations.calculate(operation, values, weights).float()
        values.append(stored(y).double())
    return [values[output].float() for output in graph.outputs]


def _layer(layer: Operation, values, weights, stored, interleaved):
    """What a layer writes; an activation other than ReLU is applied to what has been written before."""
    pool, simple = getattr(layer, "pool", False), layer.activation in (None, "relu")
    bare = replace(layer, activation=None, **({"pool": False} if pool else {}))
    y = operations.calculate(bare, values, weights).float()
    if not simple and not pool:
        y = stored(y)
    y = operations.ACTIVATIONS[layer.activation](y) if layer.activation else y
    return F.max_pool2d(y, 2) if pool else y


# --- Engines ----------------------------------------------------------------------------------------------------------


def equal(made, expected) -> bool:
    """All outputs, whose maps of one pixel may be rows."""
    return len(made) == len(expected) and all(
        np.array_equal(np.reshape(y, z.shape), z.astype(np.float32), equal_nan=True)
        for y, z in zip(made, expected, strict=True)
    )


def as_maps(x):
    return x if x.ndim == 4 else x[:, :, None, None]


def run(engine: network.Network, inputs, threads: int):
    """In memory as another call may have left it."""
    engine._arenas[:] = poisoned()
    return engine([as_maps(x) for x in inputs], threads)


def check(case: Case, batches, threads=(1, 2), top=3):
    """Every instruction set of this machine gives the reference's whole numbers."""
    engines = [network.Network(case.graph, case.arrays(), isa) for pairs in (False, True)
               for isa in cpu.instruction_sets(pairs)]  # fmt: skip
    for batch in batches:
        inputs = case.images(batch, top=top)
        for engine in engines:
            lanes = engine.isa.LANES
            expected = case.expected_in_bundles(inputs, lanes) if engine.isa.PAIRS else case.expected(inputs)
            for count in threads:
                assert equal(run(engine, inputs, count), expected), (engine.isa.NAME, batch, count)


def poisoned() -> list:
    """Arenas as another call may have left them."""
    return [np.full(1 << 22, np.nan, np.float32)]


def emulated(case: Case, inputs, images, isa, threads=1):
    """What a program gives whose machine code is run by the slow x86."""
    maps = [as_maps(x) for x in inputs]
    program = network.Program(case.graph, case.arrays(), [x.shape[1:] for x in maps], images, isa)
    layers, groups, chunks, places = program._tables
    form = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6)
    names = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
    faults = []

    def callback(start, size):
        code = Everything()[int(start) : int(start + size)].copy()

        def run(*at):
            try:
                Processor(Everything(), isa.REGISTERS).call(code, **dict(zip(names, at, strict=True)))
            except Exception as fault:  # it would be lost
                faults.append(fault)

        return form(run)

    callbacks = [callback(start, size) for start, _, size in chunks]
    chunks = chunks.copy()
    chunks[:, 0] = [ctypes.cast(each, ctypes.c_void_p).value for each in callbacks]
    program._tables = layers, groups, chunks, places
    made = program.run(maps, threads, poisoned())
    assert not faults, faults[0]
    return made
