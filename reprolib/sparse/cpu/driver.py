"""The loop that all threads run: take a task of the current step, do it, wait until all tasks of the step are done.

The caller does all the work itself if nobody comes to help. So a forked child, or a machine with other things to do, is
slower, never stuck. What moves numbers is in `moves`; here are layers, which call machine code.
"""

from __future__ import annotations

import numpy as np

from reprolib.sparse.compilation import compiled
from reprolib.sparse.cpu import moves
from reprolib.sparse.cpu.activations import OPTIONS, activate_vector
from reprolib.sparse.cpu.intrinsics import (
    borrowed,
    call,
    compare_and_swap,
    fetch_add,
    lent,
    let_others_run,
    pause,
    prefetch,
    read,
)
from reprolib.sparse.cpu.layout import CHANNELS, HEIGHT, IMAGES, WIDTH
from reprolib.sparse.cpu.planner import ELEMENTWISE, FILL, INPUT, LAYER, MAX_POOL, MEAN, OUTPUT, VIEW
from reprolib.sparse.cpu.schedule import OWN, STRETCH

INLINE = OPTIONS | {"inline": "always"}  # each function less between others compiles them once less
FROM_PYTHON = {"nogil": True, "error_model": "numpy"}  # what `OPTIONS` leaves out is needed for calls
LINE = 8  # int64 in a line of the cache: counters of different steps do not disturb each other
SPINS = 2000  # before a waiting thread lets others run
VECTORS = 32  # output vectors of a band: a multiple of the four that a max-pool takes
SCRATCH = 32 * 64 * VECTORS  # bytes for the sums of a band: at most 32 registers of 64 bytes
LINGER = 20_000  # pauses for which a helper stays awake after its work: waking up takes long

# What calls and helpers tell each other, each in a line of its own.
CALL = 0 * LINE  # the number of the call that has helpers; 0: none; -1: it begins or ends
ADDRESS = 1 * LINE  # of its arguments
INSIDE = 2 * LINE  # helpers that use them
CALLS = 3 * LINE  # that have had helpers
ANNOUNCED = 4 * LINE  # calls that are about to begin
ASLEEP = 5 * LINE  # helpers
MAIL = 6 * LINE

# Columns of tables; addresses are bytes.
GROUP, GROUPS, PLACE, PLACES, MASKS, MASK_BYTES, SUM_BYTES, LANES = range(8)  # of a layer
FIRST_CHUNK, LAST_CHUNK, TO_TARGET, TO_ADDEND, ROWS = range(5)  # of a group
CODE, WEIGHTS, CODE_BYTES = range(3)  # of a chunk
KIND, STAGE, SOURCE, OTHER, TARGET, ZEROS, ZEROS_END, NUMBERS = range(8)  # of a piece of work
STEP, WORK, TASKS, BUNDLE, BUNDLES, BAND, PARTS = range(7)  # of a step


@compiled(**OPTIONS)
def _address(plan, place, index, bundle):
    """Bytes from the start of the arena: the memory of a thread, number `index`, or that of a bundle."""
    areas, places = plan[4], plan[5]
    area = places[place, 0]
    return areas[area, 0] + (index if area == OWN else bundle) * areas[area, 1] + places[place, 1]


@compiled(**OPTIONS)
def _group(tables, group, places, stage, at, strides, start, stop, sums):
    """A group of output channels for the output vectors [start, stop), counted through all bundles.

    The next chunk is fetched meanwhile, part by part: its code lies in the third-level cache as a rule.
    """
    chunks, count = tables[2], len(places)
    source, target, addend = at[0], at[1] + group[TO_TARGET], at[2] + group[TO_ADDEND]
    for k in range(group[FIRST_CHUNK], group[LAST_CHUNK]):
        bundle, place = start // count, start % count
        ahead = chunks[min(k + 1, len(chunks) - 1)]
        part = -(-ahead[CODE_BYTES] // (64 * (stop - start))) * 64
        for vector in range(start, stop):
            for line in range((vector - start) * part, min((vector - start + 1) * part, ahead[CODE_BYTES]), 64):
                prefetch(ahead[CODE] + line)
            call(
                chunks[k, CODE],
                source + bundle * strides[0] + places[place, 0],
                chunks[k, WEIGHTS],
                sums + (vector - start) * stage[SUM_BYTES],
                target + bundle * strides[1] + places[place, 1],
                stage[MASKS] + place * stage[MASK_BYTES],
                addend + bundle * strides[2] + places[place, 2],
            )
            place += 1
            if place == count:
                bundle, place = bundle + 1, 0


@compiled(**OPTIONS)
def _layer(arena, base, plan, work, first, last, at, strides, start, stop, sums):
    """Groups [first, last) of a layer for the output vectors [start, stop), band by band; then the activation."""
    tables, layouts = plan[0], plan[1]
    stage = tables[0][work[STAGE]]
    places = tables[3][stage[PLACE] : stage[PLACE] + stage[PLACES]]
    layout = layouts[work[TARGET]]
    for begin in range(start, stop, VECTORS):
        end = min(begin + VECTORS, stop)
        for g in range(stage[GROUP] + first, stage[GROUP] + last):
            group = tables[1][g]
            _group(tables, group, places, stage, at, strides, begin, end, sums)
            if work[NUMBERS]:
                for vector in range(begin, end):
                    bundle, place = vector // len(places), vector % len(places)
                    to = at[1] - base + group[TO_TARGET] + bundle * strides[1] + places[place, 1]
                    positions = layout[HEIGHT] * layout[WIDTH] * layout[IMAGES] - place * stage[LANES]
                    activate_vector(arena, to // 4, layout, group[ROWS], min(positions, stage[LANES]), work[NUMBERS])


@compiled(**INLINE)
def _move(arena, base, outside, plan, work, index, bundle, part, parts, sums):
    """All work but layers: one of `parts` of a bundle."""
    layouts, fills, values = plan[1], plan[2], plan[3]
    target, source, other = layouts[work[TARGET]], layouts[work[SOURCE]], layouts[work[OTHER]]
    to = _address(plan, work[TARGET], index, bundle) // 4
    start = _address(plan, work[SOURCE], index, bundle) // 4
    beside = _address(plan, work[OTHER], index, bundle) // 4
    numbers, kind = work[NUMBERS:], work[KIND]
    if kind == FILL:
        first, last = work[ZEROS], work[ZEROS_END]
        moves.fill(arena, to, fills[first:last], values[first:last], part, parts)
    elif kind == INPUT:
        size = target[CHANNELS] * target[HEIGHT] * target[WIDTH]
        x = (outside[0, numbers[0]] - base) // 4 + bundle * target[IMAGES] * size
        moves.come_in(arena, x, to, target, part, parts)
    elif kind == OUTPUT:
        size = source[CHANNELS] * source[HEIGHT] * source[WIDTH]
        y = (outside[1, numbers[0]] - base) // 4 + bundle * source[IMAGES] * size
        moves.go_out(arena, start, source, y)
    elif kind == VIEW:
        moves.take_view(arena, start, source, to, target, numbers, part, parts)
    elif kind == MAX_POOL:
        moves.max_pool(arena, start, source, to, target, numbers, (sums - base) // 4, part, parts)
    elif kind == MEAN:
        moves.mean(arena, start, source, to, target, part, parts)
    elif kind == ELEMENTWISE:
        moves.elementwise(arena, (start, beside, to), source, other, target, numbers, part, parts)


@compiled(**INLINE)
def _do(arena, base, outside, plan, step, task, slot, sums):
    """One task of a step: a bundle through the first layers, or a part of one piece of work."""
    areas, places, works = plan[4], plan[5], plan[6]
    parts, stretches = step[PARTS], step[STEP] == STRETCH
    index = slot if stretches else task // parts  # of a bundle, in the memory of threads
    for i in range(0 if stretches else step[WORK], step[WORK] + (0 if stretches else 1)):
        work = works[i]
        if work[KIND] != LAYER:
            bundle, part = step[BUNDLE] + task // parts, task % parts
            _move(arena, base, outside, plan, work, index, bundle, part, parts, sums)
            continue
        stage = plan[0][0][work[STAGE]]
        first, last, start, stop = 0, stage[GROUPS], 0, stage[PLACES]
        bundle, index, share = step[BUNDLE] + task, slot, 0
        if not stretches:
            bands = step[TASKS] // parts
            bundle, index, share = step[BUNDLE], 0, 1
            start = task % bands * step[BAND]
            stop = min(start + step[BAND], step[BUNDLES] * stage[PLACES])
            first, last = task // bands * stage[GROUPS] // parts, (task // bands + 1) * stage[GROUPS] // parts
        at = (
            base + _address(plan, work[SOURCE], index, bundle),
            base + _address(plan, work[TARGET], index, bundle),
            base + _address(plan, work[OTHER], index, bundle),
        )
        strides = (
            share * areas[places[work[SOURCE], 0], 1],
            share * areas[places[work[TARGET], 0], 1],
            share * areas[places[work[OTHER], 0], 1],
        )
        _layer(arena, base, plan, work, first, last, at, strides, start, stop, sums)


@compiled(**OPTIONS)
def _take_part(arena, base, scratch, outside, plan, steps, counters, threads):
    """Take tasks, step by step, until all are done; nobody but the first `threads` to come."""
    slot = fetch_add(counters, 0, 1)
    if slot >= threads:
        return
    for s in range(len(steps)):
        claimed, done = LINE * (2 * s + 1), LINE * (2 * s + 2)
        tasks = steps[s, TASKS]
        while True:
            task = fetch_add(counters, claimed, 1)
            if task >= tasks:
                break
            _do(arena, base, outside, plan, steps[s], task, slot, scratch + slot * SCRATCH)
            fetch_add(counters, done, 1)
        spins = 0
        while read(counters, done) < tasks:
            pause()
            spins += 1
            if spins > SPINS:
                let_others_run()


# --- Help -------------------------------------------------------------------------------------------------------------
# A call lends its arguments to helpers, which never leave compiled code meanwhile: in Python they would wait for the
# caller, and for all others. One call at a time has helpers; another one that comes meanwhile does its work alone.


@compiled(**FROM_PYTHON)
def work(arguments, mail):
    """Do all work of a call. `arguments`: those of `_take_part`; the type of each is that in `EXAMPLE`."""
    helped = arguments[7] > 1 and compare_and_swap(mail, CALL, 0, -1)
    if helped:
        mail[ADDRESS] = lent(arguments)
        compare_and_swap(mail, CALL, -1, 1 + fetch_add(mail, CALLS, 1))
    _take_part(*arguments)
    if helped:
        fetch_add(mail, CALL, -1 - mail[CALL])
        while read(mail, INSIDE) > 0:
            pause()
        compare_and_swap(mail, CALL, -1, 0)


@compiled(**FROM_PYTHON)
def help_out(mail, example, slept):
    """Help with calls until none has come for a while. `example`: the types of their arguments; `slept`: 0 or 1."""
    helped, announced, waited = 0, read(mail, ANNOUNCED), 0
    fetch_add(mail, ASLEEP, -slept)
    while True:
        call = read(mail, CALL)
        if call > 0 and call != helped:
            fetch_add(mail, INSIDE, 1)
            if read(mail, CALL) == call:  # it can't end now
                _take_part(*borrowed(read(mail, ADDRESS), example))
            fetch_add(mail, INSIDE, -1)
            helped, announced, waited = call, read(mail, ANNOUNCED), 0
        pause()
        waited += 1
        if waited > LINGER:
            fetch_add(mail, ASLEEP, 1)
            if read(mail, ANNOUNCED) == announced:
                return
            fetch_add(mail, ASLEEP, -1)
            announced, waited = read(mail, ANNOUNCED), 0


def _example():
    longs, pairs, floats = np.zeros(0, np.int64), np.zeros((0, 0), np.int64), np.zeros(0, np.float32)
    plan = (pairs,) * 4, pairs, pairs, floats, pairs, pairs, pairs
    return floats, 0, 0, pairs, plan, pairs, longs, 0


EXAMPLE = _example()
