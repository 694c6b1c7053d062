"""The order of the work, and the memory that it needs.

Early layers run *depth first*: a thread takes a bundle of images through all of them in memory of its own. Where maps
have become small, threads share each layer, for all bundles at once: the code of a layer is long then, and should be
read once. Images too large to share vectors go through all layers that way, if there is one for each thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reprolib.sparse.cpu.planner import FILL, INPUT, LAYER, OUTPUT, Plan, Work

SMALL_MAP = 256  # numbers, of all images of a bundle: layers of smaller maps run for all bundles at once
FEW_WEIGHTS = 1 << 14  # unless they have no more kept weights than this
TASKS_PER_THREAD = 4  # of a layer that threads share
FEWEST = 16  # output vectors of such a task that does all groups: each thread reads all code
PARTS = 8  # of a bundle: tasks of work that only moves numbers
STRETCH = -1  # a step: a bundle goes through the first `work` pieces of work

OWN, LATE = 0, 1  # memory of a thread; of a bundle


@dataclass(frozen=True)
class Step:
    """`tasks` that any thread may do, in any order; the next step begins when all are done.

    A step is the work of this number for `bundles` from `bundle` on. A task of a layer does `band` output vectors of
    one of `parts` of its groups; other tasks do one of `parts` of a bundle.
    """

    kind: int
    work: int
    tasks: int
    bundle: int
    bundles: int
    band: int = 0
    parts: int = 1


@dataclass(frozen=True, eq=False)
class Schedule:
    """``areas [2, 2]``: where the memory of threads and that of bundles begins, and the bytes of one; `size` of all.

    ``places [places, 2]``: whose memory, and the bytes from its start.
    """

    steps: tuple[Step, ...]
    areas: np.ndarray
    places: np.ndarray
    size: int


def schedule(plan: Plan, groups: dict[int, int], bundles: int, threads: int) -> Schedule:
    """Order the work for `bundles` of images; `groups` of output channels has each layer, by the number of its work."""
    deep = stretch(plan)
    places, sizes = _places(plan, deep, again=False)
    alone = bundles - bundles % threads if deep else 0  # bundles that one thread each takes through the stretch
    steps = [Step(STRETCH, deep, alone, 0, alone)] if alone else []
    if bundles > alone:
        steps += _shared(plan, range(deep), groups, alone, bundles - alone, threads)
    steps += _shared(plan, range(deep, len(plan.work)), groups, 0, bundles, threads)
    own = threads * sizes[OWN]
    areas = np.array([[0, sizes[OWN]], [own, sizes[LATE]]])
    return Schedule(tuple(steps), areas, places, own + bundles * sizes[LATE])


def apart(plan: Plan, groups: dict[int, int], bundles: int, threads: int) -> tuple[Schedule, ...]:
    """Like `schedule`, in three parts that can each be done again: images in, all layers, images out."""
    places, sizes = _places(plan, 0, again=True)
    areas = np.array([[0, 0], [0, sizes[LATE]]])
    first = next(i for i, work in enumerate(plan.work) if work.kind not in (INPUT, FILL)) - 1
    first += plan.work[first].kind != FILL
    last = next(i for i, work in enumerate(plan.work) if work.kind == OUTPUT)
    parts = range(first), range(first, last), range(last, len(plan.work))
    steps = (tuple(_shared(plan, part, groups, 0, bundles, threads)) for part in parts)
    return tuple(Schedule(step, areas, places, bundles * sizes[LATE]) for step in steps)


def stretch(plan: Plan) -> int:
    """How many pieces of work are done depth first: all before the first layer of small maps and many weights; simply
    all where images do not share vectors.
    """
    if not any(layout.interleaved for layout, _ in plan.places):
        return len(plan.work)
    for work in plan.work:
        small = work.kind == LAYER and len(work.stage.places) * plan.images < SMALL_MAP
        if small and np.count_nonzero(work.stage.weight) > FEW_WEIGHTS:
            return next(i for i, other in enumerate(plan.work) if other.operation == work.operation)
    return len(plan.work)


def _places(plan: Plan, deep: int, again: bool) -> tuple[np.ndarray, tuple[int, int]]:
    """Whose memory each place lies in, and how far from its start; and the bytes that a thread and a bundle need.

    What is not needed any more makes room, unless all work is to be done `again`.
    """
    lives: dict[int, list[int]] = {}
    for i, work in enumerate(plan.work):
        for place in (work.source, work.other, work.target):
            if place >= 0:
                life = lives.setdefault(plan.places[place][1], [i, i])
                life[1] = i
    size_of = {buffer: layout.size for layout, buffer in plan.places}
    found: dict[int, tuple[int, int]] = {}
    sizes = [0, 0]
    for area in (OWN, LATE):
        mine = [buffer for buffer, life in lives.items() if (life[1] < deep) == (area == OWN)]
        taken: list[tuple[int, int, list[int]]] = []
        for buffer in sorted(mine, key=size_of.get, reverse=True):
            life = [0, len(plan.work)] if again else lives[buffer]
            start = _room(size_of[buffer], [(a, b) for a, b, of in taken if of[0] <= life[1] and life[0] <= of[1]])
            taken.append((start, start + size_of[buffer], life))
            found[buffer] = area, start
            sizes[area] = max(sizes[area], start + size_of[buffer])
    return np.array([found.get(buffer, (LATE, 0)) for _, buffer in plan.places]).reshape(-1, 2), tuple(sizes)


def _room(size: int, taken: list[tuple[int, int]]) -> int:
    """The first start of so many bytes between ranges that are taken."""
    start = 0
    for a, b in sorted(taken):
        if start + size <= a:
            break
        start = max(start, b)
    return start


def _shared(plan: Plan, numbers: range, groups: dict[int, int], bundle: int, bundles: int, threads: int) -> list[Step]:
    """Work that threads share, for `bundles` from `bundle` on."""
    return [_step(plan.work[i], i, groups.get(i, 0), bundle, bundles, threads) for i in numbers]


def _step(work: Work, number: int, groups: int, bundle: int, bundles: int, threads: int) -> Step:
    if work.kind == OUTPUT:
        return Step(OUTPUT, number, bundles, bundle, bundles)
    if work.kind != LAYER:
        return Step(work.kind, number, bundles * PARTS, bundle, bundles, parts=PARTS)
    # By output vectors if there are many, else by groups, so that each thread reads other code.
    vectors = bundles * len(work.stage.places)
    many = vectors >= FEWEST * threads
    tasks, parts = (min(TASKS_PER_THREAD * threads, vectors // FEWEST), 1) if many else (1, groups)
    band = -(-vectors // tasks // 4) * 4
    return Step(LAYER, number, -(-vectors // band) * parts, bundle, bundles, band, parts)
