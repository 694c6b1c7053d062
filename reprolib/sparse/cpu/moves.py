"""What moves numbers between layers: images in and out, zeros around maps, views, pools, sums, products.

A *word* is 32 bits: a float32, or a pair of bfloat16 of two channels. `at` is where a buffer begins in the arena, in
words, and `layout` a row of `layout.table`. Work is shared by rows or by channels: a task does one of `parts` stretches
of them. NaN stays NaN, as torch has it.
"""

from __future__ import annotations

import numpy as np

from reprolib.sparse.compilation import compiled
from reprolib.sparse.cpu.activations import OPTIONS, ZERO, activate, bfloat16, half, larger, number, paired
from reprolib.sparse.cpu.intrinsics import bits_of, float_of, get, put
from reprolib.sparse.cpu.layout import (
    CHANNEL,
    CHANNELS,
    COLUMN,
    FIRST,
    HEIGHT,
    IMAGES,
    INTERLEAVED,
    PAIRS,
    ROW,
    WIDTH,
    WORDS,
)
from reprolib.sparse.cpu.planner import ADD, COPY

INFINITY = np.float32(np.inf)


@compiled(**OPTIONS)
def _share(count, part, parts):
    """The first and the last of `count` rows that a task does: neighbours, for two threads that write into one line of
    the cache wait for each other.
    """
    return count * part // parts, count * (part + 1) // parts


# --- In and out -------------------------------------------------------------------------------------------------------


@compiled(**OPTIONS)
def come_in(arena, x, at, layout, part, parts):
    """A bundle of images ``[N, C, H, W]``, which begin at word x, into their layout."""
    height, width, images = layout[HEIGHT], layout[WIDTH], layout[IMAGES]
    channels, plane = layout[CHANNELS], height * width
    share = 1 + layout[PAIRS]
    first, last = _share(layout[WORDS] * height, part, parts)
    for row in range(first, last):
        to = at + layout[FIRST] + row // height * layout[CHANNEL] + row % height * layout[ROW]
        channel = row // height * share
        start = x + channel * plane + row % height * width
        for i in range(images):  # rows whole: the same pixel of 16 images lies where caches have room for few lines
            for w in range(width):
                word = get(arena, start + i * channels * plane + w)
                if share == 2:
                    other = ZERO
                    if channel + 1 < channels:
                        other = get(arena, start + (i * channels + 1) * plane + w)
                    word = paired(word, other)
                put(arena, to + w * layout[COLUMN] + i, word)


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
                        put(arena, to + w, number(arena, at, layout, c, h * layout[ROW] + w * layout[COLUMN] + i))
                else:
                    start = at + layout[FIRST] + c * layout[CHANNEL] + h * layout[ROW] + i
                    for w in range(width):
                        put(arena, to + w, get(arena, start + w * layout[COLUMN]))


@compiled(**OPTIONS)
def fill(arena, at, ranges, values, part, parts):
    """What surrounds the maps of a layout, and where a max-pool begins."""
    first, last = _share(len(ranges), part, parts)
    for i in range(first, last):
        for word in range(at + ranges[i, 0], at + ranges[i, 1]):
            put(arena, word, values[i])


# --- Maps from maps ---------------------------------------------------------------------------------------------------


@compiled(**OPTIONS)
def take_view(arena, source_at, source, target_at, target, numbers, part, parts):
    """Pixels at a stride, zeros where there are none; positions share a vector."""
    stride_y, stride_x, first_y, first_x = numbers[0], numbers[1], numbers[2], numbers[3]
    height, width, images = target[HEIGHT], target[WIDTH], target[IMAGES]
    begin = min(width, max(0, -(first_x // stride_x)))
    end = max(begin, min(width, (source[WIDTH] - 1 - first_x) // stride_x + 1))
    first, last = _share(target[WORDS] * height, part, parts)
    for row in range(first, last):
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
        first, last = _share(target[HEIGHT], part, parts)
        for y in range(first, last):
            top, bottom = _inside(y, kernel[0], stride[0], padding[0], source[HEIGHT])
            for x in range(target[WIDTH]):
                left, right = _inside(x, kernel[1], stride[1], padding[1], source[WIDTH])
                to = target_at + target[FIRST] + y * target[ROW] + x * target[COLUMN]
                for v in range(top, bottom):
                    for u in range(left, right):
                        start = source_at + source[FIRST] + v * source[ROW] + u * source[COLUMN]
                        _take_larger(arena, start, to, source[WORDS] * source[IMAGES], v == top and u == left)
    else:
        first, last = _share(target[WORDS] * target[HEIGHT], part, parts)
        for row in range(first, last):
            c, y = row // target[HEIGHT], row % target[HEIGHT]
            top, bottom = _inside(y, kernel[0], stride[0], padding[0], source[HEIGHT])
            start = source_at + source[FIRST] + c * source[CHANNEL]
            for v in range(top, bottom):  # first downwards, in whole rows
                _take_larger(arena, start + v * source[ROW], scratch, source[ROW], v == top)
            to = target_at + target[FIRST] + c * target[CHANNEL] + y * target[ROW]
            window = kernel[1], stride[1], padding[1]
            _pool_row(arena, scratch, source[WIDTH], to, target[WIDTH], source[IMAGES], window)


@compiled(**OPTIONS)
def _pool_row(arena, start, size, to, width, images, window):
    """Windows of a row of `size` pixels: tap after tap, for all windows that have it."""
    kernel, stride, padding = window
    for i in range(to, to + width * images):
        put(arena, i, -INFINITY)
    for tap in range(kernel):
        first = tap - padding
        begin, end = max(0, -(first // stride)), min(width, (size - 1 - first) // stride + 1)
        if stride == 2 and images == 1:  # a loop of its own: so it becomes vector instructions
            for x in range(begin, end):
                put(arena, to + x, larger(get(arena, to + x), get(arena, start + first + 2 * x)))
        else:
            for x in range(begin, end):
                for i in range(images):
                    at, found = to + x * images + i, get(arena, start + (first + x * stride) * images + i)
                    put(arena, at, larger(get(arena, at), found))


@compiled(**OPTIONS)
def _take_larger(arena, start, to, count, first):
    """Numbers one after the other: what comes first is taken as it is."""
    if first:
        for i in range(count):
            put(arena, to + i, get(arena, start + i))
    else:
        for i in range(count):
            put(arena, to + i, larger(get(arena, to + i), get(arena, start + i)))


@compiled(**OPTIONS)
def _max_pool_of_pairs(arena, source_at, source, target_at, target, kernel, stride, padding, part, parts):
    first, last = _share(target[WORDS] * target[HEIGHT], part, parts)
    for row in range(first, last):
        w, y = row // target[HEIGHT], row % target[HEIGHT]
        top, bottom = _inside(y, kernel[0], stride[0], padding[0], source[HEIGHT])
        for x in range(target[WIDTH]):
            left, right = _inside(x, kernel[1], stride[1], padding[1], source[WIDTH])
            to = target_at + target[FIRST] + w * target[CHANNEL] + y * target[ROW] + x * target[COLUMN]
            for i in range(target[IMAGES]):
                for upper in range(1 + target[PAIRS]):
                    channel, largest = w * (1 + target[PAIRS]) + upper, -INFINITY
                    for v in range(top, bottom):
                        for u in range(left, right):
                            place = v * source[ROW] + u * source[COLUMN] + i
                            largest = larger(largest, number(arena, source_at, source, channel, place))
                    _put_half(arena, to + i, largest, upper, target[PAIRS])


@compiled(**OPTIONS)
def _put_half(arena, at, value, upper, pairs):
    """A number, or one of the two of a word, the lower one first."""
    if pairs:
        before = bits_of(get(arena, at)) & 0xFFFF if upper else 0
        value = float_of(np.int32(bfloat16(value) << 16 * upper | before))
    put(arena, at, value)


@compiled(**OPTIONS)
def mean(arena, source_at, source, target_at, target, part, parts):
    """The mean of each map, summed in float64."""
    first, last = _share(target[WORDS], part, parts)
    for w in range(first, last):
        for i in range(target[IMAGES]):
            for upper in range(1 + target[PAIRS]):
                total = 0.0
                for y in range(source[HEIGHT]):
                    for x in range(source[WIDTH]):
                        place = y * source[ROW] + x * source[COLUMN] + i
                        total += number(arena, source_at, source, w * (1 + target[PAIRS]) + upper, place)
                value = np.float32(total / (source[HEIGHT] * source[WIDTH]))
                _put_half(arena, target_at + target[FIRST] + w * target[CHANNEL] + i, value, upper, target[PAIRS])


@compiled(**OPTIONS)
def elementwise(arena, at, source, other, target, numbers, part, parts):
    """target = source, or its sum or product with `other` (or with one number of it for each map); then an activation.

    `at` are the places of the three.
    """
    operation, kind, pairs = numbers[0], numbers[1], target[PAIRS]
    each = source[HEIGHT] * source[WIDTH] == other[HEIGHT] * other[WIDTH]  # has a number of its own for each pixel
    interleaved, images = target[INTERLEAVED], target[IMAGES]
    pixels = target[HEIGHT] * target[WIDTH]
    first, last = _share(pixels if interleaved else target[WORDS], part, parts)
    for run in range(first, last):
        # Numbers that lie one after the other: all channels of a pixel, or all pixels of a channel.
        y, x, c, count = 0, 0, run, pixels * images
        if interleaved:
            y, x, c, count = run // target[WIDTH], run % target[WIDTH], 0, target[WORDS] * images
        a = at[0] + source[FIRST] + c * source[CHANNEL] + y * source[ROW] + x * source[COLUMN]
        b = at[1] + other[FIRST] + c * other[CHANNEL]
        to = at[2] + target[FIRST] + c * target[CHANNEL] + y * target[ROW] + x * target[COLUMN]
        if each:
            b += y * other[ROW] + x * other[COLUMN]
        step = count if each or interleaved else images
        for start in range(0, count, step):
            _combine(arena, a + start, b, to + start, step, operation, pairs)
        activate(arena, to, count, kind, pairs)


@compiled(**OPTIONS)
def _combine(arena, a, b, to, count, operation, pairs):
    if operation == COPY:
        for i in range(count):
            put(arena, to + i, get(arena, a + i))
    elif pairs:
        for i in range(count):
            x, y = get(arena, a + i), get(arena, b + i)
            low, high = half(x, False), half(x, True)
            if operation == ADD:
                low, high = low + half(y, False), high + half(y, True)
            else:
                low, high = low * half(y, False), high * half(y, True)
            put(arena, to + i, paired(low, high))
    elif operation == ADD:
        for i in range(count):
            put(arena, to + i, get(arena, a + i) + get(arena, b + i))
    else:
        for i in range(count):
            put(arena, to + i, get(arena, a + i) * get(arena, b + i))
