"""Tables of what changes one thing at a time for several patterns: readings of the paper, and what lifts a pattern."""

from __future__ import annotations

import pandas as pd

from reprolib.experiments.profiles import Profile
from reprolib.paper.claims import interval, verdict
from reprolib.paper.drawing import mean_sd, ordered

DEFAULT, ALL_LIFTS = "as usual", "all together"
RIVALS = ("block", "balanced")


def changes(profile: Profile) -> dict[tuple[str, str], set[str]]:
    """Of each change and pattern the ids of the networks.

    A profile names such networks ``change: pattern``. Those of plain names, such as ``hybrid``, are the default that
    changes are compared with; ``hybrid+`` has all that lifts it.
    """
    found = {}
    for method in profile.methods | profile.ablations:
        change, _, pattern = method.rpartition(": ")
        if method in profile.ablations and not change:
            continue
        lifted = pattern.endswith("+")
        key = change or (ALL_LIFTS if lifted else DEFAULT), pattern.removesuffix("+")
        asked = (profile.pruned(method, dataset, seed) for dataset in profile.datasets for seed in profile.seeds)
        found[key] = {experiment.run_id for experiments in asked for experiment in experiments}
    return dict(sorted(found.items(), key=lambda item: item[0][0] == ALL_LIFTS))  # a stable sort: it comes last


def changes_table(profile: Profile, rows: pd.DataFrame) -> pd.DataFrame:
    """Test accuracies under each change, and claims 1 and 2 under it; texts.

    `rows` are those of ``accuracy.csv`` and ``ablations.csv``, of one data set and sparsity. Index: change. Columns:
    accuracy of each pattern (mean ± SD over seeds, in %), and hybrid minus block and balanced in points, mean over the
    seeds that both have, with its 95 % interval and what that says. A rival that the profile does not change counts as
    usual.
    """
    seeds = {
        key: rows[rows["run_id"].isin(ids)].set_index("seed")["accuracy_pct"] for key, ids in changes(profile).items()
    }
    patterns, table = ordered({pattern for _, pattern in seeds}), {}
    for change in dict.fromkeys(change for change, _ in seeds):
        own = {pattern: seeds[change, pattern] for pattern in patterns if (change, pattern) in seeds}
        table[change] = {pattern: mean_sd(values) for pattern, values in own.items() if len(values)}
        for rival in RIVALS if "hybrid" in own else ():
            of_rival = own.get(rival, seeds.get((DEFAULT, rival), pd.Series(dtype=float)))
            table[change][f"hybrid − {rival}"] = difference(own["hybrid"] - of_rival)
    columns = [*patterns, *(f"hybrid − {rival}" for rival in RIVALS)]
    return pd.DataFrame.from_dict(table, orient="index").reindex(columns=columns).astype(object).fillna("")


def lifted_against(accuracy: pd.DataFrame, rivals: tuple[str, ...]) -> pd.DataFrame:
    """``hybrid+`` minus each rival in points: mean over paired seeds, its 95 % interval, and what it says; texts."""
    seeds = accuracy.pivot_table(index="seed", columns="pattern", values="accuracy_pct")
    found = {f"hybrid+ − {rival}": difference(seeds["hybrid+"] - seeds[rival]) for rival in rivals if rival in seeds}
    return pd.DataFrame.from_dict(found, orient="index", columns=["points"])


def difference(differences: pd.Series) -> str:
    """``+1.20 [+0.40, +2.00] supported``; without an interval where there are fewer than two seeds."""
    differences = differences.dropna()
    if differences.empty:
        return ""
    mean, low, high = interval(differences)
    return f"{mean:+.2f}" + (
        f" [{low:+.2f}, {high:+.2f}] {verdict(low, high)}" if len(differences) > 1 else " (one seed)"
    )
