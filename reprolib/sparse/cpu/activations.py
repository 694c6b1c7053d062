"""Numbers in memory, and activations of them: float32, or pairs of bfloat16 numbers that share a word of 32 bits.

NaN stays NaN, as torch has it.
"""

from __future__ import annotations

import numpy as np

from reprolib.sparse.compilation import compiled
from reprolib.sparse.cpu.intrinsics import bits_of, float_of, get, put
from reprolib.sparse.cpu.layout import CHANNEL, CHANNELS, FIRST, INTERLEAVED, PAIRS
from reprolib.sparse.cpu.planner import ACTIVATIONS

# Nothing here divides by zero, and nobody calls it from Python: compilation is faster without a way to.
OPTIONS = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

RELU, RELU6, SILU, SIGMOID, HARDSWISH, HARDSIGMOID = (
    ACTIVATIONS.index(name) for name in ("relu", "relu6", "silu", "sigmoid", "hardswish", "hardsigmoid")
)
ZERO, HALF, ONE, THREE, SIX = (np.float32(number) for number in (0, 0.5, 1, 3, 6))
# e^x = 2^n * e^r with a small r: x = n * ln 2 + r, ln 2 in two parts, so that r is exact. From 2^128 on it is infinity.
LOWEST, HIGHEST = np.float32(-87), np.float32(89)
LOG2_E, LN2_HIGH, LN2_LOW = (np.float32(number) for number in (1.44269504, 0.693359375, -2.12194440e-4))
SIXTH, TWENTY_FOURTH, C5, C6 = (np.float32(1 / number) for number in (6, 24, 120, 720))


@compiled(**OPTIONS)
def bfloat16(number):
    """The bits of the nearest bfloat16, the even one of two; NaN stays NaN."""
    bits = np.int64(np.uint32(bits_of(number)))
    return bits >> 16 | 64 if number != number else bits + 0x7FFF + (bits >> 16 & 1) >> 16


@compiled(**OPTIONS)
def paired(low, high):
    """Two numbers, rounded to bfloat16, in one word."""
    return float_of(np.int32(bfloat16(low) | bfloat16(high) << 16))


@compiled(**OPTIONS)
def half(word, upper):
    """One of the two bfloat16 numbers of a word, as float32."""
    bits = bits_of(word)
    return float_of(np.int32(bits & -65536)) if upper else float_of(np.int32(bits << 16))


@compiled(**OPTIONS)
def number(arena, at, layout, channel, place):
    """Of a channel, as float32; `place` is its pixel and image. The other half of a last pair is zero."""
    if channel >= layout[CHANNELS]:
        return ZERO
    if not layout[PAIRS]:
        return get(arena, at + layout[FIRST] + channel * layout[CHANNEL] + place)
    return half(get(arena, at + layout[FIRST] + channel // 2 * layout[CHANNEL] + place), channel % 2)


@compiled(**OPTIONS)
def larger(a, b):
    """NaN if one of them is."""
    return a if a > b or a != a else b


@compiled(**OPTIONS)
def exp(x):
    """With a relative error below 2.5e-7; infinity from 88.4 on, and no less than e^-87."""
    x = HIGHEST if x > HIGHEST else x
    x = LOWEST if x < LOWEST else x
    n = np.int32((x if x == x else ZERO) * LOG2_E + (HALF if x > ZERO else -HALF))
    whole = np.float32(n)
    r = x - whole * LN2_HIGH - whole * LN2_LOW
    e = ONE + r * (ONE + r * (HALF + r * (SIXTH + r * (TWENTY_FOURTH + r * (C5 + r * C6)))))
    return e * float_of(np.int32((n + 127) << 23))


@compiled(**OPTIONS)
def _six_at_most(x):
    x = ZERO if x < ZERO else x
    return SIX if x > SIX else x


@compiled(**OPTIONS)
def activated(x, kind):
    if kind == RELU:
        return ZERO if x < ZERO else x
    if kind == RELU6:
        return _six_at_most(x)
    if kind == HARDSWISH:
        return x * _six_at_most(x + THREE) / SIX
    if kind == HARDSIGMOID:
        return _six_at_most(x + THREE) / SIX
    if kind == SIGMOID:
        return ONE / (ONE + exp(-x))
    return x / (ONE + exp(-x)) if kind == SILU else x


@compiled(**OPTIONS)
def activate(arena, at, count, kind, pairs):
    """Words one after the other. Each kind has a loop of its own: so it becomes vector instructions."""
    if pairs:
        for i in range(at, at + count):
            word = get(arena, i)
            put(arena, i, paired(activated(half(word, False), kind), activated(half(word, True), kind)))
    elif kind == RELU:
        for i in range(at, at + count):
            put(arena, i, activated(get(arena, i), RELU))
    elif kind == RELU6:
        for i in range(at, at + count):
            put(arena, i, activated(get(arena, i), RELU6))
    elif kind == HARDSWISH:
        for i in range(at, at + count):
            put(arena, i, activated(get(arena, i), HARDSWISH))
    elif kind == HARDSIGMOID:
        for i in range(at, at + count):
            put(arena, i, activated(get(arena, i), HARDSIGMOID))
    elif kind == SIGMOID:
        for i in range(at, at + count):
            put(arena, i, activated(get(arena, i), SIGMOID))
    elif kind == SILU:
        for i in range(at, at + count):
            put(arena, i, activated(get(arena, i), SILU))


@compiled(**OPTIONS)
def activate_vector(arena, at, layout, channels, lanes, kind):
    """What a layer has just written at one place: some channels of `lanes` numbers."""
    words = -(-channels // 2) if layout[PAIRS] else channels
    if layout[INTERLEAVED]:
        activate(arena, at, words * lanes, kind, layout[PAIRS])
    else:
        for c in range(words):
            activate(arena, at + c * layout[CHANNEL], lanes, kind, layout[PAIRS])
