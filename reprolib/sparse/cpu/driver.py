"""The loop that all threads run: take a task of the current step, do it, wait until all tasks of the step are done.

The caller does all the work itself if nobody comes to help. So a forked child, or a machine with other things to do, is
slower, never stuck.
"""

from __future__ import annotations

import numpy as np

from reprolib.sparse.compilation import compiled
from reprolib.sparse.cpu import planner
from reprolib.sparse.cpu.intrinsics import call, claim, get, let_others_run, pause, prefetch, put, read
from reprolib.sparse.cpu.planner import FILL, INPUT, LAYER, POOL, STRETCH

LINE = 8  # int64 in a line of the cache: counters of different steps do not disturb each other
SPINS = 2000  # before a waiting thread lets others run
VECTORS = planner.BAND
SCRATCH = 32 * 64 * VECTORS  # bytes for the sums of a band: at most 32 registers of 64 bytes
GROUP, GROUPS, PLACE, PLACES, MASKS, MASK_BYTES, SUM_BYTES = range(7)  # of a stage; see Program
KIND, TASKS, STAGE, SOURCE, SOURCE_STRIDE, TARGET, TARGET_STRIDE, BUNDLE, BUNDLES, BAND, PARTS = range(11)
# Of a layout, in numbers of 32 bits:
CHANNELS, HEIGHT, WIDTH, IMAGES, FIRST, CHANNEL, ROW, COLUMN, ZEROS, ZEROS_END, PAIRS = range(11)
LINGER = 20_000  # pauses for which a helper stays awake after its work: waking up takes long


@compiled(nogil=True)
def _come_in(x, first_image, layout, arena, at, part, parts):
    """Every so many rows of a bundle of images ``[N, C, H, W]`` into their layout."""
    height, width, images = layout[HEIGHT], layout[WIDTH], layout[IMAGES]
    channels, plane = layout[CHANNELS], height * width
    share = 1 + layout[PAIRS]
    for row in range(part, -(-channels // share) * height, parts):
        to = at + layout[FIRST] + row // height * layout[CHANNEL] + row % height * layout[ROW]
        channel = row // height * share
        start = (first_image * channels + channel) * plane + row % height * width
        for w in range(width):
            for i in range(images):
                number = get(x, start + i * channels * plane + w)
                if share == 2:
                    other = get(x, start + (i * channels + 1) * plane + w) if channel + 1 < channels else np.float32(0)
                    number = paired(number, other)
                put(arena, to + w * layout[COLUMN] + i, number)


@compiled(nogil=True)
def _go_out(arena, at, layout, y, first_image):
    """A bundle of images from its layout."""
    channels, height, width, images = layout[CHANNELS], layout[HEIGHT], layout[WIDTH], layout[IMAGES]
    size = channels * height * width
    for i in range(images):
        for c in range(channels):
            for h in range(height):
                start = at + layout[FIRST] + c * layout[CHANNEL] + h * layout[ROW] + i
                to = (first_image + i) * size + (c * height + h) * width
                for w in range(width):
                    put(y, to + w, get(arena, start + w * layout[COLUMN]))


@compiled(nogil=True)
def _fill(arena, at, layout, fills, values, part, parts):
    """What surrounds the maps of a layout, and where a max-pool begins: every so many ranges."""
    for i in range(layout[ZEROS] + part, layout[ZEROS_END], parts):
        for number in range(at + fills[i, 0], at + fills[i, 1]):
            put(arena, number, values[i])


@compiled(nogil=True)
def bfloat16(number):
    """The bits of the nearest bfloat16, the even one of two; NaN stays NaN."""
    bits = np.int64(np.float32(number).view(np.uint32))
    return bits >> 16 | 64 if number != number else bits + 0x7FFF + (bits >> 16 & 1) >> 16


@compiled(nogil=True)
def paired(low, high):
    """Two numbers, rounded to bfloat16, in the 32 bits of one."""
    return np.uint32(bfloat16(low) | bfloat16(high) << 16).view(np.float32)


@compiled(nogil=True)
def _larger(a, b):
    """As torch has it: NaN if one of them is."""
    return a if a > b or a != a else b


@compiled(nogil=True)
def _largest(arena, pixel, right, below):
    """Of four pixels."""
    above = _larger(get(arena, pixel), get(arena, pixel + right))
    return _larger(above, _larger(get(arena, pixel + below), get(arena, pixel + below + right)))


@compiled(nogil=True)
def _pool(arena, source, raw, target, layout, first, last):
    """Max-pool channels (or pairs) where positions share a vector: pixels one after the other, images innermost."""
    images, width = raw[IMAGES], layout[WIDTH]
    for c in range(first, last):
        for h in range(layout[HEIGHT]):
            upper = source + raw[FIRST] + c * (1 + layout[PAIRS]) * raw[CHANNEL] + 2 * h * raw[ROW]
            to = target + layout[FIRST] + c * layout[CHANNEL] + h * layout[ROW]
            if images == 1 and not layout[PAIRS]:  # of its own: so it becomes vector instructions
                for w in range(width):
                    put(arena, to + w, _largest(arena, upper + 2 * w, 1, raw[ROW]))
                continue
            for w in range(width):
                for i in range(images):
                    pixel = upper + 2 * w * images + i
                    number = _largest(arena, pixel, images, raw[ROW])
                    if layout[PAIRS]:
                        number = paired(number, _largest(arena, pixel + raw[CHANNEL], images, raw[ROW]))
                    put(arena, to + w * images + i, number)


@compiled(nogil=True)
def _group(chunks, first, last, places, stage, source, source_stride, target, target_stride, start, stop, sums):
    """A group of output channels for the output vectors [start, stop), counted through all bundles.

    The next chunk is fetched meanwhile, part by part: its code lies in the third-level cache as a rule.
    """
    count = len(places)
    for k in range(first, last):
        bundle, place = start // count, start % count
        ahead = chunks[min(k + 1, len(chunks) - 1)]
        part = -(-ahead[2] // (64 * (stop - start))) * 64
        for vector in range(start, stop):
            for at in range((vector - start) * part, min((vector - start + 1) * part, ahead[2]), 64):
                prefetch(ahead[0] + at)
            call(
                chunks[k, 0],
                source + bundle * source_stride + places[place, 0],
                chunks[k, 1],
                sums + (vector - start) * stage[SUM_BYTES],
                target + bundle * target_stride + places[place, 1],
                stage[MASKS] + place * stage[MASK_BYTES],
            )
            place += 1
            if place == count:
                bundle, place = bundle + 1, 0


@compiled(nogil=True)
def _layer(tables, i, first, last, source, source_stride, target, target_stride, start, stop, sums):
    """Groups [first, last) of layer i for the output vectors [start, stop), band by band."""
    stages, groups, chunks, all_places = tables
    stage = stages[i]
    places = all_places[stage[PLACE] : stage[PLACE] + stage[PLACES]]
    for at in range(start, stop, VECTORS):
        for g in range(stage[GROUP] + first, stage[GROUP] + last):
            _group(
                chunks, groups[g, 0], groups[g, 1], places, stage, source, source_stride, target + groups[g, 2],
                target_stride, at, min(at + VECTORS, stop), sums,
            )  # fmt: skip


@compiled(nogil=True)
def _stretch(x, arena, base, step, task, slot, tables, layouts, fills, values, sums):
    """One bundle through the first layers, in two buffers of this thread; the last layer writes elsewhere."""
    at, bundle = step[SOURCE] + slot * step[SOURCE_STRIDE], step[BUNDLE] + task
    other = at + step[PARTS] * step[SOURCE_STRIDE]
    _fill(arena, at // 4, layouts[0], fills, values, 0, 1)
    _come_in(x, bundle * layouts[0, IMAGES], layouts[0], arena, at // 4, 0, 1)
    for i in range(step[STAGE]):
        if i == step[STAGE] - 1:
            other = step[TARGET] + bundle * step[TARGET_STRIDE]
        _fill(arena, other // 4, layouts[i + 1], fills, values, 0, 1)
        stage = tables[0][i]
        _layer(tables, i, 0, stage[GROUPS], base + at, 0, base + other, 0, 0, stage[PLACES], sums)
        at, other = other, at


@compiled(nogil=True)
def _do(x, y, arena, base, step, task, slot, tables, layouts, fills, values, sums):
    """One task of a step. Addresses are bytes; places in arrays are numbers."""
    stages, i, parts = tables[0], step[STAGE], step[PARTS]
    bundle, part = task // parts, task % parts
    source = (step[SOURCE] + bundle * step[SOURCE_STRIDE]) // 4
    target = (step[TARGET] + bundle * step[TARGET_STRIDE]) // 4
    if step[KIND] == STRETCH:
        _stretch(x, arena, base, step, task, slot, tables, layouts, fills, values, sums)
    elif step[KIND] == INPUT:
        _fill(arena, target, layouts[0], fills, values, part, parts)
        _come_in(x, (step[BUNDLE] + bundle) * layouts[0, IMAGES], layouts[0], arena, target, part, parts)
    elif step[KIND] == FILL:
        _fill(arena, target, layouts[i + 1], fills, values, part, parts)
    elif step[KIND] == LAYER:
        groups, bands = stages[i, GROUPS], step[TASKS] // parts
        start = task % bands * step[BAND]
        stop = min(start + step[BAND], step[BUNDLES] * stages[i, PLACES])
        first, last = task // bands * groups // parts, (task // bands + 1) * groups // parts
        _layer(
            tables, i, first, last, base + step[SOURCE], step[SOURCE_STRIDE], base + step[TARGET],
            step[TARGET_STRIDE], start, stop, sums,
        )  # fmt: skip
    elif step[KIND] == POOL:
        raw, layout = layouts[len(stages) + 1 + i], layouts[i + 1]
        words = raw[CHANNELS] // (1 + layout[PAIRS])
        _pool(arena, source, raw, target, layout, part * words // parts, (part + 1) * words // parts)
    else:
        layout = layouts[len(stages)]
        _go_out(arena, source, layout, y, bundle * layout[IMAGES])


@compiled(nogil=True)
def work(x, y, arena, base, scratch, steps, tables, layouts, fills, values, counters):
    """Take tasks, step by step, until all are done."""
    slot = claim(counters, 0)
    for s in range(len(steps)):
        claimed, done = LINE * (2 * s + 1), LINE * (2 * s + 2)
        tasks = steps[s, TASKS]
        while True:
            task = claim(counters, claimed)
            if task >= tasks:
                break
            _do(x, y, arena, base, steps[s], task, slot, tables, layouts, fills, values, scratch + slot * SCRATCH)
            claim(counters, done)
        spins = 0
        while read(counters, done) < tasks:
            pause()
            spins += 1
            if spins > SPINS:
                let_others_run()


@compiled(nogil=True)
def linger(bell, heard):
    for _ in range(LINGER):
        if read(bell, 0) != heard:
            return
        pause()
