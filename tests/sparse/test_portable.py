"""CPU kernels against float64: whole numbers must come out exactly, whatever the shapes and zeros."""

import math
import os
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from reprolib.sparse import portable as cpu
from reprolib.sparse.portable import layout, packing

ROOT = Path(__file__).parents[2]


def numbers(*shape, seed, whole=True):
    """Small whole numbers, of which float32 knows every sum exactly, in any order; or any."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(-4, 5, shape, generator=generator).float() if whole else torch.randn(shape, generator=generator)
    )


def layer(c_out, c_in, kernel, density, seed, whole=True):
    """A pruned weight and its bias."""
    weight = numbers(c_out, c_in, kernel, kernel, seed=seed, whole=whole)
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < density
    return weight * kept, numbers(c_out, seed=seed + 1, whole=whole)


def reference(x, weight, bias, relu=False, pool=False):
    y = F.conv2d(x.double(), weight.double(), bias.double(), padding=weight.shape[2] // 2)
    y = y.relu() if relu else y
    return F.max_pool2d(y, 2) if pool else y


def fill_workspaces_with_nan():
    for name in ("input", "odd", "even"):
        layout.workspace(name, (1 << 18,)).fill_(torch.nan)
    for memory in vars(layout._workspaces).values():
        memory.fill_(torch.nan)


def convolve(x, plan):
    """From images to images through the kernel, in memory that was NaN before; the halo must be zero."""
    fill_workspaces_with_nan()
    inputs = cpu.to_layout(x, plan.halo)
    if len(x) % inputs.shape[4]:
        inputs[-1, ..., len(x) % inputs.shape[4] :] = torch.nan  # lanes that hold no image
    y = cpu.conv(inputs, plan)
    halo = plan.halo_out
    if halo:
        edges = torch.ones(y.shape[2:4], dtype=torch.bool)
        edges[1:-1, 1:-1] = False
        assert (y[:, :, edges] == 0).all()
    return cpu.from_layout(y[:, :, halo : y.shape[2] - halo, halo : y.shape[3] - halo], len(x))


@pytest.fixture
def torch_threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- What comes out ---------------------------------------------------------------------------------------------------

seeds = st.integers(0, 1000)
batches = st.one_of(st.sampled_from([1, 7, 8, 16, 17]), st.integers(1, 40))
densities = st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0])
lengths = st.sampled_from([None, 1, 4])


@st.composite
def cases(draw):
    """Sizes of a layer and its input, and what its epilogue does."""
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    return {
        "batch": draw(batches),
        "c_in": draw(st.integers(1, 40)),  # a chunk has 32
        "c_out": draw(st.integers(1, 36)),  # a block of rows has 16
        "map": (height, width),
        "kernel": draw(st.sampled_from([3, 1])),
        "density": draw(densities),
        "empty_block": draw(st.booleans()),
        "relu": draw(st.booleans()),
        "pool": min(height, width) >= 2 and draw(st.booleans()),
        "halo_out": draw(st.sampled_from([0, 1])),
        "length": draw(lengths),
        "seed": draw(seeds),
    }


USUAL = dict(batch=1, c_in=3, c_out=8, map=(4, 4), kernel=3, density=0.3, empty_block=False)
USUAL |= dict(relu=True, pool=True, halo_out=1, length=1, seed=0)


@given(cases())
@example(USUAL | dict(batch=40, c_in=70, c_out=50, length=1))  # several chunks and blocks
@example(USUAL | dict(batch=16, c_in=70, c_out=50, length=4))
@example(USUAL | dict(batch=2, map=(1, 1), pool=False))
@example(USUAL | dict(batch=2, map=(9, 1), pool=False))
@example(USUAL | dict(batch=20, map=(1, 9), pool=False, kernel=1, length=4))
@example(USUAL | dict(batch=17, map=(3, 7)))  # a row and a column that no pool takes
@example(USUAL | dict(batch=3, map=(7, 5), length=4))
@example(USUAL | dict(batch=3, map=(40, 36)))  # more vectors than a band holds
@example(USUAL | dict(batch=9, map=(2, 70), length=4))  # one row is longer than a band
@example(USUAL | dict(batch=9, c_out=40, density=0.0))
@example(USUAL | dict(batch=9, c_out=40, density=1.0, empty_block=True))
def test_convolution_is_exact_for_whole_numbers(case):
    weight, bias = layer(case["c_out"], case["c_in"], case["kernel"], case["density"], case["seed"])
    if case["empty_block"]:
        weight[: packing.BLOCK_ROWS] = 0
    x = numbers(case["batch"], case["c_in"], *case["map"], seed=case["seed"] + 2)
    epilogue = {name: case[name] for name in ("relu", "pool")}
    plan = cpu.plan(weight, bias, halo_out=case["halo_out"], length=case["length"], **epilogue)
    assert torch.equal(convolve(x, plan).double(), reference(x, weight, bias, **epilogue))


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize(("batch", "size"), [(2, 9), (20, 6)])
def test_rounding_is_that_of_float32(batch, size, length):
    weight, bias = layer(33, 130, 3, 0.5, seed=0, whole=False)
    x = numbers(batch, 130, size, size, seed=1, whole=False)
    expected = reference(x, weight, bias)
    y = convolve(x, cpu.plan(weight, bias, relu=False, pool=False, length=length))
    assert (y - expected).norm() < 1e-6 * expected.norm()
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("batch", [3, 19])
def test_linear_weight_is_a_1x1_convolution(batch):
    weight, bias = numbers(21, 70, seed=0), numbers(21, seed=1)
    weight[:, ::3] = 0
    x = numbers(batch, 70, seed=2)
    plan = cpu.plan(weight, bias, relu=False, pool=False)
    y = convolve(x[:, :, None, None], plan).flatten(1)
    assert torch.equal(y, F.linear(x, weight, bias))


@given(cases())
def test_specification_is_exact_too(case):
    weight, bias = layer(case["c_out"], case["c_in"], case["kernel"], case["density"], case["seed"])
    x = numbers(min(case["batch"], 3), case["c_in"], *case["map"], seed=case["seed"] + 2)
    plan = cpu.plan(weight, bias, relu=False, pool=False, length=case["length"])
    y = cpu.conv_spec(x.double().numpy(), plan)
    assert y.dtype == np.float64
    assert np.array_equal(y, reference(x, weight, bias).numpy())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("batch", [4, 24])
def test_nan_is_not_hidden(batch, relu):
    x = torch.zeros(batch, 1, 5, 5)
    x[2, 0, 1, 3] = torch.nan
    y = convolve(x, cpu.plan(torch.ones(1, 1, 3, 3), torch.zeros(1), relu=relu, pool=False))
    assert torch.equal(y.isnan(), reference(x, torch.ones(1, 1, 3, 3), torch.zeros(1), relu).isnan())
    assert y.isnan().sum() == 9


@pytest.mark.parametrize("batch", [4, 24])
def test_layers_in_a_row_do_not_write_over_their_input(batch):
    sizes = [5, 20, 9, 33, 12]
    layers = [layer(c_out, c_in, 3, 0.2, seed) for seed, (c_in, c_out) in enumerate(pairwise(sizes))]
    x = numbers(batch, 5, 6, 6, seed=9, whole=False)
    expected = x
    fill_workspaces_with_nan()
    y = cpu.to_layout(x, 1)
    for i, (weight, bias) in enumerate(layers):
        y = cpu.conv(y, cpu.plan(weight, bias, relu=True, pool=False, halo_out=int(i < 3)))
        expected = reference(expected, weight, bias, relu=True)
    torch.testing.assert_close(cpu.from_layout(y, batch).double(), expected, rtol=1e-5, atol=1e-5 * expected.max())


@pytest.mark.parametrize("given", [2, 4])
def test_activations_of_another_layer_are_refused(given):
    plan = cpu.plan(*layer(4, 3, 3, 0.5, 0), relu=False, pool=False)
    with pytest.raises(ValueError, match=f"activations of {given} channels do not fit a layer of 3 input channels"):
        cpu.conv(cpu.to_layout(torch.zeros(1, given, 4, 4), 1), plan)


# --- Layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "n"), [(1, 1), (7, 1), (8, 16), (16, 16), (17, 16), (40, 16)])
def test_layout_interleaves_16_images_or_one(batch, n):
    images = numbers(batch, 3, 2, 5, seed=0, whole=False)
    fill_workspaces_with_nan()
    x = cpu.to_layout(images, 1)
    assert x.shape == (-(-batch // n), 3, 4, 7, n)
    assert cpu.interleaved(batch) == n
    for image in {0, batch // 2, batch - 1}:
        assert torch.equal(x[image // n, :, 1:-1, 1:-1, image % n], images[image])
    assert x.count_nonzero() == images.numel()  # everything else is zero
    assert not x.isnan().any()


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
def test_from_layout_undoes_to_layout(batch, channels, height, width):
    images = numbers(batch, channels, height, width, seed=0, whole=False)
    back = cpu.from_layout(cpu.to_layout(images, 0), batch)
    assert torch.equal(back, images)
    fill_workspaces_with_nan()
    assert torch.equal(back, images)  # it is a copy
    turned = images.to(memory_format=torch.channels_last).half()
    assert torch.equal(cpu.from_layout(cpu.to_layout(turned, 0), batch), turned.float())


def test_workspace_of_inference_mode_serves_outside_of_it(monkeypatch):
    monkeypatch.setattr(layout, "_workspaces", threading.local())
    with torch.inference_mode():
        cpu.to_layout(torch.ones(1, 1, 2, 2), 0)
    assert cpu.to_layout(torch.zeros(1, 1, 2, 2), 0).sum() == 0


# --- Plan -------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from([3, 1]), densities, st.sampled_from([1, 4]), seeds)
@example(17, 65, 3, 0.5, 1, 0)
@example(3, 1, 1, 0.0, 4, 0)
def test_plan_stores_each_weight_once_and_in_order(c_out, c_in, kernel, density, length, seed):
    weight, bias = layer(c_out, c_in, kernel, density, seed)
    plan = cpu.plan(weight, bias, relu=False, pool=False, length=length)
    rebuilt = torch.zeros(-(-c_out // packing.BLOCK_ROWS) * packing.BLOCK_ROWS, c_in, kernel**2)
    order = []
    for block in range(len(plan.block_starts) - 1):
        for segment in range(plan.block_starts[block], plan.block_starts[block + 1]):
            first, last = plan.segment_starts[segment], plan.segment_starts[segment + 1]
            assert first < last
            row = block * packing.BLOCK_ROWS + plan.segment_rows[segment] * length
            for k in range(first, last):
                channel, tap = plan.channels[k], plan.taps[k]
                rebuilt[row : row + length, channel, tap] += torch.from_numpy(plan.values[k])
                order.append((block, channel // packing.CHUNK_CHANNELS[length], row, channel, tap))
    assert torch.equal(rebuilt[:c_out].reshape(weight.shape), weight)
    assert not rebuilt[c_out:].any()
    assert order == sorted(set(order))
    assert len(order) == len(plan.values) == plan.segment_starts[-1]
    assert plan.values.any(axis=1).all()  # no work for nothing
    assert torch.equal(torch.from_numpy(plan.bias), bias)


def test_vectors_of_four_only_where_the_zeros_allow_it():
    scattered, _ = layer(32, 32, 3, 0.1, seed=0)
    in_fours = numbers(32, 32, 3, 3, seed=0) * (torch.rand(8, 32, 3, 3) < 0.1).repeat_interleave(4, 0)
    for weight, length in ((scattered, 1), (in_fours, 4), (torch.ones(30, 8, 3, 3), 4)):
        assert cpu.plan(weight, torch.zeros(len(weight)), relu=False, pool=False).length == length


def test_plan_is_a_copy():
    weight, bias = layer(4, 4, 3, 1.0, seed=0)
    plan = cpu.plan(weight, bias, relu=False, pool=False)
    values = plan.values.copy()
    weight.zero_(), bias.fill_(99)
    assert np.array_equal(plan.values, values)
    assert not (plan.bias == 99).any()


# --- Bands ------------------------------------------------------------------------------------------------------------


@st.composite
def cuts(draw):
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    pool = min(height, width) >= 2 and draw(st.booleans())
    n, halo, tile = draw(st.sampled_from([1, 16])), draw(st.sampled_from([0, 1])), draw(st.sampled_from([1, 4, 8]))
    return draw(st.integers(1, 3)), 2, height, width, halo, n, pool, tile


@given(cuts())
@example((2, 2, 7, 9, 1, 16, True, 4))
@example((1, 2, 7, 5, 1, 1, True, 8))  # reads furthest beyond the end
def test_bands_cover_every_output_pixel_once(cut):
    groups, channels, height, width, halo, n, pool, tile = cut
    at = packing.bands_of(*cut)
    assert at.bands * at.rows == groups * height
    vectors = len(at.places) // at.bands
    assert vectors * at.bands == len(at.places)
    assert vectors % tile == 0
    if pool:  # the rows 2i and 2i + 1 of an image lie in one band
        first = np.arange(0, groups * height).reshape(groups, height)[:, : height // 2 * 2 : 2]
        assert (first // at.rows == (first + 1) // at.rows).all()
    # Where the epilogue looks for a pixel of the scratch lies the sum for that pixel.
    row, column, lane = np.ogrid[: groups * height, :width, :n]
    position = row % at.rows * at.pitch + column * n + lane
    place = at.places[row // at.rows * vectors + position // cpu.LANES] + position % cpu.LANES
    shape = (groups, channels, height + 2 * halo, width + 2 * halo, n)
    assert np.array_equal(place, np.ravel_multi_index((row // height, 0, row % height, column, lane), shape))


@given(cuts())
@example((1, 2, 7, 5, 1, 1, True, 8))
def test_no_vector_is_read_outside_of_the_workspace(cut):
    groups, channels, height, width, halo, n, _pool, _tile = cut
    weight = torch.ones(1, channels, 1 + 2 * halo, 1 + 2 * halo)
    offsets = cpu.plan(weight, torch.zeros(1), relu=False, pool=False).offsets(height, width, n)
    shape = groups, channels, height + 2 * halo, width + 2 * halo, n
    layout.workspace("fresh", (max(math.prod(shape) - cpu.LANES, 0),))  # there from before, and too small by one vector
    floats = layout.workspace("fresh", shape).untyped_storage().nbytes() // 4
    del vars(layout._workspaces)["fresh"]
    assert packing.bands_of(*cut).places.max() + offsets.max() + cpu.LANES <= floats


# --- Threads and compilation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [3, 40])
def test_number_of_threads_does_not_matter(batch, torch_threads):
    weight, bias = layer(70, 40, 3, 0.3, seed=0, whole=False)
    plan = cpu.plan(weight, bias, relu=False, pool=True, halo_out=1)
    x = numbers(batch, 40, 10, 10, seed=1, whole=False)
    results, before = [], numba.get_num_threads()
    for count in (1, 2, 3, 4):
        torch_threads(count)
        results.append(convolve(x, plan))
        assert torch.get_num_threads() == count
        assert numba.get_num_threads() == before
    assert all(torch.equal(result, results[0]) for result in results)


def test_two_threads_at_once_do_not_disturb_each_other():
    plans = [cpu.plan(*layer(33, 20, 3, 0.3, seed), relu=True, pool=False, halo_out=0) for seed in (0, 1)]
    inputs = [numbers(batch, 20, 8, 8, seed=seed, whole=False) for seed, batch in enumerate((5, 40))]
    expected = [convolve(x, plan) for x, plan in zip(inputs, plans, strict=True)]
    if numba.threading_layer() == "workqueue":
        pytest.skip("Numba's workqueue layer is not for several threads")
    start, wrong, done = threading.Barrier(2), [], []

    def work(i):
        start.wait()
        for _ in range(50):
            y = cpu.from_layout(cpu.conv(cpu.to_layout(inputs[i], 1), plans[i]), len(inputs[i]))
            if not torch.equal(y, expected[i]):
                wrong.append(i)
        done.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1]
    assert wrong == []


def test_first_call_compiles_once_on_a_machine_and_leaves_the_threads_of_torch(tmp_path):
    program = """
import torch
from reprolib.sparse import portable as cpu
torch.set_num_threads(3)
plan = cpu.plan(torch.ones(4, 4, 1, 1), torch.zeros(4), relu=False, pool=False)
for _ in range(2):
    y = cpu.conv(cpu.to_layout(torch.ones(2, 4, 1, 1), 0), plan)
    print(torch.get_num_threads(), *y.flatten().tolist())
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def run():
        return subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, timeout=300
        )

    first, second = run(), run()
    assert first.stdout == second.stdout == "3 4.0 4.0 4.0 4.0 4.0 4.0 4.0 4.0\n" * 2
    assert "compiling a CPU kernel" in first.stderr
    assert "compiling" not in second.stderr


@pytest.mark.parametrize("length", [0, 2, 8])
def test_lengths_without_a_kernel_are_refused(length):
    with pytest.raises(ValueError, match=rf"no kernel for vectors of {length} weights: there are 1 and 4"):
        packing.plan(torch.ones(4, 4), torch.zeros(4), relu=False, pool=False, length=length)
