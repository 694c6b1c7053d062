"""A network as one function of images: its programs in memory, and the threads that help to run them."""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import astuple
from functools import cache, partial
from types import ModuleType

import numpy as np

from reprolib.sparse.compilation import told
from reprolib.sparse.cpu import generator, planner
from reprolib.sparse.cpu.driver import LINE, SCRATCH, linger, work
from reprolib.sparse.cpu.encoder import BYTES

SLICE = 32  # bundles that go through the network together: memory stays bounded
PROGRAMS = 8  # sizes of images and numbers of them that a network remembers


class Program:
    """A network for images of one size, `images` at a time: its code in memory, and tables of addresses."""

    def __init__(self, layers: list[planner.Layer], height: int, width: int, images: int, isa: ModuleType):
        self.stages = planner.stages(layers, height, width, images, isa.LANES, isa.PAIRS)
        codes = [generator.generate(stage, isa) for stage in self.stages]
        self.code_bytes = sum(code.code.nbytes for code in codes)
        self.weight_bytes = sum(code.weights.nbytes for code in codes)
        self._pages = executable(np.concatenate([code.code for code in codes]))
        self._weights = _aligned(self.weight_bytes)
        self._weights[:] = np.concatenate([code.weights for code in codes])
        self.groups = [len(code.first_rows) - 1 for code in codes]
        self._schedules = {}
        masks = [isa.mask_table(stage.masks) for stage in self.stages]
        self._masks = _aligned(sum(table.nbytes for table in masks))
        self._masks.view(np.uint8)[:] = np.concatenate([table.ravel() for table in masks])
        self._tables = self._addresses(codes, isa)

    def _addresses(self, codes: list[generator.Code], isa: ModuleType) -> tuple[np.ndarray, ...]:
        code_at = np.frombuffer(self._pages, np.uint8).ctypes.data
        weights_at, masks_at = self._weights.ctypes.data, self._masks.ctypes.data
        stages, groups, chunks, places, zeros = [], [], [], [], [self.stages[0].source.zeros(None)]
        group_count = chunk_count = place_count = 0
        for stage, code in zip(self.stages, codes, strict=True):
            target = stage.raw if stage.pools_apart else stage.target
            floor = (0.0 if stage.layer.relu else -np.inf) if stage.layer.pool and not stage.pools_apart else None
            count = len(code.first_rows) - 1
            sum_bytes = isa.GROUP_ROWS[0] * BYTES[stage.lanes]
            stages.append((group_count, count, place_count, len(stage.places), masks_at, isa.MASK_BYTES, sum_bytes))
            first = chunk_count + code.first_chunks
            groups.append(np.stack([first[:-1], first[1:], target.to_channel(code.first_rows[:-1])], axis=1))
            chunks.append(code.chunks * [1, 4, 1] + [code_at, weights_at, 0])
            places.append(stage.places)
            zeros.append(stage.target.zeros(floor))
            group_count, chunk_count = group_count + count, chunk_count + len(code.chunks)
            place_count += len(stage.places)
            code_at, weights_at = code_at + code.code.nbytes, weights_at + code.weights.nbytes
            masks_at += len(stage.masks) * isa.MASK_BYTES
        ends = np.cumsum([0, *map(len, zeros)])
        layouts = [self.stages[0].source, *(s.target for s in self.stages), *(s.raw for s in self.stages)]
        numbers = [
            (*at.shape, at.images, at.first // 4, at.channel // 4, at.row // 4, at.column // 4,
             ends[min(i, len(zeros) - 1)], ends[min(i + 1, len(zeros))], at.pairs)
            for i, at in enumerate(layouts)
        ]  # fmt: skip
        fills = np.concatenate(zeros)
        joined = (np.concatenate(part) for part in (groups, chunks, places))
        values = fills[:, 2].astype(np.uint32).view(np.float32)
        return np.array(stages, np.int64), *joined, fills[:, :2], values, np.array(numbers, np.int64)

    def run(self, x: np.ndarray, threads: int, arenas: list) -> np.ndarray:
        """Images ``[N, C, H, W]``, float32, N a multiple of `images`, through all layers."""
        last = self.stages[-1].target
        bundles = len(x) // last.images
        key = bundles, threads
        if key not in self._schedules:
            steps, size = planner.schedule(self.stages, self.groups, bundles, threads)
            self._schedules[key] = np.array([astuple(step) for step in steps], np.int64), size
        steps, size = self._schedules[key]
        y = np.empty((len(x), *last.shape), np.float32)
        arena = _arena(arenas, size + threads * SCRATCH)
        self._run(x, y, arena, size, steps, threads)
        arenas.append(arena)
        return y

    def alone(self, x: np.ndarray, threads: int) -> tuple[Callable[[], None], Callable[[], np.ndarray]]:
        """For benchmarks: a call that runs layers on activations already in their layout, and one for the results."""
        bundles = len(x) // self.stages[-1].target.images
        come, layers, out, size = planner.apart(self.stages, self.groups, bundles, threads)
        come, layers, out = (np.array([astuple(step) for step in steps], np.int64) for steps in (come, layers, out))
        y = np.empty((len(x), *self.stages[-1].target.shape), np.float32)
        arena = _aligned(size + threads * SCRATCH)
        self._run(x, y, arena, size, come, threads)

        def results() -> np.ndarray:
            self._run(x, y, arena, size, out, threads)
            return y

        return partial(self._run, x, y, arena, size, layers, threads), results

    def _run(self, x: np.ndarray, y: np.ndarray, arena: np.ndarray, size: int, steps: np.ndarray, threads: int) -> None:
        *tables, fills, values, layouts = self._tables
        counters = np.zeros(LINE * (2 * len(steps) + 1), np.int64)
        base = arena.ctypes.data
        arguments = (
            x.reshape(-1), y.reshape(-1), arena, base, base + size, steps, tuple(tables), layouts, fills, values,
            counters,
        )  # fmt: skip
        _invite(threads - 1, (self, *arguments))
        work(*arguments)


class Network:
    """Layers in a row, as one function of images. Its programs are made when images of a new size come."""

    def __init__(self, layers: list[planner.Layer], isa: ModuleType):
        _compile(isa)
        self.layers, self.isa = layers, isa
        self._programs = {}
        self._arenas = []
        self._lock = threading.Lock()

    def program(self, height: int, width: int, images: int) -> Program:
        """The program for images of this size; the ones used last are remembered."""
        key = height, width, images
        with self._lock:
            found = self._programs.pop(key, None) or Program(self.layers, *key, self.isa)
            self._programs[key] = found
            while len(self._programs) > PROGRAMS:
                del self._programs[next(iter(self._programs))]
        return found

    def __call__(self, x: np.ndarray, threads: int) -> np.ndarray:
        """Images ``[N, C, H, W]``, float32 and contiguous, through all layers: ``[N, C', H', W']``."""
        parts = []
        lanes = self.isa.LANES
        size = SLICE * lanes
        for start in range(0, len(x), size):
            part = x[start : start + size]
            whole = len(part) - len(part) % lanes
            if whole:
                parts.append(self.program(*x.shape[2:], lanes).run(part[:whole], threads, self._arenas))
            if len(part) > whole:
                parts.append(self.program(*x.shape[2:], len(part) - whole).run(part[whole:], threads, self._arenas))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


@cache
def _compile(isa: ModuleType) -> None:
    """Compile the driver, or load it from Numba's cache: one number through one layer."""
    one = planner.Layer(np.ones((1, 1, 1, 1), np.float32), np.zeros(1, np.float32), False, False)
    with told():
        Program([one], 1, 1, 1, isa).run(np.zeros((1, 1, 1, 1), np.float32), 1, [])


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

_invitations: queue.SimpleQueue
_bell: np.ndarray  # counts invitations
_helpers: list[threading.Thread]


def _alone() -> None:
    """Nobody helps yet: at the start, and in a forked child, where threads are gone."""
    global _invitations, _bell, _helpers
    _invitations, _bell, _helpers = queue.SimpleQueue(), np.zeros(LINE, np.int64), []


_alone()
os.register_at_fork(after_in_child=_alone)


def _invite(count: int, what: tuple) -> None:
    while len(_helpers) < count:
        _helpers.append(threading.Thread(target=_help, args=(_invitations, _bell), daemon=True))
        _helpers[-1].start()
    for _ in range(count):
        _invitations.put(what)
    _bell[0] += 1


def _help(invitations: queue.SimpleQueue, bell: np.ndarray) -> None:
    while True:
        _, *arguments = invitations.get()  # the first one keeps the code alive
        heard = int(bell[0])
        work(*arguments)
        del _, arguments
        linger(bell, heard)
