"""How much of each layer is pruned: one sparsity per layer, `target` over all of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from reprolib.patterns import Pattern

RATIOS = ("uniform", "global", "sensitivity")
SPARSEST = 0.995  # bound of a layer's own sparsity where ratios differ by layer


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
