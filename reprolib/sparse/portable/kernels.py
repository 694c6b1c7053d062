"""The Numba kernels: they sum up in registers, for stored weights only, and finish a layer in one pass."""

from __future__ import annotations

import contextlib
import functools
import threading
from functools import cache

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from reprolib.sparse.compilation import compiled, told
from reprolib.sparse.portable.layout import LANES, workspace
from reprolib.sparse.portable.packing import BLOCK_ROWS, TILE_VECTORS, Plan, bands_of

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
        """The larger of both, lane by lane; NaN if one of them is."""
        larger = self.builder.fcmp_ordered(">", vector, floor)
        missing = self.builder.fcmp_unordered("uno", vector, vector)
        return self.builder.select(self.builder.or_(larger, missing), vector, floor)


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


@compiled(boundscheck=False)
def _larger(a, b):
    """The larger of both; NaN if one of them is."""
    return a if a > b or a != a else b


@compiled(boundscheck=False)
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
                above = _larger(scratch[upper + 2 * w], scratch[upper + 2 * w + 1])
                below = _larger(scratch[lower + 2 * w], scratch[lower + 2 * w + 1])
                row[w + halo, 0] = _larger(_larger(above, below) + bias, floor)
        else:
            for w in range(count):
                row[w + halo, 0] = _larger(scratch[lower + w] + bias, floor)
        if halo:
            row[0], row[-1] = 0, 0
            if out == 1:
                y[image, channel, 0] = 0
            if out == out_rows - 2:
                y[image, channel, out + 1] = 0


@compiled(boundscheck=False)
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


@compiled(parallel=True, boundscheck=False)
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
    at = bands_of(groups, channels, height, width, plan.halo, n, plan.pool, TILE_VECTORS[plan.length])
    v, s = _tile(plan.length)
    _compile(plan.length)
    with _threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)):
        _convolve(
            v, s, x.numpy().ravel(), y.numpy(), halo, plan.block_starts, plan.segment_rows, plan.segment_starts,
            plan.offsets(height, width, n), plan.values.ravel(), plan.bias, at.places, at.bands, at.rows, at.pitch,
            height, np.float32(0 if plan.relu else -np.inf), plan.pool,
        )  # fmt: skip
    return y


_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def _threads(count: int):
    """Numba with `count` threads, as it was afterwards; its layer "workqueue" can't serve two callers at once."""
    before = numba.get_num_threads()
    numba.set_num_threads(count)
    try:
        with _one_at_a_time if numba.threading_layer() == "workqueue" else contextlib.nullcontext():
            yield
    finally:
        numba.set_num_threads(before)


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


@cache
def _compile(length: int) -> None:
    """Compile the kernel for vectors of `length` weights, or load it from Numba's cache."""
    threads = torch.get_num_threads()
    numba.get_num_threads()  # starts Numba's threads, which resets the number that torch shares with it
    torch.set_num_threads(threads)
    floats, indices, index, flag = types.float32[::1], types.int64[::1], types.int64, types.boolean
    with told():
        _convolve.compile(
            (
                *map(numba.typeof, _tile(length)), floats, types.float32[:, :, :, :, ::1], index, indices, indices,
                indices, types.int32[::1], floats, floats, indices, index, index, index, index, types.float32, flag,
            )
        )  # fmt: skip
