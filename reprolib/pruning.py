"""Pruning a network: which layers, how much of each, when, and with masks that hold at every step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from reprolib.models import weights
from reprolib.patterns import Block, Pattern, Step, gemm_view, tile

SCHEDULES = ("one-shot", "gradual", "iterative")
RATIOS = ("uniform", "global", "sensitivity")
SCORES = ("magnitude", "random")
MASKS = ("nested", "refitted")

PRUNING_PHASE = 2 / 3  # share of retraining in which masks are still recomputed
MASK_UPDATES = 20  # how often they are
ROUNDS = 3  # of iterative pruning
SPARSEST = 0.995  # bound of a layer's own sparsity where ratios differ by layer


def prunable(model: nn.Module, ends: bool = False) -> dict[str, nn.Parameter]:
    """The weights that get pruned, by module name: all but the first convolution and the classifier (`ends`: all).

    Raises ValueError where there is nothing to prune, and for the weights that `models.weights` refuses.
    """
    named = weights(model)
    chosen = named if ends else dict(list(named.items())[1:-1])
    if not chosen:
        raise ValueError(
            f"nothing to prune: of {len(named)} convolutions and linear layers the first and the last stay dense "
            "unless prune_ends is asked for"
        )
    return chosen


# --- Masks of a network ---------------------------------------------------------------------------------------------


def make_masks(
    named: dict[str, Tensor],
    pattern: Pattern,
    sparsities: dict[str, float],
    score: str = "magnitude",
    seed: int = 0,
    alive: dict[str, Tensor] | None = None,
    targets: dict[str, float] | None = None,
) -> dict[str, Tensor]:
    """One mask per weight, each pruned to its own sparsity. ``score="random"`` ranks random numbers instead.

    In the steps of a schedule, `targets` holds the sparsities at the end and `alive` the masks of the step before, none
    at the first: see `patterns.Step`.
    """
    if alive and alive.keys() != named.keys():
        raise ValueError(f"masks of {sorted(alive)} can't be the step before masks of {sorted(named)}")
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, weight in named.items():
        ranked = torch.rand(weight.shape, generator=generator).to(weight.device) if score == "random" else weight
        step = Step((alive or {}).get(name), targets[name]) if targets else None
        masks[name] = pattern.mask(ranked, sparsities[name], step)
    return masks


@torch.no_grad()
def apply_masks(named: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    """Set every pruned weight to exactly 0.0, in place."""
    for name, mask in masks.items():
        named[name].masked_fill_(~mask, 0.0)


def achieved_sparsity(masks: dict[str, Tensor]) -> float:
    """Fraction of weights pruned, over the pruned layers."""
    return 1 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


# --- How much of each layer: one sparsity per layer, `target` over all of them --------------------------------------


def uniform_ratios(named: dict[str, Tensor], target: float) -> dict[str, float]:
    """The same sparsity for every layer."""
    return dict.fromkeys(named, target)


def global_ratios(named: dict[str, Tensor], pattern: Pattern, target: float) -> dict[str, float]:
    """Rank all units of the network together, each layer's scores divided by their mean; no layer becomes empty.

    For a hybrid, the units of the coarse half decide.
    """
    check_reach(target)
    ranked = getattr(pattern, "coarse", pattern)
    scores, sizes = {}, {}
    for name, weight in named.items():
        unit_scores = ranked.unit_scores(weight).flatten()
        real = unit_scores[unit_scores.isfinite()]
        scores[name] = real / real.mean().clamp_min(1e-12)
        sizes[name] = weight.numel()
    share = torch.cat([torch.full_like(s, sizes[name] / len(s)) for name, s in scores.items()])
    ascending = torch.cat(list(scores.values())).sort()
    pruned = share[ascending.indices].cumsum(0) / share.sum()
    threshold = ascending.values[min(int((pruned < target).sum()), len(pruned) - 1)]
    ratios = {name: float((s < threshold).float().mean()) for name, s in scores.items()}
    return _rebalanced(ratios, sizes, target)


def sensitivity_ratios(
    named: dict[str, Tensor], pattern: Pattern, target: float, loss: Callable[[], float]
) -> dict[str, float]:
    """Prune so much of each layer that all of them hurt alike (Han et al., 2015).

    Each layer alone is pruned to a grid of sparsities and `loss()` measured; then one rise of the loss is searched
    which, allowed to every layer, gives `target` over all. Raises ValueError for a loss that is not finite.
    """
    check_reach(target)
    grid = torch.tensor([0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99])
    rises = {}
    base = _finite(loss(), "of the dense network")
    for name, weight in named.items():
        kept = weight.detach().clone()
        rise = []
        try:
            for sparsity in grid.tolist():
                with torch.no_grad():
                    weight.copy_(kept * pattern.mask(kept, sparsity))
                rise.append(_finite(loss(), f"with layer {name} at {100 * sparsity:g} %") - base)
        finally:  # also where someone stops it
            with torch.no_grad():
                weight.copy_(kept)
        rises[name] = torch.tensor(rise).cummax(0).values  # made monotone: a lucky layer is not rewarded
    sizes = {name: weight.numel() for name, weight in named.items()}

    def ratios_at(allowed: float) -> dict[str, float]:
        return {name: _interpolate(allowed, rise, grid) for name, rise in rises.items()}

    low, high = 0.0, max(float(rise[-1]) for rise in rises.values())
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _mean(ratios_at(middle), sizes) < target else (low, middle)
    return _rebalanced(ratios_at(high), sizes, target)


def check_reach(target: float) -> None:
    """Raises ValueError for a target that ratios which differ by layer can't give."""
    if target > SPARSEST:
        raise ValueError(
            f"{100 * target:g} % is more than ratios that differ by layer can give, because they stop at "
            f"{100 * SPARSEST:g} % in each layer: use uniform ratios or a lower sparsity"
        )


def _finite(loss: float, where: str) -> float:
    if not math.isfinite(loss):
        raise ValueError(f"the loss {where} is {loss}: a sensitivity can't be told from it; use uniform ratios")
    return loss


def _interpolate(allowed: float, rise: Tensor, grid: Tensor) -> float:
    """The sparsity at which a piecewise linear, monotone `rise` over `grid` reaches `allowed`."""
    above = int((rise <= allowed).sum())
    if above == len(grid):
        return float(grid[-1])
    if above == 0:
        return float(grid[0])
    lower, upper = float(rise[above - 1]), float(rise[above])
    return float(grid[above - 1] + (grid[above] - grid[above - 1]) * (allowed - lower) / (upper - lower))


def _mean(ratios: dict[str, float], sizes: dict[str, int]) -> float:
    return sum(ratios[name] * sizes[name] for name in sizes) / sum(sizes.values())


def _rebalanced(ratios: dict[str, float], sizes: dict[str, int], target: float) -> dict[str, float]:
    """Scale the densities by one factor until the bounded ratios give `target` over all layers."""
    low, high = 0.0, 1e6

    def scaled(factor: float) -> dict[str, float]:
        return {name: min(max(1 - factor * (1 - r), 0.0), SPARSEST) for name, r in ratios.items()}

    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if _mean(scaled(middle), sizes) < target else (middle, high)
    return scaled(high)


# --- When -----------------------------------------------------------------------------------------------------------


def sparsity_at(schedule: str, target: float, progress: float) -> float:
    """The sparsity due at `progress` in [0, 1] of retraining.

    * ``one-shot``: all at once, before retraining
    * ``gradual``: cubic rise over the first two thirds (Zhu & Gupta, 2017), in twenty steps, frozen afterwards
    * ``iterative``: three rounds, each with a third of retraining, densities in geometric steps (Han et al., 2015)
    """
    match schedule:
        case "one-shot":
            return target
        case "gradual":
            if progress >= PRUNING_PHASE:
                return target
            done = int(progress / PRUNING_PHASE * MASK_UPDATES) / MASK_UPDATES
            return target * (1 - (1 - done) ** 3)
        case "iterative":
            current_round = min(int(progress * ROUNDS) + 1, ROUNDS)
            return target if current_round == ROUNDS else 1 - (1 - target) ** (current_round / ROUNDS)
    raise ValueError(f"schedule {schedule!r} is unknown: use {', '.join(SCHEDULES)}")


# --- The baseline with a regularizer --------------------------------------------------------------------------------


def group_lasso(named: dict[str, Tensor], block: Block) -> Tensor:
    """Sum over all blocks of sqrt(rows * cols) times the block's L2 norm (Yuan & Lin, 2006; Narang et al., 2017)."""
    total = torch.zeros((), device=next(iter(named.values())).device)
    for weight in named.values():
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # fp16 has no room for 1e-12
        tiles = tile(gemm_view(weight, block.order), block.rows, block.cols)
        # Squares are kept off zero: the norm has no gradient at a block that is pruned already.
        total = total + (tiles.square().sum(dim=1) + 1e-12).sqrt().sum() * (block.rows * block.cols) ** 0.5
    return total


# --- What is left ---------------------------------------------------------------------------------------------------


def remaining_flops(flops: dict[str, int], masks: dict[str, Tensor]) -> int:
    """Theoretical FLOPs of one image when each layer's FLOPs shrink with its density."""
    return round(sum(f * (float(masks[name].float().mean()) if name in masks else 1.0) for name, f in flops.items()))
