"""What the CUDA kernels compute from, and what they compute: packed weights and NumPy specifications.

A pruned weight is packed for the tensor cores like this. Its GEMM view is cut into *row groups* of 16 or 32 output
channels, a few of which (one per warp) make a *row block*; its channels are cut into chunks of 16. A row block goes
through the chunks that any of its row groups needs, one chunk a *step*. A row group keeps the columns in which any of
its weights is not zero, and multiplies them 16 at a time, wherever they come from:

    chunk      0         1         2         3            kept columns of one row group, in the order of their steps:
    step       0         1       (none)      2
    column  #·##··#·  ··#··##·  ········  ·#·##·#·        [####### ... ###][#### ... #######][###### ... 0000]
                                                            a group of 16   another, due when its last column is here

A group is due at the step of its last column; a column is then at most one step old, because the kernel holds the
chunk of the last step, too. So all groups but the last are full, whatever the sparsity (up to about 94 %; beyond that
some groups are closed early). Within a step columns are ordered such that eight consecutive ones lie in eight different
shared-memory banks, as far as the pattern allows.

With two of four weights kept (2:4) a column is a quad of four channels at one tap, and a group holds 8 quads.

Nothing here needs a GPU, or Numba.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IMAGES = 8  # interleaved in the activation layout: the columns of one tensor-core multiplication
ROW_BYTES = 2 * IMAGES  # one channel at one pixel
CHUNK = 16  # channels a step
SLOTS, LOOK_AHEAD = 4, 2  # chunks in shared memory: the last step's, this step's, and two on their way
TAP_PITCH = 6  # rows between vertical neighbours of a patch in shared memory
BANKS = 8  # of 16 bytes
WARP = 32  # threads
RESERVED_BYTES = 1024  # of shared memory, for each block
# A column's code: its age in steps (0 or 1), channel in the chunk, and row of its tap in the patch (at most 14).
TAP_BITS = 4
AGE_BIT = TAP_BITS + CHUNK.bit_length() - 1
QUAD = 4


# --- Sizes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """The sizes a tensor-core kernel is compiled for; powers of two.

    A warp computes 16 * `row_tiles` output channels at `tall` x `wide` pixels of `deep` image groups, and `splits` of
    them share the kept columns of these: each sums up its own. So a block has `warps` * `splits` warps. `taps` is 3
    or 1. With `relu` a ReLU follows, with `pool` a 2x2 max-pool.
    """

    taps: int
    tall: int
    wide: int
    deep: int
    row_tiles: int
    warps: int
    splits: int = 1
    two_of_four: bool = False
    relu: bool = True
    pool: bool = False

    @property
    def threads(self) -> int:
        """Threads per CUDA block."""
        return WARP * self.warps * self.splits

    @property
    def rows(self) -> int:
        """Output channels per warp."""
        return 16 * self.row_tiles

    @property
    def block_rows(self) -> int:
        """Output channels per CUDA block."""
        return self.rows * self.warps

    @property
    def pixels(self) -> int:
        """Output pixels per warp, each of `IMAGES` images."""
        return self.tall * self.wide * self.deep

    def resident(self, shared_bytes: int) -> int:
        """CUDA blocks that a multiprocessor with `shared_bytes` of shared memory runs at once.

        Its registers hold 8 warps of 128 sums a thread, 16 of 64. Each block takes a little more shared memory than
        its own (CUDA C++ Programming Guide, on compute capability 8.0 and later).
        """
        by_registers = (8 if self.row_tiles * self.pixels > 16 else 16) // (self.warps * self.splits)
        return max(1, min(by_registers, shared_bytes // (self.shared_bytes + RESERVED_BYTES)))

    @property
    def pitch(self) -> int:
        """Rows of shared memory between vertical neighbours."""
        return TAP_PITCH if self.taps == 3 else self.wide

    @property
    def image_rows(self) -> int:
        """Rows of shared memory from one image group of a patch to the next."""
        return (self.tall + self.taps - 2) * self.pitch + self.wide + self.taps - 1

    @property
    def channel_bytes(self) -> int:
        """Bytes of shared memory from one channel to the next: 5 banks further on, for every tile. See `_bank`."""
        used = self.image_rows * self.deep
        return (used + (5 - used) % BANKS) * ROW_BYTES

    @property
    def slot_bytes(self) -> int:
        """Bytes of one chunk in shared memory."""
        return CHUNK * self.channel_bytes

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory per CUDA block: the ring, or half of the sums of half of the warps; at most 48 KB,
        beyond which a kernel needs permission.
        """
        return max(SLOTS * self.slot_bytes, self.quad_bytes * (self.row_tiles * self.pixels // 2) * (self.splits // 2))

    @property
    def quad_bytes(self) -> int:
        """Bytes of four sums of each thread of `warps` warps."""
        return 16 * WARP * self.warps


def tile_for(taps: int, height: int, width: int, rows: int, warps: int, splits: int, **flags: bool) -> Tile:
    """The tile for maps of `height` x `width`: 4x4 pixels, or fewer of more image groups on the smallest maps.

    `rows` is 16 or 32; `warps`, `splits` and `flags` are those of `Tile`. More pixels would need more shared memory
    than a block gets unasked.
    """
    small = max(height, width)
    if taps == 1 and small == 1:
        patch = 1, 1, 16
    elif taps == 3 and small <= 2:
        patch = 2, 2, 2
    else:
        patch = 4, 4, 1
    return Tile(taps, *patch, rows // 16, warps, splits, **flags)


def warps_for(c_out: int, rows: int) -> int:
    """Row groups per row block, at most. Two at least: a smaller block could not copy a patch at once."""
    needed = -(-c_out // rows)
    return 2 if needed <= 2 else 4 if needed <= 4 else 8


# --- Packing for the tensor cores ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as `tensor_core_kernel` reads it; G groups, and one more of zeros, because the kernel reads ahead.

    * ``weights [G+1, row_tiles, 32, 8]`` fp16: for each lane of a warp the fragment of A that it holds (see `ptx.mma`)
    * ``metadata [G+1, 32]`` uint32: which two of four, for each lane (see `ptx.mma_sparse_low`); ``[0, 32]`` if dense
    * ``columns [G+1, 16 or 32]`` uint16: codes, ``age << AGE_BIT | channel << TAP_BITS | tap row``; 0 fills up
    * ``schedule`` int32: ``[row blocks + 1]`` first steps of the row blocks; ``[steps]`` their chunks;
      ``[steps + row blocks, warps]`` the group at which each warp begins each step, a last row per block to end it
    """

    weights: np.ndarray
    metadata: np.ndarray
    columns: np.ndarray
    schedule: np.ndarray


def pack(weight: np.ndarray, rows: int, warps: int, two_of_four: bool = False, splits: int = 1) -> Packed:
    """Pack a weight ``[C_out, taps, taps, C_in]`` fp16 in row groups of `rows` (16 or 32), `warps` to a row block.

    The columns that a row group keeps are dealt to `splits` warps, chunk by chunk: in what follows each of these is a
    row group of its own, those of the first warps of all row groups of a block first. With `two_of_four`, `rows` is 32
    and each row holds at most two non-zero weights in each quad of channels (see `fits_two_of_four`).
    """
    span, per_group = (QUAD, 32 // QUAD) if two_of_four else (1, 16)
    matrix, kept = _row_groups(weight, rows, warps, span)
    kept, row_group = _dealt(kept, warps, splits)
    warps *= splits
    chunks_needed = kept.reshape(len(kept) // warps, warps, kept.shape[1], -1).any(axis=(1, 3))
    block_steps = chunks_needed.sum(axis=1)
    first_step = np.concatenate([[0], np.cumsum(block_steps)])
    step_of_chunk = np.cumsum(chunks_needed, axis=1) - 1  # counted from the row block's first one

    # One entry per kept unit (column, or quad), and where it goes.
    owner, chunk, tap, unit = np.nonzero(kept)
    step, bank = step_of_chunk[owner // warps, chunk], _bank(tap, unit * span, weight.shape[1])
    place, age, groups_due = _places(owner, step, bank, len(kept), per_group, span)
    first_group = np.concatenate([[0], np.cumsum(groups_due.sum(axis=1))])
    groups = int(first_group[-1])
    group, within = first_group[owner] + place // per_group, place % per_group

    tap_row = tap // 3 * TAP_PITCH + tap % 3
    # Channels that fill up the last quad are zero weights, but not in memory: an existing one stands for them.
    spread = np.arange(span)
    channel = np.minimum((unit * span)[:, None] + spread, (weight.shape[3] - 1 - chunk * CHUNK)[:, None])
    codes = np.zeros((groups + 1, per_group, span), np.uint16)
    codes[group, within] = age[:, None] << AGE_BIT | channel << TAP_BITS | tap_row[:, None]
    source = np.full((groups + 1, per_group, span), matrix.shape[1] - 1)  # the last column is zero
    source[group, within] = ((tap * kept.shape[1] + chunk) * CHUNK + unit * span)[:, None] + spread
    group_owner = np.append(np.repeat(np.arange(len(kept)), groups_due.sum(axis=1)), 0)
    columns = matrix[row_group[group_owner][:, None], source.reshape(groups + 1, -1)]  # [G+1, 16 or 32, rows]
    metadata = np.zeros((0, 32), np.uint32)
    if two_of_four:
        columns, metadata = _compress(columns)

    # begins[row group, step]: its first group that is due at this step or later.
    begins = first_group[:-1, None] + np.cumsum(np.pad(groups_due, ((0, 0), (1, 0))), axis=1)
    begins = begins.reshape(len(block_steps), warps, -1).swapaxes(1, 2)
    ends = [begins[block, : steps + 1].ravel() for block, steps in enumerate(block_steps)]
    read_ahead = np.zeros(max(warps, LOOK_AHEAD + 1), int)
    schedule = np.concatenate([first_step, np.nonzero(chunks_needed)[1], *ends, read_ahead])
    return Packed(_fragments(columns), metadata, codes.reshape(groups + 1, -1), schedule.astype(np.int32))


def nonzero(weight: np.ndarray) -> np.ndarray:
    """Which weights of ``[C_out, taps, taps, C_in]`` fp16 are not zero: bool ``[C_out, taps * taps, whole chunks]``."""
    c_out, taps, _, c_in = weight.shape
    kept = np.zeros((c_out, taps * taps, -(-c_in // CHUNK) * CHUNK), bool)
    # Bits but the sign: ten times faster than a comparison of fp16.
    kept[:, :, :c_in] = (weight.reshape(c_out, -1, c_in).view(np.uint16) & 0x7FFF) != 0
    return kept


def fits_two_of_four(kept: np.ndarray) -> bool:
    """Whether every four consecutive channels, counted from 0, hold at most two weights. Takes `nonzero`'s result."""
    return bool(np.bitwise_count(kept.view(np.uint32)).max(initial=0) <= 2)


def stored_weights(kept: np.ndarray, rows: int, span: int = 1) -> int:
    """Weights in the kept columns (`span` = 4: quads) of row groups: the work to do, before groups are filled up."""
    return int(np.count_nonzero(_units(kept, rows, span))) * rows * span


def _units(kept: np.ndarray, rows: int, span: int) -> np.ndarray:
    """Which columns (or quads) each row group keeps: bool ``[row groups, taps * taps, channels / span]``."""
    kept = np.pad(kept, ((0, -len(kept) % rows), (0, 0), (0, 0)))
    columns = kept.reshape(len(kept) // rows, rows, *kept.shape[1:]).any(axis=1)
    return columns if span == 1 else columns.view(np.uint32) != 0


def _row_groups(weight: np.ndarray, rows: int, warps: int, span: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut into row groups and chunks, filled up with zeros.

    Returns the columns ``[row groups, taps * taps * chunks * 16 + 1, rows]``, a zero one last, and which units are
    kept, bool ``[row groups, chunks, taps * taps, 16 / span]``.
    """
    c_out, taps, _, c_in = weight.shape
    groups, chunks = -(-c_out // (rows * warps)) * warps, -(-c_in // CHUNK)
    padded = np.zeros((groups * rows, taps * taps, chunks * CHUNK), np.float16)
    padded[:c_out, :, :c_in] = weight.reshape(c_out, taps * taps, c_in)
    matrix = np.zeros((groups, taps * taps * chunks * CHUNK + 1, rows), np.float16)
    matrix[:, :-1] = padded.reshape(groups, rows, -1).transpose(0, 2, 1)
    kept = _units(nonzero(padded.reshape(-1, taps, taps, chunks * CHUNK)), rows, span)
    return matrix, kept.reshape(groups, taps * taps, chunks, CHUNK // span).transpose(0, 2, 1, 3)


def _dealt(kept: np.ndarray, warps: int, splits: int) -> tuple[np.ndarray, np.ndarray]:
    """Deal the kept units of each row group and chunk to `splits` warps, in turn.

    Takes and returns bool ``[row groups, chunks, taps * taps, units]``, ordered by block, part and row group; and the
    row group of each.
    """
    units = kept.reshape(*kept.shape[:2], -1)
    part = (np.cumsum(units, axis=2) - 1) % splits
    parts = np.stack([units & (part == p) for p in range(splits)], axis=1)  # [row groups, splits, chunks, units]
    blocks = len(kept) // warps
    dealt = parts.reshape(blocks, warps, splits, *units.shape[1:]).swapaxes(1, 2).reshape(-1, *kept.shape[1:])
    row_group = np.broadcast_to(np.arange(len(kept)).reshape(blocks, 1, warps), (blocks, splits, warps))
    return dealt, row_group.ravel()


def _bank(tap: np.ndarray, channel: np.ndarray, taps: int) -> np.ndarray:
    """The shared-memory bank of a column, up to a shift: the same for all tiles, so that one packing suits them all."""
    return (5 * channel + tap // taps * TAP_PITCH + tap % taps) % BANKS


def _places(owner, step, bank, owners: int, per_group: int, span: int):
    """Order the kept units of each row group, and say when they are due.

    Takes one entry per unit, its owner a row group. Returns each unit's place in its row group, its age when its group
    is due, and how many groups are due, ``[owners, steps]``.
    """
    steps = int(step.max(initial=-1)) + 1
    counts = np.bincount(owner * steps + step, minlength=owners * steps).reshape(owners, steps)
    starts, filled, oldest = np.zeros_like(counts), np.zeros(owners, int), np.zeros(owners, int)
    for s in range(steps):
        # An open group whose first column is about to leave shared memory takes no more columns.
        stale = (filled % per_group > 0) & (oldest < s - 1) & (counts[:, s] > 0)
        filled += np.where(stale, -filled % per_group, 0)
        starts[:, s] = filled
        fresh = (filled % per_group == 0) | (filled // per_group < (filled + counts[:, s]) // per_group)
        oldest = np.where(fresh, s, oldest)
        filled += counts[:, s]

    # Within a step, the first unit of each bank comes before the second of any: left over for the next step are those
    # of the banks that this step has too many of.
    part = owner * steps + step
    order, turn = _ranked(part * BANKS + bank)
    turns = np.empty_like(turn)
    turns[order] = turn
    order, index = _ranked(part, turns)
    place = np.empty_like(index)
    place[order] = index
    place += starts[owner, step]
    due = np.full((owners, int((-(-filled // per_group)).max(initial=0))), -1)
    np.maximum.at(due, (owner, place // per_group), step)
    due_step = due[owner, place // per_group]
    groups_due = (due[:, None, :] == np.arange(steps)[:, None]).sum(axis=2)

    # All groups that a row group has due at one step form a pool. Deal its units, sorted by bank, to the pool's phases,
    # the eights of columns that shared memory serves at once: each gets as equal a share of each bank as there is.
    order, index = _ranked(owner * steps + due_step, bank)
    pool = owner[order], due_step[order]
    first_group = (groups_due.cumsum(axis=1) - groups_due)[pool]
    phases = groups_due[pool] * (per_group * span // BANKS)
    place[order] = first_group * per_group + index % phases * (BANKS // span) + index // phases
    return place, due_step - step, groups_due


def _ranked(part: np.ndarray, key: np.ndarray | int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sort by part, then key. Returns the order, and for each element in it, its index within its part."""
    order = np.lexsort((np.broadcast_to(key, part.shape), part))
    sorted_parts = part[order]
    index = np.arange(len(part))
    begins = np.flatnonzero(np.diff(sorted_parts, prepend=-1))
    return order, index - np.repeat(begins, np.diff(begins, append=len(part)))


def _compress(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep two weights of each quad of ``[groups, 32, 32 rows]``: ``[groups, 16, 32 rows]``, and their metadata."""
    quads = columns.reshape(len(columns), 8, QUAD, 32)
    kept = sum((quads[:, :, i] != 0).astype(np.uint8) << i for i in range(QUAD))
    first, second = _PAIRS[kept, 0], _PAIRS[kept, 1]  # [groups, 8, rows]
    two = np.stack([np.take_along_axis(quads, p[:, :, None], axis=2)[:, :, 0] for p in (first, second)], axis=2)
    places = (first | second << 2).astype(np.uint32).reshape(-1, 2, 4, 32)  # [groups, half, quad, row]
    words = (places << (4 * np.arange(4, dtype=np.uint32))[:, None]).sum(axis=2, dtype=np.uint32)
    low, high = words.reshape(-1, 2, 2, 2, 8).transpose(3, 0, 4, 2, 1)  # [row g or g+8][groups, g, row tile, half]
    return two.reshape(-1, 16, 32), (low | high << 16).reshape(-1, 32)


def _pairs() -> np.ndarray:
    """For each set of at most two of four places, as bits: two places in ascending order that include it."""
    table = np.zeros((16, 2), int)
    for bits in range(16):
        kept = [i for i in range(QUAD) if bits >> i & 1]
        table[bits] = sorted((kept + [i for i in range(QUAD) if i not in kept])[:2])
    return table


_PAIRS = _pairs()


def _fragments(columns: np.ndarray) -> np.ndarray:
    """Order ``[groups, 16 columns, rows]`` as the lanes hold them: ``[groups, row_tiles, 32 lanes, 8]``."""
    # column = 8 * right + 2t + e, row = 16 * tile + 8 * down + g; lane = 4g + t, register = 2 * right + down
    parts = columns.reshape(len(columns), 2, 4, 2, -1, 2, 8)  # right, t, e, tile, down, g
    return np.ascontiguousarray(parts.transpose(0, 4, 6, 2, 1, 5, 3)).reshape(len(columns), -1, 32, 8)


# --- Packing for the CUDA cores --------------------------------------------------------------------------------------


def pack_scalar(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compressed sparse rows of ``[C_out, taps, taps, C_in]``: values fp32, columns int32, row starts int32.

    A column is ``channel << 4 | y << 2 | x``. All arrays are at least one element long.
    """
    by_channel = weight.transpose(0, 3, 1, 2)
    row, channel, y, x = np.nonzero(by_channel)
    starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(weight)))])
    values = np.append(by_channel[row, channel, y, x], 0).astype(np.float32)
    return values, np.append(channel << 4 | y << 2 | x, 0).astype(np.int32), starts.astype(np.int32)


# --- Specifications --------------------------------------------------------------------------------------------------


def tensor_core_spec(
    x, packed: Packed, taps: int, c_out: int, warps: int, piece: int = 0, slices: int = 1, splits: int = 1
) -> np.ndarray:
    """What `tensor_core_kernel` sums up: fp32 ``[groups, C_out, H, W, 8]`` from activations with halo `taps` // 2."""
    row_tiles = packed.weights.shape[1]
    rows, halo = 16 * row_tiles, taps // 2
    height, width = x.shape[2] - 2 * halo, x.shape[3] - 2 * halo
    blocks = -(-c_out // (rows * warps))
    first_step, chunks = packed.schedule[: blocks + 1], packed.schedule[blocks + 1 :]
    begins = chunks[first_step[-1] :]
    sums = np.zeros((blocks * warps * rows, len(x), height, width, IMAGES), np.float32)
    for block in range(blocks):
        start, steps = first_step[block], first_step[block + 1] - first_step[block]
        for step in range(start + steps * piece // slices, start + steps * (piece + 1) // slices):
            for warp in range(warps * splits):
                row_group, place = block * warps + warp % warps, (step + block) * warps * splits + warp
                begin, end = begins[place], begins[place + warps * splits]
                for group in range(begin, end):
                    inputs = []
                    for code in packed.columns[group].astype(int):
                        channel = chunks[step - (code >> AGE_BIT)] * CHUNK + (code >> TAP_BITS) % CHUNK
                        oy, ox = divmod(code % (1 << TAP_BITS), TAP_PITCH)
                        inputs.append(x[:, channel, oy : oy + height, ox : ox + width])
                    weights = _dense_fragments(packed, group)
                    here = slice(row_group * rows, (row_group + 1) * rows)
                    sums[here] += np.tensordot(weights, np.stack(inputs).astype(np.float32), axes=1)
    return sums[:c_out].swapaxes(0, 1)


def _dense_fragments(packed: Packed, group: int) -> np.ndarray:
    """The weights of one group, fp32 ``[rows, 16 or 32 columns]``, read off fragments and metadata lane by lane."""
    fragments = packed.weights[group]
    depth = packed.columns.shape[1]
    matrix = np.zeros((16 * len(fragments), depth), np.float32)
    for tile, lanes in enumerate(fragments):
        for lane, values in enumerate(lanes):
            g, t = divmod(lane, 4)
            for i, value in enumerate(values):
                register, e = divmod(i, 2)
                row, column = g + 8 * (register % 2), 2 * t + e + 8 * (register // 2)
                if depth == 32:
                    word = int(packed.metadata[group, 4 * g + 2 * tile + column // 8]) >> 16 * (register % 2)
                    column = column // 2 * QUAD + (word >> 2 * (column % 8) & 3)
                matrix[16 * tile + row, column] = value
    return matrix


def scalar_spec(x: np.ndarray, values, columns, starts, taps: int) -> np.ndarray:
    """What `scalar_kernel` sums up, as `tensor_core_spec`."""
    halo = taps // 2
    height, width = x.shape[2] - 2 * halo, x.shape[3] - 2 * halo
    sums = np.zeros((len(starts) - 1, len(x), height, width, IMAGES), np.float32)
    for row in range(len(sums)):
        for value, column in zip(values[starts[row] : starts[row + 1]], columns[starts[row] :], strict=False):
            oy, ox = column >> 2 & 3, column & 3
            sums[row] += value * x[:, column >> 4, oy : oy + height, ox : ox + width].astype(np.float32)
    return sums.swapaxes(0, 1)


def epilogue_spec(sums: np.ndarray, bias: np.ndarray, relu: bool, pool: bool, halo: int) -> np.ndarray:
    """What all kernels do with their sums ``[groups, C_out, H, W, 8]``: activations fp16, with a halo of zeros."""
    if pool:
        groups, channels, height, width, _ = sums.shape
        even = sums[:, :, : height // 2 * 2, : width // 2 * 2]
        sums = even.reshape(groups, channels, height // 2, 2, width // 2, 2, IMAGES).max(axis=(3, 5))
    sums = sums + bias[: sums.shape[1], None, None, None]
    sums = np.maximum(sums, 0) if relu else sums
    return np.pad(sums, [(0, 0), (0, 0), (halo, halo), (halo, halo), (0, 0)]).astype(np.float16)
