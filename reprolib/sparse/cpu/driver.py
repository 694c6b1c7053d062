"""The loop that all threads run: take a task of the current step, do it, wait until all tasks of the step are done.

The caller does all the work itself if nobody comes to help. So a forked child, or a machine with other things to do, is
slower, never stuck. What moves numbers is in `moves`; here are layers, which call machine code.
"""

from __future__ import annotations

from reprolib.sparse.compilation import compiled
from reprolib.sparse.cpu import moves
from reprolib.sparse.cpu.activations import OPTIONS, activate_vector
from reprolib.sparse.cpu.intrinsics import call, claim, let_others_run, pause, prefetch, read
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


@compiled(**FROM_PYTHON)
def work(arena, base, scratch, outside, plan, steps, counters):
    """Take tasks, step by step, until all are done. `outside`: addresses of the inputs, and of the outputs."""
    slot = claim(counters, 0)
    for s in range(len(steps)):
        claimed, done = LINE * (2 * s + 1), LINE * (2 * s + 2)
        tasks = steps[s, TASKS]
        while True:
            task = claim(counters, claimed)
            if task >= tasks:
                break
            _do(arena, base, outside, plan, steps[s], task, slot, scratch + slot * SCRATCH)
            claim(counters, done)
        spins = 0
        while read(counters, done) < tasks:
            pause()
            spins += 1
            if spins > SPINS:
                let_others_run()


@compiled(**FROM_PYTHON)
def linger(bell, heard):
    for _ in range(LINGER):
        if read(bell, 0) != heard:
            return
        pause()
