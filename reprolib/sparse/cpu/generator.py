"""The code of one layer, made for its weights.

A *group* of output channels, 31 or fewer, keeps its sums in registers. Column by column (tap, input channel) the input
vector is loaded once, and one multiplication follows per kept weight of the group: its place is the instruction's
register number, its value the next one of a stream of weights. Columns without a kept weight cost nothing:

    kept weights of a group      its code
      column 0 1 2 3
    row 0    #   # .             load x from column 0;  sum0 += x * next weight;  sum2 += x * next weight
    row 1    . . # .             load x from column 2;  sum0 += ..;  sum1 += ..
    row 2    # . . .

Where few weights are zero, code per weight does not pay: there it is a loop over input channels that multiplies by all
weights of a column, zeros too.

One to two thousand multiplications make a *chunk*. It runs for a band of output vectors before the next one, so that
it stays in the instruction cache; sums wait in a scratch meanwhile. Code per kept weight is known from FBGEMM (2019)
and SparseDNN; patents touch the field (US 11,216,732, US 10,915,816).

A chunk is called as ``f(source, weights, sums, target, masks, addend)``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from reprolib.sparse.cpu import encoder
from reprolib.sparse.cpu.encoder import BYTES, R9, RCX, RDI, RDX, RSI, WRITTEN
from reprolib.sparse.cpu.geometry import Stage

FEW = 8  # output vectors: code that runs for no more of them streams from memory
AHEAD_BYTES, FETCH_EVERY = 8192, 6  # how far ahead streaming code fetches itself, and after how many multiplications
# A layer that keeps a larger part of its weights gets a loop, if its columns are as many as that. Where code streams, a
# weight of its own takes 11 bytes and more, and one of a loop 4.
DENSE, DENSE_OF_FEW, MANY_CHANNELS = 0.75, 0.35, 16
ALIGNMENT, LINE = 64, 16  # bytes of a line of the cache, and its float32
TRAP = 0xCC  # between chunks


@dataclass(frozen=True, eq=False)
class Code:
    """Code and weights of a layer.

    ``chunks [.., 3]``: where the code and the weights of a chunk start (bytes, float32), and the bytes of its code.
    Group i of output channels ``first_rows[i]`` to ``first_rows[i + 1]`` owns the chunks ``first_chunks[i]`` to
    ``first_chunks[i + 1]``.
    """

    code: np.ndarray
    weights: np.ndarray
    chunks: np.ndarray
    first_chunks: np.ndarray
    first_rows: np.ndarray


def generate(stage: Stage, isa: ModuleType) -> Code:
    """Encode a layer in an instruction set, `avx512` or `avx2`.

    Raises ValueError where code would read or write outside of its layouts.
    """
    _refuse_wild(stage)
    weight = isa.words(stage.weight)
    rows = _group_rows(weight != 0, isa.GROUP_ROWS)
    first_rows = np.append(np.arange(0, len(weight), rows), len(weight))
    density = DENSE_OF_FEW if _streams(stage) else DENSE
    if weight.shape[1] >= MANY_CHANNELS and np.count_nonzero(weight) > density * weight.size:
        return _loops(stage, isa, weight, first_rows)
    kept, chunk_groups, chunk_starts = _in_order(weight != 0, rows, isa.CHUNK_OF_FEW if _streams(stage) else isa.CHUNK)
    is_first = np.append(True, chunk_groups[1:] != chunk_groups[:-1])
    is_last = np.append(is_first[1:], True)
    sizes = np.diff(first_rows)[chunk_groups]

    # The stream of weights; that of the first chunk of a group begins with the biases.
    chunk_of = np.repeat(np.arange(len(chunk_groups)), np.diff(chunk_starts))
    biases = np.where(is_first, sizes, 0)
    streams = np.append(0, np.cumsum(-(-(biases + np.diff(chunk_starts)) // LINE) * LINE))
    at = np.arange(len(chunk_of)) - chunk_starts[chunk_of] + biases[chunk_of]
    group, tap, channel, row = kept
    weights = np.zeros(streams[-1], np.float32)
    weights.view(np.uint32)[streams[chunk_of] + at] = weight[first_rows[group] + row, channel, tap]
    output = np.arange(len(weight))
    weights[streams[:-1][is_first][output // rows] + output % rows] = stage.bias

    before = _each(sizes, is_first, lambda size, first: _prologue(stage, isa, size, first))
    behind = _each(sizes, is_last, lambda size, last: _epilogue(stage, isa, size, last))
    packets = _packets(stage, isa, tap, channel, row, chunk_of, sizes, at)
    code, code_starts = _assembled(before, packets, chunk_starts, behind)
    code_bytes = np.diff(code_starts, append=len(code))
    chunks = np.stack([code_starts, streams[:-1] + isa.REACH, code_bytes], axis=1)
    return Code(code, weights, chunks, np.searchsorted(chunk_groups, np.arange(len(first_rows))), first_rows)


def _loops(stage: Stage, isa: ModuleType, weight: np.ndarray, first_rows: np.ndarray) -> Code:
    """A chunk for each group; groups of one size share their code. Weights come by tap, input channel, row."""
    sizes = np.diff(first_rows)
    made = {size: _loop(stage, isa, size) for size in dict.fromkeys(sizes.tolist())}
    ends = dict(zip(made, np.cumsum([len(code) for code in made.values()]), strict=True))
    streams = [
        np.append(stage.bias[a:b].view(np.uint32), weight[a:b].transpose(2, 1, 0))
        for a, b in itertools.pairwise(first_rows)
    ]
    streams = [np.pad(stream, (0, -len(stream) % LINE)) for stream in streams]
    starts = np.cumsum([0, *(len(stream) for stream in streams[:-1])])
    chunks = [
        (ends[size] - len(made[size]), start + isa.REACH, len(made[size]))
        for size, start in zip(sizes.tolist(), starts, strict=True)
    ]
    code = np.frombuffer(b"".join(made.values()), np.uint8)
    return Code(
        code, np.concatenate(streams).view(np.float32), np.array(chunks), np.arange(len(first_rows)), first_rows
    )


def _loop(stage: Stage, isa: ModuleType, size: int) -> bytes:
    channels, x, rows = stage.weight.shape[1] // (1 + isa.PAIRS), isa.REGISTERS - isa.TEMPORARIES - 1, np.arange(size)
    parts, at = [_prologue(stage, isa, size, True), encoder.add(RSI, 4 * size)], 0
    for reach, mask in zip(stage.reach.tolist(), stage.masked.tolist(), strict=True):
        body = encoder.joined(
            isa.load(x, RDI, 0, stage.lanes, mask),
            isa.multiply_add(rows, x, RSI, 4 * (rows - isa.REACH), stage.lanes),
            encoder.add(RSI, 4 * size),
            encoder.add(RDI, stage.source.channel),
        )
        parts += [encoder.add(RDI, reach - at), encoder.repeat(channels, body)]
        at = reach + channels * stage.source.channel
    code = encoder.joined(*parts, _epilogue(stage, isa, size, True))
    return code + bytes((TRAP,)) * (-len(code) % ALIGNMENT)


def _each(sizes: np.ndarray, at_end: np.ndarray, make: Callable[[int, bool], bytes]) -> list[bytes]:
    """What `make` makes for every chunk: there are many chunks, but few kinds of them."""
    kinds = list(zip(sizes.tolist(), at_end.tolist(), strict=True))
    made = {kind: make(*kind) for kind in set(kinds)}
    return [made[kind] for kind in kinds]


def _group_rows(kept: np.ndarray, choices: tuple[int, ...]) -> int:
    """Output channels of a group that need the fewest loads of ``kept [C_out, C_in, taps]``."""
    loads = {rows: int(np.logical_or.reduceat(kept, np.arange(0, len(kept), rows), axis=0).sum()) for rows in choices}
    return min(loads, key=loads.get)


def _in_order(kept: np.ndarray, rows: int, longest: int) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray]:
    """Kept weights in the order of their multiplications: by group, chunk, tap, input channel, row.

    Returns group, tap, channel and row of each; the group of every chunk; where chunks start and the last one ends.
    A chunk takes all taps of some input channels. A group without weights has one chunk without any.
    """
    groups = -(-len(kept) // rows)
    padded = np.zeros((groups * rows, *kept.shape[1:]), bool)
    padded[: len(kept)] = kept
    grid = padded.reshape(groups, rows, *kept.shape[1:]).transpose(0, 3, 2, 1)
    per_channel = grid.sum(axis=(1, 3))
    chunk = (per_channel.cumsum(axis=1) - per_channel) // longest
    each = np.nonzero(grid)
    number = each[0] * (chunk.max() + 1) + chunk[each[0], each[2]]
    order = np.argsort(number.astype(np.int32), kind="stable")
    each, number = tuple(index[order] for index in each), number[order]
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    chunk_groups = each[0][starts]
    empty = np.setdiff1d(np.arange(groups), chunk_groups)
    behind = np.searchsorted(chunk_groups, empty)
    starts = np.insert(starts, behind, np.append(starts, len(number))[behind])
    return each, np.insert(chunk_groups, behind, empty), np.append(starts, len(number))


def _streams(stage: Stage) -> bool:
    """Whether code runs for so few output vectors that it is read from memory about as often as it runs."""
    return len(stage.places) <= FEW


def _packets(
    stage: Stage, isa: ModuleType, tap, channel, row, chunk_of, sizes, at
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What is done for each kept weight: move the pointer, fetch code, load the input, multiply.

    Pairs of the weights that need an instruction, and its bytes for these.
    """
    place = (chunk_of * len(stage.reach) + tap) * stage.weight.shape[1] + channel
    new = np.diff(place, prepend=-1) != 0
    last = isa.REGISTERS - isa.TEMPORARIES - 1
    x = last - np.cumsum(new) % (last + 1 - sizes[chunk_of])
    disp = channel * stage.source.channel + stage.reach[tap]
    masks = stage.masked[tap]
    loads = [(new & (masks == mask), mask) for mask in range(1 + stage.masks.shape[1])]
    window = 2 * isa.REACH
    return [
        ((at % window == 0) & (at > 0), _rows_of(encoder.add(RSI, 4 * window))),
        ((at % FETCH_EVERY == 0) & _streams(stage), _rows_of(encoder.prefetch_code(AHEAD_BYTES))),
        *((these, isa.load(x[these], RDI, disp[these], stage.lanes, mask)) for these, mask in loads if these.any()),
        (np.ones(len(row), bool), isa.multiply_add(row, x, RSI, 4 * (at % window - isa.REACH), stage.lanes)),
    ]


def _prologue(stage: Stage, isa: ModuleType, size: int, first: bool) -> bytes:
    """Sums begin with the biases, or with what the chunk before has left."""
    sums = np.arange(size)
    if first:
        begin = isa.broadcast(sums, RSI, 4 * (sums - isa.REACH), stage.lanes)
    else:
        begin = isa.load(sums, RDX, BYTES[stage.lanes] * sums, stage.lanes)
    return encoder.joined(b"" if stage.source.interleaved else isa.load_masks(stage.masks.shape[1]), begin)


def _epilogue(stage: Stage, isa: ModuleType, size: int, last: bool) -> bytes:
    """Sums wait for the next chunk; or the addend, ReLU, the max-pool, and out. NaN stays: `maximum` returns its last
    operand.
    """
    sums, lanes = np.arange(size), stage.lanes
    if not last:
        return encoder.joined(isa.store(sums, RDX, BYTES[lanes] * sums, lanes), encoder.LEAVE)
    spare = isa.REGISTERS - 1
    target = stage.target
    disp = target.to_channel(sums)
    finish = [_addend(stage, isa, sums)] if stage.addend else []
    if stage.pool:  # the target holds the maximum so far; it began with ReLU's floor
        for i in sums:
            finish += [
                isa.load(spare, RCX, disp[i], lanes),
                isa.half(spare, i % 2, lanes) if target.pairs else b"",
                isa.maximum(i, spare, i, lanes),  # NaN of the sum stays
                isa.maximum(spare, i, spare, lanes),  # NaN of the target stays
                isa.bits_or(i, i, spare, lanes),
            ]
    elif stage.relu:
        finish += [isa.zero(spare, lanes), isa.maximum(sums, spare, sums, lanes)]
    if target.pairs:
        finish.append(isa.pair(sums[::2], sums[1::2], lanes))
        sums, disp = sums[::2], disp[::2]
    mask = 0 if stage.source.interleaved else WRITTEN
    return encoder.joined(*finish, isa.store(sums, RCX, disp, lanes, mask), encoder.LEAVE)


def _addend(stage: Stage, isa: ModuleType, sums: np.ndarray) -> bytes:
    """sums += the addend."""
    disp, lanes, spare = stage.addend.to_channel(sums), stage.lanes, isa.REGISTERS - 1
    if not stage.addend.pairs:
        return encoder.joined(isa.add(sums, sums, R9, disp, lanes))
    return encoder.joined(
        *(
            part
            for i in sums
            for part in (
                isa.load(spare, R9, disp[i], lanes), isa.half(spare, i % 2, lanes), isa.plus(i, i, spare, lanes)
            )
        )
    )  # fmt: skip


def _assembled(before, packets, chunk_starts, behind) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of all chunks, each at the start of a line, and where they start."""
    inside = np.append(0, np.cumsum(sum(present * form.shape[1] for present, form in packets)))
    body = np.diff(inside[chunk_starts])
    lead, trail = np.array([len(a) for a in before]), np.array([len(c) for c in behind])
    ends = np.cumsum(-(-(lead + body + trail) // ALIGNMENT) * ALIGNMENT)
    starts = np.append(0, ends[:-1])
    code = np.full(ends[-1], TRAP, np.uint8)
    position = inside[:-1] + np.repeat(starts + lead - inside[chunk_starts[:-1]], np.diff(chunk_starts))
    for present, form in packets:
        code[position[present][:, None] + np.arange(form.shape[1])] = form
        position += present * form.shape[1]
    for start, a, size, c in zip(starts, before, body, behind, strict=True):
        code[start : start + len(a)] = np.frombuffer(a, np.uint8)
        code[start + len(a) + size :][: len(c)] = np.frombuffer(c, np.uint8)
    return code, starts


def _rows_of(instruction: bytes) -> np.ndarray:
    return np.frombuffer(instruction, np.uint8)[None]


def _refuse_wild(stage: Stage) -> None:
    """Every address that the code can reach lies inside of its layout."""
    rows, channels, taps = stage.weight.shape
    vector = BYTES[stage.lanes]
    touched = {"write": (1, stage.target, 0, stage.target.to_channel(rows - 1))}
    if taps:
        reach = stage.source.to_channel(channels - 1) + stage.reach.max()
        touched["read"] = 0, stage.source, stage.reach.min(), reach
    if stage.addend:
        touched["add"] = 2, stage.addend, 0, stage.addend.to_channel(rows - 1)
    for what, (column, layout, before, behind) in touched.items():
        lowest, highest = stage.places[:, column].min() + before, stage.places[:, column].max() + behind + vector
        if lowest < 0 or highest > layout.size:
            raise ValueError(f"code would {what} bytes {lowest} to {highest} of {layout.size}: the plan is wrong")
