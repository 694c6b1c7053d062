"""When weights are pruned."""

SCHEDULES = ("one-shot", "gradual", "iterative")

PRUNING_PHASE = 2 / 3  # share of retraining in which masks are still recomputed
MASK_UPDATES = 20  # how often they are
ROUNDS = 3  # of iterative pruning


def sparsity_at(schedule: str, target: float, progress: float) -> float:
    """The sparsity due at `progress` in [0, 1] of retraining.

    * ``one-shot``: all at once, before retraining
    * ``gradual``: cubic rise over the first two thirds (Zhu & Gupta, 2017), in twenty steps, frozen afterwards
    * ``iterative``: three rounds, each with a third of retraining, densities in geometric steps (Han et al., 2015)
    """
    match schedule:
        case "one-shot":
            return target
        case "gradual":
            if progress >= PRUNING_PHASE:
                return target
            done = int(progress / PRUNING_PHASE * MASK_UPDATES) / MASK_UPDATES
            return target * (1 - (1 - done) ** 3)
        case "iterative":
            current_round = min(int(progress * ROUNDS) + 1, ROUNDS)
            return target if current_round == ROUNDS else 1 - (1 - target) ** (current_round / ROUNDS)
    raise ValueError(f"schedule {schedule!r} is unknown: use {', '.join(SCHEDULES)}")
