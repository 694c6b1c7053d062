"""The CPU engine against float64: whole numbers come out exactly, whatever the shapes, zeros, batches and threads."""

import copy
import ctypes
import gc
import io
import itertools
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from x86 import Everything, Processor

from reprolib.files import paths
from reprolib.patterns import parse
from reprolib.sparse import compilation, cpu, layers, sparsify
from reprolib.sparse.cpu import avx2, avx512, avx512bf16, encoder, generator, planner
from reprolib.sparse.cpu import network as memory

pytestmark = pytest.mark.skipif(
    not cpu.instruction_sets(), reason="neither AVX-512 nor AVX2 here, or code made at run time is forbidden"
)
sets = pytest.mark.parametrize("isa", [avx512, avx2], ids=lambda isa: isa.NAME)  # to make code, not to run it


def chain(shape, steps, seed, density=0.3, whole=True):
    """Layers for maps ``[C, H, W]`` from ``(C_out, kernel, relu, pool)``; a kernel of 0 is a linear layer."""
    rng = np.random.default_rng(seed)

    def numbers(*size):
        values = rng.integers(-3, 4, size) if whole else rng.standard_normal(size)
        return values.astype(np.float32)

    channels, height, width = shape
    found = []
    for c_out, kernel, relu, pool in steps:
        weight = numbers(c_out, channels, kernel, kernel) if kernel else numbers(c_out, channels * height * width)
        weight *= rng.random(weight.shape) < density
        found.append(cpu.Layer(weight, numbers(c_out), relu, pool, kernel // 2))
        channels, height, width = (
            (c_out, *(size // (1 + pool) for size in (height, width))) if kernel else (c_out, 1, 1)
        )
    return found


def reference(network, x, rounded=False):
    """In float64; `rounded`: activations between layers are rounded to bfloat16."""
    y = torch.from_numpy(x).double()
    for i, layer in enumerate(network):
        y = y.bfloat16().double() if rounded and i else y
        weight, bias = (torch.from_numpy(array).double() for array in (layer.weight, layer.bias))
        if weight.dim() == 2:
            y = F.linear(y.flatten(1), weight, bias)[:, :, None, None]
        else:
            y = F.conv2d(y, weight, bias, padding=layer.padding)
        y = y.relu() if layer.relu else y
        y = F.max_pool2d(y, 2) if layer.pool else y
    return y.numpy()


def images(batch, shape, seed=1):
    return np.random.default_rng(seed).integers(-3, 4, (batch, *shape)).astype(np.float32)


def check(network, shape, batches, threads=(1, 2)):
    """Every instruction set of this machine gives the reference's whole numbers, whatever memory held before."""
    engines = [cpu.Network(network, isa) for pairs in (False, True) for isa in cpu.instruction_sets(pairs)]
    for batch in batches:
        x = images(batch, shape, batch)
        for engine, count in itertools.product(engines, threads):
            expected = reference(network, x, engine.isa.PAIRS)
            engine._arenas[:] = [np.full(arena.shape, np.nan, np.float32) for arena in engine._arenas]
            assert np.array_equal(engine(x, count), expected), (engine.isa.NAME, batch, count)


@pytest.mark.parametrize("batch", [1, 3, "a bundle"])
@pytest.mark.parametrize("isa", [avx512, avx2, avx512bf16], ids=lambda isa: isa.NAME)
def test_networks_of_every_instruction_set_are_exact(isa, batch):
    """Planner, generator and driver together; calls of machine code go to the slow x86, so any machine will do."""
    steps = [(5, 3, False, True), (33, 3, True, False), (6, 1, True, False), (7, 3, False, True), (3, 0, False, False)]
    network = chain((3, 4, 6), steps, 0)
    batch = isa.LANES if batch == "a bundle" else batch
    program = memory.Program(network, 4, 6, batch, isa)
    stages, groups, chunks, *rest = program._tables
    form = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)

    def emulated(start, size):
        code = Everything()[int(start) : int(start + size)].copy()
        names = ("rdi", "rsi", "rdx", "rcx", "r8")
        return form(lambda *at: Processor(Everything(), isa.REGISTERS).call(code, **dict(zip(names, at, strict=True))))

    callbacks = [emulated(start, size) for start, _, size in chunks]
    chunks[:, 0] = [ctypes.cast(callback, ctypes.c_void_p).value for callback in callbacks]
    program._tables = stages, groups, chunks, *rest
    x = images(batch, (3, 4, 6))
    assert np.array_equal(program.run(x, 1, []), reference(network, x, isa.PAIRS))


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
    check(chain((3, 9, 10), steps, 0), (3, 9, 10), [batch], threads=(1, 2, 3))


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
    check(chain(shape, steps, seed, density), shape, [batch])


@pytest.mark.parametrize("spec", ["Unstructured()", "Balanced(16)", "Block(32, 32)", "Vector(32)", "NM(2, 4)",
                                  "Balanced(16) & Block(32, 32)", "Vector(4) & Block(8, 8)"])  # fmt: skip
@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_masks_of_all_patterns_are_exact(spec, sparsity):
    [layer] = chain((64, 4, 4), [(96, 3, True, True)], 0, density=1)
    mask = parse(spec).mask(torch.randn(layer.weight.shape), sparsity).numpy()
    check([replace(layer, weight=layer.weight * mask)], (64, 4, 4), [1, 5, 16, 19])


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
    [layer] = chain((20, 5, 6), [(70, 3, True, False)], 0)
    weight = EDITS[edit](layer.weight).astype(np.float32)
    check([replace(layer, weight=weight)], (20, 5, 6), [1, 3, 16, 18])


def test_rounding_is_that_of_float32():
    network = chain((64, 8, 8), [(64, 3, True, False)] * 3, 0, whole=False)
    x = np.random.default_rng(0).standard_normal((19, 64, 8, 8)).astype(np.float32)
    expected = reference(network, x)
    for isa in cpu.instruction_sets():
        assert np.linalg.norm(cpu.Network(network, isa)(x, 2) - expected) < 1e-6 * np.linalg.norm(expected)


def test_more_images_than_go_through_together():
    network = chain((3, 2, 2), [(5, 3, True, False)], 0)
    check(network, (3, 2, 2), [memory.SLICE * 16 + 5])


def test_a_layer_alone_takes_activations_in_its_layout():
    [layer] = chain((20, 6, 6), [(40, 3, True, False)], 0)
    isa = cpu.instruction_sets()[0]
    for n, batch in ((3, 3), (isa.LANES, 2 * isa.LANES)):
        program, x = memory.Program([layer], 6, 6, n, isa), images(batch, (20, 6, 6))
        again, results = program.alone(x, 2)
        again()
        assert np.array_equal(results(), reference([layer], x))


def test_results_do_not_depend_on_threads():
    network = chain((64, 8, 8), [(64, 3, True, True), (64, 3, True, False)], 0, whole=False)
    x = np.random.default_rng(0).standard_normal((35, 64, 8, 8)).astype(np.float32)
    for isa in cpu.instruction_sets():
        results = [cpu.Network(network, isa)(x, threads) for threads in (1, 2, 3, 8)]
        assert all(np.array_equal(result, results[0]) for result in results)


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


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child(pruned):
    sparse, x = sparsify(pruned), torch.randn(40, 3, 8, 8)
    expected = sparse(x)  # helpers have been started
    child = os.fork()
    if not child:
        os._exit(0 if np.array_equal(driver_result(sparse, x), expected.numpy()) else 1)
    assert os.waitpid(child, 0)[1] == 0


def driver_result(sparse, x):
    return sparse._network["network"](x.numpy(), 2)


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
    layer = nn.Conv2d(64, 64, 3, padding=1).eval().requires_grad_(False)
    layer.weight[:, ::2] = 0
    x = torch.randn(1, 64, 4, 4)
    sizes = []
    for count in (20, 300):  # the first ones fill caches
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
    network = sparse._network["network"]
    assert len(network._programs) == memory.PROGRAMS
    sparse(torch.zeros(16, 3, 256, 256))
    large = sum(arena.nbytes for arena in network._arenas)
    sparse(torch.zeros(1, 3, 8, 8))
    assert sum(arena.nbytes for arena in network._arenas) < large / 2


def test_pages_are_not_writable_and_executable_at_once():
    pages = memory.executable(np.frombuffer(encoder.LEAVE, np.uint8))
    at = np.frombuffer(pages, np.uint8).ctypes.data
    lines = Path("/proc/self/maps").read_text().splitlines()
    rights = {line.split()[1] for line in lines if line.startswith(f"{at:x}-")}
    assert rights == {"r-xp"}


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
        assert set(layers.describe(sparse)["runs_in"]) == {"Numba"}
    finally:
        cpu.instruction_sets.cache_clear()


# --- Plans ------------------------------------------------------------------------------------------------------------


@sets
def test_wrong_plans_are_refused(isa):
    [layer] = chain((8, 6, 6), [(8, 3, False, False)], 0)
    for n in (1, isa.LANES):
        [stage] = planner.stages([layer], 6, 6, n, isa.LANES)
        for change in (
            dict(places=stage.places + np.array([10**6, 0])),
            dict(places=stage.places - np.array([10**5, 0])),
            dict(places=stage.places + np.array([0, 10**6])),
            dict(source=replace(stage.source, channels=2)),
            dict(target=replace(stage.target, channels=4)),
        ):
            with pytest.raises(ValueError, match="the plan is wrong"):
                generator.generate(replace(stage, **change), isa)


@sets
def test_maps_beyond_what_an_instruction_reaches_are_refused(isa):
    layer = cpu.Layer(np.ones((1, 124, 1, 1), np.float32), np.zeros(1, np.float32), False, False)
    with pytest.raises(ValueError, match=r"displacement .* does not fit"):
        generator.generate(planner.stages([layer], 4190, 4190, 1, isa.LANES)[0], isa)


def test_layers_that_do_not_fit_are_refused():
    network = chain((3, 4, 4), [(5, 3, True, True), (6, 3, True, True), (7, 3, True, True)], 0)
    with pytest.raises(ValueError, match=r"a layer \(7, 6, 3, 3\) with a max-pool does not fit maps of 6x1x1"):
        planner.stages(network, 4, 4, 1, 8)
    with pytest.raises(ValueError, match=r"a layer \(5, 3, 3, 3\) .*does not fit"):
        planner.stages([network[0], network[0]], 4, 4, 1, 8)


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


# --- Numba ------------------------------------------------------------------------------------------------------------

USE = "import torch; from reprolib.sparse import SparseConv2d; conv = torch.nn.Conv2d(2, 2, 1).requires_grad_(False); "
USE += "print(SparseConv2d.from_dense(conv)(torch.zeros(1, 2, 3, 3)).shape)"


def run(command, **variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA")}
    environment = kept | {"PYTHONPATH": str(paths.ROOT)} | variables
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=environment, timeout=300
    )


def test_damaged_cache_is_told_and_mended(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from reprolib.sparse.compilation import compiled\n\n@compiled()\ndef f(x):\n    return x + 1\n\nprint(f(1))\n"
    )
    cache = tmp_path / "cache"
    assert run([program], NUMBA_CACHE_DIR=str(cache)).stderr == ""
    for path in cache.rglob("*.nb*"):
        path.write_bytes(path.read_bytes()[:20])
    damaged, mended = (run([program], NUMBA_CACHE_DIR=str(cache)) for _ in range(2))
    assert damaged.stdout == mended.stdout == "2\n"
    assert "a compiled kernel could not be read" in damaged.stderr and "Traceback" not in damaged.stderr
    assert mended.stderr == ""


def test_numba_without_a_folder_for_its_cache(monkeypatch, capsys):
    compilation._say.cache_clear()
    monkeypatch.setattr(compilation.numba, "njit", no_folder(compilation.numba.njit))
    assert compilation.compiled()(lambda x: x + 1)(1) == 2
    assert "no folder for compiled kernels can be written" in capsys.readouterr().err


def no_folder(njit):
    def refuse(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    return refuse


def test_numba_that_may_not_compile_is_refused():
    done = run(["-c", USE], NUMBA_DISABLE_JIT="1")
    assert "NUMBA_DISABLE_JIT is set, and sparse kernels are compiled by Numba: unset it" in done.stderr
