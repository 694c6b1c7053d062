"""Runs a program: one compiled call for a whole network, in which threads take tasks and wait for each other.

The caller does all the work itself if nobody comes to help. Helpers are threads that sleep until they are invited; each
takes the next task of the current step from a counter, and the next step begins when all tasks of a step are done. So
a forked child, or a machine with other things to do, is slower, never stuck.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import threading
from dataclasses import astuple
from functools import lru_cache, partial

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from reprolib.sparse.compilation import compiled
from reprolib.sparse.cpu import generator, planner
from reprolib.sparse.cpu.planner import FILL, INPUT, LANES, LAYER, POOL, STRETCH

LINE = 8  # int64 in a line of the cache: counters of different steps do not disturb each other
SPINS = 2000  # before a waiting thread lets others run
VECTORS = planner.BAND
SUMS = generator.GROUP_ROWS[0] * 4 * LANES  # bytes that the sums of an output vector need
SCRATCH = SUMS * VECTORS
KIND, TASKS, STAGE, SOURCE, SOURCE_STRIDE, TARGET, TARGET_STRIDE, BUNDLE, BUNDLES, BAND, PARTS = range(11)
CHANNELS, HEIGHT, WIDTH, IMAGES, FIRST, CHANNEL, ROW, COLUMN, ZEROS, ZEROS_END = range(10)  # of a layout, in numbers

_I64 = ir.IntType(64)


# --- What Numba lacks -------------------------------------------------------------------------------------------------


@intrinsic
def _call(context, code, source, weights, sums, target, masks):
    """Call machine code at an address with five addresses."""

    def generate(context, builder, signature, arguments):
        pointer = ir.FunctionType(ir.VoidType(), [_I64] * 5).as_pointer()
        builder.call(builder.inttoptr(arguments[0], pointer), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def _get(context, array, i):
    """array[i] without a look at its bounds, or for a negative i: loops of it become vector instructions."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load(builder.gep(data, [arguments[1]]))

    return types.float32(types.float32[::1], types.int64), generate


@intrinsic
def _set(context, array, i, value):
    """array[i] = value, likewise."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        builder.store(arguments[2], builder.gep(data, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(types.float32[::1], types.int64, types.float32), generate


@intrinsic
def _claim(context, counters, i):
    """Add one to a counter that threads share; its value before."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [arguments[1]]), _I64(1), "seq_cst")

    return types.int64(types.int64[::1], types.int64), generate


@intrinsic
def _read(context, counters, i):
    """The counter's value now, and all that was written before it rose to that."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load_atomic(builder.gep(data, [arguments[1]]), "acquire", 8)

    return types.int64(types.int64[::1], types.int64), generate


@intrinsic
def _pause(context):
    """Tell the core that this is a waiting loop."""
    return types.void(), partial(_call_named, "llvm.x86.sse2.pause", ir.VoidType())


@intrinsic
def _let_others_run(context):
    return types.void(), partial(_call_named, "sched_yield", ir.IntType(32))


def _call_named(name, result, context, builder, signature, arguments):
    known = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(result, []), name)
    builder.call(known, [])
    return context.get_dummy_value()


# --- Tasks ------------------------------------------------------------------------------------------------------------


@compiled(nogil=True)
def _come_in(x, first_image, layout, arena, at, part, parts):
    """Every so many rows of a bundle of images ``[N, C, H, W]`` into their layout."""
    height, width, images = layout[HEIGHT], layout[WIDTH], layout[IMAGES]
    rows = layout[CHANNELS] * height
    for row in range(part, rows, parts):
        to = at + layout[FIRST] + row // height * layout[CHANNEL] + row % height * layout[ROW]
        start = (first_image * rows + row) * width
        for w in range(width):
            for i in range(images):
                _set(arena, to + w * layout[COLUMN] + i, _get(x, start + i * rows * width + w))


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
                    _set(y, to + w, _get(arena, start + w * layout[COLUMN]))


@compiled(nogil=True)
def _fill(arena, at, layout, fills, values, part, parts):
    """What surrounds the maps of a layout, and where a max-pool begins: every so many ranges."""
    for i in range(layout[ZEROS] + part, layout[ZEROS_END], parts):
        for number in range(at + fills[i, 0], at + fills[i, 1]):
            _set(arena, number, values[i])


@compiled(nogil=True)
def _larger(a, b):
    """As torch has it: NaN if one of them is."""
    return a if a > b or a != a else b


@compiled(nogil=True)
def _pool(arena, source, raw, target, layout, first, last):
    """Max-pool channels where positions share a vector: pixels lie one after the other, images innermost."""
    images, width = raw[IMAGES], layout[WIDTH]
    for c in range(first, last):
        for h in range(layout[HEIGHT]):
            upper = source + raw[FIRST] + c * raw[CHANNEL] + 2 * h * raw[ROW]
            lower = upper + raw[ROW]
            to = target + layout[FIRST] + c * layout[CHANNEL] + h * layout[ROW]
            if images == 1:
                for w in range(width):
                    above = _larger(_get(arena, upper + 2 * w), _get(arena, upper + 2 * w + 1))
                    below = _larger(_get(arena, lower + 2 * w), _get(arena, lower + 2 * w + 1))
                    _set(arena, to + w, _larger(above, below))
                continue
            for w in range(width):
                left = 2 * w * images
                right = left + images
                for i in range(images):
                    above = _larger(_get(arena, upper + left + i), _get(arena, upper + right + i))
                    below = _larger(_get(arena, lower + left + i), _get(arena, lower + right + i))
                    _set(arena, to + w * images + i, _larger(above, below))


@compiled(nogil=True)
def _group(chunks, places, masks, source, source_stride, target, target_stride, start, stop, sums):
    """A group of output channels for the output vectors [start, stop), counted through all bundles."""
    count = len(places)
    for k in range(len(chunks)):
        bundle, place = start // count, start % count
        for vector in range(start, stop):
            _call(
                chunks[k, 0],
                source + bundle * source_stride + places[place, 0],
                chunks[k, 1],
                sums + (vector - start) * SUMS,
                target + bundle * target_stride + places[place, 1],
                masks + place * 8,
            )
            place += 1
            if place == count:
                bundle, place = bundle + 1, 0


@compiled(nogil=True)
def _layer(tables, i, first, last, source, source_stride, target, target_stride, start, stop, sums):
    """Groups [first, last) of layer i for the output vectors [start, stop), band by band."""
    stages, groups, chunks, all_places, masks = tables
    stage = stages[i]
    places = all_places[stage[2] : stage[2] + stage[3]]
    for at in range(start, stop, VECTORS):
        for g in range(stage[0] + first, stage[0] + last):
            _group(
                chunks[groups[g, 0] : groups[g, 1]], places, masks + 8 * stage[2], source, source_stride,
                target + groups[g, 2], target_stride, at, min(at + VECTORS, stop), sums,
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
        _layer(tables, i, 0, stage[1], base + at, 0, base + other, 0, 0, stage[3], sums)
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
        groups, bands = stages[i, 1], step[TASKS] // parts
        start = task % bands * step[BAND]
        stop = min(start + step[BAND], step[BUNDLES] * stages[i, 3])
        first, last = task // bands * groups // parts, (task // bands + 1) * groups // parts
        _layer(
            tables, i, first, last, base + step[SOURCE], step[SOURCE_STRIDE], base + step[TARGET],
            step[TARGET_STRIDE], start, stop, sums,
        )  # fmt: skip
    elif step[KIND] == POOL:
        raw, layout = layouts[len(stages) + 1 + i], layouts[i + 1]
        channels = raw[CHANNELS]
        _pool(arena, source, raw, target, layout, part * channels // parts, (part + 1) * channels // parts)
    else:
        layout = layouts[len(stages)]
        _go_out(arena, source, layout, y, bundle * layout[IMAGES])


@compiled(nogil=True)
def _work(x, y, arena, base, scratch, steps, tables, layouts, fills, values, counters):
    """Take tasks, step by step, until all are done."""
    slot = _claim(counters, 0)
    for s in range(len(steps)):
        claimed, done = LINE * (2 * s + 1), LINE * (2 * s + 2)
        tasks = steps[s, TASKS]
        while True:
            task = _claim(counters, claimed)
            if task >= tasks:
                break
            _do(x, y, arena, base, steps[s], task, slot, tables, layouts, fills, values, scratch + slot * SCRATCH)
            _claim(counters, done)
        spins = 0
        while _read(counters, done) < tasks:
            _pause()
            spins += 1
            if spins > SPINS:
                _let_others_run()


# --- Programs ---------------------------------------------------------------------------------------------------------

SLICE = 32  # bundles that go through the network together: memory stays bounded
PROGRAMS = 8  # sizes of images and numbers of them that a network remembers


class Program:
    """A network for images of one size, `images` at a time: its code in memory, and tables of addresses."""

    def __init__(self, layers: list[planner.Layer], height: int, width: int, images: int):
        self.stages = planner.stages(layers, height, width, images)
        codes = [generator.generate(stage) for stage in self.stages]
        self.code_bytes = sum(code.code.nbytes for code in codes)
        self.weight_bytes = sum(code.weights.nbytes for code in codes)
        self._pages = executable(np.concatenate([code.code for code in codes]))
        self._weights = _aligned(self.weight_bytes)
        self._weights[:] = np.concatenate([code.weights for code in codes])
        self.groups = [len(code.first_rows) - 1 for code in codes]
        self._schedules = {}
        self._tables = self._addresses(codes)

    def _addresses(self, codes: list[generator.Code]) -> tuple[np.ndarray, ...]:
        code_at = np.frombuffer(self._pages, np.uint8).ctypes.data
        weights_at = self._weights.ctypes.data
        stages, groups, chunks, places, masks, zeros = [], [], [], [], [], [self.stages[0].source.zeros(None)]
        group_count = chunk_count = place_count = 0
        for stage, code in zip(self.stages, codes, strict=True):
            target = stage.raw if stage.pools_apart else stage.target
            floor = (0.0 if stage.layer.relu else -np.inf) if stage.layer.pool and not stage.pools_apart else None
            count = len(code.first_rows) - 1
            stages.append((group_count, count, place_count, len(stage.places)))
            first = chunk_count + code.first_chunks
            groups.append(np.stack([first[:-1], first[1:], code.first_rows[:-1] * target.channel], axis=1))
            chunks.append(code.chunks * [1, 4] + [code_at, weights_at])
            places.append(stage.places)
            masks.append(stage.masks)
            zeros.append(stage.target.zeros(floor))
            group_count, chunk_count = group_count + count, chunk_count + len(code.chunks)
            place_count += len(stage.places)
            code_at, weights_at = code_at + code.code.nbytes, weights_at + code.weights.nbytes
        ends = np.cumsum([0, *map(len, zeros)])
        layouts = [self.stages[0].source, *(s.target for s in self.stages), *(s.raw for s in self.stages)]
        numbers = [
            (*at.shape, at.images, at.first // 4, at.channel // 4, at.row // 4, at.column // 4,
             ends[min(i, len(zeros) - 1)], ends[min(i + 1, len(zeros))])
            for i, at in enumerate(layouts)
        ]  # fmt: skip
        fills = np.concatenate(zeros)
        joined = (np.concatenate(part) for part in (groups, chunks, places, masks))
        values = fills[:, 2].astype(np.float32)
        return np.array(stages, np.int64), *joined, fills[:, :2].astype(np.int64), values, np.array(numbers, np.int64)

    def run(self, x: np.ndarray, threads: int, arenas: list) -> np.ndarray:
        """Images ``[N, C, H, W]``, float32, N a multiple of `images`, through all layers."""
        last = self.stages[-1].target
        bundles = len(x) // last.images
        key = bundles, threads
        if key not in self._schedules:
            steps, size = planner.schedule(self.stages, self.groups, bundles, threads)
            self._schedules[key] = np.array([astuple(step) for step in steps], np.int64), size
        steps, size = self._schedules[key]
        y = np.empty((len(x), last.channels, last.height, last.width), np.float32)
        arena = _arena(arenas, size + threads * SCRATCH)
        stages, groups, chunks, places, masks, fills, values, layouts = self._tables
        tables = stages, groups, chunks, places, masks.ctypes.data
        counters = np.zeros(LINE * (2 * len(steps) + 1), np.int64)
        base = arena.ctypes.data
        arguments = (
            x.reshape(-1), y.reshape(-1), arena, base, base + size, steps, tables, layouts, fills, values, counters,
        )  # fmt: skip
        _invite(threads - 1, (self, *arguments))
        _work(*arguments)
        arenas.append(arena)
        return y


class Network:
    """Layers in a row, as one function of images. Its programs are made when images of a new size come."""

    def __init__(self, layers: list[planner.Layer]):
        self.layers = layers
        self._programs = {}
        self._arenas = []
        self._lock = threading.Lock()

    def program(self, height: int, width: int, images: int) -> Program:
        """The program for images of this size; the ones used last are remembered."""
        key = height, width, images
        with self._lock:
            found = self._programs.pop(key, None) or Program(self.layers, *key)
            self._programs[key] = found
            while len(self._programs) > PROGRAMS:
                del self._programs[next(iter(self._programs))]
        return found

    def __call__(self, x: np.ndarray, threads: int) -> np.ndarray:
        """Images ``[N, C, H, W]``, float32 and contiguous, through all layers: ``[N, C', H', W']``."""
        parts = []
        size = SLICE * LANES
        for start in range(0, len(x), size):
            part = x[start : start + size]
            whole = len(part) - len(part) % LANES
            if whole:
                parts.append(self.program(*x.shape[2:], LANES).run(part[:whole], threads, self._arenas))
            if len(part) > whole:
                parts.append(self.program(*x.shape[2:], len(part) - whole).run(part[whole:], threads, self._arenas))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


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


@lru_cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


# --- Helpers ----------------------------------------------------------------------------------------------------------

LINGER = 20_000  # pauses for which a helper stays awake after its work: waking up takes long
_invitations: queue.SimpleQueue
_bell: np.ndarray  # counts invitations
_helpers: list[threading.Thread]


def _alone() -> None:
    """Nobody helps yet: at the start, and in a forked child, where threads are gone."""
    global _invitations, _bell, _helpers
    _invitations, _bell, _helpers = queue.SimpleQueue(), np.zeros(LINE, np.int64), []


_alone()
os.register_at_fork(after_in_child=_alone)


def _invite(count: int, work: tuple) -> None:
    while len(_helpers) < count:
        _helpers.append(threading.Thread(target=_help, args=(_invitations, _bell), daemon=True))
        _helpers[-1].start()
    for _ in range(count):
        _invitations.put(work)
    _bell[0] += 1


def _help(invitations: queue.SimpleQueue, bell: np.ndarray) -> None:
    while True:
        _, *arguments = invitations.get()  # the first one keeps the code alive
        heard = int(bell[0])
        _work(*arguments)
        del _, arguments
        _linger(bell, heard)


@compiled(nogil=True)
def _linger(bell, heard):
    for _ in range(LINGER):
        if _read(bell, 0) != heard:
            return
        _pause()
