"""The training loop, for dense and pruned networks alike, and the evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from reprolib.data import Dataset, Split, augmented, normalised

WARM_UP = 0.1  # share of the dense schedule in which the learning rate rises
FINE_TUNING_LR = 0.01  # of the peak: where a schedule that ends at zero is "at its end"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with Nesterov momentum 0.9. Weight decay is no sparsity-inducing penalty (see README).

    `lr` is the peak learning rate; `precision` is fp32, or bf16 by autocast.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    precision: str = "fp32"

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is unknown: use {' or '.join(PRECISIONS)}")
        for name in ("epochs", "batch_size"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {getattr(self, name)!r}")
        for name in ("lr", "weight_decay"):
            if not (isinstance(getattr(self, name), (int, float)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a number of at least 0, not {getattr(self, name)!r}")


def device() -> torch.device:
    """The GPU if one is usable, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- Learning-rate schedules: share of the peak at a progress in [0, 1) ---------------------------------------------


def dense_lr(progress: float) -> float:
    """Rise linearly during the warm-up, then fall linearly to zero."""
    return min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))


def rewound_lr(progress: float, epochs: int, dense_epochs: int) -> float:
    """LR rewinding (Renda et al., 2020): the last `epochs` of the dense schedule once more, or all of it."""
    share = min(1.0, epochs / dense_epochs)
    return dense_lr(1 - share * (1 - progress))


def fine_tuning_lr(progress: float) -> float:
    """Low constant learning rate, that of the end of dense training (Han et al., 2015)."""
    return FINE_TUNING_LR


# --- The loop -------------------------------------------------------------------------------------------------------


def fit(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    lr_at: Callable[[float], float] = dense_lr,
    prune: Callable[[float], object] | None = None,
    penalty: Callable[[float], Tensor | float] | None = None,
    label: str = "training",
) -> list[dict]:
    """Train `model` in place on the device it is on; return one row per epoch.

    `lr_at(progress)` is the share of the peak learning rate at a progress in [0, 1). `prune(progress)` sets pruned
    weights to zero: it runs before each forward pass and again behind each optimizer step. `penalty(progress)` is
    added to the loss. The order of the images and their augmentation follow from `seed` alone.

    Rows: epoch, lr, loss_train (mean cross-entropy), accuracy_validation_pct. Raises ValueError where the loss is no
    longer finite, or where the batch is larger than the training split.
    """
    train, where = dataset.train, next(model.parameters()).device
    steps = len(train) // recipe.batch_size  # the last partial batch is dropped: batch norm dislikes small ones
    if steps == 0:
        raise ValueError(f"a batch of {recipe.batch_size} is larger than the {len(train)} training images")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    curve = []
    bar = tqdm(range(recipe.epochs), desc=label, unit=" epoch", mininterval=1, dynamic_ncols=True)
    for epoch in bar:
        model.train()
        order = torch.randperm(len(train), generator=generator).to(where)
        total = torch.zeros((), device=where)
        for step in range(steps):
            progress = (epoch * steps + step) / (recipe.epochs * steps)
            optimizer.param_groups[0]["lr"] = lr = recipe.lr * lr_at(progress)
            if prune:
                prune(progress)
            batch = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            images = normalised(augmented(train.images[batch], dataset, generator), dataset)
            with autocast(where, recipe.precision):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), train.labels[batch])
            total += loss.detach()
            (loss + penalty(progress) if penalty else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            if prune:
                prune(progress)
        loss_train = total.item() / steps
        if not (math.isfinite(loss_train) and all(bool(p.isfinite().all()) for p in model.parameters())):
            what = f"{label}: training diverged in epoch {epoch + 1} (loss {loss_train:.3g})"
            raise ValueError(f"{what}; try lr below {recipe.lr}")
        accuracy = accuracy_pct(model, dataset, dataset.validation, recipe.precision)
        curve.append({"epoch": epoch + 1, "lr": lr, "loss_train": loss_train, "accuracy_validation_pct": accuracy})
        bar.set_postfix_str(f"loss {loss_train:.3f}, validation {accuracy:.2f} %", refresh=False)
    return curve


def accuracy_pct(model: nn.Module, dataset: Dataset, split: Split, precision: str = "fp32") -> float:
    """Share of `split` that `model` classifies correctly, in percent. Leaves the model in eval mode."""
    return 100 * _mean_over(split, model, dataset, precision, lambda x, labels: (x.argmax(dim=1) == labels).sum())


def mean_loss(model: nn.Module, dataset: Dataset, split: Split, precision: str = "fp32") -> float:
    """Mean cross-entropy of `model` on `split`. Leaves the model in eval mode."""
    return _mean_over(split, model, dataset, precision, lambda x, labels: F.cross_entropy(x, labels, reduction="sum"))


@torch.no_grad()
def _mean_over(split: Split, model: nn.Module, dataset: Dataset, precision: str, total_of: Callable) -> float:
    model.eval()
    total = torch.zeros((), device=split.labels.device)
    for images, labels in zip(split.images.split(500), split.labels.split(500), strict=True):
        with autocast(images.device, precision):
            logits = model(normalised(images, dataset))
        total += total_of(logits.float(), labels)
    return total.item() / len(split)


def autocast(where: torch.device, precision: str):
    """The autocast context that a recipe's precision asks for."""
    return torch.autocast(where.type, PRECISIONS["bf16"], enabled=precision == "bf16")
