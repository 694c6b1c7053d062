"""Pruned 3x3 and 1x1 convolutions on the CPU: Numba kernels that do work for stored weights only.

**Layout.** Activations live in ``[ceil(N / n)][C][H + 2 halo][W + 2 halo][n]``, float32: n images interleaved, around
every map a halo of zeros where a 3x3 convolution reads it. With n = 16 one pixel of 16 images is one SIMD vector; small
batches take n = 1, and one vector is 16 neighbouring pixels. Both ways a weight multiplies whole vectors, found at a
fixed *offset* (channel, tap) from each output vector's *place* (image, pixel):

    out[place] += weight * x[place + offset]        16 lanes at a time, no matter which weights are zero

**Work.** Stored weights come as vectors of V output channels that share an offset (V = 4 where the zeros allow it, else
1). One task is a *band* of output rows times a *block* of 16 output channels; it sums up in a scratch that stays in the
cache, S vectors per output channel in registers at a time. Single weights (V = 1) go through the input channels in
chunks, so that the 16 output channels find a chunk's pixels in the first-level cache. The epilogue adds the bias,
applies ReLU and the 2x2 max-pool and writes the next layer's input, halo included.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from dataclasses import dataclass, field
from functools import cache, lru_cache

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils, event
from numba.extending import intrinsic
from torch import Tensor

LANES = 16  # float32 in a vector: one AVX-512 register, two of AVX2, four of NEON
BLOCK_ROWS = 16  # output channels of a task
# Output vectors of a task, at most, for each output channel, by images interleaved: what 16 of them read stays in the
# second-level cache; a single image is small, and more vectors waste fewer lanes at the ends of bands.
BAND_VECTORS = {LANES: 16, 1: 64}
SMALL_BATCH = 8  # below it, lanes are pixels instead of images

# Vector length V: output vectors S per register tile, and input channels per chunk. V * S accumulators fill half of the
# registers, the rest holds inputs and weights.
_WIDE = llvmlite.binding.get_host_cpu_features().get("avx512f", False)
TILE_VECTORS = {1: 8, 4: 4} if _WIDE else {1: 4, 4: 1}
CHUNK_CHANNELS = {1: 32, 4: 1 << 30}
# Time of one stored weight, relative to V = 4: measured at 90 % sparsity on an AMD EPYC (Zen 4), 3x3, batch 64.
RELATIVE_COST = {1: 1.6, 4: 1.0}


# --- Layout ---------------------------------------------------------------------------------------------------------


def interleaved(batch: int) -> int:
    """How many images the layout interleaves for this batch: 16, or 1 for small batches."""
    return LANES if batch >= SMALL_BATCH else 1


def to_layout(images: Tensor, halo: int) -> Tensor:
    """Float images ``[N, C, H, W]`` in the kernels' layout; missing images of the last 16 are zero."""
    batch, channels, height, width = images.shape
    n = interleaved(batch)
    x = workspace("input", (-(-batch // n), channels, height + 2 * halo, width + 2 * halo, n)).zero_()
    inner = x[:, :, halo : halo + height, halo : halo + width]
    whole = batch // n
    inner[:whole] = images[: whole * n].reshape(whole, n, channels, height, width).permute(0, 2, 3, 4, 1)
    if batch % n:
        inner[whole, ..., : batch % n] = images[whole * n :].permute(1, 2, 3, 0)
    return x


def from_layout(x: Tensor, batch: int) -> Tensor:
    """Undo `to_layout` for activations without a halo: a new tensor ``[N, C, H, W]``."""
    groups, channels, height, width, n = x.shape
    return x.permute(0, 4, 1, 2, 3).reshape(groups * n, channels, height, width)[:batch].clone()


_workspaces = threading.local()


def workspace(name: str, shape: tuple[int, ...]) -> Tensor:
    """Float32 memory of this thread that is used again by the next call with the same name: fresh pages are slow.

    Two vectors more than `shape` needs are there behind it: the last vector of a map may be read beyond its end.
    """
    size = math.prod(shape)
    held = vars(_workspaces)
    if name not in held or held[name].numel() < size + 2 * LANES:
        with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside of it
            held[name] = torch.empty(size + 2 * LANES)
    return held[name][:size].view(shape)


# --- What the kernel works from -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plan:
    """A layer as the kernel reads it: its weight, its bias, and what its epilogue does.

    *Entries* are vectors of `length` weights, sorted by block of output channels, chunk of input channels, output
    channel, input channel and tap: ``values [entries, length]``, ``channels [entries]``, ``taps [entries]``. A
    *segment* is a run of entries with the same output channels and chunk: ``segment_starts [segments + 1]``,
    ``segment_rows [segments]`` (which vector of output channels in its block). Block i of 16 output channels owns the
    segments ``block_starts[i]`` to ``block_starts[i + 1]``.
    """

    length: int
    shape: tuple[int, int, int]  # C_out, C_in, K: the kernel is K x K
    block_starts: np.ndarray
    segment_rows: np.ndarray
    segment_starts: np.ndarray
    channels: np.ndarray
    taps: np.ndarray
    values: np.ndarray
    bias: np.ndarray
    relu: bool
    pool: bool
    halo_out: int  # pixels of zeros that the next layer expects around its input
    _offsets: dict = field(default_factory=dict, repr=False)

    @property
    def halo(self) -> int:
        """Pixels of zeros that this layer expects around its own input."""
        return self.shape[2] // 2

    def offsets(self, height: int, width: int, n: int) -> np.ndarray:
        """How far, in floats, each entry reads from an output vector's place; remembered for each input size."""
        if (height, width, n) not in self._offsets:
            kernel, halo = self.shape[2], self.halo
            pixels = (self.channels.astype(np.int64) * (height + 2 * halo) + self.taps // kernel) * (width + 2 * halo)
            self._offsets[height, width, n] = ((pixels + self.taps % kernel) * n).astype(np.int32)
        return self._offsets[height, width, n]


def plan(weight: Tensor, bias: Tensor, *, relu: bool, pool: bool, halo_out: int = 0, length: int | None = None) -> Plan:
    """Prepare a pruned weight ``[C_out, C_in, K, K]`` (K = 1 or 3) or ``[out, in]`` and its bias ``[C_out]``.

    Without `length` the zeros decide whether single weights or vectors of four output channels are cheaper.
    """
    weight = weight.detach().float().reshape(*weight.shape[:2], *(weight.shape[2:] or (1, 1)))
    c_out, c_in, kernel = weight.shape[:3]
    length = length or min(RELATIVE_COST, key=lambda v: _stored(weight, v) * RELATIVE_COST[v])
    chunk = min(CHUNK_CHANNELS[length], c_in)
    padded = np.zeros((-(-c_out // BLOCK_ROWS) * BLOCK_ROWS, -(-c_in // chunk) * chunk, kernel * kernel), np.float32)
    padded[:c_out, :c_in] = weight.reshape(c_out, c_in, -1).numpy()
    # block, vector of output channels, its channels, chunk, input channel, tap -> the order of the entries
    grid = padded.reshape(-1, BLOCK_ROWS // length, length, padded.shape[1] // chunk, chunk, kernel * kernel)
    grid = grid.transpose(0, 3, 1, 4, 5, 2)
    block, part, row, channel, tap = np.nonzero(grid.any(axis=-1) if length > 1 else grid[..., 0])
    segment = (block * grid.shape[1] + part) * grid.shape[2] + row
    starts = np.flatnonzero(np.diff(segment, prepend=-1))
    return Plan(
        length,
        (c_out, c_in, kernel),
        np.searchsorted(block[starts], np.arange(grid.shape[0] + 1)),
        row[starts],
        np.append(starts, len(segment)),
        (part * chunk + channel).astype(np.int32),
        tap.astype(np.int32),
        grid[block, part, row, channel, tap],
        bias.detach().float().numpy().copy(),
        relu,
        pool,
        halo_out,
    )


def _stored(weight: Tensor, length: int) -> int:
    """Weights that vectors of this length store, zeros in them included."""
    kept = weight.flatten(1) != 0
    missing = -kept.shape[0] % length
    kept = torch.nn.functional.pad(kept, (0, 0, 0, missing)).reshape(-1, length, kept.shape[1])
    return int(kept.any(dim=1).sum()) * length


@dataclass(frozen=True, eq=False)
class _Bands:
    """Where a layer's output vectors lie. Every band has `rows` output rows and ``len(places) / bands`` vectors."""

    bands: int
    rows: int
    pitch: int  # floats from row to row of a band's scratch
    places: np.ndarray  # of each output vector, in floats of the input


@lru_cache(maxsize=1024)
def _bands(groups: int, channels: int, height: int, width: int, halo: int, n: int, pool: bool, tile: int) -> _Bands:
    """Cut ``groups * height`` output rows into bands of equal size that split no pair of rows that is pooled."""
    padded = width + 2 * halo
    pitch = width * n if n > 1 else padded

    def vectors(rows: int) -> int:
        return math.ceil(math.ceil(rows * pitch / LANES) / tile) * tile

    total = groups * height if n > 1 else height
    sizes = [d for d in range(1, total + 1) if total % d == 0]
    if pool:
        sizes = [d for d in sizes if d % 2 == 0 and height % 2 == 0] or [d for d in sizes if d % height == 0]
    fitting = [d for d in sizes if vectors(d) <= BAND_VECTORS[n]]
    rows = fitting[-1] if fitting else sizes[0]

    row = np.arange(groups * height).reshape(-1, rows)
    image, h = row // height, row % height
    start = ((image * channels * (height + 2 * halo) + h) * padded) * n
    if n > 1:
        places = (start[..., None] + np.arange(width) * n).reshape(len(row), -1)
    else:  # flat over the padded rows of one image: a few lanes between the rows are computed in vain
        places = start[:, :1] + np.arange(math.ceil(rows * pitch / LANES)) * LANES
    places = np.pad(places, ((0, 0), (0, vectors(rows) - places.shape[1])), mode="edge")
    return _Bands(len(row), rows, pitch, places.astype(np.int64).ravel())


# --- Kernels --------------------------------------------------------------------------------------------------------


_INDEX = ir.IntType(64)
_VECTOR = ir.VectorType(ir.FloatType(), LANES)


class _Emitter:
    """Emits the LLVM instructions of an intrinsic: addresses in Numba's arrays, whole vectors, splats."""

    def __init__(self, context, builder, signature, arguments):
        self.context, self.builder, self.types, self.arguments = context, builder, signature.args, arguments

    def data(self, i: int):
        """Pointer to the first element of argument i, an array."""
        return self.context.make_array(self.types[i])(self.context, self.builder, self.arguments[i]).data

    def sum(self, *terms):
        total = terms[0]
        for term in terms[1:]:
            total = self.builder.add(total, term if isinstance(term, ir.Value) else _INDEX(term))
        return total

    def at(self, pointer, *terms):
        return self.builder.gep(pointer, [self.sum(*terms)])

    def vector_at(self, pointer, *terms):
        return self.builder.bitcast(self.at(pointer, *terms), _VECTOR.as_pointer())

    def load_vector(self, pointer, *terms):
        return self.builder.load(self.vector_at(pointer, *terms), align=4)

    def splat(self, scalar):
        empty = ir.Constant(_VECTOR, ir.Undefined)
        lanes = self.builder.insert_element(empty, scalar, ir.IntType(32)(0))
        return self.builder.shuffle_vector(lanes, empty, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))

    def maximum(self, floor, vector):
        """The larger of both, lane by lane; NaN in `vector` stays."""
        return self.builder.select(self.builder.fcmp_unordered(">", vector, floor), vector, floor)


@intrinsic
def _accumulate(context, v, s, x, places, first, offsets, values, start, stop, scratch, at, stride):
    """Sum up V x S output vectors in registers: for every entry k in [start, stop)

        scratch[at + i * stride + j * 16 :][:16] += values[k, i] * x[places[first + j] + offsets[k] :][:16]

    for i < V, j < S. The tuples `v` and `s` carry V and S in their length, so that the loops over them are unrolled.
    """
    rows, vectors = v.count, s.count

    def generate(context, builder, signature, arguments):
        emit = _Emitter(context, builder, signature, arguments)
        x, places, offsets, values, scratch = (emit.data(i) for i in (2, 3, 5, 6, 9))
        first, start, stop, at, stride = (arguments[i] for i in (4, 7, 8, 10, 11))
        bases = [emit.at(x, builder.load(emit.at(places, first, j))) for j in range(vectors)]
        sums = {}  # of output vector i, j: where it lies in scratch, and its register
        for i in range(rows):
            for j in range(vectors):
                target = emit.vector_at(scratch, at, builder.mul(stride, _INDEX(i)), j * LANES)
                register = cgutils.alloca_once(builder, _VECTOR)
                builder.store(builder.load(target, align=4), register)
                sums[i, j] = target, register
        with cgutils.for_range_slice(builder, start, stop, _INDEX(1)) as (k, _):
            offset = builder.sext(builder.load(emit.at(offsets, k)), _INDEX)
            inputs = [emit.load_vector(base, offset) for base in bases]
            for i in range(rows):
                weight = emit.splat(builder.load(emit.at(values, builder.mul(k, _INDEX(rows)), i)))
                for j in range(vectors):
                    register = sums[i, j][1]
                    product = builder.fmul(weight, inputs[j], flags=["contract"])
                    builder.store(builder.fadd(product, builder.load(register), flags=["contract"]), register)
        for target, register in sums.values():
            builder.store(builder.load(register), target, align=4)
        return context.get_dummy_value()

    return types.void(v, s, x, places, first, offsets, values, start, stop, scratch, at, stride), generate


@intrinsic
def _store_row(context, scratch, sources, step, y, at, count, bias, floor):
    """Write `count` output vectors: for w < count, the maximum over the `sources` (one, or four that are pooled)

    y[at + 16 * w :][:16] = max(max_i scratch[sources[i] + step * w :][:16] + bias, floor)
    """

    def generate(context, builder, signature, arguments):
        emit = _Emitter(context, builder, signature, arguments)
        scratch, y = emit.data(0), emit.data(3)
        sources = cgutils.unpack_tuple(builder, arguments[1])
        step, at, count = arguments[2], arguments[4], arguments[5]
        bias, floor = emit.splat(arguments[6]), emit.splat(arguments[7])
        with cgutils.for_range(builder, count, intp=_INDEX) as loop:
            values = [emit.load_vector(scratch, source, builder.mul(loop.index, step)) for source in sources]
            value = functools.reduce(emit.maximum, values)
            value = emit.maximum(floor, builder.fadd(value, bias))
            target = emit.vector_at(y, at, builder.mul(loop.index, _INDEX(LANES)))
            builder.store(value, target, align=4)
        return context.get_dummy_value()

    return types.void(scratch, sources, step, y, at, count, bias, floor), generate


@njit(boundscheck=False, cache=True)
def _finish(scratch, start, pitch, first_row, rows, height, bias, floor, pool, y, channel, halo):
    """Bias, ReLU and max-pool for one output channel of a band, written to ``y[:, channel]`` with its halo.

    ReLU is a `floor` of 0, its absence one of -inf.
    """
    _, channels, out_rows, out_columns, n = y.shape
    count = out_columns - 2 * halo
    for i in range(rows):
        image, h = (first_row + i) // height, (first_row + i) % height
        if pool and h % 2 == 0:
            continue  # its pair comes next; the last row of an odd height has none
        out = (h // 2 if pool else h) + halo
        lower = start + i * pitch
        upper = lower - pitch
        at = ((image * channels + channel) * out_rows + out) * out_columns * n + halo * n
        row = y[image, channel, out]
        if n == LANES and pool:
            _store_row(scratch, (upper, upper + LANES, lower, lower + LANES), 2 * LANES, y, at, count, bias, floor)
        elif n == LANES:
            _store_row(scratch, (lower,), LANES, y, at, count, bias, floor)
        elif pool:
            for w in range(count):
                above = max(scratch[upper + 2 * w], scratch[upper + 2 * w + 1])
                below = max(scratch[lower + 2 * w], scratch[lower + 2 * w + 1])
                row[w + halo, 0] = max(max(above, below) + bias, floor)
        else:
            for w in range(count):
                row[w + halo, 0] = max(scratch[lower + w] + bias, floor)
        if halo:
            row[0], row[-1] = 0, 0
            if out == 1:
                y[image, channel, 0] = 0
            if out == out_rows - 2:
                y[image, channel, out + 1] = 0


@njit(boundscheck=False, cache=True)
def _sum_block(
    v, s, x, offsets, values, segment_rows, segment_starts, first, last, places, start, stop, scratch
):  # fmt: skip
    """Sum up segments [first, last) for the output vectors [start, stop) into scratch, V x S vectors at a time."""
    stride = (stop - start) * LANES
    for place in range(start, stop, len(s)):
        for k in range(first, last):
            at = segment_rows[k] * len(v) * stride + (place - start) * LANES
            _accumulate(
                v, s, x, places, place, offsets, values, segment_starts[k], segment_starts[k + 1], scratch, at, stride
            )


@njit(parallel=True, boundscheck=False, cache=True)
def _convolve(
    v, s, x, y, halo, block_starts, segment_rows, segment_starts, offsets, values, bias, places, bands, rows, pitch,
    height, floor, pool,
):  # fmt: skip
    blocks, vectors = len(block_starts) - 1, len(places) // bands
    for task in prange(bands * blocks):
        band, block = task // blocks, task % blocks
        scratch = np.zeros(BLOCK_ROWS * vectors * LANES, np.float32)
        _sum_block(
            v, s, x, offsets, values, segment_rows, segment_starts, block_starts[block], block_starts[block + 1],
            places, band * vectors, (band + 1) * vectors, scratch,
        )  # fmt: skip
        for i in range(min(BLOCK_ROWS, len(bias) - block * BLOCK_ROWS)):
            channel = block * BLOCK_ROWS + i
            _finish(
                scratch, i * vectors * LANES, pitch, band * rows, rows, height, bias[channel], floor, pool, y, channel,
                halo,
            )  # fmt: skip


def conv(x: Tensor, plan: Plan) -> Tensor:
    """Run a layer on activations in the kernels' layout: convolution (stride 1, same size), bias, ReLU, 2x2 max-pool.

    The result, with the halo of `plan`, lies in a workspace of this thread that the next call but one uses again.
    Raises ValueError for activations of another number of channels.
    """
    groups, channels, height, width, n = x.shape
    if channels != plan.shape[1]:
        raise ValueError(f"activations of {channels} channels do not fit a layer of {plan.shape[1]} input channels")
    height, width = height - 2 * plan.halo, width - 2 * plan.halo
    halo, out = plan.halo_out, (height // 2, width // 2) if plan.pool else (height, width)
    name = "even" if x.data_ptr() == workspace("odd", (1,)).data_ptr() else "odd"
    y = workspace(name, (groups, plan.shape[0], out[0] + 2 * halo, out[1] + 2 * halo, n))
    at = _bands(groups, channels, height, width, plan.halo, n, plan.pool, TILE_VECTORS[plan.length])
    v, s = _tile(plan.length)
    _compile(plan.length)
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    _convolve(
        v, s, x.numpy().ravel(), y.numpy(), halo, plan.block_starts, plan.segment_rows, plan.segment_starts,
        plan.offsets(height, width, n), plan.values.ravel(), plan.bias, at.places, at.bands, at.rows, at.pitch, height,
        np.float32(0 if plan.relu else -np.inf), plan.pool,
    )  # fmt: skip
    return y


def conv_spec(x: np.ndarray, plan: Plan) -> np.ndarray:
    """What the kernel sums up, in plain NumPy: ``x [N, C_in, H, W]`` to ``[N, C_out, H, W]``, bias included."""
    height, width = x.shape[2:]
    c_out, _, kernel = plan.shape
    x = np.pad(x, ((0, 0), (0, 0), (plan.halo, plan.halo), (plan.halo, plan.halo)))
    y = np.zeros((len(x), -(-c_out // BLOCK_ROWS) * BLOCK_ROWS, height, width), x.dtype)
    for block in range(len(plan.block_starts) - 1):
        for segment in range(plan.block_starts[block], plan.block_starts[block + 1]):
            row = block * BLOCK_ROWS + plan.segment_rows[segment] * plan.length
            for k in range(plan.segment_starts[segment], plan.segment_starts[segment + 1]):
                dy, dx = divmod(plan.taps[k], kernel)
                pixels = x[:, plan.channels[k], dy : dy + height, dx : dx + width]
                y[:, row : row + plan.length] += plan.values[k][None, :, None, None] * pixels[:, None]
    return y[:, :c_out] + plan.bias[None, :, None, None]


# --- Compilation ----------------------------------------------------------------------------------------------------


def _tile(length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tuples as long as V and S: their types select the compiled kernel."""
    return (0,) * length, (0,) * TILE_VECTORS[length]


class _Note(event.Listener):
    """Says so when Numba begins to compile; what comes from its cache stays silent."""

    told = False

    def on_start(self, _event):
        if not self.told:
            print("compiling a CPU kernel: some seconds, once on this machine", file=sys.stderr)
        self.told = True

    def on_end(self, _event):
        pass


@cache
def _compile(length: int) -> None:
    """Compile the kernel for vectors of `length` weights, or load it from Numba's cache."""
    threads = torch.get_num_threads()
    numba.get_num_threads()  # starts Numba's threads, which resets the number that torch shares with it
    torch.set_num_threads(threads)
    floats, indices, index, flag = types.float32[::1], types.int64[::1], types.int64, types.boolean
    with event.install_listener("numba:compile", _Note()):
        _convolve.compile(
            (
                *map(numba.typeof, _tile(length)), floats, types.float32[:, :, :, :, ::1], index, indices, indices,
                indices, types.int32[::1], floats, floats, indices, index, index, index, index, types.float32, flag,
            )
        )  # fmt: skip
