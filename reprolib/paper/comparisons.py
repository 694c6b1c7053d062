"""Two tables of studies of their own: the paper read in other ways, and what lifts a pattern at the same sparsity."""

from __future__ import annotations

import pandas as pd

from reprolib.experiments.profiles import Profile
from reprolib.paper.claims import interval, verdict
from reprolib.paper.drawing import STYLE, label, mean_sd, ordered

OURS = "ours"  # the reading that all others are compared with
RIVALS = ("block", "balanced")
NO_LIFT, ALL_LIFTS = "as the paper", "all together"


def readings(profile: Profile, rows: pd.DataFrame) -> pd.DataFrame:
    """Claims 1 and 2 under each reading of a profile whose methods are called ``reading: pattern``; texts.

    `rows` are those of ``accuracy.csv`` and ``ablations.csv``. Index: the reading. Columns: accuracies of hybrid, block
    and balanced (mean ± SD over seeds), and hybrid minus either rival in points, mean over seeds that both have, with
    its 95 % interval and what that says. Where a reading has no rival of its own, that of our reading counts.
    """
    runs = {
        tuple(method.split(": ")): {
            e.run_id
            for dataset in profile.datasets
            for seed in profile.seeds
            for e in profile.pruned(method, dataset, seed)
        }
        for method in profile.methods | profile.ablations
    }
    seeds = {name: rows[rows["run_id"].isin(ids)].set_index("seed")["accuracy_pct"] for name, ids in runs.items()}
    table = {}
    for reading in dict.fromkeys(name for name, _ in seeds):
        three = {kind: seeds.get((reading, kind), seeds[OURS, kind]) for kind in ("hybrid", *RIVALS)}
        table[reading] = {kind: mean_sd(values) if len(values) else "" for kind, values in three.items()}
        table[reading] |= {f"hybrid − {kind}": _difference(three["hybrid"] - three[kind]) for kind in RIVALS}
    return pd.DataFrame.from_dict(table, orient="index")


def _difference(differences: pd.Series) -> str:
    """``+1.20 [+0.40, +2.00] supported``; without an interval where there are fewer than two seeds."""
    differences = differences.dropna()
    if differences.empty:
        return ""
    mean, low, high = interval(differences)
    return f"{mean:+.2f}" + (
        f" [{low:+.2f}, {high:+.2f}] {verdict(low, high)}" if len(differences) > 1 else " (one seed)"
    )


def lifts(accuracy: pd.DataFrame) -> pd.DataFrame:
    """Test accuracies by what lifts a pattern, mean ± SD over seeds as texts; a column per pattern."""
    pruned = accuracy[accuracy["pattern"] != "dense"]
    base = pruned["pattern"].map(lambda name: max((each for each in STYLE if name.startswith(each)), key=len))
    lift = [name.removeprefix(each) for name, each in zip(pruned["pattern"], base, strict=True)]
    names = {"": NO_LIFT, "+": ALL_LIFTS}
    pruned = pruned.assign(base=base, lift=[names.get(each, label(each.removeprefix("-"))) for each in lift])
    table = pruned.pivot_table(index="lift", columns="base", values="accuracy_pct", aggfunc=mean_sd, sort=False)
    last = [ALL_LIFTS] if ALL_LIFTS in table.index else []
    order = [NO_LIFT, *(each for each in table.index if each not in (NO_LIFT, ALL_LIFTS)), *last]
    return table.loc[order, ordered(table.columns)].fillna("").rename_axis(index=None, columns=None)


def lifted_against(accuracy: pd.DataFrame, rivals: tuple[str, ...]) -> pd.DataFrame:
    """``hybrid+`` minus each rival in points: mean over paired seeds, its 95 % interval, and what it says; texts."""
    seeds = accuracy.pivot_table(index="seed", columns="pattern", values="accuracy_pct")
    found = {f"hybrid+ − {rival}": _difference(seeds["hybrid+"] - seeds[rival]) for rival in rivals if rival in seeds}
    return pd.DataFrame.from_dict(found, orient="index", columns=["points"])
