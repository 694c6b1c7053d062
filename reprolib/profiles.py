"""Profiles: one YAML file says how large the reproduction is. Nothing else differs between quick, laptop and paper."""

from __future__ import annotations

from dataclasses import dataclass, fields

import yaml

from reprolib import paths
from reprolib.experiments import Dense, Pruned
from reprolib.training import Recipe


@dataclass(frozen=True)
class Profile:
    """What to compute. `methods` and `ablations` map a name to fields of `Pruned`; a method may restrict the
    profile's `sparsities`, `seeds` and `datasets` with keys of these names. `threads` is per network in training:
    results are bit-identical for equal thread counts, and many small networks train fastest on one thread each.
    """

    name: str
    purpose: str
    threads: int
    datasets: list[str]
    width: float
    hidden: list[int]
    seeds: list[int]
    recipe: Recipe
    retraining_epochs: int
    sparsities: list[float]
    methods: dict[str, dict]
    ablations: dict[str, dict]

    def dense(self, dataset: str, seed: int) -> Dense:
        return Dense(dataset, self.recipe, self.width, tuple(self.hidden), seed)

    def pruned(self, method: str, dataset: str, seed: int) -> list[Pruned]:
        """The experiments of one method on one data set and seed, one per sparsity; empty where it is not asked for.

        Raises ValueError for an unknown method or field.
        """
        if method not in self.methods | self.ablations:
            known = ", ".join(self.methods | self.ablations)
            raise ValueError(f"unknown method {method!r} in profile {self.name}: known are {known}")
        settings = dict((self.methods | self.ablations)[method])
        sparsities = settings.pop("sparsities", self.sparsities)
        asked = seed in settings.pop("seeds", self.seeds) and dataset in settings.pop("datasets", self.datasets)
        settings = {"epochs": self.retraining_epochs} | settings
        unknown = set(settings) - {f.name for f in fields(Pruned)}
        if unknown:
            raise ValueError(f"profile {self.name}, method {method}: unknown field {', '.join(sorted(unknown))}")
        dense = self.dense(dataset, seed)
        return [Pruned(dense, sparsity=sparsity, **settings) for sparsity in sparsities] if asked else []

    def jobs(self, section: str) -> list[tuple[str, str, int]]:
        """All (method, data set, seed) of a section, ``methods`` or ``ablations``; one seed of everything first."""
        return [
            (method, dataset, seed)
            for seed in self.seeds
            for dataset in self.datasets
            for method in getattr(self, section)
            if self.pruned(method, dataset, seed)
        ]


def names() -> list[str]:
    return sorted(path.stem for path in paths.PROFILES.glob("*.yaml"))


def load(name: str) -> Profile:
    """Read ``profiles/<name>.yaml``. Raises ValueError, naming what is wrong, for an unknown or incomplete profile."""
    if name not in names():
        raise ValueError(f"unknown profile {name!r}: known are {', '.join(names())}")
    settings = yaml.safe_load((paths.PROFILES / f"{name}.yaml").read_text())
    expected = {f.name for f in fields(Profile)} - {"name"}
    wrong = expected.symmetric_difference(settings)
    if wrong:
        raise ValueError(f"profile {name}: these keys are missing or unknown: {', '.join(sorted(wrong))}")
    profile = Profile(**settings | {"name": name, "recipe": Recipe(**settings["recipe"])})
    for section in ("methods", "ablations"):
        profile.jobs(section)  # builds every experiment once, so that a typo shows before anything is trained
    return profile
