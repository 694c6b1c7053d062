"""The paper's claims, each decided by the data: paired differences over seeds with 95 % confidence intervals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
from scipy import stats

from reprolib.bench.rivals import SPARSE
from reprolib.experiments.profiles import DECIDED_FROM

DROPS = (0.5, 1.0)  # accuracy drops from dense, in points, of claim 3
CONFIDENCE = 0.95
ORIENTATION = "for orientation"  # the verdict of rows that show a part and decide nothing

CLAIMS = {
    1: "Hybrid is more accurate than block at equal sparsity",
    2: "Hybrid is more accurate than balanced at equal sparsity",
    3: "Within a fixed drop of dense accuracy, hybrid reaches a higher sparsity",
    4: "Hybrid's measured inference speed lies between block's and balanced's",
    5: "Without a regularizer, hybrid is at least as accurate as block with group lasso",
}
BETWEEN = "hybrid between block and balanced"
LATENCY_UNIT = "% of latency"
_DENSE = "accuracy_dense_pct"  # tells dense networks of one seed, trained on different machines, apart
_ACCURACY_RIVALS = {1: "block", 2: "balanced", 5: "block-group-lasso"}


def interval(differences: pd.Series | np.ndarray) -> tuple[float, float, float]:
    """Mean of paired differences and the bounds of its 95 % confidence interval (Student's t).

    The bounds are NaN for fewer than two differences.
    """
    values = np.asarray(differences, dtype=float)
    mean = float(values.mean()) if len(values) else math.nan
    if len(values) < 2:
        return mean, math.nan, math.nan
    half_width = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - half_width, mean + half_width


def verdict(low: float, high: float) -> str:
    """``supported`` if the whole interval lies above zero, ``contradicted`` if it lies below, else ``undecided``."""
    if low > 0:
        return "supported"
    return "contradicted" if high < 0 else "undecided"


def paired_differences(accuracy: pd.DataFrame, rival: str) -> pd.DataFrame:
    """Accuracy of hybrid minus that of `rival` in points, index (target_sparsity), columns seeds, of one data set.

    A pair starts from one dense network: rows of another machine, whose dense network has another accuracy, are none.
    """
    grid = accuracy.pivot_table(index=["target_sparsity", "seed", _DENSE], columns="pattern", values="accuracy_pct")
    if not {"hybrid", rival} <= set(grid.columns):
        return pd.DataFrame()
    return (grid["hybrid"] - grid[rival]).dropna().droplevel(_DENSE).unstack("seed")


def reached_sparsity(accuracy: pd.DataFrame, drop: float) -> float:
    """The highest sparsity at which a method stays within `drop` points of dense, for one method and seed.

    Between two tested sparsities accuracy is taken as linear in the logarithm of density. NaN if even the lowest
    tested sparsity falls short, the highest tested one if none does.
    """
    rows = accuracy.sort_values("sparsity")
    spare = (rows["accuracy_pct"] - rows["accuracy_dense_pct"] + drop).to_numpy()
    log_density = np.log(1 - rows["sparsity"].to_numpy())
    fine = np.flatnonzero(spare >= 0)
    if len(fine) == 0:
        return math.nan
    last = fine[-1]
    if last == len(spare) - 1:
        return float(rows["sparsity"].iloc[-1])
    share = spare[last] / (spare[last] - spare[last + 1])
    return float(1 - np.exp(log_density[last] + share * (log_density[last + 1] - log_density[last])))


def decide(accuracy: pd.DataFrame, latency: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per claim, data set and comparison, from ``accuracy.csv`` and ``latency.csv`` of ``results/<profile>/``.

    Columns: claim, dataset (claim 4: the device), comparison, seeds, difference, low, high (mean and 95 % interval of
    the paired differences), unit, verdict, remark (what the row rests on or what is missing).
    """
    key = ["dataset", "pattern", "target_sparsity", "seed"]
    twice = accuracy[accuracy.duplicated(key, keep=False) & (accuracy["pattern"] != "dense")]
    if len(twice):
        found = ", ".join(sorted(twice["spec"].unique()))
        raise ValueError(
            f"claims compare one network of {twice['pattern'].iloc[0]} for each sparsity and seed, and there are "
            f"several ({found}): leave one in the profile's methods, move the others to its ablations"
        )
    rows = []
    for dataset, group in accuracy.groupby("dataset", sort=False):
        for claim, rival in _ACCURACY_RIVALS.items():
            rows += _accuracy_rows(claim, dataset, group, rival)
        for rival in ("block", "balanced"):
            rows += [_reach_row(dataset, group, rival, drop) for drop in DROPS]
    rows += _speed_rows(latency, accuracy["width"].iloc[0])
    return pd.DataFrame(rows).sort_values(["claim", "dataset"], kind="stable", ignore_index=True)


def seeds_needed(accuracy: pd.DataFrame) -> pd.DataFrame:
    """For each undecided claim on accuracy: how many seeds would move its interval off zero at today's mean and SD."""
    decided = decide(accuracy)
    rows = decided[(decided["verdict"] == "undecided") & (decided["seeds"] >= 2)]
    needed = []
    for row in rows.itertuples():
        half_width = row.high - row.difference
        deviation = half_width * math.sqrt(row.seeds) / stats.t.ppf((1 + CONFIDENCE) / 2, row.seeds - 1)
        enough = (
            n
            for n in range(2, 1001)
            if stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * deviation / math.sqrt(n) < abs(row.difference)
        )
        needed.append(str(next(enough, "more than 1000")))
    columns = rows[["claim", "dataset", "comparison", "seeds", "difference"]]
    return columns.assign(seeds_needed=needed)


def _accuracy_rows(claim: int, dataset: str, group: pd.DataFrame, rival: str) -> list[dict]:
    differences = paired_differences(group, rival)
    decisive = differences[differences.index >= DECIDED_FROM] if len(differences) else differences
    name = f"hybrid − {rival}"
    if decisive.empty:
        remark = f"no pair of hybrid and {rival} at {100 * DECIDED_FROM:.0f} % sparsity or more"
        return [_row(claim, dataset, name, [], "points", remark)]
    complete = decisive.dropna(axis=1)  # only seeds that have every sparsity count in the mean over sparsities
    tested = ", ".join(f"{100 * s:g}" for s in decisive.index)
    what = f"mean over {tested} % sparsity" if len(decisive) > 1 else f"at {tested} % sparsity"
    rows = [_row(claim, dataset, name, complete.mean(axis=0), "points", what)]
    if len(differences) == 1:  # the row above says it all
        return rows
    for sparsity, values in differences.iterrows():
        row = _row(claim, dataset, f"{name} at {100 * sparsity:g} %", values.dropna(), "points", "")
        rows.append(row | {"verdict": ORIENTATION})
    return rows


def _reach_row(dataset: str, group: pd.DataFrame, rival: str, drop: float) -> dict:
    name, unit = f"hybrid − {rival}, drop of {drop:g}", "points of sparsity"
    pairs = _complete_pairs(group, rival)
    if pairs.empty:
        return _row(3, dataset, name, [], unit, f"no pair of hybrid and {rival}")
    networks = dict(list(pairs.groupby(["pattern", "seed"])))
    reached = {network: reached_sparsity(rows, drop) for network, rows in networks.items()}
    seeds = sorted(pairs["seed"].unique())
    lowest, highest = pairs["target_sparsity"].min(), pairs["target_sparsity"].max()
    short = {key: math.isnan(value) for key, value in reached.items()}
    beyond = {key: value == networks[key]["sparsity"].max() for key, value in reached.items()}
    for censored, where in (
        (short, f"drop by more already at {100 * lowest:g} %, the lowest tested"),
        (beyond, f"drop by less even at {100 * highest:g} %, the highest tested"),
    ):
        if any(censored["hybrid", seed] and censored[rival, seed] for seed in seeds):
            return _row(3, dataset, name, [], unit, f"hybrid and {rival} {where}")
    # Whoever falls short counts with the lowest tested sparsity, and whoever does not end with the highest: this draws
    # differences towards zero, so that a verdict on them stands all the more.
    counted = {key: lowest if short[key] else value for key, value in reached.items()}
    gains = [100 * (counted["hybrid", seed] - counted[rival, seed]) for seed in seeds]
    censored = {f"below {100 * lowest:g} %": sum(short.values()), f"beyond {100 * highest:g} %": sum(beyond.values())}
    notes = [f"{count} of {len(reached)} networks {where}, counted there" for where, count in censored.items() if count]
    return _row(3, dataset, name, gains, unit, "; ".join(notes) or "interpolated")


def _complete_pairs(group: pd.DataFrame, rival: str) -> pd.DataFrame:
    """Rows of hybrid and `rival` at sparsities that a seed has of both, of the seeds that have all such sparsities."""
    pairs = group[group["pattern"].isin(["hybrid", rival])]
    pairs = pairs[pairs.groupby(["seed", "target_sparsity", _DENSE])["pattern"].transform("nunique") == 2]
    tested = pairs.groupby("seed")["target_sparsity"].transform("nunique")
    return pairs[tested == pairs["target_sparsity"].nunique()]


def _speed_rows(latency: pd.DataFrame | None, width: float) -> list[dict]:
    """Claim 4, for each device that networks of this width were timed on, with our kernels."""
    if latency is None:
        return [_row(4, "cpu", BETWEEN, [], LATENCY_UNIT, "no latency.csv: make bench measures it")]
    decisive = (latency["scope"] == "network") & (latency["width"] == width) & (latency["implementation"] == SPARSE)
    decisive &= latency["target_sparsity"] >= DECIDED_FROM
    rows = [_device_speed_rows(device, group) for device, group in latency[decisive].groupby("device")]
    remark = f"no latencies of all three patterns at {100 * DECIDED_FROM:.0f} % or more and width {width:g}: make bench"
    return list(itertools.chain(*rows)) or [_row(4, "cpu", BETWEEN, [], LATENCY_UNIT, remark)]


def _device_speed_rows(device: str, latency: pd.DataFrame) -> list[dict]:
    """How far inside the interval between block and balanced hybrid lies, on a logarithmic scale; negative outside.

    That is its distance to the nearer end, whichever of the two is the faster one. Nothing without all three patterns.
    """
    logs = latency.assign(log=100 * np.log(latency["latency_us"]))
    logs = logs.pivot_table(index=["batch", "target_sparsity", "seed"], columns="pattern", values="log")
    if not {"hybrid", "block", "balanced"} <= set(logs.columns):
        return []
    logs = logs[["hybrid", "block", "balanced"]].dropna()
    gaps = {rival: logs["hybrid"] - logs[rival] for rival in ("block", "balanced")}
    block, balanced = (gap.groupby("seed").mean() for gap in gaps.values())
    inside = np.maximum(np.minimum(block, -balanced), np.minimum(-block, balanced))
    batches = ", ".join(str(batch) for batch in logs.index.unique("batch"))
    tested = ", ".join(f"{100 * sparsity:g}" for sparsity in logs.index.unique("target_sparsity"))
    rows = [_row(4, device, BETWEEN, inside, LATENCY_UNIT, f"mean over {tested} % sparsity and batches of {batches}")]
    for rival, gap in gaps.items():
        parts = {f"hybrid − {rival}": gap.groupby("seed").mean()}
        for batch, values in gap.groupby("batch"):
            parts[f"hybrid − {rival} at batch {batch}"] = values.groupby("seed").mean()
        for name, values in parts.items():
            row = _row(4, device, name, values, LATENCY_UNIT, "positive: hybrid is slower")
            rows.append(row | {"verdict": ORIENTATION})
    return rows


def _row(claim: int, dataset: str, comparison: str, differences, unit: str, remark: str) -> dict:
    mean, low, high = interval(differences)
    if len(differences) == 0:
        decision = "no data"
    elif len(differences) == 1:
        decision, remark = "undecided", f"{remark}; one seed gives no interval"
    else:
        decision = verdict(low, high)
    return {
        "claim": claim,
        "dataset": dataset,
        "comparison": comparison,
        "seeds": len(differences),
        "difference": mean,
        "low": low,
        "high": high,
        "unit": unit,
        "verdict": decision,
        "remark": remark,
    }
