"""Recipes: how to train, and learning rates over a training."""

from __future__ import annotations

from dataclasses import dataclass

from reprolib import checks
from reprolib.training.precision import PRECISIONS

WARM_UP = 0.1  # share of the dense schedule in which the learning rate rises
FINE_TUNING_LR = 0.01  # of the peak: where a schedule that ends at zero is "at its end"


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with Nesterov momentum 0.9. Weight decay is no sparsity-inducing penalty (see README).

    `lr` is the peak learning rate; `precision` is fp32, or bf16 by autocast where the device multiplies that (see
    `precision.usable`); `label_smoothing` is the share of each target that is spread evenly over all classes (Szegedy
    et al., 2016).
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    precision: str = "fp32"
    label_smoothing: float = 0.0

    def __post_init__(self):
        normal = {name: checks.whole(name, getattr(self, name)) for name in ("epochs", "batch_size")}
        for name in ("lr", "weight_decay", "label_smoothing"):
            normal[name] = checks.number(name, getattr(self, name))
        if normal["label_smoothing"] >= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), not {self.label_smoothing!r}")
        checks.choice("precision", self.precision, tuple(PRECISIONS))
        for name, value in normal.items():
            object.__setattr__(self, name, value)


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
