"""Shapes of all values of a graph, for inputs of given shapes."""

from __future__ import annotations

import math

import numpy as np

from reprolib.sparse import operations
from reprolib.sparse.cpu.geometry import Window
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

Shape = tuple[int, int, int]
Weights = dict[str, tuple[np.ndarray, np.ndarray]]


def shapes(graph: Graph, weights: Weights, inputs: list[Shape]) -> list[Shape]:
    """Of all values, for one image: ``[C, H, W]``; rows have maps of one pixel, or those that they come from.

    Raises ValueError for what does not fit.
    """
    found = list(inputs)
    for operation in graph.operations:
        given = [found[source] for source in operations.sources(operation)]
        shape = _shape(operation, given, weights)
        if shape is None or min(shape[1:]) < 1:
            maps = " and ".join("×".join(map(str, source)) for source in given)
            raise ValueError(f"{_name(operation, weights)} does not fit maps of {maps}")
        found.append(shape)
    return found


def _name(operation: Operation, weights: Weights) -> str:
    if not isinstance(operation, (Convolution, Linear)):
        return f"{type(operation).__name__} (operation of the network)"
    size = "×".join(map(str, weights[operation.weight][0].shape))
    return f"layer {operation.weight} ({size}{' with a max-pool' * getattr(operation, 'pool', False)})"


def _shape(operation: Operation, given: list[Shape], weights: Weights) -> Shape | None:
    first, *others = given
    match operation:
        case Convolution():
            weight = weights[operation.weight][0]
            out = window(operation, weight, first).out(first[1:])
            whole = (len(weight), *out)
            fits = weight.shape[1] * operation.groups == first[0] and all(other == whole for other in others)
            return (len(weight), *(size // (1 + operation.pool) for size in out)) if fits and min(out) > 0 else None
        case Linear():
            weight = weights[operation.weight][0]
            whole = (len(weight), 1, 1)
            fits = weight.shape[1] == math.prod(first) and all(other == whole for other in others)
            return whole if fits else None
        case MaxPool():
            padded = all(2 * p <= k for p, k in zip(operation.padding, operation.kernel, strict=True))
            return (first[0], *pool_window(operation).out(first[1:])) if padded else None
        case Mean():
            return first[0], 1, 1
        case Flatten() | Activation():
            return first
        case Sum():
            return first if others == [first] else None
        case Product():
            small, large = sorted((first, *others), key=math.prod)
            return large if small in (large, (large[0], 1, 1)) else None
        case Concatenation():
            return (sum(shape[0] for shape in given), *first[1:]) if len({s[1:] for s in given}) == 1 else None


def window(layer: Convolution | Linear, weight: np.ndarray, source: Shape) -> Window:
    """How a layer with this weight reads maps of this shape."""
    if isinstance(layer, Linear):
        return Window(source[1:])
    return Window(tuple(weight.shape[2:]), layer.stride, layer.padding, layer.dilation)


def pool_window(pool: MaxPool) -> Window:
    return Window(pool.kernel, pool.stride, pool.padding)
