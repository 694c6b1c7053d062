"""PTX instructions that Numba has no name for, as functions a Numba-CUDA kernel can call.

Everything the tensor cores need: `mma`, `mma_sparse_low`/`mma_sparse_high`, the transposing shared-memory load that
feeds them, asynchronous copies from global to shared memory, and wide loads and stores by address. Addresses are plain
integers: ``tensor.data_ptr()`` for global memory, `shared_address` for shared memory. Pairs of fp16 travel in uint32,
the first of a pair in the low half. All of it exists from compute capability 8.0 on.

Importing this module needs numba-cuda, but no GPU.
"""

from __future__ import annotations

import inspect

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

_LLVM = {types.uint16: ir.IntType(16), types.uint32: ir.IntType(32), types.int64: ir.IntType(64)}
_LLVM |= {types.int32: ir.IntType(32), types.float32: ir.FloatType()}
_REGISTER = {types.uint16: "h", types.uint32: "r", types.int32: "r", types.int64: "l", types.float32: "f"}


def _instruction(text: str, *takes: types.Type, gives: tuple[types.Type, ...] = (), pure: bool = False):
    """An intrinsic that emits `text`: ``$0, $1 ...`` are its results, then its arguments.

    A `pure` instruction depends on its arguments alone, so the compiler may move or merge it; any other one is taken
    to touch memory and stays where it is. What a whole warp does together (``.sync``) is never moved into a branch.
    """
    attributes = ("convergent",) if ".sync" in text else ()
    if len(gives) > 1:
        returns, native = types.UniTuple(gives[0], len(gives)), ir.LiteralStructType([_LLVM[t] for t in gives])
    elif gives:
        returns, native = gives[0], _LLVM[gives[0]]
    else:
        returns, native = types.void, ir.VoidType()
    places = [f"={_REGISTER[t]}" for t in gives] + [_REGISTER[t] for t in takes] + ([] if pure else ["~{memory}"])

    def generate(context, builder, signature, arguments):
        pairs = zip(arguments, signature.args, takes, strict=True)
        arguments = [context.cast(builder, value, given, wanted) for value, given, wanted in pairs]
        function = ir.FunctionType(native, [_LLVM[t] for t in takes])
        code = ir.InlineAsm(function, text, ",".join(places), side_effect=not pure)
        result = builder.call(code, arguments, attrs=attributes)
        if len(gives) > 1:
            values = [builder.extract_value(result, i) for i in range(len(gives))]
            return context.make_tuple(builder, signature.return_type, values)
        return result if gives else context.get_dummy_value()

    def declare(typing_context, *arguments):
        # Numba computes in int64; whatever integer comes is taken modulo the width of its register.
        return returns(*map(types.unliteral, arguments)), generate

    # Numba reads an intrinsic's arity from its signature and knows no variable one.
    names = ["typing_context", *(f"operand{i}" for i in range(len(takes)))]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    declare.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    return intrinsic(declare)


# --- Tensor cores ----------------------------------------------------------------------------------------------------

_FLOATS, _WORDS = (types.float32,) * 4, (types.uint32,) * 4

# (d0 ... d3) = A[16, 16] @ B[16, 8] + C; arguments a0 ... a3, b0, b1, c0 ... c3. Lane 4g+t of the warp holds
#   A: rows g (a0, a2) and g+8 (a1, a3), columns 2t, 2t+1 (a0, a1) and 2t+8, 2t+9 (a2, a3)
#   B: rows 2t, 2t+1 (b0) and 2t+8, 2t+9 (b1), column g
#   C, D: rows g (0, 1) and g+8 (2, 3), columns 2t (0, 2) and 2t+1 (1, 3)
mma = _instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
    *_WORDS,
    *_WORDS[:2],
    *_FLOATS,
    gives=_FLOATS,
    pure=True,
)


def _mma_sparse(selector: int):
    return _instruction(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, $16, " + f"{selector:#x};",
        *_WORDS,
        *_WORDS,
        *_FLOATS,
        types.uint32,
        gives=_FLOATS,
        pure=True,
    )


# The same with A[16, 32] of which each row holds two of every four consecutive columns, B[32, 8]; arguments
# a0 ... a3 (the 16 columns that are stored), b0 ... b3 (rows 2t, 2t+1 plus 0, 8, 16, 24), c0 ... c3, metadata.
# Metadata: 2 bits per stored weight, its place among its four columns, the first one lowest. Of lanes 4g ... 4g+3 the
# first two (low) or the last two (high) give it: the first of the two for columns 0-15, the second for columns 16-31,
# each with row g in its low half and row g+8 in its high half. So one register serves two multiplications.
mma_sparse_low = _mma_sparse(0)
mma_sparse_high = _mma_sparse(1)

# Four 8x8 fp16 matrices; lane i gives the shared address of row i % 8 of matrix i // 8 (16 aligned bytes). Transposed:
# lane 4g+t gets elements [2t, g] and [2t+1, g] of each, which is the B fragment of `mma`.
load_matrices_transposed = _instruction(
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [$4];", types.uint32, gives=_WORDS
)


# --- Shared memory ---------------------------------------------------------------------------------------------------


@intrinsic
def shared_address(typing_context, array):
    """The address of a cuda.shared.array, as the instructions here take it."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, value=arguments[0]).data
        shared = builder.addrspacecast(
            builder.bitcast(data, ir.IntType(8).as_pointer()), ir.IntType(8).as_pointer(addrspace=3)
        )
        return builder.ptrtoint(shared, ir.IntType(32))

    return types.uint32(array), generate


# 16 bytes, from a global address (second) to a shared one (first), past the registers and the L1 cache.
copy_async = _instruction("cp.async.cg.shared.global.L2::128B [$0], [$1], 16;", types.uint32, types.int64)
commit_copies = _instruction("cp.async.commit_group;")
wait_all_but_newest = _instruction("cp.async.wait_group 1;")

store_shared = _instruction("st.shared.u32 [$0], $1;", types.uint32, types.uint32)
load_shared_x4 = _instruction("ld.shared.v4.u32 {$0,$1,$2,$3}, [$4];", types.uint32, gives=_WORDS)
store_shared_f32_x4 = _instruction("st.shared.v4.f32 [$0], {$1,$2,$3,$4};", types.uint32, *_FLOATS)
load_shared_f32_x4 = _instruction("ld.shared.v4.f32 {$0,$1,$2,$3}, [$4];", types.uint32, gives=_FLOATS)


# --- Global memory: what a kernel only reads, and what it writes -----------------------------------------------------


def _load(suffix: str, kind: types.Type, count: int = 1):
    targets = "{" + ",".join(f"${i}" for i in range(count)) + "}" if count > 1 else "$0"
    text = f"ld.global.nc.{suffix} {targets}, [${count}];"
    return _instruction(text, types.int64, gives=(kind,) * count, pure=True)


load_u16 = _load("u16", types.uint16)
load_u32 = _load("u32", types.uint32)
load_i32 = _load("s32", types.int32)
load_f32 = _load("f32", types.float32)
load_f32_x2 = _load("v2.f32", types.float32, 2)
load_x4 = _load("v4.u32", types.uint32, 4)
store_x4 = _instruction("st.global.v4.u32 [$0], {$1,$2,$3,$4};", types.int64, *_WORDS)
store_f32_x4 = _instruction("st.global.v4.f32 [$0], {$1,$2,$3,$4};", types.int64, *_FLOATS)


# --- Numbers ---------------------------------------------------------------------------------------------------------

# (low, high) -> a pair of fp16, rounded to nearest; with ReLU 0 for a negative number, NaN for NaN.
pack_halves = _instruction("cvt.rn.f16x2.f32 $0, $2, $1;", *_FLOATS[:2], gives=(types.uint32,), pure=True)
pack_halves_relu = _instruction("cvt.rn.relu.f16x2.f32 $0, $2, $1;", *_FLOATS[:2], gives=(types.uint32,), pure=True)
unpack_halves = _instruction(
    "{.reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high;}",
    types.uint32,
    gives=_FLOATS[:2],
    pure=True,
)
# NaN if either is NaN, unlike Python's max: a fault must not vanish in a ReLU.
maximum = _instruction("max.NaN.f32 $0, $1, $2;", *_FLOATS[:2], gives=(types.float32,), pure=True)

# i + 1. The compiler can't see through it: a loop that counts with it is not unrolled, which would cost registers.
successor = _instruction("add.s32 $0, $1, 1;", types.int32, gives=(types.int32,), pure=True)
