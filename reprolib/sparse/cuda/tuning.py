"""How to cut a layer into CUDA blocks: a model of the time orders the ways, and a GPU that is there has the last word.

A way is a `Choice`: how many row groups a block computes, how many warps share the columns of each, and into how many
slices the steps are cut. Which one is fastest depends on the layer, its zeros, the map, the batch and the GPU. On a GPU
the few best by the model are timed at the first call, and the answer is kept in a file; elsewhere the model's best
counts.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reprolib.files.atomic import write_atomically
from reprolib.sparse.cuda.packing import IMAGES, Packed, Tile, warps_for

TRIED = 8  # ways that are timed, the best by the model
MOST_SLICES = 16
SHORTEST_SLICE = 2  # steps
# The model. Cycles of a multiplication of 16 x 16 by 16 x 8 on one of a multiprocessor's four tensor cores, of the
# barrier of a step, and of a block's start and end; what the L2 cache gives a multiprocessor in a cycle, and all of
# them in a microsecond; what a launch costs. About those of an A100: on others the numbers differ, the order hardly.
MULTIPLY_CYCLES, STEP_CYCLES, BLOCK_CYCLES, CYCLES_PER_US = 8, 100, 2500, 1400
TENSOR_CORES, BYTES_PER_CYCLE = 4, 32
LAUNCH_US, BYTES_PER_US = 2.5, 4e6


class Choice(NamedTuple):
    """Row groups per block, warps that share the columns of each, and slices of the steps."""

    warps: int
    splits: int
    slices: int


class Gpu(NamedTuple):
    """What decides how many CUDA blocks run at once: multiprocessors, and the shared memory of each."""

    multiprocessors: int
    shared_bytes: int


class Work(NamedTuple):
    """What a row block has to do, as a mean over those of a layer: steps, groups of all its warps, and the sum over
    steps of the groups of the warp that has most of them.
    """

    steps: float
    groups: float
    critical: float


def block_shapes(c_out: int, rows: int) -> list[tuple[int, int]]:
    """Row groups per block, and warps that share each: up to eight warps, and no more row groups than there are.

    Two warps of 16 rows alone are left out: compilers let their sums spill, to have more blocks at once.
    """
    most, fewest = warps_for(c_out, rows), 4 if rows == 16 else 2
    shapes = [(warps, splits) for warps in (2, 4, 8) for splits in (1, 2, 4)]
    return [(warps, splits) for warps, splits in shapes if warps <= most and fewest <= warps * splits <= 8]


def candidates(c_out: int, rows: int, steps: int) -> Iterator[Choice]:
    """All ways to run a layer of `steps` chunks of channels."""
    for warps, splits in block_shapes(c_out, rows):
        slices = 1
        while slices == 1 or (slices <= MOST_SLICES and steps // slices >= SHORTEST_SLICE):
            yield Choice(warps, splits, slices)
            slices *= 2


def work_of(packed: Packed, warps: int, row_blocks: int) -> Work:
    """The work of a packed layer whose blocks have `warps` warps in all."""
    first_step, rest = packed.schedule[: row_blocks + 1], packed.schedule[row_blocks + 1 :]
    steps = first_step[-1]
    begins = rest[steps : steps + (steps + row_blocks) * warps].reshape(-1, warps)
    due = np.diff(begins, axis=0)
    inside = np.delete(due, (first_step[1:-1] + np.arange(row_blocks - 1)), axis=0)  # not from one block to the next
    return Work(*(float(total) / row_blocks for total in (steps, inside.sum(), inside.max(axis=1, initial=0).sum())))


def estimate_us(tile: Tile, work: Work, blocks: int, slices: int, gpu: Gpu) -> float:
    """What a layer of `blocks` CUDA blocks takes, in each slice; computed, to be compared with others alone."""
    resident = min(tile.resident(gpu.shared_bytes), math.ceil(blocks * slices / gpu.multiprocessors))
    waves = math.ceil(blocks * slices / (resident * gpu.multiprocessors))
    multiply = tile.row_tiles * tile.pixels * MULTIPLY_CYCLES
    together = resident * max(work.groups * multiply / TENSOR_CORES, work.steps * tile.slot_bytes / BYTES_PER_CYCLE)
    alone = work.critical * multiply + work.steps * STEP_CYCLES
    us = waves * (max(together, alone) / slices + BLOCK_CYCLES) / CYCLES_PER_US + LAUNCH_US
    if slices > 1:  # all sums are written and read
        us += 2 * 4 * slices * blocks * tile.block_rows * tile.pixels * IMAGES / BYTES_PER_US + LAUNCH_US
    return us


def chosen(
    ordered: list[Choice], key: str, file: Path | None = None, time_us: Callable[[Choice], float] | None = None
) -> Choice:
    """The fastest of some ways, the best by the model first: by the file if it has the `key`, else by `time_us`, which
    then goes into the file; without it the first one.
    """
    known = _read(file)
    if known.get(key) in map(list, ordered):
        return Choice(*known[key])
    if time_us is None:
        return ordered[0]
    best = min(ordered[:TRIED], key=time_us)
    if file:
        with contextlib.suppress(OSError):  # a folder that can't be written: it is timed again next time
            write_atomically(file, json.dumps(_read(file) | {key: best}, indent=0))
    return best


def file_for(gpu_name: str) -> Path:
    """Where the choices for a GPU are kept: in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "reprolib" / f"cuda-{re.sub(r'[^a-z0-9]+', '-', gpu_name.lower()).strip('-')}.json"


def _read(file: Path | None) -> dict:
    try:
        known = json.loads(file.read_text()) if file else {}
    except (OSError, ValueError):
        known = {}
    return known if isinstance(known, dict) else {}  # not there yet, or damaged: as if nothing had been timed
