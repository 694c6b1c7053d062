"""Stored weights against arrays worked by hand; then every format gives every weight back, at the size it promised."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from reprolib.patterns import Balanced, Block, Unstructured, Vector, gemm_view
from reprolib.sparse import formats
from reprolib.sparse.formats import BalancedBlocks, Bitmap, Blocks, ColumnVectors, pack

# Divides by no size of two.
RAGGED = [
    [1, 2, 0, 0, 5],
    [0, 3, 0, 0, 0],
    [0, 0, 7, 8, 0],
]
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def randoms(shape, density=1.0, seed=0, dtype=torch.float32):
    """A weight whose kept entries are anything but zero: also the smallest and the largest number of its type."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    weight[weight == 0] = 1
    flat, limits = weight.view(-1), torch.finfo(dtype)
    flat[::7], flat[3::7] = limits.smallest_normal / 2, limits.min
    return torch.where(torch.rand(shape, generator=generator) < density, weight, 0)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


# --- By hand ----------------------------------------------------------------------------------------------------------


def test_blocks_by_hand():
    packed = Blocks.pack(torch.tensor(RAGGED).float(), 2, 2)
    assert packed.row_starts.tolist() == [0, 2, 3]
    assert packed.block_cols.tolist() == [0, 2, 1]
    assert packed.values.tolist() == [[[1, 2], [0, 3]], [[5, 0], [0, 0]], [[7, 8], [0, 0]]]
    assert packed.storage_bytes == 3 * 4 + 3 * 2 + 12 * 4


def test_bitmap_by_hand():
    weight = torch.tensor([[0, 2.0, 0], [-1, 0, -0.0], [0, 0, 5]])
    found = Bitmap.pack(weight)
    assert found.values.tolist() == [2, -1, 5]
    assert found.bits.tolist() == [0b01010000, 0b10000000]
    assert torch.equal(found.unpack(), weight) and found.storage_bytes == 3 * 4 + 2
    transposed = weight.T[None, None]
    assert torch.equal(Bitmap.pack(transposed).unpack(), transposed)


def test_column_vectors_by_hand():
    packed = ColumnVectors.pack(torch.tensor(RAGGED).half(), 2)
    assert packed.row_starts.tolist() == [0, 3, 5]
    assert packed.columns.tolist() == [0, 1, 4, 2, 3]
    assert packed.values.tolist() == [[1, 0], [2, 3], [5, 0], [7, 0], [8, 0]]
    assert packed.storage_bytes == 3 * 4 + 5 * 2 + 10 * 2


def test_column_vectors_of_length_one_are_csr():
    packed = ColumnVectors.pack(torch.tensor(RAGGED).float(), 1)
    assert packed.row_starts.tolist() == [0, 3, 4, 6]
    assert packed.columns.tolist() == [0, 1, 4, 1, 2, 3]
    assert packed.values.tolist() == [[1], [2], [5], [3], [7], [8]]


def test_columns_of_a_convolution_are_ordered_by_tap_then_channel():
    weight = torch.zeros(1, 2, 1, 3)
    weight[0, 0, 0, 1], weight[0, 1, 0, 2] = 4, 6
    packed = ColumnVectors.pack(weight, 1)
    assert packed.columns.tolist() == [1 * 2 + 0, 2 * 2 + 1]
    assert packed.values.flatten().tolist() == [4, 6]


@pytest.mark.parametrize(
    ("weight", "sizes", "block_cols", "values", "places"),
    [
        # 2 bits a place: 1, 3, 0, 2 from the lowest bits on. The second block is empty.
        (
            [[0, 5, 0, 6, 0, 0, 0, 0], [7, 0, 8, 0, 0, 0, 0, 0]],
            (2, 4, 4),
            [0],
            [[[[5, 6]], [[7, 8]]]],
            [1 + 3 * 4 + 0 * 16 + 2 * 64],
        ),
        # Fewer weights than `kept`: a stored zero. The third row fills up the block.
        (
            [[0, 0, 3, 0], [4, 4, 0, 0], [0, 0, 0, 0]],
            (3, 4, 4),
            [0],
            [[[[3, 0]], [[4, 4]], [[0, 0]]]],
            [2 + 0 * 4 + 0 * 16 + 1 * 64, 0 + 1 * 4],
        ),
        # 4 bits: banks of 8 keep one weight each, at 5, 1 and 7; three places take two bytes.
        (
            [[0, 0, 0, 0, 0, 9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]],
            (1, 24, 8),
            [0],
            [[[[9], [1], [2]]]],
            [5 + 1 * 16, 7],
        ),
        # 8 bits: banks of 20, each with two weights.
        ([[0] * 18 + [1, 2] + [3] + [0] * 18 + [4]], (1, 20, 20), [0, 1], [[[[1, 2]]], [[[3, 4]]]], [18, 19, 0, 19]),
    ],
    ids=["2-bit", "partial", "4-bit", "8-bit"],
)
def test_balanced_blocks_by_hand(weight, sizes, block_cols, values, places):
    packed = BalancedBlocks.pack(torch.tensor(weight).float(), *sizes)
    assert packed.row_starts.tolist() == [0, len(block_cols)]
    assert packed.block_cols.tolist() == block_cols
    assert packed.values.tolist() == values
    assert packed.places.tolist() == places
    assert packed.kept == len(values[0][0][0])
    assert packed.storage_bytes == 2 * 4 + len(block_cols) * 2 + packed.values.numel() * 4 + len(places)


@pytest.mark.parametrize("sizes", [(4, 6, 4), (1, 512, 512)], ids=["do not tile", "too long"])
def test_banks_that_do_not_fit_are_refused(sizes):
    with pytest.raises(
        ValueError, match=f"banks of {sizes[2]} .* blocks of {sizes[1]} columns, or are longer than 256"
    ):
        BalancedBlocks.pack(torch.ones(4, 512), *sizes)


# --- What `pack` finds ------------------------------------------------------------------------------------------------


def pruned(shape, *masks):
    weight = randoms(shape)
    ranked = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    for pattern, sparsity in masks:
        weight[~pattern.mask(ranked, sparsity)] = 0
    return weight


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (pruned((128, 64, 3, 3), (Block(32, 32), 0.75)), "Blocks(32, 32)"),
        (pruned((64, 64, 3, 3), (Block(4, 4), 0.75)), "Blocks(4, 4)"),
        (pruned((128, 64, 3, 3), (Vector(32), 0.9)), "ColumnVectors(32)"),
        (pruned((128, 64), (Vector(4), 0.9)), "ColumnVectors(4)"),
        (pruned((128, 64), (Vector(2), 0.9)), "ColumnVectors(2)"),
        (pruned((4, 1024), (Balanced(256), 127 / 128)), "BalancedBlocks(1, 1024, 256, 2)"),
        (pruned((20, 16, 3, 3), (Balanced(16), 0.75)), "BalancedBlocks(1, 144, 16, 4)"),
        (pruned((20, 96), (Balanced(24), 23 / 24)), "BalancedBlocks(1, 96, 24, 1)"),
        (pruned((128, 64, 3, 3), (Balanced(16), 0.75)), "BalancedBlocks(64, 64, 16, 4)"),  # all survive: fewer pointers
        (pruned((128, 64, 3, 3), (Balanced(16) & Block(32, 32), 0.75)), "BalancedBlocks(32, 32, 16, 8)"),
        (pruned((128, 64, 3, 3), (Balanced(16) & Block(32, 32), 0.9)), "BalancedBlocks(32, 32, 16, 5)"),
        (pruned((128, 64, 3, 3), (Balanced(4), 0.5), (Block(32, 32), 0.75)), "BalancedBlocks(32, 32, 4, 2)"),
        (pruned((128, 64, 3, 3), (Unstructured(), 0.9)), "ColumnVectors(1)"),
        (pruned((64, 64, 3, 3), (Vector(16), 0.5), (Block(32, 32), 0.75)), "ColumnVectors(16)"),
        (randoms((64, 64)), "Blocks(64, 64)"),
        (torch.zeros(64, 64), "Blocks(64, 64)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pack_finds_the_structure(weight, expected):
    packed = pack(weight)
    assert str(packed) == expected
    assert same_bits(packed.unpack(), weight)


def test_pack_of_a_parameter_has_no_gradient():
    packed = pack(torch.nn.Linear(8, 8).weight)
    assert not packed.values.requires_grad
    assert not packed.unpack().requires_grad


def test_minus_zero_is_pruned():
    weight = torch.tensor([[0.0, -0.0, 2.0, -0.0]])
    assert ColumnVectors.pack(weight, 1).values.tolist() == [[2]]
    assert BalancedBlocks.pack(weight, 1, 4, 4).kept == 1
    assert len(Blocks.pack(-torch.zeros(8, 8), 4, 4).values) == 0
    assert same_bits(ColumnVectors.pack(weight, 1).unpack(), torch.tensor([[0.0, 0.0, 2.0, 0.0]]))


# --- Every format, every weight ---------------------------------------------------------------------------------------

sides = st.integers(1, 20)
shapes = st.one_of(
    st.tuples(sides, st.integers(1, 80)),
    st.builds(lambda out, channels: (out, channels, 3, 3), sides, sides),
    st.builds(lambda out, channels: (out, channels, 1, 1), sides, st.integers(1, 80)),
)
densities = st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0])
seeds = st.integers(0, 1000)


@given(shapes, densities, seeds, st.sampled_from(list(BITS)))
@example((1, 1), 1.0, 0, torch.float32)
@example((1, 300), 0.3, 0, torch.bfloat16)  # one row, divisors up to 150
@example((70, 257), 0.05, 0, torch.float16)  # a prime: no bank tiles a row
@example((3, 512), 0.3, 0, torch.float64)  # banks of 256
def test_every_format_gives_the_weight_back_at_the_size_that_was_foreseen(shape, density, seed, dtype):
    weight = randoms(shape, density, seed, dtype)
    for (make, *sizes), foreseen in formats._options(weight).items():
        packed = make(weight, *sizes)
        assert same_bits(packed.unpack(), weight), packed
        assert packed.storage_bytes == foreseen + packed.row_starts.nbytes, packed


@given(st.sampled_from([Block(4, 4), Block(8, 8), Vector(4), Balanced(4), Unstructured()]), shapes, densities, seeds)
def test_pack_is_never_larger_than_csr_or_dense_blocks(pattern, shape, density, seed):
    weight = randoms(shape, density, seed)
    weight[~pattern.mask(torch.rand(shape), 0.5)] = 0
    packed = pack(weight)
    assert same_bits(packed.unpack(), weight)
    assert packed.storage_bytes <= ColumnVectors.pack(weight, 1).storage_bytes
    assert packed.storage_bytes <= Blocks.pack(weight, 4, 4).storage_bytes


@given(shapes, densities, seeds)
def test_indices_are_sorted_and_within_bounds(shape, density, seed):
    weight = randoms(shape, density, seed)
    for packed, indices, width in (
        (b := Blocks.pack(weight, 4, 8), b.block_cols, 8),
        (v := ColumnVectors.pack(weight, 2), v.columns, 1),
    ):
        assert packed.row_starts[0] == 0
        assert packed.row_starts[-1] == len(indices) == len(packed.values)
        for start, stop in zip(packed.row_starts, packed.row_starts[1:], strict=False):
            assert (indices[start:stop].diff() > 0).all()
        assert ((indices >= 0) & (indices < math.ceil(math.prod(shape[1:]) / width))).all()


def test_more_columns_than_16_bits_can_count():
    weight = torch.zeros(4, 40000)
    weight[1, 39999], weight[2, 32768] = 1, 2
    packed = ColumnVectors.pack(weight, 1)
    assert packed.columns.tolist() == [39999, 32768]
    assert torch.equal(packed.unpack(), weight)
    weight = torch.zeros(64, 40000)
    weight[:, 64:128] = 1
    packed = pack(weight)  # its blocks are few enough again
    assert (str(packed), packed.storage_bytes) == ("Blocks(64, 64)", 64 * 64 * 4 + 2 * 4 + 2)
    assert formats._options(weight)[Blocks.pack, 64, 64] == 64 * 64 * 4 + 2


def test_transposed_weight_is_packed_as_it_looks():
    weight = randoms((6, 10), 0.3).T
    assert torch.equal(pack(weight).unpack(), weight)
    weight = randoms((6, 4, 3, 3), 0.3)
    packed = pack(weight.contiguous(memory_format=torch.channels_last))
    assert torch.equal(packed.unpack(), weight)
    assert torch.equal(gemm_view(packed.unpack()), gemm_view(weight))
