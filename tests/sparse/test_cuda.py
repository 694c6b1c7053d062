"""The CUDA kernels, proven without a GPU: packing against its specification, kernels by emulation, code by assembly.

Where there is a GPU, the last section runs them on it.
"""

import dataclasses
import functools
import inspect
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from reprolib.patterns import parse
from reprolib.sparse import cuda
from reprolib.sparse.cuda import assembler, backend, packing, tuning
from reprolib.sparse.cuda.packing import Tile
from reprolib.sparse.cuda.tuning import Choice

SHARED_BYTES = {(8, 0): 164 * 1024, (9, 0): 228 * 1024}  # of a multiprocessor, by compute capability (NVIDIA's guide)
TOLERANCE = 1e-3  # relative error of fp16 results with fp32 sums, in the norm of the output
has_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@dataclass(frozen=True)
class Layer:
    """A layer with random weights and its input; what all kernels are tried with."""

    shape: tuple[int, int, int, int]  # of the input: N, C, H, W
    c_out: int
    variant: str
    taps: int = 3
    density: float = 0.3  # of column vectors (of quads with 2:4)
    relu: bool = True
    pool: bool = False
    halo_out: int = 1
    choice: Choice | None = None  # in emulation; by default one slice of the largest blocks
    seed: int = 0

    @functools.cached_property
    def tensors(self):
        """Input, weight and bias; the input fp16, because rounding it is not the kernels' doing."""
        g = torch.Generator().manual_seed(self.seed)
        c_in, rows = self.shape[1], backend.ROWS[self.variant]
        x = torch.randn(self.shape, generator=g).half()
        weight = torch.randn(self.c_out, c_in, self.taps, self.taps, generator=g)
        keep = torch.rand(-(-self.c_out // rows), c_in, self.taps, self.taps, generator=g) < self.density
        weight = weight * keep.repeat_interleave(rows, 0)[: self.c_out]
        if self.variant == "2:4":
            quads = F.pad(weight.permute(0, 2, 3, 1), (0, -c_in % 4)).unflatten(3, (-1, 4))
            places = torch.rand(quads.shape, generator=g).argsort(-1)
            weight = (quads * (places < 2)).flatten(3)[..., :c_in].permute(0, 3, 1, 2).contiguous()
        return x, weight, torch.randn(self.c_out, generator=g)

    def plan(self, device="cpu"):
        _, weight, bias = self.tensors
        options = dict(relu=self.relu, pool=self.pool, halo_out=self.halo_out, variant=self.variant)
        return cuda.plan(weight, bias, device=device, **options)

    def input(self, device="cpu"):
        return cuda.to_layout(self.tensors[0].to(device), self.taps // 2)

    def check(self, y, x=None):
        """Assert that y, in the kernels' layout, is this layer's output for x in float64, within a halo of zeros."""
        x = self.tensors[0] if x is None else x.cpu()
        _, weight, bias = self.tensors
        wanted = F.conv2d(x.double(), weight.half().double(), bias.double(), padding=self.taps // 2)
        wanted = F.max_pool2d(wanted, 2) if self.pool else wanted
        wanted = wanted.relu() if self.relu else wanted
        y = y.cpu()
        got = cuda.from_layout(y, len(x), self.halo_out).double()
        assert got.shape == wanted.shape
        assert (got - wanted).norm() <= TOLERANCE * wanted.norm()  # False for NaN
        with_halo = y.clone()
        with_halo[:, :, self.halo_out : y.shape[2] - self.halo_out, self.halo_out : y.shape[3] - self.halo_out] = 0
        assert (with_halo == 0).all()


@contextmanager
def poisoned():
    """New tensors hold NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# --- Layout ----------------------------------------------------------------------------------------------------------


def test_layout_interleaves_eight_images_within_a_halo_of_zeros():
    x = torch.arange(9 * 2 * 3 * 2, dtype=torch.float32).reshape(9, 2, 3, 2)
    y = cuda.to_layout(x, halo=1)
    assert y.shape == (2, 2, 5, 4, 8)
    assert y.dtype == torch.float16 and y.is_contiguous()
    assert y[0, 1, 2 + 1, 0 + 1, 5] == x[5, 1, 2, 0]
    assert y[1, 0, 0 + 1, 1 + 1, 0] == x[8, 0, 0, 1]
    assert (y[1, ..., 1:] == 0).all()  # there is no tenth image
    assert y.count_nonzero() == x.count_nonzero()


@pytest.mark.parametrize("halo", [0, 1])
@pytest.mark.parametrize("n", [1, 8, 11])
def test_layout_comes_back(halo, n):
    x = torch.randn(n, 3, 4, 5).half()
    assert torch.equal(cuda.from_layout(cuda.to_layout(x, halo), n, halo), x)


# --- Packing, against its specification ------------------------------------------------------------------------------


@st.composite
def layers(draw, variant):
    taps, pool = draw(st.sampled_from([1, 3])), draw(st.booleans())
    sizes = st.integers(1 + pool, 6)
    return Layer(
        shape=(draw(st.integers(1, 9)), draw(st.integers(1, 70)), draw(sizes), draw(sizes)),
        c_out=draw(st.integers(1, 80)),
        variant=variant,
        taps=taps,
        density=draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0])),
        relu=draw(st.booleans()),
        pool=pool,
        halo_out=draw(st.integers(0, 1)),
        seed=draw(st.integers(0, 5)),
    )


@pytest.mark.parametrize("variant", sorted(backend.ROWS))
@given(data=st.data())
def test_packed_weights_specify_the_convolution(variant, data):
    layer = data.draw(layers(variant))
    layer.check(cuda.conv(layer.input(), layer.plan()))


@pytest.mark.parametrize("slices", [2, 3, 7])
def test_slices_add_up(slices):
    layer = Layer((8, 100, 3, 3), 40, "v16", density=0.05)
    plan, x = layer.plan(), layer.input().numpy()
    warps = packing.warps_for(40, 16)
    packed = packing.Packed(*(t.numpy() for t in plan.packed(warps, 1)[0]))
    parts = [packing.tensor_core_spec(x, packed, 3, 40, warps, piece, slices) for piece in range(slices)]
    whole = packing.tensor_core_spec(x, packed, 3, 40, warps)
    np.testing.assert_allclose(sum(parts), whole, atol=1e-4)
    assert sum(np.any(part) for part in parts) > 1


def arrays_of(plan, splits=1):
    """Weights, metadata and columns as kernels read them, in blocks as large as they get."""
    return plan.packed(packing.warps_for(plan.c_out, plan.rows), splits)[0][:3]


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_a_dense_layer_is_packed_without_padding(splits):
    plan = cuda.plan(torch.ones(64, 64, 3, 3), torch.zeros(64), device="cpu", variant="v32")
    weights, _, columns = arrays_of(plan, splits)
    groups = 2 * 64 * 9 // 16
    assert columns.shape == (groups + 1, 16)
    assert weights.numel() == (groups + 1) * 32 * 16
    assert (weights[:-1] == 1).all() and (weights[-1] == 0).all()


def test_two_of_four_stores_half_of_a_dense_layer():
    weight = torch.ones(64, 64, 3, 3) * torch.tensor([0, 1, 0, 1] * 16)[:, None, None]
    plan = cuda.plan(weight, torch.zeros(64), device="cpu", variant="2:4")
    weights, metadata, _ = arrays_of(plan)
    assert (weights[:-1] == 1).all()
    assert weights[:-1].numel() == weight.numel() // 2
    assert (metadata[:-1] == int("1101" * 8, 2) - (1 << 32)).all()  # places 1 and 3, eight times


def test_groups_are_full_although_chunks_are_not():
    # 5 columns in each of 8 chunks: a chunk fills no group of 16, but the chunks together fill two and a half.
    weight = torch.zeros(32, 128, 3, 3)
    weight[:, ::16, 0, :] = 1
    weight[:, 1::16, 1, :2] = 1
    plan = cuda.plan(weight, torch.zeros(32), device="cpu", variant="v32")
    assert arrays_of(plan)[2].shape[0] - 1 == 4  # a group spans two chunks at most: 10 columns, four times


def banks(plan):
    """Shared-memory banks of the eight columns of each phase, as the 4x4 tile places them."""
    tile, codes = Tile(3, 4, 4, 1, 2, 2), arrays_of(plan)[2][:-1].numpy().astype(int)
    channel, row = codes >> packing.TAP_BITS & packing.CHUNK - 1, codes & (1 << packing.TAP_BITS) - 1
    return ((channel * tile.channel_bytes // 16 + row) % 8).reshape(-1, 8)


@pytest.mark.parametrize("variant", ["v32", "v16", "2:4"])
def test_columns_of_a_dense_layer_lie_in_eight_banks(variant):
    weight = torch.ones(64, 64, 3, 3) * torch.tensor([0, 1, 0, 1] * 16)[:, None, None].lt(2)
    weight = weight * torch.tensor([1, 0, 0, 1] * 16)[:, None, None] if variant == "2:4" else weight
    plan = cuda.plan(weight, torch.zeros(64), device="cpu", variant=variant)
    assert (np.sort(banks(plan), axis=1) == np.arange(8)).all()


def test_random_columns_share_banks_as_evenly_as_they_can():
    layer = Layer((1, 256, 4, 4), 256, "v32", density=0.25)
    phases = banks(layer.plan())
    conflicts = np.mean([np.bincount(phase).max() for phase in phases])
    shuffled = np.random.default_rng(0).permutation(phases.ravel()).reshape(-1, 8)
    assert conflicts < 0.75 * np.mean([np.bincount(phase).max() for phase in shuffled])


def test_all_tiles_have_the_same_banks():
    tiles = [packing.tile_for(taps, size, size, 32, 2, 1) for taps in (1, 3) for size in (1, 2, 4, 8, 16, 32)]
    assert {tile.channel_bytes // 16 % 8 for tile in tiles} == {5}
    assert max(tile.shared_bytes for tile in tiles) <= 48 * 1024


@pytest.mark.parametrize(
    ("pattern", "sparsity", "variant"),
    [
        ("Block(32, 32)", 0.9, "v32"),
        ("Vector(32)", 0.9, "v32"),
        ("Vector(16)", 0.9, "v16"),
        ("NM(2, 4) & Block(32, 32)", 0.9, "2:4"),
        ("Balanced(4)", 0.5, "2:4"),
        ("Unstructured()", 0.99, "v16"),
        ("Unstructured()", 0.5, "v32"),
    ],
)
def test_plan_finds_the_variant_with_the_least_work(pattern, sparsity, variant):
    weight = torch.randn(128, 128, 3, 3, generator=torch.Generator().manual_seed(0))
    weight = weight * parse(pattern).mask(weight, sparsity)
    assert cuda.plan(weight, torch.zeros(128), device="cpu").variant == variant


def test_unpackable_weights_are_refused():
    bias = torch.zeros(8)
    with pytest.raises(ValueError, match=r"\(8, 8, 5, 5\)"):
        cuda.plan(torch.ones(8, 8, 5, 5), bias, device="cpu")
    with pytest.raises(ValueError, match="variant 'v8' is unknown"):
        cuda.plan(torch.ones(8, 8), bias, device="cpu", variant="v8")
    with pytest.raises(ValueError, match="not 2:4"):
        cuda.plan(torch.ones(8, 8), bias, device="cpu", variant="2:4")
    with pytest.raises(ValueError, match="halo_out"):
        cuda.plan(torch.ones(8, 8), bias, device="cpu", halo_out=2)


def test_misfitting_activations_are_refused():
    plan = cuda.plan(torch.ones(8, 16, 3, 3), torch.zeros(8), device="cpu", pool=True)
    with pytest.raises(ValueError, match="16 input channels"):
        cuda.conv(cuda.to_layout(torch.ones(1, 8, 4, 4), 1), plan)
    with pytest.raises(ValueError, match="float32"):
        cuda.conv(cuda.to_layout(torch.ones(1, 16, 4, 4), 1).float(), plan)
    with pytest.raises(ValueError, match="1x4 pixels are too small for a max-pool"):
        cuda.conv(cuda.to_layout(torch.ones(1, 16, 1, 4), 1), plan)


def test_blocks_on_a_multiprocessor_share_its_shared_memory():
    tile = packing.tile_for(3, 32, 32, 16, 2, 1)
    assert (tile.warps, tile.shared_bytes) == (2, 37 * 1024)
    assert [tile.resident(shared) for shared in SHARED_BYTES.values()] == [4, 6]  # its registers would do for 8
    assert tile.resident(48 * 1024) == tile.resident(1024) == 1
    assert packing.tile_for(3, 32, 32, 32, 8, 1).resident(SHARED_BYTES[9, 0]) == 1  # eight warps of many registers
    assert packing.tile_for(3, 32, 32, 32, 2, 4).resident(SHARED_BYTES[9, 0]) == 1


def test_more_blocks_than_a_grid_takes_are_refused():
    plan = cuda.plan(torch.ones(8, 16, 1, 1), torch.zeros(8), device="cpu")
    arrays = *plan.packed(2, 1)[0], plan.bias
    x = torch.empty(1, 16, 1, 1, 8, dtype=torch.float16).expand(1, 16, 1028, 1028, 8)
    with pytest.raises(ValueError, match="8 images of 1028x1028 pixels are too many at once: run them in parts"):
        backend.run(None, x, arrays, 8, 1, 32, False, False, 0, Choice(2, 1, 1))


@pytest.mark.parametrize("start", [0, 1, 8])
def test_kernels_get_activations_where_they_may_load_sixteen_bytes(start):
    x = torch.arange(40.0).half()[start : start + 16]
    assert backend.aligned(x).data_ptr() % 16 == 0
    assert torch.equal(backend.aligned(x), x)
    assert (backend.aligned(x) is x) == (start != 1)


# --- The operator ----------------------------------------------------------------------------------------------------


def opcheck(layer, device):
    plan = layer.plan(device)
    choice = backend.SINGLE if plan.variant == "v1" else Choice(2, 2, 1)
    arrays = *plan.packed(*choice[:2])[0], plan.bias
    sizes = plan.c_out, plan.taps, plan.rows, plan.relu, plan.pool, plan.halo_out, *choice
    checks = "test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"
    torch.library.opcheck(
        torch.ops.reprolib.sparse_conv.default, (layer.input(device), *arrays, *sizes), test_utils=checks
    )


@pytest.mark.parametrize("variant", sorted(backend.ROWS))
@pytest.mark.parametrize("pool", [False, True])
def test_operator_is_well_formed(variant, pool):
    opcheck(Layer((3, 20, 5, 4), 24, variant, pool=pool), "cpu")


def test_without_a_gpu_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"no NVIDIA GPU.*sparsify\(model, device='cpu'\)"):
        cuda.require()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(RuntimeError, match=r"compute capability 7\.5, 8\.0 is needed"):
        cuda.require()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    cuda.require()
    monkeypatch.setattr(backend, "_finds_compiler", lambda: False)
    with pytest.raises(RuntimeError, match=r"finds no NVVM.*set CUDA_HOME to the folder of the CUDA toolkit"):
        cuda.require()
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="numba-cuda is not installed"):
        cuda.require()


def test_imports_without_numba_cuda():
    program = "import sys; sys.modules['numba.cuda'] = None; from reprolib.sparse import cuda; print(cuda.IMAGES)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "8\n", done.stderr


# --- The kernels' source, emulated -----------------------------------------------------------------------------------


def emulate(layer, x=None):
    """Run a layer with the kernels that a GPU would run, on the CPU."""
    import emulation

    from reprolib.sparse.cuda.kernels import KERNELS

    names = []

    def launch(name, sizes, grid, threads, *arguments):
        names.append(name)
        emulation.launch(KERNELS[name][0](*sizes), grid, threads, *arguments)

    plan = layer.plan()
    choice = layer.choice or Choice(packing.warps_for(plan.c_out, plan.rows), 1, 1)
    choice = backend.SINGLE if plan.variant == "v1" else choice
    sizes = plan.c_out, plan.taps, plan.rows, plan.relu, plan.pool, plan.halo_out, choice
    x = layer.input() if x is None else x
    with poisoned():
        y = backend.run(launch, x, (*plan.packed(*choice[:2])[0], plan.bias), *sizes)
    wanted = ["scalar"] if plan.variant == "v1" else ["tensor_core"]
    assert names == wanted + ["reduce"] * (choice.slices > 1)
    return y


EMULATED = {
    "v32": Layer((3, 20, 5, 6), 40, "v32"),
    "v32, pool, odd map": Layer((1, 20, 5, 7), 70, "v32", pool=True),
    "v16, two image groups": Layer((9, 33, 4, 4), 20, "v16", relu=False),
    "v16, eight warps": Layer((1, 17, 3, 3), 128, "v16", density=0.05),
    "v16, two row blocks": Layer((1, 3, 4, 4), 130, "v16", halo_out=0),
    "2:4": Layer((3, 20, 4, 4), 40, "2:4"),
    "2:4, pool, lone channels": Layer((2, 17, 6, 4), 33, "2:4", pool=True, relu=False),
    "2x2 map": Layer((17, 20, 2, 2), 20, "v16"),
    "2x2 map, pool": Layer((25, 9, 2, 2), 40, "v32", pool=True, halo_out=0),
    "1x1 map": Layer((2, 9, 1, 1), 20, "v16", halo_out=0),
    "linear": Layer((9, 70, 1, 1), 10, "v32", taps=1, relu=False, halo_out=0),
    "linear, many images": Layer((130, 20, 1, 1), 40, "v16", taps=1, halo_out=0),
    "1x1 convolution": Layer((3, 40, 6, 5), 20, "v16", taps=1),
    "1x1 convolution, 2:4, pool": Layer((3, 40, 4, 4), 20, "2:4", taps=1, pool=True),
    "all zero": Layer((1, 20, 4, 4), 40, "v32", density=0.0),
    "all dense": Layer((1, 16, 4, 4), 32, "v32", density=1.0),
    "sliced": Layer((3, 130, 3, 4), 20, "v16", choice=Choice(2, 1, 4)),
    "sliced, pool, sparse": Layer((9, 200, 4, 4), 40, "v32", density=0.02, pool=True, choice=Choice(2, 2, 6)),
    "sliced, 2x2 map, 2:4": Layer((17, 130, 2, 2), 70, "2:4", density=0.1, halo_out=0, choice=Choice(4, 2, 4)),
    "sliced linear": Layer((20, 130, 1, 1), 20, "v16", taps=1, halo_out=0, choice=Choice(2, 4, 2)),
    "scalar": Layer((3, 20, 5, 7), 10, "v1"),
    "scalar, pool": Layer((9, 5, 5, 6), 7, "v1", density=0.1, pool=True, relu=False),
    "scalar linear": Layer((9, 20, 1, 1), 7, "v1", taps=1, halo_out=0),
}


@pytest.mark.parametrize("layer", EMULATED.values(), ids=EMULATED)
def test_kernel_source_computes_the_convolution(layer):
    layer.check(emulate(layer))


ODD = {  # shapes that nothing divides
    "v16, pool": Layer((1, 67, 3, 5), 75, "v16", pool=True),
    "v32, 2x2 map": Layer((17, 67, 2, 1), 150, "v32", density=0.1, relu=False),
    "2:4, 1x1 convolution": Layer((9, 67, 5, 3), 150, "2:4", taps=1),
}


@pytest.mark.parametrize("name", ODD)
def test_every_way_to_cut_a_layer_is_right(name):
    layer = ODD[name]
    ways = list(tuning.candidates(layer.c_out, backend.ROWS[layer.variant], steps=5))
    assert {way.slices for way in ways} == {1, 2} and {(2, 4), (4, 2), (8, 1)} <= {way[:2] for way in ways}
    for way in ways:
        layer.check(emulate(dataclasses.replace(layer, choice=way)))


def test_an_empty_row_block_gives_its_bias():
    layer = Layer((1, 16, 4, 4), 160, "v16", density=1.0, relu=False)
    layer.tensors[1][:128] = 0
    layer.check(emulate(layer))


@pytest.mark.parametrize("variant", ["v16", "v1"])
@pytest.mark.parametrize("choice", [None, Choice(2, 2, 4)])
def test_not_a_number_passes_through_relu_and_pool(variant, choice):
    if variant == "v1" and choice:
        pytest.skip("single weights are not sliced")
    layer = Layer((2, 128, 4, 4), 5, variant, density=1.0, pool=True, halo_out=0, choice=choice)
    x = layer.tensors[0].clone()
    x[1, 7, 2, 2] = torch.nan  # one pixel of each pooled window is next to it
    got = cuda.from_layout(emulate(layer, cuda.to_layout(x, 1)), 2)
    assert got[1, :].isnan().all()
    assert not got[0, :].isnan().any()


def test_infinity_becomes_not_a_number_only_where_the_dense_network_says_so():
    """Columns that fill up a group are zeros, of channel 0: zero times infinity is not a number, there as here."""
    layer = Layer((1, 20, 5, 6), 40, "v32", density=0.1, relu=False, halo_out=0)
    x, weight, bias = layer.tensors
    x = x.clone()
    x[0, 0, 2, 2] = torch.inf
    got = cuda.from_layout(emulate(layer, cuda.to_layout(x, 1)), 1).isfinite()
    wanted = F.conv2d(x.double(), weight.half().double(), bias.double(), padding=1).isfinite()
    assert not got.all() and (got | ~wanted).all()


def test_emulation_catches_faults():
    """As in a kernel, `cuda` is Numba's here: the emulation gives each thread its own."""
    import emulation
    from numba.cuda.types import uint8

    from reprolib.sparse.cuda.ptx import commit_copies, copy_async, load_shared_x4, mma, shared_address, store_x4

    def hasty(x, y):
        shared = shared_address(cuda.shared.array(16, uint8, alignment=16))
        copy_async(shared, x)
        commit_copies()  # but no wait
        a, b, c, d = load_shared_x4(shared)
        store_x4(y, a, b, c, d)

    def beyond(x, y):
        shared = shared_address(cuda.shared.array(16, uint8, alignment=16))
        load_shared_x4(shared + 16)

    def unaligned(x, y):
        store_x4(y + 8, 0, 0, 0, 0)

    def outside(x, y):
        store_x4(y + 32, 0, 0, 0, 0)

    def diverged(x, y):
        if cuda.threadIdx.x:
            mma(0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0)

    def stuck(x, y):
        if cuda.threadIdx.x < 32:
            cuda.syncthreads()

    x, y = torch.ones(8).half(), torch.zeros(16).half()
    late = []
    for seed in range(8):
        emulation.launch(hasty, (1,), 1, x, y, seed=seed)
        late.append(y[:8].isnan().all().item())
    assert True in late and False in late
    for kernel, message in [
        (beyond, "shared access out of bounds"),
        (unaligned, "not aligned"),
        (outside, "global access out of bounds"),
        (diverged, "a warp diverged"),
        (stuck, "before a barrier"),
    ]:
        with pytest.raises(AssertionError, match=message):
            emulation.launch(kernel, (1,), 64, x, y)


def test_what_a_launch_compiles_is_what_the_assembler_looks_at(monkeypatch):
    """Without link-time optimisation, for as many threads; and nobody is warned of layers with few blocks."""
    import numba
    from numba import cuda as nb

    asked = {}
    monkeypatch.setattr(nb, "jit", lambda signature, **options: lambda kernel: asked.update(options) or kernel)
    backend._compiled("scalar", (3, False, True), 128, device=-1)
    assert asked == {"launch_bounds": 128, "lto": False}
    assert numba.config.CUDA_LOW_OCCUPANCY_WARNINGS == 0


@pytest.mark.parametrize("name", ["mma", "mma_sparse_low", "load_matrices_transposed", "load_x4", "copy_async"])
def test_what_a_warp_does_together_is_never_moved_into_a_branch(name):
    from numba.cuda import types

    from reprolib.sparse.cuda import ptx

    calls = []
    builder = SimpleNamespace(
        call=lambda code, arguments, attrs: calls.append(attrs), extract_value=lambda result, i: None
    )
    context = SimpleNamespace(
        cast=lambda builder, value, given, wanted: value, make_tuple=lambda *_: None, get_dummy_value=lambda: None
    )
    instruction = getattr(ptx, name)
    count = len(inspect.signature(instruction._defn).parameters) - 1
    signature, generate = instruction._defn(None, *[types.int64] * count)
    generate(context, builder, signature, [None] * count)
    together = name.startswith(("mma", "load_matrices"))
    assert calls == [("convergent",) if together else ()]


# --- The kernels' code, assembled ------------------------------------------------------------------------------------

needs_assembler = pytest.mark.skipif(
    not all(map(assembler.find_tool, ("ptxas", "nvdisasm"))), reason="needs ptxas and nvdisasm"
)
ARCHES = [(8, 0), (9, 0)]


def tile(taps, size, variant, warps=8, splits=1, **flags):
    """The tile that `backend.run` takes."""
    flags["two_of_four"] = variant == "2:4"
    return packing.tile_for(taps, size, size, backend.ROWS[variant], warps, splits, **flags)


TILES = {
    "v32": tile(3, 32, "v32"),
    "v32, pool": tile(3, 32, "v32", pool=True),
    "v16": tile(3, 32, "v16"),
    "2:4": tile(3, 32, "2:4"),
    "2:4, pool": tile(3, 32, "2:4", pool=True),
    "v32, 2x2 map": tile(3, 2, "v32"),
    "2:4, 2x2 map, pool": tile(3, 2, "2:4", pool=True),
    "v32, 1x1 convolution": tile(1, 32, "v32"),
    "v32, linear": tile(1, 1, "v32", relu=False),
    "v32, linear, split": tile(1, 1, "v32", 2, 4),
    "v16, 2x2 map, split": tile(3, 2, "v16", 2, 4),
}
TILES |= {  # all blocks, with the most that follows the sums
    f"{variant}, pool, {warps} x {splits} warps": tile(3, 32, variant, warps, splits, pool=True)
    for variant in ("v32", "v16", "2:4")
    for warps, splits in tuning.block_shapes(512, backend.ROWS[variant])
}


@needs_assembler
@pytest.mark.parametrize("arch", ARCHES, ids="sm_{0[0]}{0[1]}".format)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_tensor_core_kernels_spill_nothing(tile, arch):
    from reprolib.sparse.cuda.kernels import KERNELS

    make, arguments = KERNELS["tensor_core"]
    report = assembler.assemble(make(tile), arguments, threads=tile.threads, arch=arch)
    # The sums live in registers, so the inner loop stands there once, unrolled over pixels and row tiles.
    assert report.spill_bytes == report.local_bytes == report.count("LDL") == report.count("STL") == 0
    whole_registers = -(-report.registers // 8) * 8
    assert whole_registers * tile.threads * tile.resident(SHARED_BYTES[arch]) <= 65536
    assert report.count("HMMA.SP" if tile.two_of_four else "HMMA.16816") == tile.row_tiles * tile.pixels
    assert report.count("LDSM") == tile.pixels // (1 if tile.two_of_four else 2)
    assert report.count("LDGSTS") > 0
    assert report.shared_bytes == tile.shared_bytes


@needs_assembler
@pytest.mark.parametrize("arch", ARCHES, ids="sm_{0[0]}{0[1]}".format)
@pytest.mark.parametrize(
    ("name", "sizes"), [("reduce", (TILES["v32"],)), ("scalar", (3, False, True)), ("scalar", (3, True, True))]
)
def test_other_kernels_spill_nothing(name, sizes, arch):
    from reprolib.sparse.cuda.kernels import KERNELS

    make, arguments = KERNELS[name]
    report = assembler.assemble(make(*sizes), arguments, threads=backend.THREADS, arch=arch)
    assert report.spill_bytes == report.local_bytes == 0
    assert report.registers <= 96
    assert report.count("STG") > 0


@needs_assembler
def test_report_tells_of_spills():
    from numba import cuda as nb
    from numba.cuda import types

    def greedy(out, n):
        array = nb.local.array(64, types.float32)
        for i in range(64):
            array[i] = i
        out[0] = array[n]

    report = assembler.assemble(greedy, (types.float32[:], types.int32), threads=32)
    assert report.local_bytes >= 256
    assert report.count("STL") > 0


def test_a_missing_assembler_is_named(monkeypatch):
    monkeypatch.setattr(assembler, "find_tool", lambda name: None)
    with pytest.raises(RuntimeError, match="ptxas and nvdisasm not found"):
        assembler.assemble(None, (), 32)


# --- On a GPU --------------------------------------------------------------------------------------------------------


ON_GPU = EMULATED | {
    "VGG, 32x32": Layer((16, 64, 32, 32), 64, "v32", density=0.1),
    "VGG, 16x16, pool": Layer((16, 128, 16, 16), 128, "v16", density=0.25, pool=True),
    "VGG, 4x4, 2:4": Layer((64, 512, 4, 4), 512, "2:4", density=0.5),
    "VGG, 2x2": Layer((128, 512, 2, 2), 512, "v32", density=0.1),
    "VGG, one image": Layer((1, 512, 4, 4), 512, "v32", density=0.1, pool=True),
}


@has_gpu
@pytest.mark.parametrize("layer", ON_GPU.values(), ids=ON_GPU)
def test_gpu_computes_the_convolution(layer):
    cuda.require()
    with poisoned():
        y = cuda.conv(layer.input("cuda"), layer.plan("cuda"))
    layer.check(y)


@has_gpu
@pytest.mark.parametrize("name", ["VGG, one image", "VGG, 32x32", "scalar, pool"])
def test_gpu_graph_replays_the_convolution(name):
    layer = ON_GPU[name]
    plan, x = layer.plan("cuda"), layer.tensors[0].cuda()
    cuda.warm_up(plan, *(layer.shape[i] for i in (0, 2, 3)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda.conv(cuda.to_layout(x, 1), plan)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        y.fill_(torch.nan)
        graph.replay()
        layer.check(y, x)


@has_gpu
def test_gpu_kernels_run_on_the_current_stream():
    layer = ON_GPU["VGG, 32x32"]
    plan, x = layer.plan("cuda"), layer.input("cuda")
    late = torch.full_like(x, torch.nan)
    cuda.conv(x, plan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second: any other stream would read NaN
        late.copy_(x)
        y = cuda.conv(late, plan)
    stream.synchronize()
    layer.check(y)


@has_gpu
@pytest.mark.parametrize("variant", sorted(backend.ROWS))
def test_gpu_operator_is_well_formed(variant):
    opcheck(Layer((3, 20, 5, 4), 24, variant, pool=True), "cuda")
