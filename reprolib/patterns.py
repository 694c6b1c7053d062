"""Sparsity patterns: small frozen values that turn a weight into a mask.

``Balanced(16) & Block(32, 32)`` is the method of the paper: a fine-grained vector-wise mask AND a coarse-grained
block-wise mask. Every pattern sees the weight through its *GEMM view*, the matrix ``[C_out, K_h*K_w*C_in]`` that a
convolution multiplies its input patches with, and cuts that matrix into *groups* of *units*: in each group the same
number of units with the largest scores is kept.

To add a pattern, write one frozen dataclass with two methods, ``scores`` and ``spread`` (see `Pattern`). Masks,
hybrids, schedules, sweeps, tables and figures work with it at once; so does its text form, ``parse("MyPattern(4)")``.
"""

from __future__ import annotations

import ast
import math
from dataclasses import MISSING, dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reprolib import checks

ORDERS = ("channels_last", "channels_first")
NORMS = ("l1", "l2", "max", "mean")
CHECKS = {"int": checks.whole, "float": checks.number, "bool": checks.flag}  # by type of a pattern's field


# --- The GEMM view --------------------------------------------------------------------------------------------------


def gemm_view(weight: Tensor, order: str = "channels_last") -> Tensor:
    """See a Conv2d weight ``[C_out, C_in, K_h, K_w]`` or a Linear weight ``[out, in]`` as a matrix of C_out rows.

    ``channels_last`` orders the columns by (tap, channel), ``channels_first`` by (channel, tap).
    """
    if weight.dim() == 4 and order == "channels_last":
        weight = weight.permute(0, 2, 3, 1)
    return weight.reshape(weight.shape[0], -1)


def from_gemm_view(matrix: Tensor, shape: torch.Size, order: str = "channels_last") -> Tensor:
    """Undo `gemm_view`: a matrix ``[C_out, columns]`` back to `shape`, without a copy where strides allow it."""
    if len(shape) == 4 and order == "channels_last":
        c_out, c_in, k_h, k_w = shape
        matrix = matrix.reshape(c_out, k_h, k_w, c_in).permute(0, 3, 1, 2)
    return matrix.reshape(shape)


def tile(matrix: Tensor, rows: int, cols: int, fill: float = 0.0) -> Tensor:
    """Cut a matrix into tiles, ``[tiles, rows*cols]`` in row-major order; partial tiles are filled up with `fill`."""
    pad_rows, pad_cols = -matrix.shape[0] % rows, -matrix.shape[1] % cols
    if pad_rows or pad_cols:
        matrix = F.pad(matrix, (0, pad_cols, 0, pad_rows), value=fill)
    down, across = matrix.shape[0] // rows, matrix.shape[1] // cols
    return matrix.reshape(down, rows, across, cols).transpose(1, 2).reshape(down * across, rows * cols)


def untile(tiles: Tensor, shape: tuple[int, int], rows: int, cols: int) -> Tensor:
    """Undo `tile`, cropping what was filled up."""
    down, across = -(-shape[0] // rows), -(-shape[1] // cols)
    matrix = tiles.reshape(down, across, rows, cols).transpose(1, 2).reshape(down * rows, across * cols)
    return matrix[: shape[0], : shape[1]]


# --- Counting -------------------------------------------------------------------------------------------------------


def pruned_count(units: int, sparsity: float) -> int:
    """How many of `units` go: floor(sparsity * units + 0.5), yet never all of them."""
    return min(math.floor(sparsity * units + 0.5), units - 1)


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Mark exactly `count` largest scores in each row of ``[groups, units]``; of equal scores the first ones stay."""
    units = scores.shape[1]
    if count >= units:
        return torch.ones_like(scores, dtype=torch.bool)
    # The threshold alone would keep every tie: `> threshold` is too few, `>= threshold` too many.
    threshold = scores.kthvalue(units - count + 1, dim=1, keepdim=True).values
    keep = scores > threshold
    ties = scores == threshold
    missing = count - keep.sum(dim=1, keepdim=True)
    tied = ties.sum(dim=1, keepdim=True) > missing
    if not tied.any():
        return keep | ties
    return keep | (ties & (ties.cumsum(dim=1, dtype=torch.int32) <= missing))


def _ranked(scores: Tensor) -> Tensor:
    """The rank of each score in its row of ``[groups, units]``, int32, 0 for the largest; of equal ones first come
    first.
    """
    best_first = scores.argsort(dim=1, descending=True, stable=True)
    position = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device).expand_as(best_first)
    return torch.empty_like(best_first, dtype=torch.int32).scatter_(1, best_first, position)


# --- The vocabulary -------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """Where a schedule of steps stands: the mask of the step before (None at the first), and the sparsity at its end.

    A hybrid adds `within` for its fine half, the weights that its coarse half has left: each group keeps its share of
    those of its units that lie there.
    """

    alive: Tensor | None
    target: float | None
    within: Tensor | None = None


NO_STEP = Step(None, None)


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern. Subclasses define how the GEMM view is cut and how its units are ranked:

    * ``scores(matrix) -> [groups, units]``: from the magnitudes ``[C_out, columns]``, one score per unit
    * ``spread(values, shape) -> [C_out, columns]``: give every weight the value of its unit, ``[groups, units]``

    Partial tiles at the right and bottom edge are units (or groups) of their own, scored by the weights they have.
    """

    order: str = field(default="channels_last", kw_only=True)

    def scores(self, matrix: Tensor) -> Tensor:
        raise NotImplementedError

    def spread(self, values: Tensor, shape: tuple[int, int]) -> Tensor:
        raise NotImplementedError

    def __post_init__(self):
        """Checks every field by its type, and brings it into its one normal form: equal patterns have one text form."""
        checks.choice("column order", self.order, ORDERS)
        for f in fields(self):
            kind = getattr(f.type, "__name__", f.type)  # a notebook's fields have types, a module's their names
            if kind in CHECKS:
                value = CHECKS[kind](f"{type(self).__name__}: {f.name}", getattr(self, f.name))
                object.__setattr__(self, f.name, value)

    @property
    def family(self) -> str:
        """The pattern's name without its sizes, as it stands in tables: ``"block"``, ``"hybrid"`` ..."""
        return type(self).__name__.lower()

    def mask(self, weight: Tensor, sparsity: float, step: Step | None = None) -> Tensor:
        """Bool mask shaped like `weight`, on its device; True = keep the weight.

        In each group of n units exactly floor(sparsity * n + 0.5) are pruned, those with the smallest scores; ties go
        by position and at least one unit stays. To get the random control of a pattern, pass random numbers of the
        weight's shape instead of the weight.

        A schedule that prunes in steps says where it stands: what its mask has pruned stays pruned.

        Raises ValueError for sparsities outside [0, 1) and for a weight that is not finite, not of a floating type, or
        without a GEMM view.
        """
        alive, _, within = step or NO_STEP
        scores = self._preferred(self.unit_scores(weight, alive), weight)
        check_sparsity(sparsity)
        units = scores.shape[1]
        count = units - pruned_count(units, sparsity)
        if within is None:
            keep = keep_largest(scores, count)
        else:
            real, there = (self._units_in(m, scores).sum(dim=1) for m in (torch.ones_like(within), within))
            shares = there * real.clamp(max=count) / real
            kept_so_far = (shares.cumsum(0) + 0.5).floor()  # what rounding takes from one group, the next one gets
            keep = _ranked(scores) < kept_so_far.diff(prepend=kept_so_far.new_zeros(1))[:, None]
        mask = self._spread_over(weight, keep)
        return mask if alive is None else mask & alive

    def ranks(self, weight: Tensor, alive: Tensor | None = None) -> tuple[Tensor, int]:
        """Rank of every weight's unit in its group (0 = the last to be pruned), shaped like `weight`; and n units.

        ``ranks < count`` is the mask that keeps `count` units in each group. Units of which nothing is `alive` are the
        first to be pruned.
        """
        scores = self._preferred(self.unit_scores(weight, alive), weight)
        return self._spread_over(weight, _ranked(scores)), scores.shape[1]

    def unit_scores(self, weight: Tensor, alive: Tensor | None = None) -> Tensor:
        """Scores float64 ``[groups, units]`` of a weight of any floating type, up to a factor common to all of them.

        -inf marks what is no unit (the filling of a partial group) and units of which nothing is `alive`.
        """
        scores = self.scores(_magnitudes(weight, self.order))
        return scores if alive is None else scores.masked_fill(~self._units_in(alive, scores), -math.inf)

    def _preferred(self, scores: Tensor, weight: Tensor) -> Tensor:
        """The scores, those of units raised that are to stay before all others."""
        return scores

    def groups(self, weight: Tensor) -> Tensor:
        """The number of every weight's group, int64, shaped like `weight`."""
        scores = self.unit_scores(weight)
        numbers = torch.arange(len(scores), device=weight.device)[:, None]
        return self._spread_over(weight, numbers.expand_as(scores))

    def units_with(self, mask: Tensor, weight: Tensor) -> Tensor:
        """The weights whose unit has a weight in `mask`; bool, both shaped like `weight`."""
        return self._spread_over(weight, self._units_in(mask, self.unit_scores(weight)))

    def _units_in(self, mask: Tensor, scores: Tensor) -> Tensor:
        """Which units have a weight in `mask`; bool, shaped like `scores`."""
        places = torch.arange(scores.numel(), device=mask.device).view(scores.shape)
        matrix = gemm_view(mask, self.order)
        found = torch.zeros(scores.numel(), dtype=torch.bool, device=mask.device)
        found[self.spread(places, matrix.shape)[matrix]] = True
        return found.view(scores.shape)

    def _spread_over(self, weight: Tensor, values: Tensor) -> Tensor:
        """`spread`, shaped like `weight`."""
        matrix = self.spread(values, gemm_view(weight, self.order).shape)
        return from_gemm_view(matrix, weight.shape, self.order)

    def __and__(self, coarse: Pattern) -> Hybrid:
        """``fine & coarse``: both masks are made on their own and a weight stays where both keep it."""
        return Hybrid(self, coarse)

    def __str__(self) -> str:
        sizes, keywords = [], []
        for f in fields(self):
            value = getattr(self, f.name)
            text = str(value) if isinstance(value, Pattern) else repr(value)
            if f.default is MISSING:
                sizes.append(text)
            elif value != f.default:
                keywords.append(f"{f.name}={text}")
        return f"{type(self).__name__}({', '.join(sizes + keywords)})"


@dataclass(frozen=True)
class Unstructured(Pattern):
    """The largest single weights stay, wherever they are."""

    def scores(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(1, -1)

    def spread(self, values: Tensor, shape: tuple[int, int]) -> Tensor:
        return values.reshape(shape)


@dataclass(frozen=True)
class Block(Pattern):
    """Whole tiles of rows x cols go, ranked by a norm of their weights: l1, l2, max or mean (Narang et al., 2017).

    Where it is `covered`, no channel is lost while there are blocks enough: of each `rows` output channels the best
    block stays; then of each `cols` input channels, all taps together, if `cols` divides them and the order is
    ``channels_last``.
    """

    rows: int
    cols: int
    norm: str = "l1"
    covered: bool = False

    def __post_init__(self):
        super().__post_init__()
        checks.choice("Block: norm", self.norm, NORMS)

    def scores(self, matrix: Tensor) -> Tensor:
        tiles = tile(matrix, self.rows, self.cols)
        match self.norm:
            case "l1":
                scores = tiles.sum(dim=1)
            case "l2":
                scores = tiles.square().sum(dim=1)  # ranks as its root does
            case "max":
                scores = tiles.amax(dim=1)
            case "mean":
                scores = tiles.sum(dim=1) / tile(torch.ones_like(matrix), self.rows, self.cols).sum(dim=1)
        return scores[None]

    def _preferred(self, scores: Tensor, weight: Tensor) -> Tensor:
        if not self.covered:
            return scores
        grid = scores.view(-(-weight.shape[0] // self.rows), -1)
        raised = torch.zeros_like(grid).scatter_(1, grid.argmax(dim=1, keepdim=True), 2.0)
        if weight.shape[1] % self.cols == 0 and (self.order == ORDERS[0] or weight.dim() == 2):
            by_input = grid.view(-1, weight.shape[1] // self.cols)  # [rows of blocks * taps, groups of inputs]
            best = by_input.argmax(dim=0, keepdim=True)
            raised.view_as(by_input).scatter_add_(0, best, torch.ones_like(best, dtype=raised.dtype))
        return scores + raised.view_as(scores) * (scores.max() + 1)

    def spread(self, values: Tensor, shape: tuple[int, int]) -> Tensor:
        tiles = values.reshape(-1, 1).expand(-1, self.rows * self.cols)
        return untile(tiles, shape, self.rows, self.cols)


@dataclass(frozen=True)
class Balanced(Pattern):
    """Every row is cut into banks of consecutive columns; each bank keeps the same number of its largest weights.

    Yao et al., AAAI 2019; with a bank of M this is N:M sparsity. The paper's vector-wise fine-grained half is this
    pattern in our reading. A last partial bank keeps the same number too, or all it has if it has fewer.
    """

    bank: int

    def scores(self, matrix: Tensor) -> Tensor:
        return tile(matrix, 1, self.bank, fill=-math.inf)

    def spread(self, values: Tensor, shape: tuple[int, int]) -> Tensor:
        return untile(values, shape, 1, self.bank)


@dataclass(frozen=True)
class NM(Pattern):
    """N:M sparsity: of every m consecutive weights of a row the n largest stay, whatever the target sparsity.

    ``NM(2, 4)`` is what sparse tensor cores execute. ``NM(2, 4) & Block(32, 32)`` leaves the rest of the target to the
    blocks.
    """

    n: int
    m: int

    def __post_init__(self):
        super().__post_init__()
        if self.n > self.m:
            raise ValueError(f"NM keeps n of m weights: n = {self.n} must not be larger than m = {self.m}")

    def mask(self, weight: Tensor, sparsity: float, step: Step | None = None) -> Tensor:
        """As `Pattern.mask`, with a sparsity of 1 - n / m: at once, or at most that much on the way to a `target`."""
        due = _nm_sparsity(self.n, self.m, sparsity, step)
        return Balanced(self.m, order=self.order).mask(weight, due, step)

    def scores(self, matrix: Tensor) -> Tensor:
        return Balanced(self.m).scores(matrix)

    def spread(self, values: Tensor, shape: tuple[int, int]) -> Tensor:
        return Balanced(self.m).spread(values, shape)


def _nm_sparsity(n: int, m: int, sparsity: float, step: Step | None) -> float:
    check_sparsity(sparsity)
    on_the_way = step is not None and step.target is not None and sparsity < step.target
    return min(sparsity, 1 - n / m) if on_the_way else 1 - n / m


@dataclass(frozen=True)
class Vector(Pattern):
    """Whole column vectors go: the weights of `length` consecutive output channels at one column, ranked by L1 norm.

    The unit of VectorSparse, OVW and 1xN pruning. A last partial vector is a unit of its own.
    """

    length: int

    def scores(self, matrix: Tensor) -> Tensor:
        return tile(matrix, self.length, 1).sum(dim=1)[None]

    def spread(self, values: Tensor, shape: tuple[int, int]) -> Tensor:
        tiles = values.reshape(-1, 1).expand(-1, self.length)
        return untile(tiles, shape, self.length, 1)


@dataclass(frozen=True)
class VNM(Pattern):
    """V:N:M sparsity (Castro et al., "VENOM", SC 2023): for v rows together, 2 n of every m columns stay, ranked by L1
    norm; within these, each row keeps its n largest weights. VNM(64, 2, 16) runs on sparse tensor cores as 2:4.

    Its sparsity is 1 - n / m, whatever the target. On the way to it, columns go first, weights of single rows last: so
    each mask lies within the one before.
    """

    v: int
    n: int
    m: int

    def __post_init__(self):
        super().__post_init__()
        if 2 * self.n > self.m:
            raise ValueError(f"VNM keeps 2 n of m columns: 2 * {self.n} must not be larger than m = {self.m}")

    def mask(self, weight: Tensor, sparsity: float, step: Step | None = None) -> Tensor:
        """As `NM.mask`."""
        due = _nm_sparsity(self.n, self.m, sparsity, step)
        kept = self.m - pruned_count(self.m, due)
        columns = super().mask(weight, 1 - max(kept, 2 * self.n) / self.m, step)
        return Balanced(self.m, order=self.order).mask(weight, due, (step or NO_STEP)._replace(alive=columns))

    def scores(self, matrix: Tensor) -> Tensor:
        vectors = tile(matrix, self.v, 1).sum(dim=1).view(-(-matrix.shape[0] // self.v), -1)
        return tile(vectors, 1, self.m, fill=-math.inf)

    def spread(self, values: Tensor, shape: tuple[int, int]) -> Tensor:
        vectors = untile(values, (-(-shape[0] // self.v), shape[1]), 1, self.m)
        return vectors.repeat_interleave(self.v, dim=0)[: shape[0]]


@dataclass(frozen=True)
class Pairs(Pattern):
    """The largest pairs stay: of a row, the weights of two neighbouring columns, ranked by L1 norm.

    In the default order these are two input channels, which instructions of CPUs for bf16 multiply together.
    """

    def scores(self, matrix: Tensor) -> Tensor:
        return tile(matrix, 1, 2).sum(dim=1)[None]

    def spread(self, values: Tensor, shape: tuple[int, int]) -> Tensor:
        return untile(values.reshape(-1, 1).expand(-1, 2), shape, 1, 2)


@dataclass(frozen=True)
class Hybrid(Pattern):
    """``mask_fine AND mask_coarse``, the method of the paper; written ``fine & coarse``.

    `split` is the fine half's share of the target in the exponent of density: density_fine = density ** split. 0.5
    gives both halves the same sparsity, 1 - sqrt(density). The fine count is a whole number, so the coarse half takes
    the count of units whose AND comes nearest to the target. With `rescore` the coarse half ranks the weights that
    the fine half leaves, instead of all of them.

    Where banks tile blocks, density = density_fine * density_coarse exactly. Elsewhere the product rule is off by what
    the halves agree on: weights in strong blocks are strong. In steps it holds there too, because each half takes its
    share of what the other one has left.
    """

    fine: Pattern
    coarse: Pattern
    split: float = 0.5
    rescore: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not (isinstance(self.fine, Pattern) and isinstance(self.coarse, Pattern)):
            raise ValueError(f"a hybrid takes two patterns, not {self.fine!r} and {self.coarse!r}")
        for half in (self.fine, self.coarse):
            if isinstance(half, VNM):
                raise ValueError(f"{half} has a fine and a coarse half of its own: use it alone")
        if isinstance(self.coarse, Hybrid):
            raise ValueError("the coarse half of a hybrid must be a single pattern: write (a & b) & c, not a & (b & c)")
        if self.order != ORDERS[0]:
            raise ValueError("a hybrid has no column order of its own: give order= to its halves")
        if isinstance(self.coarse, NM):
            raise ValueError(f"{self.fine} & {self.coarse} would not be n:m: write {self.coarse} & {self.fine}")
        if self.split > 1:
            raise ValueError(f"split must lie in [0, 1], not {self.split!r}")
        if isinstance(self.fine, NM) and self.split != 0.5:
            raise ValueError(f"{self.fine} takes its own share of every target: leave split={self.split:g} out")

    def mask(self, weight: Tensor, sparsity: float, step: Step | None = None) -> Tensor:
        """As `Pattern.mask`; the achieved sparsity is within one coarse unit of the target if the halves allow it."""
        fine, coarse = self.halves(weight, sparsity, step)
        return fine & coarse  # THE AND of the paper

    def halves(self, weight: Tensor, sparsity: float, step: Step | None = None) -> tuple[Tensor, Tensor]:
        """The fine and the coarse mask whose AND meets `sparsity`.

        On the way to a `target` the coarse half keeps at least the units that it needs there. Without that bound it
        would prune more of them than the target has room for, as long as the fine half keeps more weights of each.
        """
        check_sparsity(sparsity)
        alive, target, within = step or NO_STEP
        target = sparsity if target is None else target
        fine = self._fine_mask(weight, sparsity, Step(alive, target, within))
        ranks, units = self.coarse.ranks(weight * fine if self.rescore else weight, alive)
        count = _units_to_keep(ranks, units, fine.double(), _wanted(weight, sparsity, within))
        if target > sparsity:
            there = torch.ones_like(fine) if alive is None else self.coarse.units_with(alive, weight)
            fine_at_the_end = self._fine_mask(weight, target, Step(alive, target, within))
            # How many weights will be left then is known, of each group its part, but not which ones.
            groups = self.fine.groups(weight)
            expected = there * _mean_of_groups(self.fine.mask(weight, self.fine_sparsity(target)), groups)
            expected *= fine_at_the_end.sum() / expected.sum()
            count = max(count, _units_to_keep(ranks, units, expected, _wanted(weight, target, within)))
        return fine, ranks < count

    def groups(self, weight: Tensor) -> Tensor:
        """One group: the coarse half takes its units from all of the weight."""
        return torch.zeros(weight.shape, dtype=torch.int64, device=weight.device)

    def fine_sparsity(self, sparsity: float) -> float:
        """The fine half's share of a target."""
        return 1.0 - round((1.0 - sparsity) ** self.split, 12)

    def _fine_mask(self, weight: Tensor, sparsity: float, step: Step) -> Tensor:
        """The fine half's share of `sparsity`.

        Weights of coarse units that are gone take no part in it: else the fine half would keep more and more of the
        units that are left. Where that would leave too few of them to meet `sparsity`, they take part after all.
        """
        due, ends = map(self.fine_sparsity, (sparsity, step.target))
        step = step._replace(target=ends)
        if step.alive is not None:
            left = self.coarse.units_with(step.alive, weight)
            left = left if step.within is None else left & step.within
            fine = self.fine.mask(weight, due, step._replace(within=left))
            if fine.sum() >= _wanted(weight, sparsity, step.within):
                return fine
        return self.fine.mask(weight, due, step)

    @property
    def family(self) -> str:
        return "hybrid"

    def __str__(self) -> str:
        plain = Hybrid(self.fine, self.coarse)
        return f"{self.fine} & {self.coarse}" if self == plain else super().__str__()


def _wanted(weight: Tensor, sparsity: float, within: Tensor | None) -> int:
    """How many weights a mask keeps at `sparsity`; of a part of the weight, `within`, its share of them."""
    count = weight.numel() - pruned_count(weight.numel(), sparsity)
    return count if within is None else round(count * within.sum().item() / within.numel())


def _mean_of_groups(mask: Tensor, groups: Tensor) -> Tensor:
    """Of every weight the share of its group that `mask` keeps, float64."""
    kept, whole = torch.bincount(groups[mask], minlength=int(groups.max()) + 1), torch.bincount(groups.flatten())
    return (kept.double() / whole)[groups]


def _units_to_keep(ranks: Tensor, units: int, expected: Tensor, wanted: int) -> int:
    """How many units the coarse half keeps in each group, for the AND to come nearest to `wanted` weights.

    `expected` says of every weight how much of it the fine half keeps: all, nothing, or its share.
    """
    # kept[c - 1]: how many weights the AND keeps when the coarse half keeps c units in each group.
    kept = torch.bincount(ranks.flatten(), expected.flatten(), minlength=units).cumsum(0)
    distance = (kept - wanted).abs().round(decimals=6)  # so that in whatever order they were added, equal is equal
    return int(distance.masked_fill(kept == 0, math.inf).argmin()) + 1  # a layer never becomes empty


def check_sparsity(sparsity: float) -> None:
    """Raises ValueError for a sparsity outside [0, 1)."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), not {sparsity!r}: 0.9 prunes nine weights of ten")


def _magnitudes(weight: Tensor, order: str) -> Tensor:
    """The checked weight's magnitudes in GEMM view, float64 ``[C_out, columns]``, contiguous.

    The largest one is scaled to [0.5, 1), by a power of two: no sum or square of them overflows, and a mask is the same
    for every floating type, scale and memory layout of the weight.
    """
    if weight.dim() not in (2, 4) or weight.numel() == 0:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} has no GEMM view: "
            "patterns take Conv2d [C_out, C_in, K_h, K_w] and Linear [out, in] weights"
        )
    if not weight.is_floating_point():
        raise ValueError(f"a weight of {weight.dtype} cannot be ranked: patterns take floating-point weights")
    matrix = gemm_view(weight.detach(), order).double().contiguous().abs()  # sums depend on the layout
    largest = matrix.max()
    if not largest.isfinite():
        raise ValueError("the weight holds NaN or infinite values and cannot be ranked: did the training diverge?")
    exponent = torch.frexp(largest).exponent.clamp(-1000, 1000)
    return torch.ldexp(matrix, -exponent)


# --- Text form and sizes --------------------------------------------------------------------------------------------


def known() -> dict[str, type[Pattern]]:
    """All patterns that are defined by now, by name."""
    found, queue = {}, [Pattern]
    while queue:
        for cls in queue.pop().__subclasses__():
            found[cls.__name__] = cls
            queue.append(cls)
    return dict(sorted(found.items()))


def parse(text: str) -> Pattern:
    """The pattern that a text such as ``"Balanced(16) & Block(32, 32)"`` names; the inverse of ``str(pattern)``.

    Only pattern names, numbers and strings are understood: no code of the text is run. Raises ValueError.
    """

    misunderstood = f"pattern {text!r} is not understood: write for example 'Balanced(16) & Block(32, 32)'"

    def build(node: ast.expr):
        match node:
            case ast.BinOp(op=ast.BitAnd(), left=left, right=right):
                return Hybrid(build(left), build(right))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                if name not in known():
                    raise ValueError(f"unknown pattern {name!r} in {text!r}: known are {', '.join(known())}")
                try:
                    return known()[name](*map(build, args), **{k.arg: build(k.value) for k in keywords})
                except TypeError as error:
                    raise ValueError(f"pattern {text!r}: {error}") from None
        try:
            return ast.literal_eval(node)
        except ValueError:
            raise ValueError(misunderstood) from None

    try:
        pattern = build(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError:
        raise ValueError(misunderstood) from None
    if not isinstance(pattern, Pattern):
        raise ValueError(misunderstood)
    return pattern


def sizes(pattern: Pattern) -> dict[str, int]:
    """Unit sizes by column name: ``bank``, ``block_rows``, ``block_cols``, ``vector_length``, ..."""
    if isinstance(pattern, Hybrid):
        return sizes(pattern.fine) | sizes(pattern.coarse)
    named = {f"{pattern.family}_{f.name}": getattr(pattern, f.name) for f in fields(pattern) if f.type in ("int", int)}
    return {"bank" if name == "balanced_bank" else name: size for name, size in named.items()}


def fitting_bank(columns: list[int], sparsity: float, tolerance: float) -> int | None:
    """Smallest bank that tiles rows of all these lengths and expresses `sparsity` within `tolerance`, if any does."""
    for bank in range(2, min(columns) + 1):
        tiles_all = all(length % bank == 0 for length in columns)
        if tiles_all and abs(pruned_count(bank, sparsity) / bank - sparsity) <= tolerance:
            return bank
    return None
