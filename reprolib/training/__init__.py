"""Training: data sets, recipes, the loop with its checkpoints, and what a network is worth afterwards.

    fit(model, data.load("cifar10"), Recipe(epochs=15), seed=0)

It knows patterns only through the pruner that is handed to it, and nothing of experiments or of what they are for.
"""

from reprolib.training.checkpoints import position
from reprolib.training.evaluation import accuracy_pct, mean_loss
from reprolib.training.loop import device, fit, total_steps, with_renewed_statistics
from reprolib.training.recipes import Recipe, dense_lr, fine_tuning_lr, rewound_lr

__all__ = [
    "Recipe",
    "accuracy_pct",
    "dense_lr",
    "device",
    "fine_tuning_lr",
    "fit",
    "mean_loss",
    "position",
    "rewound_lr",
    "total_steps",
    "with_renewed_statistics",
]
