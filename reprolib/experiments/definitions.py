"""Experiments: frozen values that say everything a result depends on."""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING, dataclass
from functools import cached_property

from reprolib import checks, models, pruning
from reprolib.experiments import records
from reprolib.patterns import Block, Hybrid, check_sparsity, parse
from reprolib.training import Recipe, data

RETRAININGS = ("lr-rewinding", "fine-tuning")


@dataclass(frozen=True)
class Dense:
    """A dense network, trained from scratch. All patterns of a (data set, seed) start from the same one.

    `dataset` and `model` are names of the project, or of the user's own (see `training.own_data`, `models.build`).
    `images` > 0 takes only as many of each split: enough to try every step, and proof of nothing.
    """

    dataset: str
    recipe: Recipe
    width: float = 1.0
    hidden: tuple[int, ...] = ()
    seed: int = 0
    images: int = 0
    model: str = "vgg16"

    def __post_init__(self):
        data.check(self.dataset)
        if not isinstance(self.recipe, Recipe):
            raise ValueError(f"recipe must be a Recipe, not {self.recipe!r}")
        if not isinstance(self.hidden, (tuple, list)):
            raise ValueError(f"hidden must list the sizes of linear layers, not {self.hidden!r}")
        _normalise(
            self,
            width=checks.number("width", self.width, 1 / 64),
            hidden=tuple(checks.whole("hidden", size) for size in self.hidden),
            seed=checks.whole("seed", self.seed, 0),
            images=checks.whole("images", self.images, 0),
        )
        models.check(self.model, self.width, self.hidden)

    @property
    def origin(self) -> str:
        """Data set, network and seed, as the ids of its runs begin."""
        return f"{data.label(self.dataset)}-{models.label(self.model, self.width)}-seed{self.seed}"

    @cached_property
    def run_id(self) -> str:
        return f"{self.origin}-dense-{fingerprint(self)}"

    @property
    def label(self) -> str:
        """What progress bars and messages call it."""
        return f"{data.label(self.dataset)}, seed {self.seed}, dense"


class _Smaller:
    """What is made of a `dense` network: it has a `sparsity`, and a `method` that tables call it by."""

    @cached_property
    def run_id(self) -> str:
        return f"{self.dense.origin}-{self.method}-{100 * self.sparsity:g}pct-{fingerprint(self)}"

    @property
    def label(self) -> str:
        """What progress bars and messages call it."""
        return f"{data.label(self.dense.dataset)}, seed {self.dense.seed}, {self.method} at {100 * self.sparsity:g} %"


@dataclass(frozen=True)
class Pruned(_Smaller):
    """A dense network pruned to `sparsity` and retrained.

    `pattern` is the text form of a pattern; `score` is magnitude or random (the control); `schedule`, `ratios` and
    `retraining` are explained in `reprolib.pruning` and `reprolib.training`; `group_lasso` > 0 adds that penalty on
    the blocks of the pattern while masks still change; `prune_ends` includes the first convolution and the classifier.
    Four things lift the accuracy of a pattern at the same sparsity, and are off by default, as in the paper: the share
    `distillation` of the loss asks for the answers of the dense network; `pruning_phase` is the share of retraining in
    which the gradual schedule prunes; `lr_factor` multiplies the learning rates of retraining; `permuted` first orders
    the output channels of layers so that large weights meet in the same blocks (`pruning.permute_channels`).
    `masks` are nested: what a step of the schedule prunes stays pruned. Refitted ones, made from the weights alone at
    each step, are there for comparison: in a hybrid they bring pruned blocks back.
    """

    dense: Dense
    pattern: str
    sparsity: float
    epochs: int
    score: str = "magnitude"
    schedule: str = "gradual"
    ratios: str = "uniform"
    retraining: str = "lr-rewinding"
    group_lasso: float = 0.0
    prune_ends: bool = False
    masks: str = "nested"
    distillation: float = 0.0
    pruning_phase: float = pruning.PRUNING_PHASE
    lr_factor: float = 1.0
    permuted: bool = False

    def __post_init__(self):
        if not isinstance(self.dense, Dense):
            raise ValueError(f"dense must be the Dense experiment to start from, not {self.dense!r}")
        if not isinstance(self.pattern, str):
            raise ValueError(
                f"pattern must be the text form of one, such as {str(Block(4, 4))!r}, not {self.pattern!r}"
            )
        pattern = parse(self.pattern)
        _normalise(  # one spelling, one id
            self,
            pattern=str(pattern),
            sparsity=checks.number("sparsity", self.sparsity),
            epochs=checks.whole("epochs", self.epochs),
            score=checks.choice("score", self.score, pruning.SCORES),
            schedule=checks.choice("schedule", self.schedule, pruning.SCHEDULES),
            ratios=checks.choice("ratios", self.ratios, pruning.RATIOS),
            retraining=checks.choice("retraining", self.retraining, RETRAININGS),
            group_lasso=checks.number("group_lasso", self.group_lasso),
            prune_ends=checks.flag("prune_ends", self.prune_ends),
            masks=checks.choice("masks", self.masks, pruning.MASKS),
            distillation=checks.number("distillation", self.distillation),
            pruning_phase=pruning.check_phase(checks.number("pruning_phase", self.pruning_phase)),
            lr_factor=checks.number("lr_factor", self.lr_factor),
            permuted=checks.flag("permuted", self.permuted),
        )
        check_sparsity(self.sparsity)
        if self.ratios != "uniform":
            pruning.check_reach(self.sparsity)
        if self.distillation > 1:
            raise ValueError(f"distillation must lie in [0, 1], not {self.distillation!r}")
        if not self.lr_factor:
            raise ValueError("lr_factor must be more than 0: with 0 nothing is learned")
        if self.pruning_phase != pruning.PRUNING_PHASE and self.schedule != "gradual":
            raise ValueError(f"pruning_phase is for the gradual schedule, not for {self.schedule}: leave it out")
        if self.permuted:
            pruning.check_permutable(pattern)
        if self.schedule == "one-shot":  # no step before the one mask
            _normalise(self, masks="nested")
        if self.group_lasso and not isinstance(pattern, Block):
            raise ValueError(f"group_lasso shrinks blocks, and {self.pattern} has none: use it with Block(rows, cols)")

    @property
    def method(self) -> str:
        """The pattern's family and what sets the run apart: ``hybrid``, ``random-hybrid``, ``block-group-lasso``.

        What lifts it: ``hybrid-distilled``; all that a pattern can have of it together: ``hybrid+``.
        """
        pattern = parse(self.pattern)
        prefix = "random-" * (self.score == "random") + "refitted-" * (self.masks == "refitted")
        lifts = {
            "distilled": self.distillation > 0,
            "short-phase": self.pruning_phase < pruning.PRUNING_PHASE,
            "high-lr": self.lr_factor > 1,
            "permuted": self.permuted,
            "covered": isinstance(pattern, Block) and pattern.covered,
        }
        impossible = {"permuted": not pruning.is_permutable(pattern), "covered": not isinstance(pattern, Block)}
        possible = [name for name in lifts if not impossible.get(name)]
        used = [name for name in lifts if lifts[name]]
        suffix = "+" if used == possible else "".join(f"-{name}" for name in used)
        return prefix + pattern.family + ("-group-lasso" if self.group_lasso else "") + suffix


@dataclass(frozen=True)
class Channels(_Smaller):
    """A rival: a dense network that loses whole channels, `sparsity` of its weights, and is retrained.

    See `pruning.remove_channels`. All of them go at once; the learning rate is rewound as for `Pruned`.
    """

    dense: Dense
    sparsity: float
    epochs: int
    method = "channels"

    def __post_init__(self):
        if not isinstance(self.dense, Dense):
            raise ValueError(f"dense must be the Dense experiment to start from, not {self.dense!r}")
        sparsity = checks.number("sparsity", self.sparsity)
        check_sparsity(sparsity)
        _normalise(self, sparsity=sparsity, epochs=checks.whole("epochs", self.epochs))


def _normalise(frozen, **values) -> None:
    for name, value in values.items():
        object.__setattr__(frozen, name, value)


def fingerprint(experiment: Dense | Pruned | Channels) -> str:
    """Eight hex digits of the non-default fields: a new field with a default keeps the ids of old runs.

    Hybrids on a schedule always say how their masks are made: up to version 0.1 they were refitted without saying so.
    """
    value = _non_default(experiment)
    in_steps = isinstance(experiment, Pruned) and experiment.schedule != "one-shot"
    if in_steps and isinstance(parse(experiment.pattern), Hybrid):
        value["masks"] = experiment.masks
    return records.fingerprint(value)


def _non_default(value):
    if not dataclasses.is_dataclass(value):
        return value
    return {
        f.name: _non_default(getattr(value, f.name))
        for f in dataclasses.fields(value)
        if f.default is MISSING or getattr(value, f.name) != f.default
    }
