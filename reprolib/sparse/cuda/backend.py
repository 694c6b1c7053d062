"""Pruned convolutions and linear layers on an NVIDIA GPU: fp16 activations and weights, fp32 sums.

    p = plan(weight, bias, relu=True, pool=True, halo_out=1, device="cuda")
    y = from_layout(conv(to_layout(x, halo=1), p), len(x), halo=1)

Bias, ReLU and 2x2 max-pool are part of the kernel. Activations stay in the kernels' layout between layers:
``[ceil(N / 8)][C][H + 2 halo][W + 2 halo][8]`` fp16, eight images interleaved, with a halo of zeros that a convolution
writes itself. `conv` may be captured in a CUDA graph; call it once before, for the first call compiles (`warm_up`).

This module imports everywhere; `require` says what a machine lacks to run it. On CPU tensors `conv` runs the NumPy
specification of the kernels, which is slow and only good for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import statistics
import sys
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reprolib.sparse.cuda import packing, tuning
from reprolib.sparse.cuda.packing import CHUNK, IMAGES, Packed, Tile
from reprolib.sparse.cuda.tuning import Choice, Gpu, Work

# What a weight costs in each kernel, relative to one in a kept column of 32. Estimates from the instructions that a
# multiplication needs, to be measured: 16 rows use half of what each load from shared memory brings; 2:4 counts both
# halves of a quad. On the CUDA cores a weight would cost about 32: more than even v16 does for a column of which 15
# weights are zero. So v1 runs only where it is named, for comparison.
COSTS = {"v32": 1.0, "v16": 1.25, "2:4": 0.62}
ROWS = {"v32": 32, "v16": 16, "2:4": 32, "v1": 1}
THREADS = 128  # per block, of the kernels without tensor cores
SINGLE = Choice(1, 1, 1)  # of the kernel for single weights: there is nothing to choose
NOMINAL = Gpu(132, 228 * 1024)  # an H100: for which layers are cut where there is no GPU
TIMINGS, HOLD_CYCLES = 5, 100_000
LARGEST_GRID = 65_535  # blocks in y or z


@dataclass(frozen=True, eq=False)
class Plan:
    """A pruned layer. Made by `plan`.

    `variant` names the kernel: ``v32`` and ``v16`` keep columns of so many rows, ``2:4`` two of four weights in columns
    of 32 rows, ``v1`` single weights. `matrix` is the weight, fp16 ``[C_out, taps, taps, C_in]`` on the CPU; `packed`
    gives it as kernels read it. `bias` is fp32, filled up to whole row blocks, on the device.
    """

    variant: str
    c_out: int
    c_in: int
    taps: int
    relu: bool
    pool: bool
    halo_out: int
    matrix: np.ndarray
    bias: Tensor
    choices: dict[tuple[int, int, int], Choice] = field(default_factory=dict)  # by image groups, height and width
    _packed: dict[tuple[int, int], tuple[tuple[Tensor, ...], Work]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return ROWS[self.variant]

    def packed(self, warps: int, splits: int) -> tuple[tuple[Tensor, ...], Work]:
        """Weights, metadata, columns and schedule of `packing.Packed` (of `packing.pack_scalar` with ``v1``, its row
        starts as schedule) for blocks of so many warps, on the device; and what there is to do. Made once.
        """
        if (warps, splits) not in self._packed:
            if self.variant == "v1":
                weights, columns, schedule = packing.pack_scalar(self.matrix)
                packed, work = Packed(weights, np.zeros((0, 32), np.uint32), columns, schedule), Work(0, 0, 0)
            else:
                packed = packing.pack(self.matrix, self.rows, warps, self.variant == "2:4", splits)
                work = tuning.work_of(packed, warps * splits, math.ceil(self.c_out / (self.rows * warps)))
            # torch has few operations for unsigned integers; the bits are the same.
            arrays = packed.weights, packed.metadata.view(np.int32), packed.columns, packed.schedule
            arrays = [a.view(np.int16) if a.dtype == np.uint16 else a for a in arrays]
            tensors = tuple(torch.from_numpy(a).to(self.bias.device) for a in arrays)
            self._packed[warps, splits] = tensors, work
        return self._packed[warps, splits]

    def tile(self, height: int, width: int, choice: Choice) -> Tile:
        """The sizes of the kernel for maps of `height` x `width`."""
        flags = {"two_of_four": self.variant == "2:4", "relu": self.relu, "pool": self.pool}
        return packing.tile_for(self.taps, height, width, self.rows, choice.warps, choice.splits, **flags)

    def ordered(self, groups: int, height: int, width: int, gpu: Gpu) -> list[Choice]:
        """All ways to run the layer on so many image groups, the fastest by the model first."""

        def estimate_us(choice: Choice) -> float:
            tile = self.tile(height, width, choice)
            _, work = self.packed(choice.warps, choice.splits)
            return tuning.estimate_us(
                tile, work, math.prod(blocks(tile, self.c_out, groups, height, width)), choice.slices, gpu
            )

        steps = math.ceil(self.c_in / CHUNK)
        return sorted(tuning.candidates(self.c_out, self.rows, steps), key=estimate_us)


def plan(
    weight: Tensor,
    bias: Tensor,
    *,
    relu: bool = False,
    pool: bool = False,
    halo_out: int = 0,
    device: str | torch.device = "cuda",
    variant: str | None = None,
) -> Plan:
    """Pack a weight ``[C_out, C_in, 3, 3]``, ``[C_out, C_in, 1, 1]`` or ``[out, in]``, its zeros pruned; onto `device`.

    Convolutions have stride 1 and a padding that keeps the size. After bias and `relu`, `pool` takes the maximum of
    each 2x2 window; the output gets a halo of `halo_out` (0 or 1) zeros. `variant` is the one with the least work to
    do, unless named. Raises ValueError for another shape or variant, and for 2:4 where the weight is not.
    """
    if weight.dim() == 2:
        weight = weight[:, :, None, None]
    if weight.dim() != 4 or weight.shape[2:] not in ((1, 1), (3, 3)):
        raise ValueError(f"no kernel for a weight of shape {tuple(weight.shape)}: 3x3, 1x1 and linear are supported")
    if halo_out not in (0, 1):
        raise ValueError(f"halo_out must be 0 or 1, not {halo_out}")
    c_out, c_in, taps, _ = weight.shape
    matrix = weight.detach().cpu().permute(0, 2, 3, 1).half().contiguous().numpy()
    kept = packing.nonzero(matrix)
    if variant is None:
        work = costs(kept)
        variant = min(work, key=work.get)
    if variant not in ROWS:
        raise ValueError(f"variant {variant!r} is unknown: use one of {', '.join(ROWS)}")
    if variant == "2:4" and not packing.fits_two_of_four(kept):
        raise ValueError("the weight is not 2:4: some four consecutive channels hold more than two non-zero weights")
    most_rows = ROWS[variant] * packing.warps_for(c_out, ROWS[variant])
    padded_bias = F.pad(bias.detach().cpu().float(), (0, -c_out % most_rows)).to(device)
    return Plan(variant, c_out, c_in, taps, relu, pool, halo_out, matrix, padded_bias)


def costs(kept: np.ndarray) -> dict[str, float]:
    """The work of each tensor-core variant that can run a weight, in weights of ``v32``.

    `kept` is the result of `packing.nonzero`.
    """
    work = {variant: packing.stored_weights(kept, ROWS[variant]) for variant in ("v32", "v16")}
    if packing.fits_two_of_four(kept):
        work["2:4"] = packing.stored_weights(kept, ROWS["2:4"], packing.QUAD)
    return {variant: COSTS[variant] * weights for variant, weights in work.items()}


# --- Layout ----------------------------------------------------------------------------------------------------------


def to_layout(x: Tensor, halo: int) -> Tensor:
    """``[N, C, H, W]`` of any float type to the kernels' layout, fp16, with a halo and missing images of zeros."""
    n, c, height, width = x.shape
    padded = F.pad(x.half(), (halo, halo, halo, halo, 0, 0, 0, -n % IMAGES))
    groups = padded.reshape(-1, IMAGES, c, height + 2 * halo, width + 2 * halo)
    return groups.permute(0, 2, 3, 4, 1).contiguous()


def from_layout(y: Tensor, n: int, halo: int = 0) -> Tensor:
    """The first `n` images of activations in the kernels' layout, without the halo: ``[n, C, H, W]`` fp16."""
    inner = y[:, :, halo : y.shape[2] - halo, halo : y.shape[3] - halo]
    return inner.permute(0, 4, 1, 2, 3).flatten(0, 1)[:n].contiguous()


# --- The operator ----------------------------------------------------------------------------------------------------


def conv(x: Tensor, plan: Plan) -> Tensor:
    """Run a layer on activations in the kernels' layout, with a halo of 1 for 3x3, 0 otherwise; on torch's stream.

    The result is in the same layout, its halo as planned. Raises ValueError for activations that do not fit.
    """
    halo = plan.taps // 2
    height, width = x.shape[2] - 2 * halo, x.shape[3] - 2 * halo
    if x.dim() != 5 or x.shape[1] != plan.c_in or x.shape[4] != IMAGES or x.dtype != torch.float16:
        raise ValueError(f"activations {tuple(x.shape)} {x.dtype} do not fit a layer of {plan.c_in} input channels")
    if min(height, width) < 1 + plan.pool:
        raise ValueError(f"maps of {height}x{width} pixels are too small{' for a max-pool' * plan.pool}")
    return _run(x, plan, _choice(x, plan, height, width))


def _run(x: Tensor, plan: Plan, choice: Choice) -> Tensor:
    arrays, _ = plan.packed(choice.warps, choice.splits)
    sizes = plan.c_out, plan.taps, plan.rows, plan.relu, plan.pool, plan.halo_out
    return torch.ops.reprolib.sparse_conv(x, *arrays, plan.bias, *sizes, *choice)


def _choice(x: Tensor, plan: Plan, height: int, width: int) -> Choice:
    """How to run the layer on these activations: found at the first call, on a GPU by timing."""
    shape = len(x), height, width
    if shape not in plan.choices:
        plan.choices[shape] = SINGLE if plan.variant == "v1" else _found(x, plan, shape)
    return plan.choices[shape]


def _found(x: Tensor, plan: Plan, shape: tuple[int, int, int]) -> Choice:
    if x.device.type != "cuda":
        return plan.ordered(*shape, NOMINAL)[0]
    ordered = plan.ordered(*shape, _gpu(x.device))
    kept = np.count_nonzero(plan.matrix)
    key = f"{plan.variant} {plan.taps}x{plan.taps} {plan.c_in}-{plan.c_out} {kept} {shape} {plan.pool:d}{plan.halo_out}"
    time_us = None
    if not torch.cuda.is_current_stream_capturing():
        time_us = functools.partial(_time_us, x, plan)
        print("timing ways to run a CUDA layer: a few seconds, once for each layer and batch", file=sys.stderr)
    return tuning.chosen(ordered, key, tuning.file_for(torch.cuda.get_device_name(x.device)), time_us)


def _time_us(x: Tensor, plan: Plan, choice: Choice) -> float:
    """Microseconds of a layer run in one of the ways, the median of a few, without the time between launches."""
    times = []
    for turn in range(TIMINGS + 1):  # the first one compiles
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HOLD_CYCLES)  # until all that follows is asked for
        before.record()
        _run(x, plan, choice)
        after.record()
        after.synchronize()
        times += [1e3 * before.elapsed_time(after)] * (turn > 0)
    return statistics.median(times)


def warm_up(plan: Plan, n: int, height: int, width: int) -> None:
    """Compile and load what `conv` needs for `n` images of `height` x `width`, as before capturing a CUDA graph."""
    halo = plan.taps // 2
    shape = math.ceil(n / IMAGES), plan.c_in, height + 2 * halo, width + 2 * halo, IMAGES
    conv(torch.zeros(shape, dtype=torch.float16, device=plan.bias.device), plan)
    torch.cuda.synchronize(plan.bias.device)


@torch.library.custom_op("reprolib::sparse_conv", mutates_args=(), device_types="cuda")
def _sparse_conv(
    x: Tensor,
    weights: Tensor,
    metadata: Tensor,
    columns: Tensor,
    schedule: Tensor,
    bias: Tensor,
    c_out: int,
    taps: int,
    rows: int,
    relu: bool,
    pool: bool,
    halo_out: int,
    warps: int,
    splits: int,
    slices: int,
) -> Tensor:
    arrays = weights, metadata, columns, schedule, bias
    x = aligned(x)
    with torch.cuda.device(x.device):
        return run(launch, x, arrays, c_out, taps, rows, relu, pool, halo_out, Choice(warps, splits, slices))


@_sparse_conv.register_fake
def _(x, weights, metadata, columns, schedule, bias, c_out, taps, rows, relu, pool, halo_out, warps, splits, slices):
    return x.new_empty(_shape_out(x, c_out, taps, pool, halo_out))


@_sparse_conv.register_kernel("cpu")
def _(x, weights, metadata, columns, schedule, bias, c_out, taps, rows, relu, pool, halo_out, warps, splits, slices):
    x, weights, columns, schedule = x.numpy(), weights.numpy(), columns.numpy(), schedule.numpy()
    if rows == 1:
        sums = packing.scalar_spec(x, weights, columns, schedule, taps)
    else:
        packed = Packed(weights, metadata.numpy().view(np.uint32), columns, schedule)
        parts = (
            packing.tensor_core_spec(x, packed, taps, c_out, warps, piece, slices, splits) for piece in range(slices)
        )
        sums = sum(parts)
    return torch.from_numpy(packing.epilogue_spec(sums, bias.numpy(), relu, pool, halo_out))


def aligned(x: Tensor) -> Tensor:
    """The tensor or a copy: contiguous, and where kernels may load 16 bytes at once. A view may begin anywhere."""
    x = x.contiguous()
    return x if x.data_ptr() % packing.ROW_BYTES == 0 else x.clone()


def _shape_out(x: Tensor, c_out: int, taps: int, pool: bool, halo_out: int) -> tuple:
    height, width = ((size - taps // 2 * 2) // (1 + pool) + 2 * halo_out for size in x.shape[2:4])
    return x.shape[0], c_out, height, width, IMAGES


# --- Launching -------------------------------------------------------------------------------------------------------


def blocks(tile: Tile, c_out: int, groups: int, height: int, width: int) -> tuple[int, int, int]:
    """CUDA blocks by rows, by patches of a map and by image groups."""
    patches = math.ceil(height / tile.tall) * math.ceil(width / tile.wide)
    return math.ceil(c_out / tile.block_rows), patches, math.ceil(groups / tile.deep)


def run(launch, x: Tensor, arrays: tuple, c_out, taps, rows, relu, pool, halo_out, choice: Choice) -> Tensor:
    """Run a layer as chosen through `launch` (see there). `arrays` are those of `Plan.packed`, and the bias."""
    weights, metadata, columns, schedule, bias = arrays
    y = x.new_empty(_shape_out(x, c_out, taps, pool, halo_out))
    groups, c_in, height, width = x.shape[0], x.shape[1], x.shape[2] - taps // 2 * 2, x.shape[3] - taps // 2 * 2
    if rows == 1:
        grid = math.ceil(groups * y.shape[2] * y.shape[3] / THREADS), c_out
        sizes = c_in, height, width, c_out, groups, halo_out
        launch("scalar", (taps, pool, relu), grid, THREADS, x, y, weights, columns, schedule, bias, *sizes)
        return y
    flags = {"two_of_four": len(metadata) > 0, "relu": relu, "pool": pool}
    tile = packing.tile_for(taps, height, width, rows, choice.warps, choice.splits, **flags)
    row_blocks, patches, deep_patches = blocks(tile, c_out, groups, height, width)
    slices, in_a_slice = choice.slices, row_blocks * patches * deep_patches
    grid = row_blocks, patches, deep_patches * slices
    if max(grid[1:]) > LARGEST_GRID:
        raise ValueError(f"{groups * IMAGES} images of {height}x{width} pixels are too many at once: run them in parts")
    parts = slices, in_a_slice, tile.block_rows * tile.pixels * IMAGES
    sums = x.new_empty(parts, dtype=torch.float32) if slices > 1 else y
    sizes = c_in, height, width, c_out, groups, halo_out, slices
    launch("tensor_core", (tile,), grid, tile.threads, x, sums, *arrays, *sizes)
    if slices > 1:
        sizes = slices, in_a_slice, row_blocks, groups, c_out, height, width, halo_out
        launch("reduce", (tile,), (math.ceil(y.numel() / IMAGES / THREADS),), THREADS, sums, y, bias, *sizes)
    return y


def require() -> None:
    """Raise RuntimeError, in one line, if this machine can't run the kernels."""
    if not torch.cuda.is_available():
        missing = "no NVIDIA GPU, or no driver for it"
    elif importlib.util.find_spec("numba_cuda") is None:
        missing = "the package numba-cuda is not installed"
    elif (capability := torch.cuda.get_device_capability()) < (8, 0):
        missing = f"compute capability {'.'.join(map(str, capability))}, 8.0 is needed"
    elif not _finds_compiler():
        missing = (
            "numba-cuda finds no NVVM, which compiles them; set CUDA_HOME to the folder of the CUDA toolkit, the one "
            "that holds bin/nvcc"
        )
    else:
        return
    raise RuntimeError(f"can't run the CUDA kernels: {missing}; use the CPU kernels: sparsify(model, device='cpu')")


def _finds_compiler() -> bool:
    from numba.cuda.cudadrv import nvvm

    try:
        return nvvm.is_available()
    except Exception:  # whatever its loader raises where the library is missing
        return False


def launch(name: str, sizes: tuple, grid: tuple, threads: int, *arguments) -> None:
    """Launch a kernel of `kernels.KERNELS`, made for `sizes`, on torch's stream; tensors go by their address."""
    from numba import cuda

    stream = cuda.external_stream(torch.cuda.current_stream().cuda_stream)
    kernel = _compiled(name, sizes, threads, torch.cuda.current_device())
    kernel[grid, threads, stream](*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


@functools.cache
def _compiled(name: str, sizes: tuple, threads: int, device: int):
    """A kernel, compiled and loaded on the current device.

    All of them stay below 48 KB of shared memory. For more, a kernel needs the attribute
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, which Numba has no name for; this would be the place to set it.
    """
    import numba
    from numba import cuda, void

    from reprolib.sparse.cuda.kernels import KERNELS

    make, signature = KERNELS[name]
    print("compiling a CUDA kernel: about two seconds, once for each layer size", file=sys.stderr)
    numba.config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # small layers have few blocks
    # Without link-time optimisation: what runs is then what `assembler.assemble` looks at.
    return cuda.jit(void(*signature), launch_bounds=threads, lto=False)(make(*sizes))


@functools.cache
def _gpu(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.multi_processor_count, properties.shared_memory_per_multiprocessor)
