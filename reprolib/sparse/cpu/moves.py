"""What moves numbers between layers: images in and out, zeros around maps, views, pools, sums, activations.

A *word* is 32 bits: a float32, or a pair of bfloat16 of two channels. `at` is where a buffer begins in the arena, in
words, and `layout` a row of a table (see `LAYOUT`). Work is shared by rows or by channels: a task does every
`parts`-th one, from `part` on. NaN stays NaN, as torch has it.
"""

from __future__ import annotations

import numpy as np

from reprolib.sparse.compilation import compiled
from reprolib.sparse.cpu.intrinsics import bits_of, float_of, get, put
from reprolib.sparse.cpu.layout import Layout
from reprolib.sparse.cpu.planner import ACTIVATIONS, ADD, COPY

OPTIONS = {"nogil": True, "error_model": "numpy"}  # nothing here divides by zero

# Columns of the table of layouts, in words.
CHANNELS, HEIGHT, WIDTH, IMAGES, WORDS, FIRST, CHANNEL, ROW, COLUMN, PAIRS, INTERLEAVED = range(11)
RELU, RELU6, SILU, SIGMOID, HARDSWISH, HARDSIGMOID = (
    ACTIVATIONS.index(name) for name in ("relu", "relu6", "silu", "sigmoid", "hardswish", "hardsigmoid")
)
ZERO, HALF, ONE, THREE, SIX = (np.float32(number) for number in (0, 0.5, 1, 3, 6))
# e^x = 2^n * e^r with a small r: x = n * ln 2 + r, ln 2 in two parts, so that r is exact.
LARGEST, LOG2_E, LN2_HIGH, LN2_LOW = (np.float32(number) for number in (87, 1.44269504, 0.693359375, -2.12194440e-4))
SIXTH, TWENTY_FOURTH, C5, C6 = (np.float32(1 / number) for number in (6, 24, 120, 720))


def table(layouts: list[Layout]) -> np.ndarray:
    """Layouts as these loops read them."""
    rows = [
        (at.channels, at.height, at.width, at.images, at.words, at.first // 4, at.channel // 4, at.row // 4,
         at.column // 4, at.pairs, at.interleaved)
        for at in layouts
    ]  # fmt: skip
    return np.array(rows, np.int64)


# --- Numbers ----------------------------------------------------------------------------------------------------------


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
def _number(arena, at, layout, channel, place):
    """Of a channel, as float32; `place` is its pixel and image."""
    if not layout[PAIRS]:
        return get(arena, at + layout[FIRST] + channel * layout[CHANNEL] + place)
    bits = bits_of(get(arena, at + layout[FIRST] + channel // 2 * layout[CHANNEL] + place))
    return float_of(np.int32(bits & -65536)) if channel % 2 else float_of(np.int32(bits << 16))


@compiled(**OPTIONS)
def _larger(a, b):
    """NaN if one of them is."""
    return a if a > b or a != a else b


@compiled(**OPTIONS)
def _exp(x):
    x = LARGEST if x > LARGEST else x
    x = -LARGEST if x < -LARGEST else x
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
def _activated(x, kind):
    if kind == RELU:
        return ZERO if x < ZERO else x
    if kind == RELU6:
        return _six_at_most(x)
    if kind == HARDSWISH:
        return x * _six_at_most(x + THREE) / SIX
    if kind == HARDSIGMOID:
        return _six_at_most(x + THREE) / SIX
    if kind == SIGMOID:
        return ONE / (ONE + _exp(-x))
    return x / (ONE + _exp(-x)) if kind == SILU else x


@compiled(**OPTIONS)
def _activate(arena, at, count, kind, pairs):
    """Words one after the other. Each kind has a loop of its own: so it becomes vector instructions."""
    if pairs:
        for i in range(at, at + count):
            bits = bits_of(get(arena, i))
            low, high = float_of(np.int32(bits << 16)), float_of(np.int32(bits & -65536))
            put(arena, i, paired(_activated(low, kind), _activated(high, kind)))
    elif kind == RELU:
        for i in range(at, at + count):
            put(arena, i, _activated(get(arena, i), RELU))
    elif kind == RELU6:
        for i in range(at, at + count):
            put(arena, i, _activated(get(arena, i), RELU6))
    elif kind == HARDSWISH:
        for i in range(at, at + count):
            put(arena, i, _activated(get(arena, i), HARDSWISH))
    elif kind == HARDSIGMOID:
        for i in range(at, at + count):
            put(arena, i, _activated(get(arena, i), HARDSIGMOID))
    elif kind == SIGMOID:
        for i in range(at, at + count):
            put(arena, i, _activated(get(arena, i), SIGMOID))
    elif kind == SILU:
        for i in range(at, at + count):
            put(arena, i, _activated(get(arena, i), SILU))


@compiled(**OPTIONS)
def activate_vector(arena, at, layout, channels, lanes, kind):
    """What a layer has just written at one place: some channels of `lanes` numbers."""
    words = -(-channels // 2) if layout[PAIRS] else channels
    if layout[INTERLEAVED]:
        _activate(arena, at, words * lanes, kind, layout[PAIRS])
    else:
        for c in range(words):
            _activate(arena, at + c * layout[CHANNEL], lanes, kind, layout[PAIRS])


# --- In and out -------------------------------------------------------------------------------------------------------


@compiled(**OPTIONS)
def come_in(arena, x, at, layout, part, parts):
    """A bundle of images ``[N, C, H, W]``, which begin at word x, into their layout."""
    height, width, images = layout[HEIGHT], layout[WIDTH], layout[IMAGES]
    channels, plane = layout[CHANNELS], height * width
    share = 1 + layout[PAIRS]
    for row in range(part, layout[WORDS] * height, parts):
        to = at + layout[FIRST] + row // height * layout[CHANNEL] + row % height * layout[ROW]
        channel = row // height * share
        start = x + channel * plane + row % height * width
        for w in range(width):
            for i in range(images):
                number = get(arena, start + i * channels * plane + w)
                if share == 2:
                    other = ZERO
                    if channel + 1 < channels:
                        other = get(arena, start + (i * channels + 1) * plane + w)
                    number = paired(number, other)
                put(arena, to + w * layout[COLUMN] + i, number)


@compiled(**OPTIONS)
def go_out(arena, at, layout, y):
    """A bundle of images from its layout to word y."""
    channels, height, width = layout[CHANNELS], layout[HEIGHT], layout[WIDTH]
    for i in range(layout[IMAGES]):
        for c in range(channels):
            for h in range(height):
                to = y + ((i * channels + c) * height + h) * width
                if layout[PAIRS]:
                    for w in range(width):
                        put(arena, to + w, _number(arena, at, layout, c, h * layout[ROW] + w * layout[COLUMN] + i))
                else:
                    start = at + layout[FIRST] + c * layout[CHANNEL] + h * layout[ROW] + i
                    for w in range(width):
                        put(arena, to + w, get(arena, start + w * layout[COLUMN]))


@compiled(**OPTIONS)
def fill(arena, at, ranges, values, part, parts):
    """What surrounds the maps of a layout, and where a max-pool begins."""
    for i in range(part, len(ranges), parts):
        for number in range(at + ranges[i, 0], at + ranges[i, 1]):
            put(arena, number, values[i])


# --- Maps from maps ---------------------------------------------------------------------------------------------------


@compiled(**OPTIONS)
def take_view(arena, source_at, source, target_at, target, numbers, part, parts):
    """Pixels at a stride, zeros where there are none; positions share a vector."""
    stride_y, stride_x, first_y, first_x = numbers[0], numbers[1], numbers[2], numbers[3]
    height, width, images = target[HEIGHT], target[WIDTH], target[IMAGES]
    begin = min(width, max(0, -(first_x // stride_x)))
    end = max(begin, min(width, (source[WIDTH] - 1 - first_x) // stride_x + 1))
    for row in range(part, target[WORDS] * height, parts):
        c, y = row // height, stride_y * (row % height) + first_y
        to = target_at + target[FIRST] + c * target[CHANNEL] + row % height * target[ROW]
        if y < 0 or y >= source[HEIGHT]:
            for i in range(width * images):
                put(arena, to + i, ZERO)
            continue
        start = source_at + source[FIRST] + c * source[CHANNEL] + y * source[ROW] + first_x * images
        for i in range(begin * images):
            put(arena, to + i, ZERO)
        for i in range(end * images, width * images):
            put(arena, to + i, ZERO)
        if stride_x == 1:
            for i in range(begin * images, end * images):
                put(arena, to + i, get(arena, start + i))
        elif stride_x == 2 and images == 1:
            for x in range(begin, end):
                put(arena, to + x, get(arena, start + 2 * x))
        else:
            for x in range(begin, end):
                for i in range(images):
                    put(arena, to + x * images + i, get(arena, start + x * stride_x * images + i))


@compiled(**OPTIONS)
def _inside(place, kernel, stride, padding, size):
    """The first pixel of a window and the one behind its last, inside of a map."""
    first = place * stride - padding
    return max(0, first), min(size, first + kernel)


@compiled(**OPTIONS)
def max_pool(arena, source_at, source, target_at, target, numbers, scratch, part, parts):
    """The largest number of each window; `scratch` is room for a row of a map."""
    kernel, stride, padding = (numbers[0], numbers[1]), (numbers[2], numbers[3]), (numbers[4], numbers[5])
    if source[PAIRS] or target[PAIRS]:
        _max_pool_of_pairs(arena, source_at, source, target_at, target, kernel, stride, padding, part, parts)
    elif source[INTERLEAVED]:
        for y in range(part, target[HEIGHT], parts):
            top, bottom = _inside(y, kernel[0], stride[0], padding[0], source[HEIGHT])
            for x in range(target[WIDTH]):
                left, right = _inside(x, kernel[1], stride[1], padding[1], source[WIDTH])
                to = target_at + target[FIRST] + y * target[ROW] + x * target[COLUMN]
                for v in range(top, bottom):
                    for u in range(left, right):
                        start = source_at + source[FIRST] + v * source[ROW] + u * source[COLUMN]
                        _take_larger(arena, start, to, source[WORDS] * source[IMAGES], v == top and u == left)
    else:
        for row in range(part, target[WORDS] * target[HEIGHT], parts):
            c, y = row // target[HEIGHT], row % target[HEIGHT]
            top, bottom = _inside(y, kernel[0], stride[0], padding[0], source[HEIGHT])
            start = source_at + source[FIRST] + c * source[CHANNEL]
            for v in range(top, bottom):  # first downwards, in whole rows
                _take_larger(arena, start + v * source[ROW], scratch, source[ROW], v == top)
            to, images = target_at + target[FIRST] + c * target[CHANNEL] + y * target[ROW], source[IMAGES]
            for x in range(target[WIDTH]):
                left, right = _inside(x, kernel[1], stride[1], padding[1], source[WIDTH])
                for i in range(images):
                    number = get(arena, scratch + left * images + i)
                    for u in range(left + 1, right):
                        number = _larger(number, get(arena, scratch + u * images + i))
                    put(arena, to + x * images + i, number)


@compiled(**OPTIONS)
def _take_larger(arena, start, to, count, first):
    """Numbers one after the other: what comes first is taken as it is."""
    if first:
        for i in range(count):
            put(arena, to + i, get(arena, start + i))
    else:
        for i in range(count):
            put(arena, to + i, _larger(get(arena, to + i), get(arena, start + i)))


@compiled(**OPTIONS)
def _max_pool_of_pairs(arena, source_at, source, target_at, target, kernel, stride, padding, part, parts):
    for row in range(part, target[WORDS] * target[HEIGHT], parts):
        w, y = row // target[HEIGHT], row % target[HEIGHT]
        share = 1 + target[PAIRS]
        top, bottom = _inside(y, kernel[0], stride[0], padding[0], source[HEIGHT])
        for x in range(target[WIDTH]):
            left, right = _inside(x, kernel[1], stride[1], padding[1], source[WIDTH])
            for i in range(target[IMAGES]):
                low, high = np.float32(-np.inf), np.float32(-np.inf)
                for v in range(top, bottom):
                    for u in range(left, right):
                        place = v * source[ROW] + u * source[COLUMN] + i
                        low = _larger(low, _number(arena, source_at, source, share * w, place))
                        if share * w + 1 < source[CHANNELS]:
                            high = _larger(high, _number(arena, source_at, source, share * w + 1, place))
                to = target_at + target[FIRST] + w * target[CHANNEL] + y * target[ROW] + x * target[COLUMN] + i
                put(arena, to, paired(low, high) if share == 2 else low)


@compiled(**OPTIONS)
def mean(arena, source_at, source, target_at, target, part, parts):
    """The mean of each map, summed in float64."""
    share, count = 1 + target[PAIRS], source[HEIGHT] * source[WIDTH]
    for w in range(part, target[WORDS], parts):
        for i in range(target[IMAGES]):
            low, high = 0.0, 0.0
            for y in range(source[HEIGHT]):
                for x in range(source[WIDTH]):
                    place = y * source[ROW] + x * source[COLUMN] + i
                    low += _number(arena, source_at, source, share * w, place)
                    if share == 2 and 2 * w + 1 < source[CHANNELS]:
                        high += _number(arena, source_at, source, 2 * w + 1, place)
            to = target_at + target[FIRST] + w * target[CHANNEL] + i
            one, other = np.float32(low / count), np.float32(high / count)
            put(arena, to, paired(one, other) if share == 2 else one)


@compiled(**OPTIONS)
def elementwise(arena, at, source, other, target, numbers, part, parts):
    """target = source, or its sum or product with `other` (or with one number of it for each map); then an activation.

    `at` are the places of the three.
    """
    operation, kind = numbers[0], numbers[1]
    each = source[HEIGHT] * source[WIDTH] == other[HEIGHT] * other[WIDTH]  # has a number of its own for each pixel
    if target[PAIRS]:
        _elementwise_pairs(arena, at, source, other, target, operation, kind, each, part, parts)
    elif source[INTERLEAVED]:
        for y in range(part, target[HEIGHT], parts):
            for x in range(target[WIDTH]):
                a = at[0] + source[FIRST] + y * source[ROW] + x * source[COLUMN]
                b = at[1] + other[FIRST] + (y * other[ROW] + x * other[COLUMN] if each else 0)
                to = at[2] + target[FIRST] + y * target[ROW] + x * target[COLUMN]
                _combine(arena, a, b, to, target[WORDS] * target[IMAGES], operation)
                _activate(arena, to, target[WORDS] * target[IMAGES], kind, False)
    else:
        images = target[IMAGES]
        for c in range(part, target[WORDS], parts):
            a = at[0] + source[FIRST] + c * source[CHANNEL]
            b = at[1] + other[FIRST] + c * other[CHANNEL]
            to, count = at[2] + target[FIRST] + c * target[CHANNEL], target[HEIGHT] * target[ROW]
            if each or operation == COPY:
                _combine(arena, a, b, to, count, operation)
            else:
                for pixel in range(0, count, images):
                    _combine(arena, a + pixel, b, to + pixel, images, operation)
            _activate(arena, to, count, kind, False)


@compiled(**OPTIONS)
def _combine(arena, a, b, to, count, operation):
    if operation == COPY:
        for i in range(count):
            put(arena, to + i, get(arena, a + i))
    elif operation == ADD:
        for i in range(count):
            put(arena, to + i, get(arena, a + i) + get(arena, b + i))
    else:
        for i in range(count):
            put(arena, to + i, get(arena, a + i) * get(arena, b + i))


@compiled(**OPTIONS)
def _combined(a, b, operation, kind):
    number = a if operation == COPY else a + b if operation == ADD else a * b
    return _activated(number, kind)


@compiled(**OPTIONS)
def _elementwise_pairs(arena, at, source, other, target, operation, kind, each, part, parts):
    for row in range(part, target[WORDS] * target[HEIGHT], parts):
        w, y = row // target[HEIGHT], row % target[HEIGHT]
        for x in range(target[WIDTH]):
            for i in range(target[IMAGES]):
                a = y * source[ROW] + x * source[COLUMN] + i
                b = y * other[ROW] + x * other[COLUMN] + i if each else i
                low = _combined(
                    _number(arena, at[0], source, 2 * w, a), _number(arena, at[1], other, 2 * w, b), operation, kind
                )
                high = _combined(
                    _number(arena, at[0], source, 2 * w + 1, a),
                    _number(arena, at[1], other, 2 * w + 1, b),
                    operation,
                    kind,
                )
                to = at[2] + target[FIRST] + w * target[CHANNEL] + y * target[ROW] + x * target[COLUMN] + i
                put(arena, to, paired(low, high))
