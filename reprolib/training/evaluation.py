"""What a network is worth on a split of its data set."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from reprolib.models import is_finite, mode
from reprolib.training.data import Dataset, Split, normalised
from reprolib.training.precision import autocast, exact_convolutions

EVALUATION_PIXELS = {"cpu": 500 * 32**2, "cuda": 2500 * 32**2}  # of a batch


def accuracy_pct(model: nn.Module, dataset: Dataset, split: Split, precision: str = "fp32") -> float:
    """Share of `split` that `model`, in eval mode meanwhile, classifies correctly, in percent.

    Raises ValueError for a network whose parameters, statistics or logits are not finite.
    """
    return 100 * _mean_over(split, model, dataset, precision, lambda x, labels: (x.argmax(dim=1) == labels).sum())


def mean_loss(model: nn.Module, dataset: Dataset, split: Split, precision: str = "fp32") -> float:
    """Mean cross-entropy of `model`, in eval mode meanwhile, on `split`. Raises ValueError as `accuracy_pct` does."""
    return _mean_over(split, model, dataset, precision, lambda x, labels: F.cross_entropy(x, labels, reduction="sum"))


@torch.no_grad()
def _mean_over(split: Split, model: nn.Module, dataset: Dataset, precision: str, total_of: Callable) -> float:
    where = split.labels.device
    total, finite = torch.zeros((), device=where), torch.ones((), dtype=torch.bool, device=where)
    batch = max(1, EVALUATION_PIXELS[where.type] // dataset.image_size**2)
    with mode(model, training=False), exact_convolutions():
        for images, labels in zip(split.images.split(batch), split.labels.split(batch), strict=True):
            with autocast(precision, where.type):
                logits = model(normalised(images, dataset)).float()
            finite &= logits.isfinite().all()
            total += total_of(logits, labels)
    if not (finite and is_finite(model)):
        raise ValueError("the network holds or gives NaN or infinite numbers: did its training diverge?")
    return total.item() / len(split)
