"""Pruning of whole channels, as Torch-Pruning does it: what is left is a narrower dense network, for any engine."""

from __future__ import annotations

import copy

import torch
from torch import nn

from reprolib.models import weights
from reprolib.patterns import check_sparsity
from reprolib.pruning.masks import prunable

ROUND_TO = 16  # channels stay multiples of it: vectors of AVX-512; with fewer, torch may crash (models.resnet)
STEPS = 200  # in which all channels would go


@torch.inference_mode(False)
@torch.enable_grad()  # Torch-Pruning follows gradients through the network
def remove_channels(model: nn.Module, sparsity: float, image_shape: tuple[int, int, int]) -> nn.Module:
    """A narrower copy of `model`, in eval mode, without the share `sparsity` of the weights of its inner layers.

    Channels that are added to each other go together (Fang et al., "DepGraph", CVPR 2023), the ones of the smallest
    L2 norm first, ranked among layers that are alike (Fang et al., "Isomorphic Pruning", ECCV 2024). The outputs of the
    first layer and of the last one stay, as in `prunable`. `image_shape` is ``[C, H, W]``. Raises ValueError where so
    many can't go.
    """
    import torch_pruning  # here: nothing else needs it

    check_sparsity(sparsity)
    model = copy.deepcopy(model).eval()
    inner, layers = list(prunable(model)), list(weights(model))
    before = _count(model, inner)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        torch.zeros(1, *image_shape, device=next(model.parameters()).device),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        isomorphic=True,
        pruning_ratio=1.0,
        iterative_steps=STEPS,
        round_to=ROUND_TO,
        ignored_layers=[model.get_submodule(name) for name in (layers[0], layers[-1])],
    )
    for _ in range(STEPS):
        if (removed := 1 - _count(model, inner) / before) >= sparsity:
            return model
        pruner.step()
    raise ValueError(
        f"no more than {100 * removed:.1f} % of the weights can go with whole channels, in multiples of {ROUND_TO}, "
        f"where {100 * sparsity:g} % was asked: ask for less"
    )


def _count(model: nn.Module, names: list[str]) -> int:
    named = weights(model)
    return sum(named[name].numel() for name in names)
