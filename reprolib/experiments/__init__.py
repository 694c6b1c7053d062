"""Experiments: what is asked for, by whom, and each computed once.

    record = run(Pruned(Dense("cifar10", recipe), "Balanced(16) & Block(32, 32)", 0.9, epochs=30), folder)

`definitions` are the questions, `running` answers them, `records` keep the answers, `profiles` are lists
of questions, `scheduling` asks many at a time.
"""

from reprolib.experiments.definitions import Channels, Dense, Pruned
from reprolib.experiments.running import (
    CHECKPOINT,
    check_target,
    epochs,
    epochs_done,
    is_done,
    load_model,
    packed,
    run,
    set_aside_damaged,
    take_over,
    unpack,
    untrained,
)

__all__ = ["CHECKPOINT", "Channels", "Dense", "Pruned", "check_target", "epochs", "epochs_done", "is_done"]
__all__ += ["load_model", "packed", "run", "set_aside_damaged", "take_over", "unpack", "untrained"]
