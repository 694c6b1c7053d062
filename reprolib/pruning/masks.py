"""The weights of a network that get pruned, and their masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reprolib.models import weights
from reprolib.patterns import Block, Pattern, Step, gemm_view, tile

SCORES = ("magnitude", "random")
MASKS = ("nested", "refitted")


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
