"""Simulated annealing of the order of channels, compiled: see `permutation`, which says what the numbers are."""

import math

import numba
import numpy as np

NO_NAN = {"nnan", "nsz"}  # so that the larger of two numbers is one instruction; sums keep their order


@numba.njit(fastmath=NO_NAN)
def beyond(sums: np.ndarray, last: float) -> float:
    """What blocks hold beyond the `last` one that stays."""
    total = 0.0
    for value in sums:
        if value > last:
            total += value - last
    return total


@numba.njit(fastmath=NO_NAN)
def held(columns, members, bank, keep, rows, largest, rest, sums) -> None:
    """Into `sums`: what a group of inputs, `members`, keeps in each block.

    `columns`, float32 ``[inputs, taps * outputs]``, holds the magnitudes; of each bank of inputs the `keep` largest
    stay, and `rows` outputs make a block. `largest`, ``[keep, taps * outputs]``, and `rest` are room to work in.
    """
    sums[:] = 0
    for first in range(0, len(members), bank):
        largest[:] = 0
        for member in members[first : first + bank]:
            values = columns[member]
            if keep == bank:
                largest[0] += values
            else:
                rest[:] = values
                for t in range(keep):
                    for j in range(len(rest)):
                        x, y = rest[j], largest[t, j]
                        largest[t, j] = max(x, y)
                        rest[j] = min(x, y)
        for t in range(1 if keep == bank else keep):
            for block in range(len(sums)):
                for j in range(block * rows, (block + 1) * rows):
                    sums[block] += largest[t, j]


@numba.njit(fastmath=NO_NAN)
def anneal(
    order,
    pairs,
    luck,
    temperatures,
    rows,
    cols,
    bank,
    keep,
    outputs,
    last_row,
    row_share,
    inputs,
    last_column,
    column_share,
) -> None:
    """Swap channels in `order`, int64 ``[channels]``, in place, where `pairs` of places say.

    A swap stays if what is kept rises, or falls by so little that `luck` allows it at its temperature. `outputs`,
    float32 ``[channels, blocks]``: what each channel keeps of each block, as an output; `inputs` are the `columns` of
    `held`. Either may be empty. Changes count in the shares of their layer.
    """
    n, across = outputs.shape
    places = inputs.shape[1]
    by_row, by_column = np.zeros((n // rows, across), np.float32), np.zeros((n // cols, places // rows), np.float32)
    row_values, column_values = np.zeros(n // rows), np.zeros(n // cols)
    largest, rest = np.zeros((1 if keep == bank else keep, places), np.float32), np.zeros(places, np.float32)
    new_rows, new_columns = np.zeros((2, across), np.float32), np.zeros((2, places // rows), np.float32)
    if across:
        for place in range(n):
            by_row[place // rows] += outputs[order[place]]
        for group in range(n // rows):
            row_values[group] = beyond(by_row[group], last_row)
    if places:
        for group in range(n // cols):
            held(inputs, order[group * cols : (group + 1) * cols], bank, keep, rows, largest, rest, by_column[group])
            column_values[group] = beyond(by_column[group], last_column)
    for turn in range(len(pairs)):
        a, b = pairs[turn]
        ends_row, ends_column = (a // rows, b // rows), (a // cols, b // cols)
        moves_row = across > 0 and ends_row[0] != ends_row[1]
        moves_column = places > 0 and ends_column[0] != ends_column[1]
        if not (moves_row or moves_column):
            continue
        gain = 0.0
        if moves_row:
            change = outputs[order[b]] - outputs[order[a]]
            new_rows[0] = by_row[ends_row[0]] + change
            new_rows[1] = by_row[ends_row[1]] - change
            for end in range(2):
                gain += row_share * (beyond(new_rows[end], last_row) - row_values[ends_row[end]])
        order[a], order[b] = order[b], order[a]
        if moves_column:
            for end in range(2):
                group = ends_column[end]
                members = order[group * cols : (group + 1) * cols]
                held(inputs, members, bank, keep, rows, largest, rest, new_columns[end])
                gain += column_share * (beyond(new_columns[end], last_column) - column_values[group])
        if gain > 0 or (temperatures[turn] > 0 and math.exp(gain / temperatures[turn]) > luck[turn]):
            for end in range(2):
                if moves_row:
                    by_row[ends_row[end]] = new_rows[end]
                    row_values[ends_row[end]] = beyond(new_rows[end], last_row)
                if moves_column:
                    by_column[ends_column[end]] = new_columns[end]
                    column_values[ends_column[end]] = beyond(new_columns[end], last_column)
        else:
            order[a], order[b] = order[b], order[a]
