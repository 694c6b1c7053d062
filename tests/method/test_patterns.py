"""Masks against hand-worked matrices, then invariants that hold for every pattern and weight."""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from reprolib.patterns import (
    NM,
    VNM,
    Balanced,
    Block,
    Hybrid,
    Pairs,
    Pattern,
    Step,
    Unstructured,
    Vector,
    fitting_bank,
    from_gemm_view,
    gemm_view,
    parse,
    sizes,
    tile,
    untile,
)

# Sums of the 2x2 tiles of WEIGHT: 11 and 18 above, 14 and 7 below.
WEIGHT = [
    [1, -2, 3, -4],
    [8, 0, -6, 5],
    [-9, 1, 1, 1],
    [2, 2, -2, 3],
]
# Divides by no size: sums of its 2x2 tiles are 8, 4, 5 above and 4, 9, 3 below.
RAGGED = [
    [5, 1, 1, 1, 4],
    [1, 1, 1, 1, 1],
    [2, 2, 9, 0, 3],
]


@dataclass(frozen=True)
class Filters(Pattern):
    """A pattern that only these tests know: whole output channels go."""

    def scores(self, matrix):
        return matrix.sum(dim=1)[None]

    def spread(self, values, shape):
        return values.reshape(-1, 1).expand(shape)


ALL = [
    Unstructured(),
    Block(2, 2),
    Block(2, 2, covered=True),
    Balanced(4),
    Vector(2),
    Pairs(),
    Balanced(2) & Block(2, 2),
    Hybrid(Balanced(2), Block(2, 4), split=0.25, rescore=True),
    Unstructured() & Block(2, 2),
    Filters(),
]


def mask_of(pattern, weight, sparsity):
    """The mask as a literal: one string of 0 and 1 per row."""
    mask = pattern.mask(torch.tensor(weight, dtype=torch.float32), sparsity)
    return ["".join("01"[keep] for keep in row) for row in mask.tolist()]


def whole_numbers(rows, cols, seed):
    """A weight of small whole numbers: many ties, and sums that are exact."""
    return torch.randint(-4, 5, (rows, cols), generator=torch.Generator().manual_seed(seed)).float()


# --- Hand-worked masks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "sparsity", "expected"),
    [
        (Unstructured(), 0.5, ["0111", "1011", "1000", "0001"]),
        (Block(2, 2), 0.5, ["0011", "0011", "1100", "1100"]),
        (Block(2, 2), 0.75, ["0011", "0011", "0000", "0000"]),
        (Block(1, 4), 0.5, ["0000", "1111", "1111", "0000"]),
        (Balanced(2), 0.5, ["0101", "1010", "1010", "1001"]),
        (Balanced(4), 0.75, ["0001", "1000", "1000", "0001"]),
        (Vector(2), 0.5, ["1011", "1011", "1000", "1000"]),
        (Pairs(), 0.5, ["0011", "1111", "1100", "0000"]),
        (Filters(), 0.5, ["0000", "1111", "1111", "0000"]),
        (Balanced(2) & Block(2, 2), 0.75, ["0001", "0010", "1000", "1000"]),
        (Balanced(4) & Block(2, 2), 0.75, ["0011", "0010", "0000", "0000"]),
        (Block(2, 2) & Balanced(2), 0.75, ["0001", "0010", "1000", "1000"]),
        (Vector(2) & Block(2, 2), 0.75, ["0011", "0011", "0000", "0000"]),
        (Hybrid(Balanced(2), Block(2, 2), rescore=True), 0.75, ["0100", "1000", "1000", "1000"]),
        (Hybrid(Balanced(4), Block(2, 2), split=0.0), 0.75, ["0011", "0011", "0000", "0000"]),
        (Hybrid(Balanced(4), Block(2, 2), split=1.0), 0.75, ["0001", "1000", "1000", "0001"]),
        ((Balanced(2) & Block(2, 2)) & Filters(), 0.875, ["0000", "1010", "0000", "0000"]),
    ],
    ids=str,
)
def test_mask_by_hand(pattern, sparsity, expected):
    assert mask_of(pattern, WEIGHT, sparsity) == expected


@pytest.mark.parametrize(
    ("pattern", "sparsity", "expected"),
    [
        (Block(2, 2), 0.5, ["11001", "11001", "00110"]),
        (Block(2, 2, norm="mean"), 0.5, ["00001", "00001", "00111"]),
        (Balanced(3), 2 / 3, ["10001", "10010", "00101"]),
        (Balanced(3), 1 / 3, ["11011", "11011", "10111"]),
        (Vector(2), 0.6, ["10001", "10001", "00101"]),
    ],
    ids=str,
)
def test_partial_tiles_are_units_of_their_own(pattern, sparsity, expected):
    assert mask_of(pattern, RAGGED, sparsity) == expected


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("l1", "11110000000000"),  # 12 against 9, 11 and 8
        ("l2", "00000000111100"),  # squares: 61 against 36, 53 and 32
        ("max", "00001111000000"),  # 7 against 3, 6 and 4
        ("mean", "00000000000011"),  # 4 in a block of two, against 3, 2.25 and 2.75
    ],
)
def test_norm_ranks_blocks(norm, expected):
    weight = [[3, 3, 3, 3, 7, 2, 0, 0, 6, 5, 0, 0, 4, 4]]
    assert mask_of(Block(1, 4, norm=norm), weight, 0.75) == [expected]


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (1, ["1000", "0000"]),
        (2, ["1000", "0001"]),  # the best of each row; the best two are both in the first
        (3, ["1001", "0001"]),  # and of the second channel
        (4, ["1011", "0001"]),
    ],
)
def test_covered_blocks_lose_no_channel_while_there_are_enough(kept, expected):
    matrix = torch.tensor([[9.0, 6.0, 8.5, 8.0], [0.0, 1.0, 2.0, 5.0]])  # two channels at each of two taps
    weight = from_gemm_view(matrix, torch.Size([2, 2, 1, 2]))
    mask = gemm_view(Block(1, 1, covered=True).mask(weight, 1 - kept / 8))
    assert ["".join("01"[keep] for keep in row) for row in mask.tolist()] == expected


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99), st.data())
def test_covered_blocks_cover(down, inputs, taps, seed, data):
    """With blocks for every row and every group of inputs, each keeps one, step by step; and as many stay as ever."""
    blocks = down * inputs * taps
    kept = data.draw(st.integers(min(down + inputs, blocks), blocks), label="kept")
    weight = whole_numbers(down * 2, inputs * 3 * taps, seed).reshape(down * 2, inputs * 3, 1, taps)
    pattern, alive = Block(2, 3, covered=True), None
    for count in range(blocks, kept - 1, -1):
        alive = pattern.mask(weight if alive is None else weight * alive, 1 - count / blocks, Step(alive, None))
        assert alive.sum() == count * 6
        assert alive.any(dim=(1, 2, 3)).all() and alive.any(dim=(0, 2, 3)).all()


@pytest.mark.parametrize(
    ("order", "expected"),
    [("channels_last", [[0, 1], [1, 0]]), ("channels_first", [[0, 1], [0, 1]])],
)
def test_column_order_decides_which_weights_share_a_bank(order, expected):
    weight = torch.tensor([[[[1.0, 4.0]], [[2.0, 3.0]]]])  # [1, 2 channels, 1, 2 taps]
    assert Balanced(2, order=order).mask(weight, 0.5)[0, :, 0].int().tolist() == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Unstructured(), ["1111", "0000"]),
        (Block(2, 2), ["1100", "1100"]),
        (Balanced(2), ["1010", "1010"]),
        (Vector(2), ["1100", "1100"]),
        (Filters(), ["1111", "0000"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_ties_go_by_position(pattern, expected, value):
    assert mask_of(pattern, [[value] * 4] * 2, 0.5) == expected


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [(Unstructured(), 1), (Block(2, 2), 4), (Balanced(2), 8), (Vector(2), 2), (Balanced(2) & Block(2, 2), 2)],
    ids=str,
)
@pytest.mark.parametrize("weight", [WEIGHT, [[0] * 4] * 4], ids=["weights", "zeros"])
def test_one_unit_of_a_group_stays_at_any_sparsity(pattern, kept, weight):
    assert pattern.mask(torch.tensor(weight, dtype=torch.float32), 0.9999).sum() == kept


@pytest.mark.parametrize("pattern", ALL, ids=str)
def test_sparsity_zero_keeps_everything(pattern):
    assert pattern.mask(torch.zeros(4, 3, 3, 3), 0.0).all()


# --- The GEMM view and tiles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "expected"),
    [("channels_last", [0, 4, 1, 5, 2, 6, 3, 7]), ("channels_first", [0, 1, 2, 3, 4, 5, 6, 7])],
)
def test_gemm_view_orders_columns(order, expected):
    weight = torch.arange(8.0).reshape(1, 2, 2, 2)  # channel 0 holds 0..3, channel 1 holds 4..7
    assert gemm_view(weight, order).tolist() == [expected]
    assert gemm_view(weight[0, 0], order).tolist() == [[0, 1], [2, 3]]  # a Linear weight is its own view


def test_gemm_view_multiplies_unfolded_patches_like_the_convolution():
    weight, image = torch.randn(4, 3, 3, 3), torch.randn(1, 3, 5, 5)
    patches = torch.nn.functional.unfold(image, 3)[0].reshape(3, 9, 9)  # channel, tap, place
    product = gemm_view(weight) @ patches.transpose(0, 1).reshape(27, 9)
    torch.testing.assert_close(product, torch.conv2d(image, weight).reshape(4, 9))


@pytest.mark.parametrize("order", ["channels_last", "channels_first"])
@pytest.mark.parametrize("shape", [(4, 3, 3, 2), (4, 6)])
def test_from_gemm_view_undoes_gemm_view(shape, order):
    weight = torch.randn(shape)
    assert torch.equal(from_gemm_view(gemm_view(weight, order), weight.shape, order), weight)


def test_tile_fills_partial_tiles_and_untile_crops_them():
    matrix = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    tiles = tile(matrix, 2, 2, fill=-1)
    assert tiles.tolist() == [[1, 2, 4, 5], [3, -1, 6, -1], [7, 8, -1, -1], [9, -1, -1, -1]]
    assert torch.equal(untile(tiles, (3, 3), 2, 2), matrix)


# --- Invariants -------------------------------------------------------------------------------------------------------

dimensions = st.integers(1, 20)
sparsities = st.floats(0, 1, exclude_max=True)
seeds = st.integers(0, 1000)


def expected_kept(units, sparsity):
    return max(1, units - math.floor(sparsity * units + 0.5))


@given(st.sampled_from([(1, 1), (2, 3), (4, 4), (5, 1)]), dimensions, dimensions, sparsities, seeds)
@example((1, 1), 1, 1, 0.99, 0)
def test_whole_units_go_and_their_count_is_exact(unit, rows, cols, sparsity, seed):
    height, width = unit
    pattern = {(1, 1): Unstructured(), (5, 1): Vector(5)}.get(unit, Block(height, width))
    mask = pattern.mask(whole_numbers(rows, cols, seed), sparsity)
    units = [
        mask[top : top + height, left : left + width]
        for top in range(0, rows, height)
        for left in range(0, cols, width)
    ]
    assert all(unit.all() or not unit.any() for unit in units)
    assert sum(bool(unit.any()) for unit in units) == expected_kept(len(units), sparsity)


@given(st.integers(1, 9), dimensions, dimensions, sparsities, seeds)
def test_every_bank_keeps_the_same_number_and_its_largest(bank, rows, cols, sparsity, seed):
    weight = whole_numbers(rows, cols, seed)
    mask = Balanced(bank).mask(weight, sparsity)
    for start in range(0, cols, bank):
        keep, values = mask[:, start : start + bank], weight[:, start : start + bank].abs()
        assert (keep.sum(dim=1) == min(expected_kept(bank, sparsity), keep.shape[1])).all()
        smallest_kept = values.masked_fill(~keep, math.inf).amin(dim=1)
        largest_pruned = values.masked_fill(keep, -math.inf).amax(dim=1)
        assert (smallest_kept >= largest_pruned).all()


@given(
    st.sampled_from([Balanced(4), Balanced(8), Balanced(16), Unstructured(), Vector(4)]),
    st.sampled_from([Block(4, 4), Block(8, 8), Block(2, 16), Vector(8)]),
    st.sampled_from([0.5, 0.75, 0.8, 0.9, 0.95, 0.98]),
    st.booleans(),
    st.integers(4, 10),
    st.integers(20, 60),
    seeds,
)
def test_hybrid_comes_within_one_coarse_unit_of_its_target(fine, coarse, sparsity, rescore, row_tiles, cols, seed):
    weight = torch.randn(4 * row_tiles, cols, generator=torch.Generator().manual_seed(seed))
    kept = int(Hybrid(fine, coarse, rescore=rescore).mask(weight, sparsity).sum())
    assert abs(kept - (1 - sparsity) * weight.numel()) <= math.prod(sizes(coarse).values())


def blocks_and_banks(mask, rows, cols, bank):
    """The 0/1 mask as ``[blocks, rows * cols / bank banks, bank]``, cut by slices."""
    return torch.stack(
        [
            mask[top : top + rows, left : left + cols].reshape(-1, bank).int()
            for top in range(0, mask.shape[0], rows)
            for left in range(0, mask.shape[1], cols)
        ]
    )


tiling = st.sampled_from([(2, 2, 2), (2, 4, 2), (4, 4, 4), (3, 8, 4), (1, 6, 3)])  # rows, cols, a bank that divides


@given(tiling, st.integers(1, 5), st.integers(1, 5), sparsities, seeds)
def test_density_is_an_exact_product_where_banks_tile_blocks(size, down, across, sparsity, seed):
    rows, cols, bank = size
    weight = whole_numbers(rows * down, cols * across, seed)
    mask = (Balanced(bank) & Block(rows, cols)).mask(weight, sparsity)
    banks = blocks_and_banks(mask, rows, cols, bank).sum(dim=2)
    alive = banks.any(dim=1)
    assert alive.any()
    per_bank = int(banks.max())
    assert (banks[alive] == per_bank).all()
    assert int(mask.sum()) * bank == int(alive.sum()) * rows * cols * per_bank


@given(tiling, st.integers(1, 5), st.integers(1, 5), sparsities, seeds)
def test_the_and_equals_pruning_blocks_first_and_vectors_inside_the_surviving_ones(size, down, across, sparsity, seed):
    rows, cols, bank = size
    weight = whole_numbers(rows * down, cols * across, seed)
    mask = (Balanced(bank) & Block(rows, cols)).mask(weight, sparsity)
    banks = blocks_and_banks(mask, rows, cols, bank)
    blocks_kept, per_bank = int(banks.any(2).any(1).sum()), int(banks.sum(dim=2).max())

    magnitudes = blocks_and_banks(weight.abs(), rows, cols, bank).tolist()
    best_blocks = sorted(range(len(magnitudes)), key=lambda b: -sum(map(sum, magnitudes[b])))[:blocks_kept]
    expected = torch.zeros_like(banks)
    for b in best_blocks:
        for v, vector in enumerate(magnitudes[b]):
            expected[b, v, sorted(range(bank), key=lambda place: -vector[place])[:per_bank]] = 1
    assert torch.equal(banks, expected)


@given(st.sampled_from([p for p in ALL if not isinstance(p, Hybrid)]), dimensions, dimensions, seeds)
def test_ranks_below_a_count_are_the_mask_of_that_count(pattern, rows, cols, seed):
    weight = whole_numbers(rows, cols, seed)
    ranks, units = pattern.ranks(weight)
    for pruned in range(units):
        assert torch.equal(ranks < units - pruned, pattern.mask(weight, pruned / units))


NORMED = [Block(2, 2, norm=norm) for norm in ("l1", "l2", "max", "mean")]


@pytest.mark.parametrize("pattern", ALL + NORMED[1:], ids=str)
@given(
    sparsity=sparsities,
    seed=seeds,
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    place=st.floats(0, 1),
    transposed=st.booleans(),
)
def test_sign_scale_type_and_layout_of_the_weights_do_not_matter(pattern, sparsity, seed, dtype, place, transposed):
    """A mask is decided by real numbers: those of a half too, near the ends of what the type can hold."""
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight[0, :2] = weight[1, :2]  # some ties
    weight[weight.abs() < 2**-4] = 0  # so that none is rounded when it is scaled
    smallest, largest = math.log2(torch.finfo(dtype).tiny) + 5, math.log2(torch.finfo(dtype).max) - 3
    scaled = -weight * 2.0 ** round(smallest + place * (largest - smallest))
    if transposed:
        scaled = scaled.t().contiguous().t()
    assert torch.equal(pattern.mask(scaled, sparsity), pattern.mask(weight.double(), sparsity))


@given(seeds, st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), st.floats(0.1, 0.9))
def test_blocks_rank_by_their_exact_sums(seed, dtype, sparsity):
    """fp16 sums of a 32 x 32 block overflow, and bf16 ones are off by per cents: the reference is exact."""
    weight = (100 * torch.randn(96, 96, generator=torch.Generator().manual_seed(seed))).to(dtype)
    sums = [
        [math.fsum(weight[top : top + 32, left : left + 32].abs().flatten().tolist()) for left in range(0, 96, 32)]
        for top in range(0, 96, 32)
    ]
    kept = sorted((value for row in sums for value in row), reverse=True)[: expected_kept(9, sparsity)]
    expected = torch.tensor([[value in kept for value in row] for row in sums])
    assert torch.equal(Block(32, 32).mask(weight, sparsity)[::32, ::32], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_that_are_equal_tie_in_every_layout(dtype):
    """The same numbers in another order sum up to other last bits: they must do so in every layout alike."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        numbers = torch.rand(64, dtype=dtype, generator=generator)
        weight = torch.stack([numbers[torch.randperm(64, generator=generator)] for _ in range(8)], dim=1)
        transposed = weight.t().contiguous().t()
        assert torch.equal(Vector(64).mask(weight, 0.5), Vector(64).mask(transposed, 0.5))


# --- Weights as networks hold them ------------------------------------------------------------------------------------

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 8), (4, 6, 3, 3), (4, 8, 1, 1)], ids=["linear", "conv3x3", "conv1x1"])
@pytest.mark.parametrize("pattern", ALL, ids=str)
def test_mask_is_bool_and_has_the_shape_and_device_of_the_weight(pattern, shape, dtype, device):
    weight = torch.nn.Parameter(whole_numbers(shape[0], math.prod(shape[1:]), 0).reshape(shape).to(device, dtype))
    mask = pattern.mask(weight, 0.5)
    assert (mask.dtype, mask.shape, mask.device) == (torch.bool, weight.shape, weight.device)
    assert torch.equal(mask.cpu(), pattern.mask(weight.detach().cpu().float(), 0.5))


@pytest.mark.parametrize("pattern", ALL, ids=str)
def test_memory_format_does_not_matter(pattern):
    weight = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    expected = pattern.mask(weight, 0.7)
    assert torch.equal(pattern.mask(weight.contiguous(memory_format=torch.channels_last), 0.7), expected)


def test_mask_does_not_change_the_weight():
    weight = torch.randn(8, 8)
    before = weight.clone()
    Hybrid(Balanced(2), Block(2, 2), rescore=True).mask(weight, 0.75)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("weight", "sparsity", "message"),
    [
        (torch.ones(4, 4), 1.0, r"sparsity .*\[0, 1\).* 1\.0: 0\.9 prunes nine weights of ten"),
        (torch.ones(4, 4), -0.1, r"\[0, 1\), not -0\.1"),
        (torch.ones(4, 4), math.nan, r"\[0, 1\), not nan"),
        (torch.tensor([[1.0, math.nan]]), 0.5, "NaN or infinite .* did the training diverge"),
        (torch.tensor([[1.0, math.inf]]), 0.5, "NaN or infinite .* did the training diverge"),
        (torch.ones(2, 3, 4), 0.5, r"shape \(2, 3, 4\) has no GEMM view.*Conv2d .* Linear"),
        (torch.ones(0, 4), 0.5, r"shape \(0, 4\) has no GEMM view"),
        (torch.ones(4, 4, dtype=torch.int8), 0.5, "weight of torch.int8 cannot be ranked.* floating-point weights"),
        (torch.ones(4, 4, dtype=torch.bool), 0.5, "weight of torch.bool cannot be ranked"),
        (torch.ones(4, 4, dtype=torch.complex64), 0.5, "weight of torch.complex64 cannot be ranked"),
    ],
    ids=["one", "negative", "nan", "nan-weight", "inf-weight", "3-D", "empty", "int8", "bool", "complex"],
)
@pytest.mark.parametrize("pattern", [Unstructured(), Balanced(2) & Block(2, 2)], ids=str)
def test_bad_sparsity_or_weight_is_refused(pattern, weight, sparsity, message):
    with pytest.raises(ValueError, match=message):
        pattern.mask(weight, sparsity)


# --- Values and their text form ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Block(0, 4), "Block: rows must be a whole number of at least 1, not 0"),
        (lambda: Block(4, 2.5), "Block: cols .* not 2.5"),
        (lambda: Balanced(-1), "Balanced: bank .* not -1"),
        (lambda: Vector("8"), "Vector: length .* not '8'"),
        (lambda: Block(4, 4, norm="l3"), "norm 'l3' is unknown: use l1, l2, max, mean"),
        (lambda: Balanced(4, order="rows"), "order 'rows' is unknown: use channels_last, channels_first"),
        (lambda: Balanced(4) & 3, "a hybrid takes two patterns, not .* and 3"),
        (lambda: Balanced(2) & (Balanced(4) & Block(2, 2)), r"write \(a & b\) & c"),
        (lambda: Hybrid(Balanced(2), Block(2, 2), split=1.5), r"split must lie in \[0, 1\], not 1.5"),
        (lambda: Hybrid(NM(2, 4), Block(2, 2), split=0.25), r"NM\(2, 4\) takes its own share .*leave split=0.25 out"),
        (lambda: Hybrid(Balanced(2), Block(2, 2), split="0.5"), "split must be a number of at least 0, not '0.5'"),
        (lambda: Hybrid(Balanced(2), Block(2, 2), rescore="false"), "rescore must be true or false, not 'false'"),
        (lambda: Block(2, True), "Block: cols must be a whole number of at least 1, not True"),
        (lambda: Block(2, 2) & NM(2, 4), r"would not be n:m: write NM\(2, 4\) & Block\(2, 2\)"),
        (lambda: Hybrid(Balanced(2), Block(2, 2), order="channels_first"), "give order= to its halves"),
        (lambda: VNM(4, 2, 8) & Block(4, 8), r"VNM\(4, 2, 8\) has a fine and a coarse half of its own: use it alone"),
        (lambda: VNM(4, 2, 3), r"VNM keeps 2 n of m columns: 2 \* 2 must not be larger than m = 3"),
    ],
)
def test_bad_pattern_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (Unstructured(), "Unstructured()"),
        (Block(32, 16), "Block(32, 16)"),
        (Block(4, 4, norm="max", order="channels_first"), "Block(4, 4, order='channels_first', norm='max')"),
        (Balanced(16) & Block(32, 32), "Balanced(16) & Block(32, 32)"),
        (Hybrid(Balanced(8), Block(8, 8), split=0.25), "Hybrid(Balanced(8), Block(8, 8), split=0.25)"),
        (Filters(), "Filters()"),
        (
            Hybrid(Balanced(8, order="channels_first"), Block(8, 8), split=0.25),
            "Hybrid(Balanced(8, order='channels_first'), Block(8, 8), split=0.25)",
        ),
        (Hybrid(Balanced(2), Block(2, 2), split=0.25) & Vector(4), None),
    ],
)
def test_text_form(pattern, text):
    assert text is None or str(pattern) == text
    assert parse(str(pattern)) == pattern


def test_spelling_of_the_text_does_not_matter():
    assert parse(" Balanced(bank = 16)&Block( 32,cols=32 )") == Balanced(16) & Block(32, 32)


orders = st.sampled_from(["channels_last", "channels_first"])
lengths = st.integers(1, 128)
single_patterns = st.one_of(
    st.builds(Unstructured, order=orders),
    st.builds(Block, lengths, lengths, norm=st.sampled_from(["l1", "l2", "max", "mean"]), order=orders),
    st.builds(Balanced, lengths, order=orders),
    st.builds(Vector, lengths, order=orders),
    st.builds(Filters, order=orders),
)
plain_patterns = st.one_of(st.builds(Block, lengths, lengths), st.builds(Balanced, lengths), st.builds(Vector, lengths))
patterns = st.one_of(
    single_patterns,
    st.builds(lambda a, b, c: a & b & c, single_patterns, single_patterns, single_patterns),
    st.builds(Hybrid, plain_patterns, plain_patterns, split=st.floats(0, 1), rescore=st.booleans()),
)


@given(patterns)
def test_parse_undoes_str(pattern):
    assert parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Blok(4, 4)", "unknown pattern 'Blok' in .*known are Balanced, Block, .*Unstructured, VNM, Vector"),
        ("open('secrets')", "unknown pattern 'open'"),
        ("__import__('os').getcwd()", "not understood: write for example 'Balanced"),
        ("Block(4", r"'Block\(4' is not understood"),
        ("Block(4)", r"Block\(4\).*missing 1 required positional argument: 'cols'"),
        ("Block(4, 4) + Block(4, 4)", "not understood"),
        ("16", "'16' is not understood"),
        ("3 & Block(4, 4)", "a hybrid takes two patterns, not 3 and"),
        ("Block(-1, 4)", "rows must be a whole number of at least 1, not -1"),
        ("", "'' is not understood"),
    ],
)
def test_text_that_names_no_pattern_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_patterns_are_equal_and_hash_by_value():
    assert len({Balanced(4) & Block(2, 2), Balanced(4) & Block(2, 2), Balanced(4) & Block(2, 4)}) == 2


@pytest.mark.parametrize(
    ("pattern", "family", "expected"),
    [
        (Unstructured(), "unstructured", {}),
        (Block(32, 16), "block", {"block_rows": 32, "block_cols": 16}),
        (Balanced(16), "balanced", {"bank": 16}),
        (Vector(8), "vector", {"vector_length": 8}),
        (Pairs(), "pairs", {}),
        (Balanced(16) & Block(32, 16), "hybrid", {"bank": 16, "block_rows": 32, "block_cols": 16}),
    ],
    ids=str,
)
def test_family_and_sizes_name_table_columns(pattern, family, expected):
    assert pattern.family == family
    assert sizes(pattern) == expected


@pytest.mark.parametrize(
    ("columns", "sparsity", "bank"),
    [
        ([576, 1152, 4608], 0.5, 2),
        ([576, 1152, 4608], 0.9, 48),  # 43 / 48 = 89.6 %
        ([576, 1152, 4608], 0.95, 64),  # 61 / 64 = 95.3 %
        ([9], 2 / 3, 3),
        ([8], 0.9, None),
    ],
)
def test_fitting_bank_is_the_smallest_that_divides_and_expresses(columns, sparsity, bank):
    assert fitting_bank(columns, sparsity, tolerance=0.005) == bank


# --- Whoever adds a pattern -------------------------------------------------------------------------------------------


def test_a_new_pattern_gets_masks_hybrids_and_a_text_form():
    pattern = parse("Balanced(2) & Filters()")
    assert pattern == Balanced(2) & Filters()
    assert mask_of(pattern, WEIGHT, 0.75) == ["0000", "1010", "1010", "0000"]
    assert mask_of(Filters() & Block(2, 2), WEIGHT, 0.75) == ["0000", "0011", "1100", "0000"]


def test_hybrid_is_never_empty():
    # The block that ranks first is empty after the fine half: kept counts 0 and 2 are equally far from the wanted 1.
    mask = (Unstructured() & Block(1, 3)).mask(torch.tensor([[5.0, 5, 0, 4, 4, 4]]), 5 / 6)
    assert mask.any()


def test_sizes_of_a_pattern_from_a_notebook_are_checked_and_named():
    # A notebook has no `from __future__ import annotations`: the type of a field is a class there, not its name.
    stripes = dataclasses.make_dataclass("Stripes", [("gap", int)], bases=(Pattern,), frozen=True)
    assert sizes(stripes(3)) == {"stripes_gap": 3}
    with pytest.raises(ValueError, match="Stripes: gap must be a whole number of at least 1, not 0"):
        stripes(0)


# --- N:M ------------------------------------------------------------------------------------------------------------


def test_two_of_four_stay_whatever_the_target():
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0, 0.5, 1.0, -2.0, 0.0]])
    expected = torch.tensor([[True, True, False, False, False, True, True, False]])
    for sparsity in (0.0, 0.5, 0.9):
        assert torch.equal(NM(2, 4).mask(weight, sparsity), expected)


def test_blocks_take_what_two_of_four_leave():
    weight = torch.randn(64, 64, 3, 3)
    for sparsity in (0.5, 0.75, 0.875):  # of 36 blocks 36, 18 and 9 stay
        mask = (NM(2, 4) & Block(32, 32)).mask(weight, sparsity)
        assert mask.float().mean() == 1 - sparsity
        assert gemm_view(mask).reshape(-1, 4).sum(dim=1).unique().tolist() in ([0, 2], [2])


@pytest.mark.parametrize("text", ["NM(5, 4)", "NM(0, 4)"])
def test_n_of_m_must_be_possible(text):
    with pytest.raises(ValueError, match="NM"):
        parse(text)


VENOM = [  # columns of the upper two rows hold 11 11 11 3 12 1
    [10.0, 1.0, 6.0, 2.0, 5.0, 0.0],
    [1.0, 10.0, 5.0, 1.0, 7.0, 1.0],
    [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
]


def test_in_groups_of_rows_few_columns_stay_and_of_these_few_weights():
    for sparsity in (0.0, 0.5, 0.9):  # columns 0 and 4: of equals the first
        assert mask_of(VNM(2, 1, 6), VENOM, sparsity) == ["100000", "000010", "000001"]
    assert mask_of(VNM(2, 2, 6), VENOM, 0.5) == ["101000", "010010", "000011"]
    assert mask_of(VNM(2, 1, 3), VENOM, 0.5) == ["100010", "010010", "001001"]  # of columns 0 and 1, and of 3 and 4


def test_columns_go_first_and_then_weights_of_rows():
    alive, kept = None, []
    for due in (0.0, 1 / 3, 0.5, 4 / 6, 5 / 6):
        alive = VNM(2, 1, 6).mask(torch.tensor(VENOM), due, Step(alive, 5 / 6))
        kept.append(["".join("01"[keep] for keep in row) for row in alive.tolist()])
    assert kept == [
        ["111111", "111111", "111111"],
        ["111010", "111010", "001111"],
        ["110010", "110010", "000111"],
        ["100010", "100010", "000011"],
        ["100000", "000010", "000001"],
    ]


@given(
    st.integers(1, 9), st.integers(1, 30), st.integers(1, 4), st.integers(1, 3), st.integers(0, 8), st.integers(0, 99)
)
def test_venom_keeps_n_weights_of_2n_columns(rows, cols, v, n, more, seed):
    m = 2 * n + more
    mask = VNM(v, n, m).mask(whole_numbers(rows, cols, seed), 0.9)
    for left in range(0, cols, m):
        bank = mask[:, left : left + m]
        assert (bank.sum(dim=1) == min(n, bank.shape[1])).all()
        assert all(group.any(dim=0).sum() <= 2 * n for group in bank.split(v))


# --- Step by step -----------------------------------------------------------------------------------------------------


def test_two_of_four_are_reached_in_steps():
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0]])
    kept = [NM(2, 4).mask(weight, due, Step(None, 0.5)).int().tolist() for due in (0.0, 0.25, 0.5)]
    assert kept == [[[1, 1, 1, 1]], [[1, 1, 1, 0]], [[1, 1, 0, 0]]]


def test_pruned_units_rank_behind_kept_ones_that_are_zero():
    weight, alive = torch.tensor([[0.0, 0.0, 0.0, 5.0]]), torch.tensor([[False, True, False, True]])
    assert Unstructured().mask(weight, 0.5, Step(alive, 0.5)).tolist() == alive.tolist()
    assert Balanced(2).mask(weight, 0.5, Step(alive, 0.5)).tolist() == alive.tolist()
    assert Vector(1).ranks(weight, alive)[0].tolist() == [[2, 1, 3, 0]]


def test_hybrid_on_its_way_keeps_the_blocks_that_it_needs_at_the_end():
    """64 blocks of one bank of eight. At 98 % one weight of each bank stays, and ten blocks do. At 96.45 % two weights
    of a bank still stay, and nine blocks would meet what is due."""
    weight = torch.arange(1.0, 513.0).reshape(8, 64)
    pattern = Balanced(8) & Block(1, 8)
    on_its_way = pattern.mask(weight, 0.9645, Step(None, 0.98))
    assert pattern.mask(weight, 0.9645).reshape(64, 8).sum(dim=1).unique(return_counts=True)[1].tolist() == [55, 9]
    assert on_its_way.reshape(64, 8).sum(dim=1).tolist() == 54 * [0] + 10 * [2]
    assert pattern.mask(weight, 0.98, Step(on_its_way, 0.98)).reshape(64, 8).sum(dim=1).tolist() == 54 * [0] + 10 * [1]
