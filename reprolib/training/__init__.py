"""Training: data sets, recipes, the loop with its checkpoints, and what a network is worth afterwards.

    fit(model, data.load("cifar10"), Recipe(epochs=15), seed=0)

It knows patterns only as masks that a schedule hands to it, and nothing of experiments or of what they are for.
"""

from reprolib.training.checkpoints import position
from reprolib.training.evaluation import accuracy_pct, mean_loss
from reprolib.training.loop import MaskSchedule, Trained, device, fit
from reprolib.training.recipes import Recipe, dense_lr, fine_tuning_lr, rewound_lr

__all__ = [
    "MaskSchedule",
    "Recipe",
    "Trained",
    "accuracy_pct",
    "dense_lr",
    "device",
    "fine_tuning_lr",
    "fit",
    "mean_loss",
    "position",
    "rewound_lr",
]
