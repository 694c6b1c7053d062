"""What Numba lacks: calls of machine code, counters that threads share, loops over memory without bounds."""

from __future__ import annotations

from functools import partial

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic

_I64 = ir.IntType(64)


@intrinsic
def call(context, code, source, weights, sums, target, masks, addend):
    """Call machine code at an address with six addresses."""

    def generate(context, builder, signature, arguments):
        pointer = ir.FunctionType(ir.VoidType(), [_I64] * 6).as_pointer()
        builder.call(builder.inttoptr(arguments[0], pointer), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


@intrinsic
def prefetch(context, address):
    """Bring a line of memory into the second-level cache."""

    def generate(context, builder, signature, arguments):
        pointer = ir.IntType(8).as_pointer()
        known = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(
            builder.module, ir.FunctionType(ir.VoidType(), [pointer, *[ir.IntType(32)] * 3]), "llvm.prefetch.p0"
        )
        read, second_level, data = (ir.Constant(ir.IntType(32), number) for number in (0, 2, 1))
        builder.call(known, [builder.inttoptr(arguments[0], pointer), read, second_level, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def get(context, array, i):
    """array[i] without a look at its bounds, or for a negative i: loops of it become vector instructions."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load(builder.gep(data, [arguments[1]]))

    return types.float32(types.float32[::1], types.int64), generate


@intrinsic
def put(context, array, i, value):
    """array[i] = value, likewise."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        builder.store(arguments[2], builder.gep(data, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(types.float32[::1], types.int64, types.float32), generate


@intrinsic
def float_of(context, bits):
    """The float32 of these 32 bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def bits_of(context, number):
    """The 32 bits of a float32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


def _place(context, builder, array_type, array, i):
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [i])


@intrinsic
def fetch_add(context, counters, i, amount):
    """Add to a counter that threads share; its value before."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature.args[0], *arguments[:2])
        return builder.atomic_rmw("add", place, arguments[2], "seq_cst")

    return types.int64(types.int64[::1], types.int64, types.int64), generate


@intrinsic
def compare_and_swap(context, counters, i, old, new):
    """Write `new` where a counter is `old`; whether it was."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature.args[0], *arguments[:2])
        return builder.extract_value(builder.cmpxchg(place, *arguments[2:], "seq_cst", "seq_cst"), 1)

    return types.boolean(types.int64[::1], *[types.int64] * 3), generate


@intrinsic
def read(context, counters, i):
    """The counter's value now, and all that was written before it rose to that."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_place(context, builder, signature.args[0], *arguments), "acquire", 8)

    return types.int64(types.int64[::1], types.int64), generate


@intrinsic
def lent(context, values):
    """The address of these values, for other threads, as long as the function that calls this has not returned."""

    def generate(context, builder, signature, arguments):
        return builder.ptrtoint(cgutils.alloca_once_value(builder, arguments[0]), _I64)

    return types.int64(values), generate


@intrinsic
def borrowed(context, address, like):
    """The values at such an address. Their types must be those of `like`."""

    def generate(context, builder, signature, arguments):
        kind = context.get_value_type(signature.return_type)
        values = builder.load(builder.inttoptr(arguments[0], kind.as_pointer()))
        return impl_ret_borrowed(context, builder, signature.return_type, values)

    return like(types.int64, like), generate


@intrinsic
def pause(context):
    """Tell the core that this is a waiting loop."""
    return types.void(), partial(_call_named, "llvm.x86.sse2.pause", ir.VoidType())


@intrinsic
def let_others_run(context):
    return types.void(), partial(_call_named, "sched_yield", ir.IntType(32))


def _call_named(name, result, context, builder, signature, arguments):
    known = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(result, []), name)
    builder.call(known, [])
    return context.get_dummy_value()
