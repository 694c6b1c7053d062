"""How a pruned weight is stored: three formats, found from its zeros, that give it back bit for bit.

(A pruned weight that was -0.0 comes back as 0.0.) All of them store the GEMM view ``[C_out, columns]`` of a weight,
columns in (tap, channel) order:

    Blocks(R, S)            ColumnVectors(V)        BalancedBlocks(R, S, bank=4, kept=2)
    ┌────┬────┐             ┌─────────┐             ┌────┬────┐
    │####│    │             │# #  #   │             │ ##·│    │   inside a surviving block every bank
    │####│    │  whole      │# #  #   │  V weights  │#·#·│    │   of a row keeps the same number of weights
    ├────┼────┤  tiles      ├─────────┤  of one     ├────┼────┤
    │    │####│             │ #    # #│  column     │    │ ##·│   2:4 inside blocks: bank=4, kept=2
    │    │####│             │ #    # #│             │    │#··#│   balanced rows: all blocks survive
    └────┴────┘             └─────────┘             └────┴────┘

`Bitmap` knows no structure: a bit per weight, and those that are kept. It is made in no time.

`Blocks` is BSR, block compressed sparse rows. `ColumnVectors(1)` is CSR, the home of unstructured sparsity; longer
vectors also hold vectors inside surviving blocks. `BalancedBlocks` needs one pointer per block and a few bits per
weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from reprolib.patterns import from_gemm_view, gemm_view, tile, untile

SIZES = (64, 32, 16, 8, 4)  # of blocks and vectors that `pack` looks for
LONGEST_BANK = 256  # a position inside a bank fits into a byte
SAMPLE_ROWS = 64  # that show whether balanced rows are worth a look at all of them


@dataclass(frozen=True, eq=False)
class Format:
    """What all formats share. `shape` is that of the weight, ``[C_out, C_in, K_h, K_w]`` or ``[out, in]``."""

    shape: torch.Size

    @property
    def storage_bytes(self) -> int:
        """Bytes of all arrays of the format, indices included."""
        arrays = (getattr(self, f.name) for f in fields(self))
        return sum(array.nbytes for array in arrays if isinstance(array, Tensor))

    def unpack(self) -> Tensor:
        """The weight that was packed, bit for bit."""
        raise NotImplementedError

    def __str__(self) -> str:
        sizes = [str(getattr(self, f.name)) for f in fields(self) if f.type == "int"]
        return f"{type(self).__name__}({', '.join(sizes)})"


@dataclass(frozen=True, eq=False)
class Blocks(Format):
    """Surviving tiles of rows x cols (BSR).

    ``values [blocks, rows, cols]``; block row i owns the blocks ``row_starts[i]`` to ``row_starts[i + 1]``, which lie
    at ``block_cols [blocks]``.
    """

    rows: int
    cols: int
    row_starts: Tensor
    block_cols: Tensor
    values: Tensor

    @staticmethod
    def pack(weight: Tensor, rows: int, cols: int) -> Blocks:
        """Store every tile of rows x cols that holds a weight other than zero."""
        matrix = gemm_view(weight)
        tiles = tile(matrix, rows, cols)
        kept = (tiles != 0).any(dim=1).reshape(-(-matrix.shape[0] // rows), -1)
        row_starts, block_cols = _compressed(kept)
        return Blocks(weight.shape, rows, cols, row_starts, block_cols, tiles[kept.flatten()].reshape(-1, rows, cols))

    def unpack(self) -> Tensor:
        view = _view_shape(self.shape)
        tiles = self.values.new_zeros(-(-view[0] // self.rows), -(-view[1] // self.cols), self.rows * self.cols)
        tiles[_rows_of(self.row_starts), self.block_cols.long()] = self.values.flatten(1)
        return from_gemm_view(untile(tiles.flatten(0, 1), view, self.rows, self.cols), self.shape)


@dataclass(frozen=True, eq=False)
class ColumnVectors(Format):
    """Surviving column vectors: the weights of `length` consecutive output channels at one column.

    ``values [vectors, length]``; row group i owns the vectors ``row_starts[i]`` to ``row_starts[i + 1]``, which lie in
    the ascending ``columns [vectors]``. Length 1 is CSR.
    """

    length: int
    row_starts: Tensor
    columns: Tensor
    values: Tensor

    @staticmethod
    def pack(weight: Tensor, length: int) -> ColumnVectors:
        """Store every column vector that holds a weight other than zero."""
        matrix = gemm_view(weight)
        groups = -(-matrix.shape[0] // length)
        vectors = tile(matrix, length, 1).reshape(groups, matrix.shape[1], length)
        kept = (vectors != 0).any(dim=2)
        row_starts, columns = _compressed(kept)
        return ColumnVectors(weight.shape, length, row_starts, columns, vectors[kept])

    def unpack(self) -> Tensor:
        view = _view_shape(self.shape)
        vectors = self.values.new_zeros(-(-view[0] // self.length), view[1], self.length)
        vectors[_rows_of(self.row_starts), self.columns.long()] = self.values
        return from_gemm_view(untile(vectors.flatten(0, 1), view, self.length, 1), self.shape)


@dataclass(frozen=True, eq=False)
class BalancedBlocks(Format):
    """Balanced rows inside surviving blocks: each bank of `bank` consecutive columns stores `kept` weights of a row.

    ``values [blocks, rows, cols / bank, kept]``, and each weight's place in its bank in ``places``, packed to 2, 4 or
    8 bits. With bank 4 and kept 2 this is 2:4 inside blocks; with blocks as long as a row it is balanced sparsity
    (Yao et al., AAAI 2019). A bank with fewer weights than `kept` stores zeros.
    """

    rows: int
    cols: int
    bank: int
    kept: int
    row_starts: Tensor
    block_cols: Tensor
    values: Tensor
    places: Tensor

    @staticmethod
    def pack(weight: Tensor, rows: int, cols: int, bank: int) -> BalancedBlocks:
        """Store surviving blocks bank by bank; the fullest bank says how many weights each one stores.

        Raises ValueError where banks do not tile blocks or are longer than 256.
        """
        if cols % bank or bank > LONGEST_BANK:
            raise ValueError(f"banks of {bank} do not tile blocks of {cols} columns, or are longer than {LONGEST_BANK}")
        blocks = Blocks.pack(weight, rows, cols)
        banks = blocks.values.reshape(-1, rows, cols // bank, bank)
        stored = banks != 0
        kept = max(int(stored.sum(dim=3).max()), 1) if banks.numel() else 1
        places = stored.to(torch.uint8).argsort(dim=3, descending=True, stable=True)[..., :kept]
        return BalancedBlocks(
            weight.shape,
            rows,
            cols,
            bank,
            kept,
            blocks.row_starts,
            blocks.block_cols,
            banks.gather(3, places),
            _squeeze(places, bank),
        )

    def unpack(self) -> Tensor:
        places = _expand(self.places, self.bank, self.values.numel()).reshape(self.values.shape)
        banks = self.values.new_zeros(*self.values.shape[:3], self.bank).scatter_(3, places, self.values)
        tiles = banks.reshape(-1, self.rows, self.cols)
        return Blocks(self.shape, self.rows, self.cols, self.row_starts, self.block_cols, tiles).unpack()


@dataclass(frozen=True, eq=False)
class Bitmap(Format):
    """Kept weights ``values [kept]`` in the order of the weight; ``bits``, eight in a byte, say where they are."""

    bits: Tensor
    values: Tensor

    @staticmethod
    def pack(weight: Tensor) -> Bitmap:
        """Store every weight other than zero; on the CPU."""
        kept = weight != 0
        return Bitmap(weight.shape, torch.from_numpy(np.packbits(kept.numpy())), weight[kept])

    def unpack(self) -> Tensor:
        weight = self.values.new_zeros(self.shape)
        kept = np.unpackbits(self.bits.numpy(), count=weight.numel()).astype(bool)
        weight.view(-1)[torch.from_numpy(kept)] = self.values
        return weight


def pack(weight: Tensor) -> Format:
    """The format that stores structure in the fewest bytes, found from the zeros of `weight`; of equals the coarsest.

    Takes Conv2d ``[C_out, C_in, K_h, K_w]`` and Linear ``[out, in]`` weights of any float type.
    """
    weight = weight.detach()
    options = _options(weight)
    make, *sizes = min(options, key=options.get)
    return make(weight, *sizes)


# --- Finding the structure ------------------------------------------------------------------------------------------


def _options(weight: Tensor) -> dict[tuple, int]:
    """Bytes, without the row pointers, of every format that `pack` considers, by its constructor and sizes.

    What a look at some rows shows to be larger than another one is left out.
    """
    matrix = (gemm_view(weight) != 0).to(torch.uint8)
    columns = matrix.shape[1]
    value = weight.element_size()
    blocks, vectors = _surviving(matrix)
    fullest = {bank: _fullest(tile(matrix, 1, SIZES[0]), bank) for bank in SIZES}  # banks outside of blocks are empty
    options = {}
    for size in SIZES:
        index = _index_type(-(-columns // size)).itemsize
        options[Blocks.pack, size, size] = blocks[size] * (size * size * value + index)
        for bank in (b for b in SIZES if b <= size):
            places = blocks[size] * size * size // bank * fullest[bank]
            options[BalancedBlocks.pack, size, size, bank] = blocks[size] * index + _balanced_bytes(places, value, bank)
    index = _index_type(columns).itemsize
    for length in (*SIZES, 2, 1):
        options[ColumnVectors.pack, length] = vectors[length] * (length * value + index)
    index, rows = _index_type(1).itemsize, int(matrix.any(dim=1).sum())  # of blocks as long as a row

    def balanced(rows_looked_at: Tensor, bank: int) -> int:
        places = rows * columns // bank * _fullest(rows_looked_at, bank)
        return rows * index + _balanced_bytes(places, value, bank)

    for bank in (b for b in range(2, min(columns, LONGEST_BANK) + 1) if columns % b == 0):
        if balanced(matrix[:SAMPLE_ROWS], bank) <= min(options.values()):
            options[BalancedBlocks.pack, 1, columns, bank] = balanced(matrix, bank)
    return options


def _surviving(kept: Tensor) -> tuple[dict[int, int], dict[int, int]]:
    """How many square tiles, and how many column vectors, hold a kept weight (uint8, 1 = kept), by their size."""
    rows, columns = (-size % SIZES[0] for size in kept.shape)
    tiles = vectors = torch.nn.functional.pad(kept, (0, columns, 0, rows))
    tile_counts, vector_counts = {}, {1: int(kept.count_nonzero())}
    size = 1
    while size < SIZES[0]:  # from those half as large
        size *= 2
        vectors = vectors[::2] | vectors[1::2]
        tiles = tiles[::2] | tiles[1::2]
        tiles = tiles[:, ::2] | tiles[:, 1::2]
        tile_counts[size], vector_counts[size] = int(tiles.count_nonzero()), int(vectors.count_nonzero())
    return tile_counts, vector_counts


def _fullest(kept: Tensor, bank: int) -> int:
    """The largest number of kept weights (uint8, 1 = kept) in any bank of ``[.., columns]``."""
    return max(int(kept.reshape(-1, bank).sum(dim=1, dtype=torch.int16).max()), 1) if kept.numel() else 1


def _balanced_bytes(weights: int, value_bytes: int, bank: int) -> int:
    return weights * value_bytes + math.ceil(weights * _place_bits(bank) / 8)


# --- Index arrays ---------------------------------------------------------------------------------------------------


def _index_type(columns: int) -> torch.dtype:
    return torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32


def _compressed(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Row pointers and column indices of the True entries of a matrix."""
    row_starts = torch.zeros(kept.shape[0] + 1, dtype=torch.int32, device=kept.device)
    row_starts[1:] = kept.sum(dim=1).cumsum(0)
    return row_starts, kept.nonzero()[:, 1].to(_index_type(kept.shape[1]))


def _rows_of(row_starts: Tensor) -> Tensor:
    return torch.repeat_interleave(
        torch.arange(len(row_starts) - 1, device=row_starts.device), row_starts.diff().long()
    )


def _view_shape(shape: torch.Size) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _place_bits(bank: int) -> int:
    return 2 if bank <= 4 else 4 if bank <= 16 else 8


def _squeeze(places: Tensor, bank: int) -> Tensor:
    """Places in a bank, several to a byte, the first one in the lowest bits."""
    per_byte = 8 // _place_bits(bank)
    flat = places.flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % per_byte)).reshape(-1, per_byte)
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=places.device) * _place_bits(bank)
    return (flat << shifts).sum(dim=1, dtype=torch.uint8)


def _expand(squeezed: Tensor, bank: int, count: int) -> Tensor:
    """Undo `_squeeze`: `count` places as int64."""
    bits = _place_bits(bank)
    shifts = torch.arange(8 // bits, dtype=torch.uint8, device=squeezed.device) * bits
    return ((squeezed[:, None] >> shifts) & (2**bits - 1)).flatten()[:count].long()
