"""When weights are pruned."""

from reprolib import checks

SCHEDULES = ("one-shot", "gradual", "iterative")

PRUNING_PHASE = 2 / 3  # share of retraining in which a gradual schedule still recomputes masks
MASK_UPDATES = 20  # how often they are
ROUNDS = 3  # of iterative pruning


def check_phase(phase: float) -> float:
    """A share of retraining in which masks change. Raises ValueError outside (0, 1]."""
    if not 0 < checks.number("phase", phase) <= 1:
        raise ValueError(f"phase must lie in (0, 1], not {phase!r}")
    return float(phase)


def sparsity_at(schedule: str, target: float, progress: float, phase: float = PRUNING_PHASE) -> float:
    """The sparsity due at `progress` in [0, 1] of retraining; `phase` is the share of it in which ``gradual`` prunes.

    * ``one-shot``: all at once, before retraining
    * ``gradual``: cubic rise over the phase (Zhu & Gupta, 2017), in twenty steps, frozen afterwards
    * ``iterative``: three rounds, each with a third of retraining, densities in geometric steps (Han et al., 2015)
    """
    match schedule:
        case "one-shot":
            return target
        case "gradual":
            if progress >= phase:
                return target
            done = int(progress / phase * MASK_UPDATES) / MASK_UPDATES
            return target * (1 - (1 - done) ** 3)
        case "iterative":
            current_round = min(int(progress * ROUNDS) + 1, ROUNDS)
            return target if current_round == ROUNDS else 1 - (1 - target) ** (current_round / ROUNDS)
    raise ValueError(f"schedule {schedule!r} is unknown: use {', '.join(SCHEDULES)}")
