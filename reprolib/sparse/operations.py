"""What a sparse network computes: operations on values, and what each of them means in torch.

A value is *maps*, ``[N, C, H, W]``, or *rows*, ``[.., features]``. Value i of a graph is its i-th input or, behind
these, what operation i minus the number of inputs has given. Batch norms and average pools are convolutions here, with
as many groups as channels: a kernel for any zeros needs no other kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]
LARGEST = 1 << 12  # stride, padding, dilation and window of a pool: kernels may multiply them

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
}


@dataclass(frozen=True)
class Convolution:
    """`torch.nn.functional.conv2d` of maps, then `addend` is added, then comes an activation, then a 2x2 max-pool.

    `weight` is the key of its weight ``[C_out, C_in / groups, K_h, K_w]`` and bias ``[C_out]``.
    """

    source: int
    weight: str
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    addend: int | None = None
    activation: str | None = None
    pool: bool = False


@dataclass(frozen=True)
class Linear:
    """`torch.nn.functional.linear` of rows, then `addend` is added, then comes an activation.

    `weight` is the key of its weight ``[out, in]`` and bias ``[out]``.
    """

    source: int
    weight: str
    addend: int | None = None
    activation: str | None = None


@dataclass(frozen=True)
class MaxPool:
    """`torch.nn.functional.max_pool2d` of maps, without dilation."""

    source: int
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)


@dataclass(frozen=True)
class Mean:
    """The mean of each map: ``[N, C, 1, 1]``."""

    source: int


@dataclass(frozen=True)
class Flatten:
    """Maps as rows ``[N, C * H * W]``."""

    source: int


@dataclass(frozen=True)
class Activation:
    """One of `ACTIVATIONS`."""

    source: int
    activation: str


@dataclass(frozen=True)
class Sum:
    """The sum of two values of one shape."""

    source: int
    other: int


@dataclass(frozen=True)
class Product:
    """Maps times maps of the same shape, or times one number for each map, ``[N, C, 1, 1]``."""

    source: int
    other: int


@dataclass(frozen=True)
class Concatenation:
    """The channels of maps one after the other."""

    sources: tuple[int, ...]


Operation = Convolution | Linear | MaxPool | Mean | Flatten | Activation | Sum | Product | Concatenation
Weights = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Graph:
    """`inputs` says which inputs are maps (True) and which are rows; `outputs` are values."""

    inputs: tuple[bool, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[int, ...]

    def numbered(self) -> list[tuple[int, Operation]]:
        """Operations with the number of the value that each gives."""
        return list(enumerate(self.operations, len(self.inputs)))


def check(graph: Graph, weights: Weights) -> None:
    """Raise ValueError for what is no graph with its weights: then kernels may rely on it."""
    kinds = list(graph.inputs)
    _must(kinds and all(type(maps) is bool for maps in kinds), "its inputs", graph.inputs)
    for operation in graph.operations:
        read = sources(operation)
        _must(read and all(type(value) is int and 0 <= value < len(kinds) for value in read), "its sources", operation)
        kinds.append(_check(operation, [kinds[value] for value in read], weights))
    known = all(type(output) is int and 0 <= output < len(kinds) for output in graph.outputs)
    _must(graph.outputs and known, "its outputs", graph.outputs)


def _check(operation: Operation, given: list[bool], weights: Weights) -> bool:
    """Whether an operation gives maps, from values that are maps or not."""
    maps, same = given[0], len(set(given)) == 1
    match operation:
        case Convolution(_, key, stride, padding, dilation, groups, _, activation, pool):
            weight = _check_weight(operation, weights.get(key), 4)
            _must(maps and same, "it is for maps", operation)
            _must(_is_pair(stride, 1) and _is_pair(padding, 0) and _is_pair(dilation, 1), "its window", operation)
            _must(type(groups) is int and groups >= 1 and len(weight) % groups == 0, "its groups", operation)
            _must((activation is None or activation in ACTIVATIONS) and type(pool) is bool, "its end", operation)
        case Linear(_, key, _, activation):
            _check_weight(operation, weights.get(key), 2)
            _must(not maps and same, "it is for rows", operation)
            _must(activation is None or activation in ACTIVATIONS, "its end", operation)
        case MaxPool(_, kernel, stride, padding):
            _must(maps, "it is for maps", operation)
            _must(_is_pair(kernel, 1) and _is_pair(stride, 1) and _is_pair(padding, 0), "its window", operation)
        case Mean():
            _must(maps, "it is for maps", operation)
        case Flatten():
            _must(maps, "it is for maps", operation)
            return False
        case Activation(_, activation):
            _must(activation in ACTIVATIONS, "there is no such activation", operation)
        case Sum():
            _must(same, "maps and rows have no sum", operation)
        case Product() | Concatenation():
            _must(maps and same, "it is for maps", operation)
        case _:
            _must(False, "it is no operation", operation)
    return maps


def _check_weight(operation: Convolution | Linear, pair: tuple[Tensor, Tensor] | None, dimensions: int) -> Tensor:
    _must(pair is not None, "it has no weight", operation)
    weight, bias = pair
    _must(weight.dim() == dimensions and weight.numel() > 0, f"its weight is {tuple(weight.shape)}", operation)
    _must(bias.shape == weight.shape[:1], f"its bias is {tuple(bias.shape)}", operation)
    _must(weight.is_floating_point() and bias.is_floating_point(), f"its weight is {weight.dtype}", operation)
    return weight


def _is_pair(value: object, least: int) -> bool:
    return type(value) is tuple and len(value) == 2 and all(type(v) is int and least <= v <= LARGEST for v in value)


def _must(holds: object, what: str, where: object) -> None:
    if not holds:
        raise ValueError(f"this is no graph of operations: {what} ({where})")


def sources(operation: Operation) -> tuple[int, ...]:
    """The values that an operation reads."""
    if isinstance(operation, Concatenation):
        return operation.sources
    found = (getattr(operation, name, None) for name in ("source", "other", "addend"))
    return tuple(value for value in found if value is not None)


def calculate(operation: Operation, values: Sequence[Tensor], weights: Weights) -> Tensor:
    """What an operation means: the definition that kernels are tested against, and what runs where there is none."""
    match operation:
        case Convolution(source, key, stride, padding, dilation, groups):
            y = F.conv2d(values[source], *weights[key], stride, padding, dilation, groups)
        case Linear(source, key):
            y = F.linear(values[source], *weights[key])
        case MaxPool(source, kernel, stride, padding):
            return F.max_pool2d(values[source], kernel, stride, padding)
        case Mean(source):
            return values[source].mean((2, 3), keepdim=True)
        case Flatten(source):
            return values[source].flatten(1)
        case Activation(source, activation):
            return ACTIVATIONS[activation](values[source])
        case Sum(source, other):
            return values[source] + values[other]
        case Product(source, other):
            return values[source] * values[other]
        case Concatenation(parts):
            return torch.cat([values[part] for part in parts], dim=1)
    return finish(operation, y, values)


def finish(layer: Convolution | Linear, y: Tensor, values: Sequence[Tensor]) -> Tensor:
    """What comes behind the products `y` of a layer."""
    y = y if layer.addend is None else y + values[layer.addend]
    y = ACTIVATIONS[layer.activation](y) if layer.activation else y
    return F.max_pool2d(y, 2) if getattr(layer, "pool", False) else y


def interpret(graph: Graph, inputs: Sequence[Tensor], weights: Weights) -> tuple[Tensor, ...]:
    """All operations in torch, one after the other."""
    values = list(inputs)
    for operation in graph.operations:
        values.append(calculate(operation, values, weights))
    return tuple(values[output] for output in graph.outputs)


# --- What follows a convolution becomes part of it --------------------------------------------------------------------


def fused(graph: Graph) -> Graph:
    """The same graph in fewer operations: sums, activations and 2x2 max-pools behind convolutions and linear layers."""
    count = len(graph.inputs)
    used = Counter(graph.outputs)
    for operation in graph.operations:
        used.update(sources(operation))
    found: list[Operation | None] = list(graph.operations)
    holder = {}  # of a value that is part of another operation now

    def held(value: int) -> int:
        return holder.get(value, value)

    for value, operation in graph.numbered():
        operation = renamed(operation, held)
        found[value - count] = operation
        for source in sources(operation):
            before = found[source - count] if source >= count else None
            together = _together(before, source, operation) if used[source] == 1 else None
            if together:
                found[source - count], found[value - count] = together, None
                holder[value], used[source] = source, used[value]
                break
    return _compact(graph, found, held)


def _together(before: Operation | None, source: int, operation: Operation) -> Operation | None:
    """One operation for two, where `before` gives the value `source`, which only `operation` reads."""
    if not isinstance(before, (Convolution, Linear)) or getattr(before, "pool", False):
        return None
    match operation:
        case Sum(a, b) if before.activation is before.addend is None and max(a, b) == source:
            return replace(before, addend=min(a, b))  # the other one is there before
        case Activation(_, activation) if before.activation is None:
            return replace(before, activation=activation)
        case MaxPool(_, (2, 2), (2, 2), (0, 0)) if isinstance(before, Convolution):
            return replace(before, pool=True)
    return None


def renamed(operation: Operation, name: Callable[[int], int]) -> Operation:
    """An operation that reads values under other numbers."""
    changes = {}
    for field in fields(operation):
        value = getattr(operation, field.name)
        if field.name in ("source", "other", "addend") and value is not None:
            changes[field.name] = name(value)
        elif field.name == "sources":
            changes[field.name] = tuple(map(name, value))
    return replace(operation, **changes)


def _compact(graph: Graph, operations: list[Operation | None], held: Callable[[int], int]) -> Graph:
    """Numbers without gaps, where some operations are no more."""
    count = len(graph.inputs)
    numbers = {value: value for value in range(count)}
    kept = []
    for value, operation in enumerate(operations, count):
        if operation is not None:
            numbers[value] = count + len(kept)
            kept.append(renamed(operation, lambda old: numbers[held(old)]))
    return Graph(graph.inputs, tuple(kept), tuple(numbers[held(output)] for output in graph.outputs))
