"""What operations mean, and which of them become one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reprolib.sparse.operations import (
    ACTIVATIONS,
    Activation,
    Concatenation,
    Convolution,
    Flatten,
    Graph,
    Linear,
    MaxPool,
    Mean,
    Product,
    Sum,
    fused,
    interpret,
    sources,
)

MAPS, ROWS = (True,), (False,)


def weights(channels=4, groups=1):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, channels // groups, 1, 1, generator=generator, dtype=torch.float64)
    return {"w": (weight, torch.randn(channels, generator=generator, dtype=torch.float64))}


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- What an operation means ------------------------------------------------------------------------------------------


def test_a_convolution_adds_then_activates_then_pools():
    x = torch.tensor([[[[1.0, -2.0], [3.0, -4.0]]]])
    addend = torch.tensor([[[[0.0, 5.0], [0.0, 0.0]]]])
    held = {"w": (torch.tensor([[[[2.0]]]]), torch.tensor([-1.0]))}
    # Times 2, minus 1: 1 -5 5 -9. With the addend: 1 0 5 -9.
    one = Convolution(0, "w", addend=1)
    for operation, expected in (
        (Convolution(0, "w"), [[1.0, -5.0], [5.0, -9.0]]),
        (one, [[1.0, 0.0], [5.0, -9.0]]),
        (Convolution(0, "w", addend=1, activation="relu"), [[1.0, 0.0], [5.0, 0.0]]),
        (Convolution(0, "w", activation="relu", pool=True), [[5.0]]),
    ):
        (y,) = interpret(Graph((True, True), (operation,), (2,)), [x, addend], held)
        assert y[0, 0].tolist() == expected


def test_the_other_operations():
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]], [[-1.0, 0.0], [0.0, 1.0]]]])
    graph = Graph(
        MAPS,
        (
            Mean(0),
            Product(0, 1),
            Concatenation((1, 1)),
            Flatten(3),
            Linear(4, "w", activation="relu"),
            Sum(4, 4),
            MaxPool(0, (2, 1), (1, 1), (1, 0)),
            Activation(0, "relu6"),
        ),
        (1, 2, 4, 5, 6, 7, 8),
    )
    held = {"w": (torch.tensor([[1.0, 1, 0, 0], [-1, 0, 0, 0]]), torch.tensor([0.5, 0]))}
    values = [value[0].tolist() for value in interpret(graph, [maps], held)]
    assert values == [
        [[[3.0]], [[0.0]]],
        [[[3.0, 6.0], [9.0, 18.0]], [[0.0, 0.0], [0.0, 0.0]]],
        [3.0, 0.0, 3.0, 0.0],
        [3.5, 0.0],
        [6.0, 0.0, 6.0, 0.0],
        [[[1.0, 2.0], [3.0, 6.0], [3.0, 6.0]], [[-1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]],
        [[[1.0, 2.0], [3.0, 6.0]], [[0.0, 0.0], [0.0, 1.0]]],
    ]


# --- What becomes one -------------------------------------------------------------------------------------------------

ONE = Convolution(0, "w")


@pytest.mark.parametrize(
    ("operations", "outputs", "expected", "renumbered"),
    [
        ((ONE, Activation(1, "silu")), (2,), (Convolution(0, "w", activation="silu"),), (1,)),
        ((ONE, Activation(1, "silu")), (1, 2), (ONE, Activation(1, "silu")), (1, 2)),
        ((ONE, Sum(1, 0)), (2,), (Convolution(0, "w", addend=0),), (1,)),
        ((ONE, Sum(0, 1)), (2,), (Convolution(0, "w", addend=0),), (1,)),
        ((ONE, Sum(1, 1)), (2,), (ONE, Sum(1, 1)), (2,)),
        ((ONE, MaxPool(1, (2, 2), (2, 2))), (2,), (Convolution(0, "w", pool=True),), (1,)),
        ((ONE, MaxPool(1, (2, 2), (1, 1))), (2,), (ONE, MaxPool(1, (2, 2), (1, 1))), (2,)),
        ((ONE, MaxPool(1, (2, 2), (2, 2), (1, 1))), (2,), (ONE, MaxPool(1, (2, 2), (2, 2), (1, 1))), (2,)),
        # The pool comes last, and a sum behind an activation is no part of it.
        (
            (ONE, MaxPool(1, (2, 2), (2, 2)), Activation(2, "relu")),
            (3,),
            (Convolution(0, "w", pool=True), Activation(1, "relu")),
            (2,),
        ),
        (
            (ONE, Activation(1, "relu"), Sum(2, 0)),
            (3,),
            (Convolution(0, "w", activation="relu"), Sum(1, 0)),
            (2,),
        ),
        ((ONE, Activation(1, "relu"), Activation(2, "relu")), (3,),
         (Convolution(0, "w", activation="relu"), Activation(1, "relu")), (2,)),
        # What two read is not changed for one of them.
        (
            (ONE, Activation(1, "relu"), MaxPool(2, (2, 2), (2, 2))),
            (3, 2),
            (Convolution(0, "w", activation="relu"), MaxPool(1, (2, 2), (2, 2))),
            (2, 1),
        ),
        # Of two convolutions the later one adds the other.
        (
            (ONE, Convolution(1, "w"), Convolution(0, "w"), Sum(2, 3), Activation(4, "relu")),
            (5,),
            (ONE, Convolution(1, "w"), Convolution(0, "w", addend=2, activation="relu")),
            (3,),
        ),
        # The value that is added is calculated after the convolution.
        ((ONE, Activation(0, "relu"), Sum(1, 2)), (3,), (ONE, Activation(0, "relu"), Sum(1, 2)), (3,)),
        # What is behind reads it under its new number.
        (
            (ONE, Activation(1, "relu"), Mean(2), Product(2, 3), Concatenation((4, 2))),
            (5, 2),
            (Convolution(0, "w", activation="relu"), Mean(1), Product(1, 2), Concatenation((3, 1))),
            (4, 1),
        ),
    ],
)  # fmt: skip
def test_what_becomes_one(operations, outputs, expected, renumbered):
    graph = Graph(MAPS, operations, outputs)
    assert fused(graph) == Graph(MAPS, expected, renumbered)
    assert fused(fused(graph)) == fused(graph)


def test_linear_layers_take_no_pool_and_rows_no_maps():
    graph = Graph((False, False), (Linear(0, "w"), Sum(2, 1), Activation(3, "relu")), (4,))
    assert fused(graph).operations == (Linear(0, "w", addend=1, activation="relu"),)


def test_numbers_and_sources():
    graph = Graph((True, True), (Convolution(0, "w", addend=1), Concatenation((2, 0, 2))), (3,))
    assert graph.numbered() == [(2, graph.operations[0]), (3, graph.operations[1])]
    assert [sources(operation) for operation in graph.operations] == [(0, 1), (2, 0, 2)]


@st.composite
def graphs(draw):
    """Graphs of maps ``[2, 4, 9, 9]`` and what pools make of them; a Concatenation goes through 8 channels."""
    sizes, operations = [(4, 9), (4, 9)], []

    def pick(allowed):
        return draw(st.sampled_from([value for value, size in enumerate(sizes) if allowed(size)]))

    for _ in range(draw(st.integers(1, 10))):
        kind = draw(st.sampled_from(["conv", "conv", "conv", "sum", "act", "act", "pool", "product", "mean", "cat"]))
        source = len(sizes) - 1 if draw(st.booleans()) else pick(lambda size: True)
        channels, size = sizes[source]
        if kind == "conv":
            groups = draw(st.sampled_from([1, 2]))
            operations.append(Convolution(source, f"w{channels}/{groups}", groups=groups))
        elif kind == "sum":
            operations.append(Sum(source, pick(lambda other, wanted=sizes[source]: other == wanted)))
        elif kind == "act":
            operations.append(Activation(source, draw(st.sampled_from(sorted(ACTIVATIONS)))))
        elif kind == "pool" and size > 1:
            kernel, stride, padding = draw(st.sampled_from([(2, 2, 0), (2, 2, 0), (2, 1, 0), (3, 2, 1)]))
            operations.append(MaxPool(source, (kernel, kernel), (stride, stride), (padding, padding)))
            size = (size + 2 * padding - kernel) // stride + 1
        elif kind == "product":
            operations.append(Product(source, pick(lambda o, c=channels, s=size: o[0] == c and o[1] in (1, s))))
        elif kind == "cat" and channels == 4:
            operations.append(Concatenation((source, pick(lambda o, s=size: o == (4, s)))))
            channels = 8
        else:
            operations.append(Mean(source))
            size = 1
        sizes.append((channels, size))
    outputs = draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=3))
    return Graph((True, True), tuple(operations), tuple(outputs))


@settings(max_examples=100)
@given(graphs())
def test_fused_means_the_same(graph):
    held = {f"w{size}/{groups}": weights(size, groups)["w"] for size in (4, 8) for groups in (1, 2)}
    inputs = [numbers(2, 4, 9, 9), numbers(2, 4, 9, 9, seed=1)]
    one = fused(graph)
    for left, right in zip(interpret(graph, inputs, held), interpret(one, inputs, held), strict=True):
        torch.testing.assert_close(left, right)
    assert len(one.operations) <= len(graph.operations)
    for value, operation in one.numbered():
        assert all(source < value for source in sources(operation))
        if isinstance(operation, Activation) and operation.source >= 2:
            before = one.operations[operation.source - 2]
            if isinstance(before, Convolution):  # then something is in the way
                used = [source for other in one.operations for source in sources(other)] + list(one.outputs)
                assert before.pool or before.activation or used.count(operation.source) > 1
