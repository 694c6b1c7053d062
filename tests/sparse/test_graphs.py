"""Whole graphs in the CPU engine against float64: whole numbers come out exactly."""

import numpy as np
import pytest
import torch
from graphs import Case, as_maps, cases, check, emulated, equal, run, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from reprolib.sparse import cpu, operations
from reprolib.sparse.cpu import avx2, avx512, avx512bf16, planner
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
)

needs_engine = pytest.mark.skipif(
    not cpu.instruction_sets(), reason="neither AVX-512 nor AVX2 here, or code made at run time is forbidden"
)
isas = pytest.mark.parametrize("isa", [avx512, avx2, avx512bf16], ids=lambda isa: isa.NAME)
BATCHES = [1, 2, 3, 7, 8, 9, 16, 17, 33]


@needs_engine
@settings(max_examples=150)
@given(cases(), st.lists(st.sampled_from(BATCHES), min_size=1, max_size=3, unique=True), st.integers(1, 3))
def test_random_graphs_are_exact(case, batches, threads):
    engines = [
        cpu.Network(graph, case.arrays(), isa)
        for graph in (case.graph, operations.fused(case.graph))
        for isa in cpu.instruction_sets()
    ]
    for batch in batches:
        inputs = case.images(batch)
        expected = case.expected(inputs)
        for engine in engines:
            assert equal(run(engine, inputs, threads), expected), (batch, engine.graph)


@pytest.mark.skipif(not cpu.instruction_sets(pairs=True), reason="no instructions for bfloat16 here")
@settings(max_examples=60)
@given(cases(top=200), st.sampled_from(BATCHES), st.integers(1, 3))
def test_random_graphs_of_pairs_are_exact(case, batch, threads):
    for isa in cpu.instruction_sets(pairs=True):
        inputs = case.images(batch, top=200)
        expected = case.expected_in_bundles(inputs, isa.LANES)
        assert equal(run(cpu.Network(case.graph, case.arrays(), isa), inputs, threads), expected)


# --- Any machine: calls of machine code go to the slow x86 ------------------------------------------------------------


def exact(case, inputs, images, isa):
    expected = case.expected_of_pairs(inputs, images, isa.LANES) if isa.PAIRS else case.expected(inputs)
    return equal(emulated(case, inputs, images, isa), expected)


@isas
@settings(max_examples=80)
@given(st.data())
def test_random_graphs_of_every_instruction_set_are_exact(isa, data):
    """Planner, generator and driver together."""
    top = 200 if isa.PAIRS else 3  # of bfloat16, most are rounded
    small = {"most": 6, "size": 4, "channels": (1, 2, 3, 5), "outputs": (1, 3, 8, 33)}
    case = data.draw(cases(top=top, **small))
    images = data.draw(st.sampled_from([1, 2, 3, isa.LANES - 1, isa.LANES]), "images")
    assert exact(case, case.images(images, top=top), images, isa)


def all_kinds():
    """A graph of every kind of operation: views, an addend, channels among others, pools of both ways."""
    layers = (
        Convolution(0, "stem", (2, 2), (1, 1)),  # 1: 6 channels, 4 x 3
        Convolution(1, "same", padding=(1, 1), addend=1, activation="relu"),  # 2
        MaxPool(0, (3, 2), (2, 2), (1, 0)),  # 3: 3 channels
        Concatenation((1, 2, 3)),  # 4: 15 channels
        Convolution(4, "wide", padding=(2, 2), dilation=(2, 2), activation="relu6"),  # 5: 7 channels
        Mean(5),  # 6
        Convolution(6, "squeeze", activation="relu"),  # 7
        Product(7, 5),  # 8
        Convolution(8, "each", padding=(1, 1), groups=7, pool=True),  # 9: 2 x 1
        Sum(9, 9),  # 10
        Flatten(10),  # 11
        Linear(11, "last"),  # 12
        Activation(10, "relu6"),  # 13
    )
    sizes = {"stem": (6, 3, 3, 3), "same": (6, 6, 3, 3), "wide": (7, 15, 3, 3), "squeeze": (7, 7, 1, 1),
             "each": (7, 1, 3, 3), "last": (5, 14)}  # fmt: skip
    weights = {key: (whole(i, 1, *size), whole(i, 5, size[0])) for i, (key, size) in enumerate(sizes.items())}
    return Case(Graph((True,), layers, (12, 13, 4)), weights, [(3, 8, 6)])


@isas
@pytest.mark.parametrize("batch", [1, 3, "a bundle"])
def test_a_graph_of_all_kinds_is_exact_in_every_instruction_set(isa, batch):
    """But for the mean of 12 numbers, which is a fraction."""
    case, images = all_kinds(), isa.LANES if batch == "a bundle" else batch
    inputs = case.images(images)
    expected = case.expected_of_pairs(inputs, images, isa.LANES) if isa.PAIRS else case.expected(inputs)
    for made, y in zip(emulated(case, inputs, images, isa), expected, strict=True):
        np.testing.assert_allclose(made.reshape(y.shape), y, rtol=0.02 if isa.PAIRS else 1e-5, atol=1e-4)


@isas
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name not in ("relu", "relu6")])
def test_activations_of_every_instruction_set(isa, activation):
    """Behind a layer, alone, and before a max-pool; of 3 channels, one has no partner in a pair."""
    layers = (
        Convolution(0, "0", activation=activation),
        Activation(1, activation),
        Convolution(2, "1", padding=(1, 1), activation=activation, pool=True),
        Convolution(3, "2"),
    )
    weights = {str(i): (whole(i, 1, 3, 3, k, k), whole(i, 1, 3)) for i, k in enumerate((1, 3, 1))}
    case = Case(Graph((True,), layers, (1, 2, 4)), weights, [(3, 4, 4)])
    for images in (1, 3, isa.LANES):
        inputs = case.images(images, top=9)
        expected = case.expected_of_pairs(inputs, images, isa.LANES) if isa.PAIRS else case.expected(inputs)
        for made, y in zip(emulated(case, inputs, images, isa), expected, strict=True):
            tolerance = {"rtol": 2**-7, "atol": 0.02} if isa.PAIRS else {"rtol": 1e-5, "atol": 1e-5}
            np.testing.assert_allclose(made, y, **tolerance)


@isas
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_the_missing_half_of_a_pair_is_zero_behind_a_pool(isa, activation):
    """A minus infinity there, the least of nothing, times a weight of zero would be NaN."""
    layers = (
        Convolution(0, "0", activation=activation, pool=True),
        MaxPool(1, (2, 2), (1, 1), (1, 1)),
        Convolution(2, "1", (1, 1)),
    )
    weights = {"0": (whole(0, 2, 3, 1, 1, 1), whole(0, 2, 3)), "1": (torch.ones(2, 3, 1, 1), torch.zeros(2))}
    case = Case(Graph((True,), layers, (3,)), weights, [(1, 4, 4)])
    for images in (1, isa.LANES):
        [made] = emulated(case, case.images(images), images, isa)
        assert np.isfinite(made).all()


@pytest.mark.parametrize("images", [1, 16])
@pytest.mark.parametrize("order", [(0, 1), (1, 0, 1), (0, 0, 0), (1, 1, 0)], ids=str)
def test_parts_that_begin_in_the_middle_of_a_pair(order, images):
    """Of channels 3 and 2; alone, and among others."""
    weights = {"0": (whole(0, 2, 2, 3, 1, 1), whole(0, 2, 2))}
    layers = Convolution(0, "0"), Concatenation(order), Concatenation((1, 2, 1))
    case = Case(Graph((True,), layers, (2, 3)), weights, [(3, 4, 5)])
    assert exact(case, case.images(images), images, avx512bf16)


# --- Graphs that once went wrong, or may ------------------------------------------------------------------------------


@needs_engine
@pytest.mark.parametrize("size", [(1, 5), (5, 1), (1, 1), (3, 4)])
def test_one_number_for_each_map_may_come_first(size):
    """Also where maps are as low as that number."""
    graph = Graph((True, True), (Convolution(0, "0"), Product(1, 2), Product(2, 1), Product(1, 1)), (3, 4, 5))
    weights = {"0": (whole(0, 2, 4, 4, 1, 1), whole(1, 2, 4))}
    check(Case(graph, weights, [(4, *size), (4, 1, 1)]), [1, 3, 8, 17])


@pytest.mark.parametrize("shapes", [[(2, 3, 1), (2, 1, 3)], [(2, 1, 1), (1, 2, 1)], [(4, 1, 1), (2, 2, 1)]])
def test_products_that_torch_would_spread_are_refused(shapes):
    with pytest.raises(ValueError, match=r"Product .*does not fit maps of"):
        planner.plan(Graph((True, True), (Product(0, 1),), (2,)), {}, shapes, 1, 8)


@needs_engine
def test_dense_blocks():
    """Channels grow: every layer reads all before, and the last concatenation holds them all."""
    layers, weights, last, width = [], {}, 0, 3
    for i in range(4):
        layers.append(Convolution(last, str(i), padding=(1, 1), activation="relu"))
        weights[str(i)] = whole(i, 1, 4, width, 3, 3), whole(i, 3, 4)
        layers.append(Concatenation((last, len(layers))))
        last, width = len(layers), width + 4
    case = Case(Graph((True,), tuple(layers), (last,)), weights, [(3, 5, 6)])
    check(case, [1, 3, 8, 19], top=1)
    plan = planner.plan(case.graph, case.arrays(), case.inputs, 8, 8)
    assert len({buffer for _, buffer in plan.places}) == 1, "one buffer, and nothing is copied"
    assert all(work.kind != planner.ELEMENTWISE for work in plan.work)


@needs_engine
@pytest.mark.parametrize("order", [(1, 2), (2, 1), (2, 2, 1)])
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_pooled_maps_beside_others(activation, order):
    """The floor below a max-pool must not wipe out what lies beside it."""
    layers = [Convolution(0, key, activation=activation, pool=True) for key in "ab"]
    layers.append(Concatenation(order))
    weights = {key: (whole(i, 2, 3 + i, 2, 1, 1), whole(i, 3, 3 + i)) for i, key in enumerate("ab")}
    check(Case(Graph((True,), tuple(layers), (1, 2, 3)), weights, [(2, 5, 6)]), [1, 3, 8])


@needs_engine
@pytest.mark.parametrize(
    "parts",
    [
        [(1,)],
        [(1, 1)],
        [(2, 1), (2, 1)],
        [(1, 2), (3, 1)],
        [(2, 1), (3, 3)],
        [(1, 2), (3, 2), (4, 0)],
        [(1, 0), (2, 3)],
    ],
    ids=str,
)
def test_concatenations_nested_and_repeated(parts):
    layers = [Convolution(0, "a", padding=(1, 1)), Convolution(0, "b")]
    layers += [Concatenation(part) for part in parts]
    count = len(layers)
    weights = {"a": (whole(0, 1, 3, 2, 3, 3), whole(0, 3, 3)), "b": (whole(1, 1, 5, 2, 1, 1), whole(1, 3, 5))}
    case = Case(Graph((True,), tuple(layers), tuple(range(1, count + 1))), weights, [(2, 4, 5)])
    channels = case.expected(case.images(1))[-1].shape[1]
    case.weights["c"] = whole(2, 1, 2, channels, 5, 3), whole(2, 3, 2)
    halo = Convolution(count, "c", padding=(2, 1))  # all in the buffer get its halo
    case.graph = Graph((True,), (*layers, halo), (*case.graph.outputs, count + 1))
    check(case, [1, 5, 8, 17])


@needs_engine
@pytest.mark.parametrize(("kernel", "padding", "dilation", "stride"), [
    ((9, 9), (4, 4), (1, 1), (1, 1)), ((5, 5), (6, 6), (1, 1), (1, 1)), ((3, 3), (7, 7), (7, 7), (1, 1)),
    ((1, 1), (3, 3), (1, 1), (2, 2)), ((2, 15), (0, 7), (1, 1), (1, 1)), ((7, 7), (3, 3), (1, 1), (4, 4)),
    ((1, 1), (1, 1), (1, 1), (4, 4)), ((3, 3), (1, 1), (1, 1), (5, 1)),
])  # fmt: skip
def test_kernels_larger_than_maps_and_paddings_larger_than_kernels(kernel, padding, dilation, stride):
    for size in ((3, 3), (2, 7), (3, 1)):
        weight = whole(0, 2, 4, 3, *kernel)
        layer = Convolution(0, "0", stride, padding, dilation)
        case = Case(Graph((True,), (layer, Flatten(1)), (1, 2)), {"0": (weight, whole(1, 9, 4))}, [(3, *size)])
        try:
            case.expected(case.images(1))
        except RuntimeError:
            with pytest.raises(ValueError, match="does not fit"):
                planner.plan(case.graph, case.arrays(), case.inputs, 1, 8)
        else:
            check(case, [1, 3, 8, 9])


@needs_engine
@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 3), (5, 4)])
def test_max_pools_at_the_edges(kernel):
    """Windows with a single pixel of the map, the rest padding; negative numbers, as zeros would be larger."""
    padding = tuple(k // 2 for k in kernel)
    layers = (MaxPool(0, kernel, (1, 1), padding), MaxPool(0, kernel, (3, 2), padding), Convolution(1, "0"))
    for size in ((1, 1), (1, 6), (5, 2)):
        case = Case(Graph((True,), layers, (1, 2, 3)), {"0": (whole(0, 2, 3, 2, 1, 1), whole(0, 2, 3))}, [(2, *size)])
        for batch in (1, 3, 8, 9):
            inputs = [x - 9 for x in case.images(batch)]
            for isa in cpu.instruction_sets():
                engine = cpu.Network(case.graph, case.arrays(), isa)
                assert equal(run(engine, inputs, 2), case.expected(inputs))


@needs_engine
def test_nan_and_infinity_stay_where_they_are():
    """Of one image in one pixel: neighbours in a vector, and masked lanes, see none of it."""
    layers = (
        Convolution(0, "0", padding=(1, 1)),
        MaxPool(1, (2, 2), (2, 2)),
        Sum(1, 1),
        Product(1, 1),
        Mean(1),
        Activation(1, "relu6"),
        Activation(1, "hardswish"),
        Convolution(1, "1", (2, 2)),
    )
    weights = {"0": (torch.ones(2, 1, 3, 3), torch.zeros(2)), "1": (torch.ones(1, 2, 1, 1), torch.zeros(1))}
    case = Case(Graph((True,), layers, tuple(range(1, 9))), weights, [(1, 5, 5)])
    for bad in (np.nan, np.inf, -np.inf):
        for batch in (1, 3, 8):
            [x] = case.images(batch)
            x[batch // 2, 0, 2, 4] = bad
            for isa in cpu.instruction_sets():
                made = run(cpu.Network(case.graph, case.arrays(), isa), [x], 2)
                for y, z in zip(made, case.expected([x]), strict=True):
                    np.testing.assert_allclose(y, z, rtol=1e-6)


@needs_engine
def test_widest_maps_of_a_max_pool():
    weights = {"0": (whole(0, 2, 1, 1, 1, 1), whole(0, 2, 1))}
    graph = Graph((True,), (Convolution(0, "0"), MaxPool(1, (2, 3), (1, 2), (0, 1))), (2,))
    widest = planner.WIDEST // 8
    check(Case(graph, weights, [(1, 3, widest)]), [8])
    check(Case(graph, weights, [(1, 3, planner.WIDEST)]), [1])
    case = Case(graph, weights, [(1, 3, planner.WIDEST + 1)])
    with pytest.raises(ValueError, match=rf"maps {planner.WIDEST + 1} pixels wide are too wide for the max-pool"):
        planner.plan(graph, case.arrays(), case.inputs, 1, 8)


@needs_engine
@pytest.mark.parametrize("activation", ["sigmoid", "hardswish"])
def test_activations_end_with_the_map(activation):
    """Numbers behind the last one, of the next channel or of zeros around the maps, are not activated (again)."""
    layers = (
        Convolution(0, "0", activation=activation), Convolution(1, "1", padding=(1, 1)),
        Convolution(0, "0", activation=activation),
    )  # fmt: skip
    weights = {"0": (torch.ones(20, 1, 1, 1), torch.zeros(20)), "1": (torch.ones(1, 20, 3, 3), torch.zeros(1))}
    for size in ((1, 1), (2, 3), (3, 3), (3, 11)):
        case = Case(Graph((True,), layers, (1, 2, 3)), weights, [(1, *size)])
        for batch in (1, 2, 3, 7, 8):
            inputs = case.images(batch)
            for isa in cpu.instruction_sets():
                made = run(cpu.Network(case.graph, case.arrays(), isa), inputs, 2)
                for y, z in zip(made, case.expected(inputs), strict=True):
                    np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-3)


@needs_engine
def test_accuracy_of_fractions():
    """Means, products and activations up to rounding."""
    torch.manual_seed(0)
    names = ["silu", "sigmoid", "hardswish", "hardsigmoid"]
    layers = [Convolution(0, "0", padding=(1, 1), activation=name, pool=i % 2 > 0) for i, name in enumerate(names)]
    layers += [Mean(1), Product(1, 5), Activation(6, "silu"), Convolution(7, "1", addend=7, activation="sigmoid")]
    weights = {
        "0": (torch.randn(16, 8, 3, 3) / 8, torch.randn(16)),
        "1": (torch.randn(16, 16, 1, 1) / 4, torch.randn(16)),
    }
    case = Case(Graph((True,), tuple(layers), tuple(range(1, 9))), weights, [(8, 9, 7)])
    for batch in (1, 3, 8, 19):
        inputs = [torch.randn(batch, 8, 9, 7).numpy()]
        for isa in cpu.instruction_sets():
            made = cpu.Network(case.graph, case.arrays(), isa)([as_maps(x) for x in inputs], 2)
            for y, z in zip(made, case.expected(inputs), strict=True):
                np.testing.assert_allclose(y, z, rtol=3e-6, atol=3e-6)
