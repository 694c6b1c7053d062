"""A network as one function of images: its programs in memory, and the threads that help to run them."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from functools import cache, cached_property, lru_cache, partial
from types import ModuleType

import numpy as np

from reprolib.sparse.compilation import told
from reprolib.sparse.cpu import generator, layout, planner
from reprolib.sparse.cpu.driver import ANNOUNCED, ASLEEP, EXAMPLE, LINE, MAIL, SCRATCH, help_out, work
from reprolib.sparse.cpu.encoder import BYTES
from reprolib.sparse.cpu.planner import LAYER, OUTPUT
from reprolib.sparse.cpu.schedule import Schedule, apart, schedule
from reprolib.sparse.cpu.shapes import Shape, Weights, shapes
from reprolib.sparse.operations import Convolution, Graph

IN_FLIGHT_BYTES = 1 << 28  # of bundles that go through the network together: memory stays bounded
MOST_IN_FLIGHT = 32  # of these bundles
# Images share vectors where the largest map of as many as a vector has lanes is not larger than this, about what a
# third-level cache holds. Larger ones go through the network alone, and neighbouring positions share vectors.
SHARED_BYTES = 1 << 25
PROGRAMS = 8  # sizes of images and numbers of them that a network remembers


class Program:
    """A graph for images of one size, `images` at a time: its code in memory, and tables of addresses."""

    def __init__(self, graph: Graph, weights: Weights, inputs: list[Shape], images: int, isa: ModuleType):
        self.plan = planner.plan(graph, weights, inputs, images, isa.LANES, isa.PAIRS)
        self.shapes = [self.plan.places[w.source][0] for w in self.plan.work if w.kind == OUTPUT]
        self.stages = {i: work.stage for i, work in enumerate(self.plan.work) if work.kind == LAYER}
        codes = {i: generator.generate(stage, isa) for i, stage in self.stages.items()}
        self.code_bytes = sum(code.code.nbytes for code in codes.values())
        self.weight_bytes = sum(code.weights.nbytes for code in codes.values())
        self._pages = executable(np.concatenate([code.code for code in codes.values()]))
        self._weights = _aligned(self.weight_bytes)
        self._weights[:] = np.concatenate([code.weights for code in codes.values()])
        masks = {i: isa.mask_table(stage.masks) for i, stage in self.stages.items()}
        self._masks = _aligned(sum(table.nbytes for table in masks.values()))
        self._masks.view(np.uint8)[:] = np.concatenate([table.ravel() for table in masks.values()])
        self.groups = {i: len(code.first_rows) - 1 for i, code in codes.items()}
        self._schedules: dict[tuple[int, int], tuple] = {}
        self._tables = self._layers(codes, masks, isa)
        self._work = self._pieces(list(codes))
        self._layouts = layout.table([at for at, _ in self.plan.places])

    def _layers(self, codes: dict[int, generator.Code], masks: dict[int, np.ndarray], isa: ModuleType) -> tuple:
        """Tables of layers, groups, chunks and output vectors: see `driver`."""
        code_at = np.frombuffer(self._pages, np.uint8).ctypes.data
        weights_at, masks_at = self._weights.ctypes.data, self._masks.ctypes.data
        layers, groups, chunks, places = [], [], [], []
        group_count = chunk_count = place_count = 0
        for i, code in codes.items():
            stage, mask_bytes = self.stages[i], masks[i].shape[1] if len(masks[i]) else 0
            count, sum_bytes = self.groups[i], isa.GROUP_ROWS[0] * BYTES[stage.lanes]
            layers.append(
                (group_count, count, place_count, len(stage.places), masks_at, mask_bytes, sum_bytes, stage.lanes)
            )
            first, rows = chunk_count + code.first_chunks, code.first_rows[:-1]
            added = stage.addend.to_channel(rows) if stage.addend else 0 * rows
            to = stage.target.to_channel(rows)
            groups.append(np.stack([first[:-1], first[1:], to, added, np.diff(code.first_rows)], axis=1))
            chunks.append(code.chunks * [1, 4, 1] + [code_at, weights_at, 0])
            places.append(stage.places)
            group_count, chunk_count = group_count + count, chunk_count + len(code.chunks)
            place_count += len(stage.places)
            code_at, weights_at = code_at + code.code.nbytes, weights_at + code.weights.nbytes
            masks_at += masks[i].nbytes
        return np.array(layers, np.int64), *(np.concatenate(part) for part in (groups, chunks, places))

    def _pieces(self, layers: list[int]) -> tuple[np.ndarray, ...]:
        """The table of all work, and what it fills in."""
        rows, zeros, count = [], [np.zeros((0, 3), np.int64)], 0
        for i, piece in enumerate(self.plan.work):
            stage = layers.index(i) if piece.kind == LAYER else -1
            begin = count
            if piece.zeros is not None:
                zeros.append(piece.zeros)
                count += len(piece.zeros)
            numbers = piece.numbers + (0,) * (6 - len(piece.numbers))
            rows.append((piece.kind, stage, piece.source, piece.other, piece.target, begin, count, *numbers))
        fills = np.concatenate(zeros)
        return np.array(rows, np.int64), fills[:, :2].copy(), fills[:, 2].astype(np.uint32).view(np.float32)

    def run(self, inputs: list[np.ndarray], threads: int, arenas: list) -> list[np.ndarray]:
        """Images ``[N, C, H, W]``, float32 and contiguous, N a multiple of `images`, through all layers."""
        bundles = len(inputs[0]) // self.plan.images
        key = bundles, threads
        if key not in self._schedules:
            self._schedules[key] = _numbered(schedule(self.plan, self.groups, *key))
        order = self._schedules[key]
        outputs = self._empty(len(inputs[0]))
        arena = _arena(arenas, order[-1] + threads * SCRATCH)
        self._run(inputs, outputs, arena, order, threads)
        arenas.append(arena)
        return outputs

    @cached_property
    def bundle_bytes(self) -> int:
        """Memory that a bundle needs while it goes through."""
        one, two = (schedule(self.plan, self.groups, count, 1).size for count in (1, 2))
        return two - one

    def alone(
        self, inputs: list[np.ndarray], threads: int
    ) -> tuple[Callable[[], None], Callable[[], list[np.ndarray]]]:
        """For benchmarks: a call that runs layers on activations already in their layout, and one for the results."""
        bundles = len(inputs[0]) // self.plan.images
        come, layers, out = map(_numbered, apart(self.plan, self.groups, bundles, threads))
        outputs = self._empty(len(inputs[0]))
        arena = _aligned(come[-1] + threads * SCRATCH)
        self._run(inputs, outputs, arena, come, threads)

        def results() -> list[np.ndarray]:
            self._run(inputs, outputs, arena, out, threads)
            return outputs

        return partial(self._run, inputs, outputs, arena, layers, threads), results

    def _empty(self, count: int) -> list[np.ndarray]:
        return [np.empty((count, at.channels, at.height, at.width), np.float32) for at in self.shapes]

    def _run(self, inputs, outputs, arena: np.ndarray, order: tuple, threads: int) -> None:
        steps, areas, places, size = order
        works, fills, values = self._work
        counters = np.zeros(LINE * (2 * len(steps) + 1), np.int64)
        base = arena.ctypes.data
        outside = np.zeros((2, max(len(inputs), len(outputs))), np.int64)
        for row, arrays in zip(outside, (inputs, outputs), strict=True):
            row[: len(arrays)] = [array.ctypes.data for array in arrays]
        plan = self._tables, self._layouts, fills, values, areas, places, works
        work((arena, base, base + size, outside, plan, steps, counters, threads), _with_helpers(threads - 1))


def _numbered(order: Schedule) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """A schedule as tables of numbers."""
    steps = np.array([astuple(step) for step in order.steps], np.int64).reshape(-1, 7)
    return steps, order.areas.astype(np.int64), order.places.astype(np.int64), order.size


class Network:
    """A graph as a function of images. Its programs are made when images of a new size come.

    `weights` are float32, as `operations` describes them.
    """

    def __init__(self, graph: Graph, weights: Weights, isa: ModuleType):
        _compile(isa)
        self.graph, self.weights, self.isa = graph, weights, isa
        self._programs = {}
        self._together = lru_cache(PROGRAMS)(self._share)
        self._arenas = []
        self._lock = threading.Lock()

    def program(self, inputs: tuple[Shape, ...], images: int) -> Program:
        """The program for images of these sizes; the ones used last are remembered."""
        key = inputs, images
        with self._lock:
            found = self._programs.pop(key, None) or Program(self.graph, self.weights, list(inputs), images, self.isa)
            self._programs[key] = found
            while len(self._programs) > PROGRAMS:
                del self._programs[next(iter(self._programs))]
        return found

    def _share(self, inputs: tuple[Shape, ...]) -> int:
        """How many images share vectors."""
        largest = max(math.prod(shape) for shape in shapes(self.graph, self.weights, list(inputs)))
        return self.isa.LANES if 4 * self.isa.LANES * largest <= SHARED_BYTES else 1

    def __call__(self, inputs: list[np.ndarray], threads: int) -> list[np.ndarray]:
        """Images ``[N, C, H, W]``, float32 and contiguous, through all operations: one array for each output.

        Raises ValueError for images that do not fit.
        """
        sizes = tuple(x.shape[1:] for x in inputs)
        together = self._together(sizes)
        count, start, parts = len(inputs[0]), 0, []
        while start < count:
            images = together if count - start >= together else count - start
            program = self.program(sizes, images)
            bundles = max(1, min(MOST_IN_FLIGHT, IN_FLIGHT_BYTES // max(1, program.bundle_bytes)))
            stop = start + images * min(bundles, (count - start) // images)
            parts.append(program.run([x[start:stop] for x in inputs], threads, self._arenas))
            start = stop
        return parts[0] if len(parts) == 1 else [np.concatenate(part) for part in zip(*parts, strict=True)]


@cache
def _compile(isa: ModuleType) -> None:
    """Compile the driver, or load it from Numba's cache: one number through one layer."""
    graph = Graph((True,), (Convolution(0, "weight"),), (1,))
    weights = {"weight": (np.ones((1, 1, 1, 1), np.float32), np.zeros(1, np.float32))}
    with told():
        Program(graph, weights, [(1, 1, 1)], 1, isa).run([np.zeros((1, 1, 1, 1), np.float32)], 1, [])
        help_out(np.zeros(MAIL, np.int64), EXAMPLE, 0)


def _aligned(size: int) -> np.ndarray:
    """Float32 memory of `size` bytes at the start of a line of the cache."""
    memory = np.empty(size // 4 + 16, np.float32)
    start = -memory.ctypes.data % 64 // 4
    return memory[start : start + size // 4]


def _arena(arenas: list, size: int) -> np.ndarray:
    """Memory that nobody uses now, of a former call if that fits: fresh pages are slow. What is far too large goes."""
    while arenas:
        arena = arenas.pop()
        if size <= arena.nbytes <= max(4 * size, 1 << 26):
            return arena
    return _aligned(size)


def executable(code: np.ndarray) -> mmap.mmap:
    """Pages that hold `code`, written first, executable then, never both. Raises OSError where a system forbids it."""
    pages = mmap.mmap(-1, len(code), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages[:] = code.tobytes()
    at = np.frombuffer(pages, np.uint8).ctypes.data
    if _libc().mprotect(ctypes.c_void_p(at), ctypes.c_size_t(len(code)), mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "this system forbids code that is made while a program runs")
    return pages


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


# --- Helpers ----------------------------------------------------------------------------------------------------------

_mail: np.ndarray  # what calls and helpers tell each other: see `driver`
_sleepers: queue.SimpleQueue  # wakes helpers
_helpers: list[threading.Thread]
_cores: set[int]  # where helpers may run


def _alone() -> None:
    """Nobody helps yet: at the start, and in a forked child, where threads are gone."""
    global _mail, _sleepers, _helpers, _cores
    _mail, _sleepers, _helpers, _cores = np.zeros(MAIL, np.int64), queue.SimpleQueue(), [], set()


_alone()
os.register_at_fork(after_in_child=_alone)


def _with_helpers(count: int) -> np.ndarray:
    """Wake helpers for a call that is about to begin; what to tell them by."""
    global _cores
    if not count:
        return _mail
    while len(_helpers) < count:
        _helpers.append(threading.Thread(target=_help, args=(_mail, _sleepers), daemon=True))
        _helpers[-1].start()
        _cores = set()
    others = os.sched_getaffinity(0) - {_libc().sched_getcpu()}
    if others and others != _cores:  # else Linux may wake them on the caller's core, and they take turns there
        _cores = others
        for helper in list(_helpers):
            with suppress(OSError):
                os.sched_setaffinity(helper.native_id, others)
    _mail[ANNOUNCED] += 1
    for _ in range(min(count, int(_mail[ASLEEP]))):
        _sleepers.put(None)
    return _mail


def _help(mail: np.ndarray, sleepers: queue.SimpleQueue) -> None:
    help_out(mail, EXAMPLE, 0)
    while True:
        sleepers.get()
        help_out(mail, EXAMPLE, 1)
