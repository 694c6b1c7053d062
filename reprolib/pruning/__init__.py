"""Pruning a network: which layers, how much of each, when, and with masks that hold at every step.

pruner = Pruner(model, "Balanced(16) & Block(32, 32)", sparsity=0.9, steps=len(loader) * epochs)
...
optimizer.step()
pruner.step()
"""

from reprolib.pruning.channels import remove_channels
from reprolib.pruning.masks import (
    MASKS,
    SCORES,
    achieved_sparsity,
    apply_masks,
    group_lasso,
    make_masks,
    prunable,
    remaining_flops,
)
from reprolib.pruning.permutation import check_permutable, is_permutable, permute_channels
from reprolib.pruning.pruner import Pruner
from reprolib.pruning.ratios import RATIOS, check_reach, global_ratios, sensitivity_ratios, uniform_ratios
from reprolib.pruning.schedules import PRUNING_PHASE, ROUNDS, SCHEDULES, check_phase, sparsity_at

__all__ = [
    "MASKS",
    "PRUNING_PHASE",
    "RATIOS",
    "ROUNDS",
    "SCHEDULES",
    "SCORES",
    "Pruner",
    "achieved_sparsity",
    "apply_masks",
    "check_permutable",
    "check_phase",
    "check_reach",
    "global_ratios",
    "group_lasso",
    "is_permutable",
    "make_masks",
    "permute_channels",
    "prunable",
    "remaining_flops",
    "remove_channels",
    "sensitivity_ratios",
    "sparsity_at",
    "uniform_ratios",
]
