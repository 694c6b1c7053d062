"""The CPU engine: exact for any batch, weights and threads; its memory, its code, its compiler."""

import copy
import gc
import io
import os
import pickle
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from graphs import cases, chain, check, equal, run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from reprolib.patterns import parse
from reprolib.sparse import SparseNetwork, cpu, describe, sparsify
from reprolib.sparse.cpu import driver, encoder, generator, network, planner
from reprolib.sparse.operations import Convolution, Graph, Mean

pytestmark = pytest.mark.skipif(
    not cpu.instruction_sets(), reason="neither AVX-512 nor AVX2 here, or code made at run time is forbidden"
)

BATCHES = (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65)


@pytest.mark.parametrize("batch", BATCHES)
def test_every_batch_is_exact(batch):
    steps = [
        (40, 3, True, False),
        (33, 3, False, True),
        (64, 1, True, False),
        (70, 3, True, True),
        (9, 0, False, False),
    ]
    check(chain((3, 9, 10), steps), [batch], threads=(1, 2, 3))


@st.composite
def networks(draw):
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    steps, size = [], min(height, width)
    for _ in range(draw(st.integers(1, 4))):
        pool = size >= 2 and draw(st.booleans())
        steps.append((draw(st.integers(1, 70)), draw(st.sampled_from([1, 3])), draw(st.booleans()), pool))
        size //= 1 + pool
    if draw(st.booleans()):
        steps.append((draw(st.integers(1, 40)), 0, draw(st.booleans()), False))
    return (draw(st.integers(1, 20)), height, width), steps, draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))


@settings(max_examples=40)
@given(networks(), st.integers(1, 40), st.integers(0, 99))
@example(((1, 1, 1), [(1, 3, False, False)], 1.0), 1, 0)
@example(((5, 2, 2), [(31, 3, True, True)], 0.0), 17, 0)
@example(((5, 40, 3), [(32, 3, True, False), (1, 1, False, False)], 0.3), 5, 0)
def test_networks_are_exact(case, batch, seed):
    shape, steps, density = case
    check(chain(shape, steps, seed, density), [batch])


@pytest.mark.parametrize("spec", ["Unstructured()", "Balanced(16)", "Block(32, 32)", "Vector(32)", "NM(2, 4)",
                                  "Balanced(16) & Block(32, 32)", "Vector(4) & Block(8, 8)"])  # fmt: skip
@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_masks_of_all_patterns_are_exact(spec, sparsity):
    case = chain((64, 4, 4), [(96, 3, True, True)], density=1)
    weight, bias = case.weights["0"]
    mask = parse(spec).mask(torch.randn(weight.shape), sparsity)
    case.weights["0"] = weight * mask, bias
    check(case, [1, 5, 16, 19])


EDITS = {
    "one weight": lambda w: np.where(np.arange(w.size).reshape(w.shape) == 77, 2, 0),
    "all zeros but one": lambda w: np.where(np.arange(w.size).reshape(w.shape) == w.size - 1, -3, 0),
    "no zeros": lambda w: np.where(w == 0, 1, w),
    "all but one": lambda w: np.where(np.arange(w.size).reshape(w.shape) == 100, 0, np.where(w == 0, 1, w)),
    "an empty group": lambda w: w * (np.arange(len(w)) >= 62)[:, None, None, None],
    "empty columns": lambda w: w * (np.arange(w.shape[1]) % 3 == 0)[None, :, None, None],
    "one tap": lambda w: w * (np.arange(9).reshape(3, 3) == 2),
}


@pytest.mark.parametrize("edit", EDITS)
def test_odd_weights_are_exact(edit):
    case = chain((20, 5, 6), [(70, 3, True, False)])
    weight, bias = case.weights["0"]
    case.weights["0"] = torch.from_numpy(EDITS[edit](weight.numpy()).astype(np.float32)), bias
    check(case, [1, 3, 16, 18])


def engines(case):
    return [cpu.Network(case.graph, case.arrays(), isa) for isa in cpu.instruction_sets()]


def noise(batch, *shape):
    return np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)


def test_rounding_is_that_of_float32():
    case, x = chain((64, 8, 8), [(64, 3, True, False)] * 3, whole=False), noise(19, 64, 8, 8)
    [expected] = case.expected([x])
    for engine in engines(case):
        [made] = engine([x], 2)
        assert np.linalg.norm(made - expected) < 1e-6 * np.linalg.norm(expected)


def test_results_do_not_depend_on_threads():
    case, x = chain((64, 8, 8), [(64, 3, True, True), (64, 3, True, False)], whole=False), noise(35, 64, 8, 8)
    for engine in engines(case):
        results = [engine([x], threads)[0] for threads in (1, 2, 3, 8)]
        assert all(np.array_equal(result, results[0]) for result in results)


def test_more_images_than_go_through_together():
    check(chain((3, 2, 2), [(5, 3, True, False)]), [network.MOST_IN_FLIGHT * 16 + 5])


def test_bundles_that_need_much_memory_go_through_one_by_one(monkeypatch):
    monkeypatch.setattr(network, "IN_FLIGHT_BYTES", 1)
    check(chain((3, 2, 2), [(5, 3, True, False)]), [35])


def test_large_maps_go_through_alone(monkeypatch):
    monkeypatch.setattr(network, "SHARED_BYTES", 0)
    check(chain((3, 4, 5), [(5, 3, True, True)]), [17])


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_layers_alone_take_activations_in_their_layout(activation):
    """Again and again: nothing that they read is overwritten."""
    case = chain((20, 6, 6), [(40, 3, True, True), (9, 1, False, False)])
    first, second = case.graph.operations
    case.graph = replace(case.graph, operations=(replace(first, activation=activation), second))
    isa = cpu.instruction_sets()[0]
    for images, batch in ((3, 3), (isa.LANES, 2 * isa.LANES)):
        program, inputs = network.Program(case.graph, case.arrays(), case.inputs, images, isa), case.images(batch)
        again, results = program.alone(inputs, 2)
        for _ in range(3):
            again()
            np.testing.assert_allclose(results()[0], case.expected(inputs)[0], rtol=1e-5, atol=1e-4)


@settings(max_examples=20)
@given(cases(), st.sampled_from([1, 3, 8]))
def test_layers_alone_are_exact_for_any_graph(case, images):
    isa = cpu.instruction_sets()[-1]
    images = isa.LANES if images == 8 else images
    inputs = [x if x.ndim == 4 else x[:, :, None, None] for x in case.images(images)]
    program = network.Program(case.graph, case.arrays(), [x.shape[1:] for x in inputs], images, isa)
    again, results = program.alone(inputs, 2)
    again(), again()
    assert equal(results(), case.expected(case.images(images)))


def test_threads_that_share_layers_write_no_word_twice():
    """Many threads on small parts, over and over: where two tasks wrote one word, some run would differ."""
    steps = [(33, 3, False, True), (31, 3, True, False), (7, 3, False, False)]
    case = chain((5, 7, 9), steps)
    first, *rest = case.graph.operations
    last = len(rest) + 2
    layers = (replace(first, activation="relu6"), *rest, Convolution(0, "s", (2, 2)), Convolution(last, "t"))
    case.weights["s"], case.weights["t"] = (
        (torch.ones(6, 5, 3, 3), torch.zeros(6)), (torch.ones(2, 6, 1, 1), torch.zeros(2)),
    )  # fmt: skip
    case.graph = Graph((True,), layers, (last - 1, last + 1, 1))
    for batch in (1, 3, 11):
        inputs = case.images(batch)
        expected = case.expected(inputs)
        for engine in engines(case):
            assert all(equal(run(engine, inputs, 5), expected) for _ in range(40))


# --- Around the kernels -----------------------------------------------------------------------------------------------


@pytest.fixture
def pruned():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), nn.MaxPool2d(2)
    ).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight *= torch.rand(layer.weight.shape) < 0.3
    return model.requires_grad_(False)


def test_inputs_may_lie_anywhere_in_memory(pruned):
    sparse = sparsify(pruned)
    memory = torch.randn(5 * 3 * 8 * 8 + 1)
    x = memory[1:].view(5, 3, 8, 8)
    expected = pruned(x)
    for view in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(sparse(view), expected)
    torch.testing.assert_close(sparse(x[::2]), expected[::2])


def test_several_threads_at_once(pruned):
    sparse = sparsify(pruned)
    inputs = [torch.randn(batch, 3, 8, 8) for batch in (1, 5, 16, 40)]
    expected = [sparse(x) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(50):
            if not torch.equal(sparse(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_calls_lend_helpers_what_these_expect(pruned, monkeypatch):
    """Types are not looked at when a helper reads the arguments of a call."""
    found = []
    monkeypatch.setattr(network, "work", lambda arguments, mail: found.append(numba.typeof(arguments)))
    for batch in (1, 16, 40):
        sparsify(pruned)(torch.zeros(batch, 3, 8, 8))
    assert set(found) == {numba.typeof(driver.EXAMPLE)}


def test_helpers_help_and_fall_asleep(pruned):
    sparse, x = sparsify(pruned), torch.zeros(64, 3, 8, 8)
    driver_result(sparse, x)
    calls, mail = int(network._mail[driver.CALLS]), network._mail
    driver_result(sparse, x)
    assert mail[driver.CALLS] == calls + 1 and mail[driver.CALL] == mail[driver.INSIDE] == 0
    deadline = time.monotonic() + 60
    while mail[driver.ASLEEP] < len(network._helpers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child(pruned):
    sparse, x = sparsify(pruned), torch.randn(40, 3, 8, 8)
    expected = sparse(x)  # helpers have been started
    child = os.fork()
    if not child:
        os._exit(0 if np.array_equal(driver_result(sparse, x), expected.numpy()) else 1)
    assert os.waitpid(child, 0)[1] == 0


def engine_of(sparse):
    [found] = [module for module in sparse.modules() if isinstance(module, SparseNetwork)]
    return found.engine()


def driver_result(sparse, x):
    return engine_of(sparse)([x.numpy()], 2)[0]


@pytest.mark.parametrize("used", [False, True])
def test_copied_and_saved(pruned, used):
    sparse, x = sparsify(pruned), torch.randn(3, 3, 8, 8)
    expected = sparse(x) if used else pruned(x)
    file = io.BytesIO()
    torch.save(sparse, file)
    assert len(pickle.dumps(sparse)) < 40_000  # without what is made from it
    file.seek(0)
    for twin in (copy.deepcopy(sparse), torch.load(file, weights_only=False)):
        torch.testing.assert_close(twin(x), expected)


def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_code_goes_with_its_layer():
    layer = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)).eval().requires_grad_(False)
    layer[0].weight[:, ::2] = 0
    x = torch.randn(1, 64, 4, 4)
    sizes = []
    for count in (100, 300):  # the first ones fill caches
        for _ in range(count):
            sparsify(layer)(x)
        gc.collect()
        sizes.append(resident_mib())
    assert sizes[1] < sizes[0] + 30  # the code of 300 such layers takes 60 MiB


def test_memory_of_large_and_of_many_sizes_is_given_back(pruned):
    sparse = sparsify(pruned)
    sparse(torch.zeros(1, 3, 8, 8))
    for size in range(2, 40):
        sparse(torch.zeros(1, 3, size, 8))
    engine = engine_of(sparse)
    assert len(engine._programs) == network.PROGRAMS
    sparse(torch.zeros(1, 3, 1500, 2000))
    large = sum(arena.nbytes for arena in engine._arenas)
    sparse(torch.zeros(1, 3, 8, 8))
    assert sum(arena.nbytes for arena in engine._arenas) < large / 2


def test_pages_are_not_writable_and_executable_at_once():
    pages = network.executable(np.frombuffer(encoder.LEAVE, np.uint8))
    at = np.frombuffer(pages, np.uint8).ctypes.data
    lines = Path("/proc/self/maps").read_text().splitlines()
    rights = {line.split()[1] for line in lines if line.startswith(f"{at:x}-")}
    assert rights == {"r-xp"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(pruned, dtype):
    x = torch.randn(9, 3, 8, 8)
    expected = sparsify(pruned)(x)
    torch.set_default_dtype(dtype)
    try:
        made = sparsify(pruned)(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.dtype == torch.float32 and torch.equal(made, expected)


def test_system_that_forbids_code_gets_the_portable_kernels(pruned, monkeypatch):
    x, expected = torch.randn(2, 3, 8, 8), sparsify(pruned)(torch.randn(2, 3, 8, 8)).shape

    def refuse(code):
        raise OSError("forbidden")

    monkeypatch.setattr(cpu, "executable", refuse)
    cpu.instruction_sets.cache_clear()
    try:
        assert not cpu.instruction_sets()
        sparse = sparsify(pruned)
        assert sparse(x).shape == expected
        assert set(describe(sparse)["runs_in"]) == {"Numba"}
    finally:
        cpu.instruction_sets.cache_clear()


# --- Plans ------------------------------------------------------------------------------------------------------------


def test_graphs_without_layers_are_refused():
    with pytest.raises(ValueError, match=r"a graph without layers .*leave it to torch"):
        planner.plan(Graph((True,), (Mean(0),), (1,)), {}, [(3, 4, 4)], 1, 8)


def test_layers_that_do_not_fit_are_refused():
    case = chain((3, 4, 4), [(5, 3, True, True), (6, 3, True, True), (7, 3, True, True)])
    with pytest.raises(ValueError, match=r"layer 2 \(7×6×3×3 with a max-pool\) does not fit maps of 6×1×1"):
        planner.plan(case.graph, case.arrays(), case.inputs, 1, 8)
    twice = Graph((True,), (Convolution(0, "0"), Convolution(1, "0")), (2,))
    with pytest.raises(ValueError, match=r"layer 0 \(5×3×3×3\) does not fit maps of 5×2×2"):
        planner.plan(twice, case.arrays(), case.inputs, 1, 8)


@given(st.integers(1, 70), st.integers(1, 40), st.sampled_from([1, 9]), st.floats(0, 1), st.integers(1, 60))
def test_each_kept_weight_is_multiplied_once_in_order(c_out, c_in, taps, density, longest):
    kept = np.random.default_rng(0).random((c_out, c_in, taps)) < density
    rows = 14
    (group, tap, channel, row), chunk_groups, starts = generator._in_order(kept, rows, longest)
    rebuilt = np.zeros_like(kept)
    rebuilt[group * rows + row, channel, tap] = True
    assert np.array_equal(rebuilt, kept) and len(row) == kept.sum() == starts[-1]
    assert set(chunk_groups) == set(range(-(-c_out // rows))) and (np.diff(chunk_groups) >= 0).all()
    for chunk, (first, last) in enumerate(pairwise(starts)):
        order = list(zip(tap[first:last], channel[first:last], row[first:last], strict=True))
        assert order == sorted(order) and set(group[first:last]) <= {chunk_groups[chunk]}
