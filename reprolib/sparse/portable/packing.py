"""What a kernel works from: stored weights in the order in which they are read, and where output vectors lie."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from reprolib.sparse.portable.layout import LANES

REMEMBERED = 8  # sizes of images whose offsets a plan keeps
BLOCK_ROWS = 16  # output channels of a task
# Output vectors of a task, at most, for each output channel, by images interleaved: what 16 of them read stays in the
# second-level cache; a single image is small, and more vectors waste fewer lanes at the ends of bands.
BAND_VECTORS = {LANES: 16, 1: 64}

# Vector length V: output vectors S per register tile, and input channels per chunk. V * S accumulators fill half of the
# registers, the rest holds inputs and weights.
TILE_VECTORS = {1: 4, 4: 1}
CHUNK_CHANNELS = {1: 32, 4: 1 << 30}
# Time of one stored weight, relative to V = 4: measured at 90 % sparsity on an AMD EPYC (Zen 4), 3x3, batch 64.
RELATIVE_COST = {1: 1.6, 4: 1.0}


@dataclass(frozen=True, eq=False)
class Plan:
    """A layer as the kernel reads it: its weight, its bias, and what its epilogue does.

    *Entries* are vectors of `length` weights, sorted by block of output channels, chunk of input channels, output
    channel, input channel and tap: ``values [entries, length]``, ``channels [entries]``, ``taps [entries]``. A
    *segment* is a run of entries with the same output channels and chunk: ``segment_starts [segments + 1]``,
    ``segment_rows [segments]`` (which vector of output channels in its block). Block i of 16 output channels owns the
    segments ``block_starts[i]`` to ``block_starts[i + 1]``.
    """

    length: int
    shape: tuple[int, int, int]  # C_out, C_in, K: the kernel is K x K
    block_starts: np.ndarray
    segment_rows: np.ndarray
    segment_starts: np.ndarray
    channels: np.ndarray
    taps: np.ndarray
    values: np.ndarray
    bias: np.ndarray
    relu: bool
    pool: bool
    halo_out: int  # pixels of zeros that the next layer expects around its input
    _offsets: dict = field(default_factory=dict, repr=False)

    @property
    def halo(self) -> int:
        """Pixels of zeros that this layer expects around its own input."""
        return self.shape[2] // 2

    def offsets(self, height: int, width: int, n: int) -> np.ndarray:
        """How far, in floats, each entry reads from an output vector's place; remembered for the last input sizes."""
        if (height, width, n) not in self._offsets:
            kernel, halo = self.shape[2], self.halo
            pixels = (self.channels.astype(np.int64) * (height + 2 * halo) + self.taps // kernel) * (width + 2 * halo)
            offsets = (pixels + self.taps % kernel) * n
            if offsets.size and offsets.max() > np.iinfo(np.int32).max:
                raise ValueError(f"{self.shape[1]} maps of {height}x{width} pixels are too large: split the images")
            while len(self._offsets) >= REMEMBERED:
                del self._offsets[next(iter(self._offsets))]
            self._offsets[height, width, n] = offsets.astype(np.int32)
        return self._offsets[height, width, n]


def plan(weight: Tensor, bias: Tensor, *, relu: bool, pool: bool, halo_out: int = 0, length: int | None = None) -> Plan:
    """Prepare a pruned weight ``[C_out, C_in, K, K]`` (K = 1 or 3) or ``[out, in]`` and its bias ``[C_out]``.

    Without `length` the zeros decide whether single weights or vectors of four output channels are cheaper. Raises
    ValueError for a length that no kernel has.
    """
    weight = weight.detach().float().reshape(*weight.shape[:2], *(weight.shape[2:] or (1, 1)))
    c_out, c_in, kernel = weight.shape[:3]
    if length is not None and length not in RELATIVE_COST:
        known = " and ".join(map(str, RELATIVE_COST))
        raise ValueError(f"there is no kernel for vectors of {length} weights: there are {known}")
    length = length or min(RELATIVE_COST, key=lambda v: _stored(weight, v) * RELATIVE_COST[v])
    chunk = min(CHUNK_CHANNELS[length], c_in)
    padded = np.zeros((-(-c_out // BLOCK_ROWS) * BLOCK_ROWS, -(-c_in // chunk) * chunk, kernel * kernel), np.float32)
    padded[:c_out, :c_in] = weight.reshape(c_out, c_in, -1).numpy()
    # block, vector of output channels, its channels, chunk, input channel, tap -> the order of the entries
    grid = padded.reshape(-1, BLOCK_ROWS // length, length, padded.shape[1] // chunk, chunk, kernel * kernel)
    grid = grid.transpose(0, 3, 1, 4, 5, 2)
    block, part, row, channel, tap = np.nonzero(grid.any(axis=-1) if length > 1 else grid[..., 0])
    segment = (block * grid.shape[1] + part) * grid.shape[2] + row
    starts = np.flatnonzero(np.diff(segment, prepend=-1))
    return Plan(
        length,
        (c_out, c_in, kernel),
        np.searchsorted(block[starts], np.arange(grid.shape[0] + 1)),
        row[starts],
        np.append(starts, len(segment)),
        (part * chunk + channel).astype(np.int32),
        tap.astype(np.int32),
        grid[block, part, row, channel, tap],
        bias.detach().float().numpy().copy(),
        relu,
        pool,
        halo_out,
    )


def _stored(weight: Tensor, length: int) -> int:
    """Weights that vectors of this length store, zeros in them included."""
    kept = weight.flatten(1) != 0
    missing = -kept.shape[0] % length
    kept = torch.nn.functional.pad(kept, (0, 0, 0, missing)).reshape(-1, length, kept.shape[1])
    return int(kept.any(dim=1).sum()) * length


@dataclass(frozen=True, eq=False)
class Bands:
    """Where a layer's output vectors lie. Every band has `rows` output rows and ``len(places) / bands`` vectors."""

    bands: int
    rows: int
    pitch: int  # floats from row to row of a band's scratch
    places: np.ndarray  # of each output vector, in floats of the input


@lru_cache(maxsize=1024)
def bands_of(groups: int, channels: int, height: int, width: int, halo: int, n: int, pool: bool, tile: int) -> Bands:
    """Cut ``groups * height`` output rows into bands of equal size that split no pair of rows that is pooled."""
    padded = width + 2 * halo
    pitch = width * n if n > 1 else padded

    def vectors(rows: int) -> int:
        return math.ceil(math.ceil(rows * pitch / LANES) / tile) * tile

    total = groups * height if n > 1 else height
    sizes = [d for d in range(1, total + 1) if total % d == 0]
    if pool:
        sizes = [d for d in sizes if d % 2 == 0 and height % 2 == 0] or [d for d in sizes if d % height == 0]
    fitting = [d for d in sizes if vectors(d) <= BAND_VECTORS[n]]
    rows = fitting[-1] if fitting else sizes[0]

    row = np.arange(groups * height).reshape(-1, rows)
    image, h = row // height, row % height
    start = ((image * channels * (height + 2 * halo) + h) * padded) * n
    if n > 1:
        places = (start[..., None] + np.arange(width) * n).reshape(len(row), -1)
    else:  # flat over the padded rows of one image: a few lanes between the rows are computed in vain
        places = start[:, :1] + np.arange(math.ceil(rows * pitch / LANES)) * LANES
    places = np.pad(places, ((0, 0), (0, vectors(rows) - places.shape[1])), mode="edge")
    return Bands(len(row), rows, pitch, places.astype(np.int64).ravel())
