"""Profiles: one YAML file says how large the reproduction is. Nothing else differs between quick, laptop and paper."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Required, get_type_hints

import pandas as pd
from pydantic import Field
from typing_extensions import TypedDict  # Python 3.11 has one that pydantic cannot read

from reprolib import experiments
from reprolib.experiments import Channels, Dense, Pruned
from reprolib.files import paths, settings
from reprolib.files.atomic import write_atomically
from reprolib.files.settings import Count, Some
from reprolib.pruning import PRUNING_PHASE
from reprolib.training import Recipe

DRY_RUN, DRY_IMAGES = "-dry-run", 16
DENSE = "dense"  # what tables call the networks that are not pruned
DECISIVE = ("hybrid", "block", "balanced")  # the methods that most claims compare
DECIDED_FROM = 0.90  # CIFAR-10 is nearly flat below: claims on accuracy are decided at and above this target sparsity


# What a method may say: the fields of `Pruned`, and which part of the profile it is asked for.
Method = TypedDict(
    "Method",
    {name: kind for name, kind in get_type_hints(Pruned).items() if name not in ("dense", "sparsity", "pattern")}
    | {"pattern": Required[str], "sparsities": Some[float], "seeds": Some[int], "datasets": Some[str]},
    total=False,
)


@dataclass(frozen=True)
class Profile:
    """What to compute. `methods` and `ablations` map a name to fields of `Pruned`; a method may restrict the
    profile's `sparsities`, `seeds` and `datasets` with keys of these names. `threads` is per network in training:
    results are bit-identical for equal thread counts, and many small networks train fastest on one thread each.
    `channels` are sparsities at which whole channels go, as a rival.
    """

    name: str
    purpose: str
    threads: Count
    datasets: Some[str]
    width: float
    hidden: list[int]
    seeds: Some[int]
    recipe: Recipe
    retraining_epochs: Count
    sparsities: Some[float]
    methods: Annotated[dict[str, Method], Field(min_length=1)]
    ablations: dict[str, Method]
    images: int = 0
    model: str = "vgg16"
    channels: list[float] = field(default_factory=list)

    def dense(self, dataset: str, seed: int) -> Dense:
        return Dense(dataset, self.recipe, self.width, tuple(self.hidden), seed, self.images, self.model)

    def settings(self, method: str) -> dict:
        """The parameters of notebook 02 that make up a method: ``pattern``, ``sparsities`` and what else it names.

        Raises ValueError for an unknown method.
        """
        known = self.methods | self.ablations
        if method not in known:
            raise ValueError(f"unknown method {method!r} in profile {self.name}: known are {', '.join(known)}")
        chosen = {key: value for key, value in known[method].items() if key not in ("seeds", "datasets")}
        return {"sparsities": self.sparsities} | chosen

    def experiments(
        self,
        dataset: str,
        seed: int,
        sparsities: list[float],
        epochs: int = 0,
        pruning_phase: float = 0.0,
        **fields,
    ) -> list[Pruned]:
        """One experiment per sparsity from the dense network of this data set and seed.

        `epochs` 0 means the profile's, and `pruning_phase` 0 the usual one.
        """
        fields |= {"epochs": epochs or self.retraining_epochs, "pruning_phase": pruning_phase or PRUNING_PHASE}
        return [Pruned(self.dense(dataset, seed), sparsity=sparsity, **fields) for sparsity in sparsities]

    def pruned(self, method: str, dataset: str, seed: int) -> list[Pruned]:
        """The experiments of a method for one data set and seed; empty where the method does not ask for them."""
        settings = self.settings(method)
        only = (self.methods | self.ablations)[method]
        if seed not in only.get("seeds", self.seeds) or dataset not in only.get("datasets", self.datasets):
            return []
        return self.experiments(dataset, seed, **settings)

    def without_channels(self) -> list[Channels]:
        """Networks that lose whole channels."""
        dense = [self.dense(dataset, seed) for seed in self.seeds for dataset in self.datasets]
        return [Channels(one, sparsity, self.retraining_epochs) for one in dense for sparsity in self.channels]

    def asked(self, section: str) -> dict[Pruned, str]:
        """All experiments of a section, ``methods`` or ``ablations``, each with the name that it has there."""
        found: dict[Pruned, str] = {}
        for seed in self.seeds:
            for dataset in self.datasets:
                for method in getattr(self, section):
                    for experiment in self.pruned(method, dataset, seed):
                        found.setdefault(experiment, method)
        return found

    def reported(self) -> dict[Dense | Pruned | Channels, str]:
        """The experiments of ``accuracy.csv``: dense networks, methods, and networks that lose channels; each with
        what the table calls it, its `pattern`.
        """
        dense = [self.dense(dataset, seed) for dataset in self.datasets for seed in self.seeds]
        named = dict.fromkeys(dense, DENSE) | self.asked("methods")
        return named | dict.fromkeys(self.without_channels(), Channels.method)

    def plan(self) -> list[Dense | Pruned | Channels]:
        """All experiments, the most telling ones first, each behind the dense network that it starts from.

        Of each seed: the dense networks, then what decides claims on hybrid, block and balanced, the other methods, the
        ablations, those without channels; within these, sparsities, data sets and methods in the order in which the
        profile names them.
        """

        methods, ablations = self.asked("methods"), self.asked("ablations")
        seeds = {seed: number for number, seed in enumerate(self.seeds)}
        sparsities = {sparsity: number for number, sparsity in enumerate(self.sparsities)}

        def rank(experiment: Dense | Pruned | Channels) -> tuple[int, int, int]:
            if isinstance(experiment, Dense):
                return seeds[experiment.seed], 0, 0
            seed = seeds[experiment.dense.seed]
            if isinstance(experiment, Channels):
                return seed, 4, 0
            decisive = methods.get(experiment) in DECISIVE and experiment.sparsity >= DECIDED_FROM
            kind = 1 if decisive else 2 if experiment in methods else 3
            return seed, kind, sparsities.get(experiment.sparsity, len(sparsities))

        return sorted(self.reported() | ablations, key=rank)


def coverage(profile: Profile, accuracy: pd.DataFrame) -> pd.DataFrame:
    """What a profile asks for, beside what its ``accuracy.csv`` holds. Index: dataset, method, in the profile's order.

    Columns: asked and trained (networks), missing (their seeds and sparsities, as a text), hours_left (to train the
    missing ones one after the other, at the mean time per epoch of the networks of the data set that are there; NaN
    where there are none).
    """
    rows = pd.DataFrame(
        {
            "dataset": (e if isinstance(e, Dense) else e.dense).dataset,
            "method": name,
            "seed": (e if isinstance(e, Dense) else e.dense).seed,
            "sparsity": 0.0 if isinstance(e, Dense) else e.sparsity,
            "epochs": experiments.epochs(e),
            "run_id": e.run_id,
        }
        for e, name in profile.reported().items()
    )
    rows = rows.sort_values("dataset", key=lambda names: names.map(profile.datasets.index), kind="stable")
    rows["trained"] = rows["run_id"].isin(accuracy["run_id"])
    times = accuracy.groupby("dataset")[["wall_time_s", "epochs"]].sum()
    hours_per_epoch = rows["dataset"].map(times["wall_time_s"] / times["epochs"]) / 3600
    rows["hours_left"] = rows["epochs"].where(~rows["trained"], 0) * hours_per_epoch
    groups = rows.groupby(["dataset", "method"], sort=False)
    table = groups.agg(asked=("run_id", "size"), trained=("trained", "sum"), hours_left=("hours_left", _sum))
    table.insert(2, "missing", [_missing(group[~group["trained"]]) for _, group in groups])
    return table


def _sum(hours: pd.Series) -> float:
    return hours.sum(min_count=1)


def _missing(rows: pd.DataFrame) -> str:
    """Sparsities by seed: ``seed 1: 90, 98 %``."""
    texts = []
    for seed, group in rows.groupby("seed"):
        sparsities = ", ".join(f"{100 * sparsity:g}" for sparsity in sorted(group["sparsity"]) if sparsity)
        texts.append(f"seed {seed}: {sparsities} %" if sparsities else f"seed {seed}")
    return "; ".join(texts)


def names() -> list[str]:
    return sorted(path.stem for path in paths.PROFILES.glob("*.yaml"))


def load(name: str) -> Profile:
    """Read ``profiles/<name>.yaml``; for ``<name>-dry-run``, what `dry_run` makes of it.

    What ends in ``.yaml`` is the path of a profile of the user's own. Its content is kept beside its results, so that
    from then on other processes, and the user, may call it by its name, as the project's.

    Raises ValueError, naming what is wrong, for an unknown or incomplete profile; OSError for an unreadable file.
    """
    if name.endswith(DRY_RUN):
        return dry_run(load(name.removesuffix(DRY_RUN)))
    if name.endswith(".yaml"):
        return _adopted(Path(name).expanduser())
    if name in names():
        return _read(paths.PROFILES / f"{name}.yaml", name)
    kept = paths.own_profile(name)
    if "/" in name or not kept.exists():
        known = ", ".join(names())
        raise ValueError(f"unknown profile {name!r}: known are {known}; one of your own is the path of a .yaml file")
    return _read(kept, name)


def _adopted(path: Path) -> Profile:
    """The profile of the user's own that lies at `path`; a copy of it goes to its results."""
    name = path.stem
    if path.resolve().parent == paths.PROFILES:
        return load(name)
    if not re.fullmatch(r"\w[\w.-]*", name) or name.endswith(DRY_RUN):
        raise ValueError(f"{path}: results are named after the file: call it by letters, digits, _, . and -")
    if name in (*names(), "sweeps"):
        raise ValueError(f"{path}: results/{name} belongs to the project: give your profile another name")
    profile, content = _read(path, name), path.read_text(encoding="utf-8")
    kept = paths.own_profile(name)
    if not kept.exists() or kept.read_text(encoding="utf-8") != content:
        write_atomically(kept, content)
    return profile


def dry_run(profile: Profile) -> Profile:
    """The networks of the first two seeds, three epochs of two steps on a few images each: all of the code, in minutes.

    Six steps, so that masks change and then hold while it trains, and that a GPU captures steps with a penalty too; two
    seeds, so that claims get intervals.
    """

    def short(methods: dict[str, dict]) -> dict[str, dict]:
        return {name: {key: value for key, value in m.items() if key != "epochs"} for name, m in methods.items()}

    return replace(
        profile,
        name=profile.name + DRY_RUN,
        purpose=f"every network of {profile.name}, two seeds, six steps each: tries the code, proves nothing",
        seeds=profile.seeds[:2],
        recipe=replace(profile.recipe, epochs=3, batch_size=DRY_IMAGES // 2),
        retraining_epochs=3,
        methods=short(profile.methods),
        ablations=short(profile.ablations),
        images=DRY_IMAGES,
    )


def _read(path: Path, name: str) -> Profile:
    written = settings.read(path, dict[str, Any])
    if taken := {"name", "images"} & written.keys():
        raise ValueError(f"{path}: {', '.join(sorted(taken))} is unknown")
    profile = settings.checked(written | {"name": name}, Profile, f"{path}: ")
    if profile.methods.keys() & {DENSE, Channels.method}:
        raise ValueError(
            f"{path}: methods: in tables {DENSE} and {Channels.method} are other networks: take another name"
        )
    for method, only in (profile.methods | profile.ablations).items():
        for key in ("seeds", "datasets"):
            if foreign := [value for value in only.get(key, []) if value not in getattr(profile, key)]:
                raise ValueError(f"{path}: {method}.{key}: the profile itself has no {foreign[0]!r}")
    try:
        profile.plan()  # builds every experiment once, so that a typo shows before anything is trained
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return profile
