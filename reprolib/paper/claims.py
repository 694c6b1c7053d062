"""The paper's claims, each decided by the data: paired differences over seeds with 95 % confidence intervals."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from scipy import stats

from reprolib import models
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
    6: "At equal measured latency, hybrid is more accurate",
}
UNTIMED = "no latency.csv: make bench measures it"
BETWEEN = "hybrid between block and balanced"
LATENCY_UNIT = "% of latency"
_DENSE = "accuracy_dense_pct"  # tells dense networks of one seed, trained on different machines, apart
NO_DIFFERENCES = pd.Series(dtype=float)
_ACCURACY_RIVALS = {1: "block", 2: "balanced", 5: "block-group-lasso"}


@dataclass(frozen=True, eq=False)
class Decision:
    """One comparison and all that it rests on.

    `differences` are paired, one per seed; `accuracies` and `latencies` are the rows of ``accuracy.csv`` and of
    ``latency.csv`` that they come from; `dataset` is the device for claim 4. A comparison that does not decide shows a
    part, for orientation.
    """

    claim: int
    dataset: str
    comparison: str
    differences: pd.Series
    unit: str
    remark: str
    accuracies: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["commit", "seed"]))
    latencies: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["commit", "seed"]))
    decides: bool = True

    @property
    def verdict(self) -> str:
        if not self.decides:
            return ORIENTATION
        if self.differences.empty:
            return "no data"
        return "undecided" if len(self.differences) == 1 else verdict(*interval(self.differences)[1:])

    @property
    def commits(self) -> list[str]:
        return sorted({*self.accuracies["commit"], *self.latencies["commit"]})

    def as_row(self) -> dict:
        mean, low, high = interval(self.differences)
        alone = "one seed gives no interval" if len(self.differences) == 1 else ""
        return {
            "claim": self.claim,
            "dataset": self.dataset,
            "comparison": self.comparison,
            "seeds": len(self.differences),
            "difference": mean,
            "low": low,
            "high": high,
            "unit": self.unit,
            "verdict": self.verdict,
            "remark": "; ".join(filter(None, [self.remark, alone])),
            "commits": ", ".join(self.commits),
        }


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


def pairs(accuracy: pd.DataFrame, rival: str) -> pd.DataFrame:
    """The rows of hybrid and `rival`, of one data set, that have the other one at the same sparsity and seed.

    A pair starts from one dense network: rows of another machine, whose dense network has another accuracy, are none.
    """
    rows = accuracy[accuracy["pattern"].isin(["hybrid", rival])].dropna(subset="accuracy_pct")
    return rows[rows.groupby(["seed", "target_sparsity", _DENSE])["pattern"].transform("nunique") == 2]


def paired_differences(accuracy: pd.DataFrame, rival: str) -> pd.DataFrame:
    """Accuracy of hybrid minus that of `rival` in points, index (target_sparsity), columns seeds, of one data set."""
    rows = pairs(accuracy, rival)
    if rows.empty:
        return pd.DataFrame()
    grid = rows.pivot_table(index=["target_sparsity", "seed", _DENSE], columns="pattern", values="accuracy_pct")
    return (grid["hybrid"] - grid[rival]).droplevel(_DENSE).unstack("seed")


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
    the paired differences), unit, verdict, remark (how the number came about or what is missing), commits (of the code,
    where the rows behind it were computed).
    """
    return pd.DataFrame([decision.as_row() for decision in decisions(accuracy, latency)])


def decisions(accuracy: pd.DataFrame, latency: pd.DataFrame | None = None) -> list[Decision]:
    """What `decide` tabulates, with the rows behind each number; by claim, then by data set."""
    key = ["dataset", "pattern", "target_sparsity", "seed"]
    twice = accuracy[accuracy.duplicated(key, keep=False) & (accuracy["pattern"] != "dense")]
    if len(twice):
        found = ", ".join(sorted(twice["spec"].unique()))
        raise ValueError(
            f"claims compare one network of {twice['pattern'].iloc[0]} for each sparsity and seed, and there are "
            f"several ({found}): leave one in the profile's methods, move the others to its ablations"
        )
    found = []
    for dataset, group in accuracy.groupby("dataset", sort=False):
        for claim, rival in _ACCURACY_RIVALS.items():
            found += _on_accuracy(claim, dataset, group, rival)
        for rival in ("block", "balanced"):
            found += [_on_reach(dataset, group, rival, drop) for drop in DROPS]
            found += _at_equal_latency(dataset, group, rival, latency)
    found += _on_speed(latency, *accuracy[["model", "width"]].iloc[0])
    return sorted(found, key=lambda decision: (decision.claim, decision.dataset))


def seeds_needed(accuracy: pd.DataFrame, latency: pd.DataFrame | None = None) -> pd.DataFrame:
    """For each undecided claim: how many seeds would move its interval off zero at today's mean and SD.

    Seeds of claim 4 are timed networks, those of the others trained ones.
    """
    decided = decide(accuracy, latency)
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


def _on_accuracy(claim: int, dataset: str, group: pd.DataFrame, rival: str) -> list[Decision]:
    differences, rows = paired_differences(group, rival), pairs(group, rival)
    decisive = differences[differences.index >= DECIDED_FROM] if len(differences) else differences
    name = f"hybrid − {rival}"
    if decisive.empty:
        remark = f"no pair of hybrid and {rival} at {100 * DECIDED_FROM:.0f} % sparsity or more"
        return [Decision(claim, dataset, name, NO_DIFFERENCES, "points", remark)]
    complete = decisive.dropna(axis=1)  # only seeds that have every sparsity count in the mean over sparsities
    tested = ", ".join(f"{100 * s:g}" for s in decisive.index)
    what = f"mean over {tested} % sparsity" if len(decisive) > 1 else f"at {tested} % sparsity"
    behind = rows[(rows["target_sparsity"] >= DECIDED_FROM) & rows["seed"].isin(complete.columns)]
    found = [Decision(claim, dataset, name, complete.mean(axis=0), "points", what, behind)]
    if len(differences) == 1:  # the one above says it all
        return found
    for sparsity, values in differences.iterrows():
        part, behind = f"{name} at {100 * sparsity:g} %", rows[rows["target_sparsity"] == sparsity]
        found.append(Decision(claim, dataset, part, values.dropna(), "points", "", behind, decides=False))
    return found


def _on_reach(dataset: str, group: pd.DataFrame, rival: str, drop: float) -> Decision:
    name, unit = f"hybrid − {rival}, drop of {drop:g}", "points of sparsity"
    rows = _complete_pairs(group, rival)
    if rows.empty:
        return Decision(3, dataset, name, NO_DIFFERENCES, unit, f"no pair of hybrid and {rival}")
    networks = dict(list(rows.groupby(["pattern", "seed"])))
    reached = {network: reached_sparsity(its, drop) for network, its in networks.items()}
    seeds = sorted(rows["seed"].unique())
    lowest, highest = rows["target_sparsity"].min(), rows["target_sparsity"].max()
    short = {key: math.isnan(value) for key, value in reached.items()}
    beyond = {key: value == networks[key]["sparsity"].max() for key, value in reached.items()}
    ends = (
        (short, lowest, f"by more already at {100 * lowest:g} %, the lowest tested"),
        (beyond, highest, f"by less even at {100 * highest:g} %, the highest tested"),
    )
    for censored, _, where in ends:
        if any(censored["hybrid", seed] and censored[rival, seed] for seed in seeds):
            return Decision(3, dataset, name, NO_DIFFERENCES, unit, f"hybrid and {rival} drop {where}")
    # Whoever falls short counts with its lowest tested sparsity, as achieved, and whoever does not end with the
    # highest: this draws differences towards zero, so that a verdict on them stands all the more.
    counted = {key: networks[key]["sparsity"].min() if short[key] else value for key, value in reached.items()}
    gains = {seed: 100 * (counted["hybrid", seed] - counted[rival, seed]) for seed in seeds}
    notes = ["points of sparsity, not of accuracy"]
    for (censored, end, where), method in itertools.product(ends, ("hybrid", rival)):
        if of := [str(seed) for seed in seeds if censored[method, seed]]:
            seed = f"seed{'s' * (len(of) > 1)} {', '.join(of)}"
            notes.append(f"{method} with {seed} drops {where}: counted with {100 * end:g} %")
    return Decision(3, dataset, name, pd.Series(gains), unit, "; ".join(notes), rows)


def _complete_pairs(group: pd.DataFrame, rival: str) -> pd.DataFrame:
    """`pairs` of the seeds that have all sparsities that any seed has a pair of."""
    rows = pairs(group, rival)
    tested = rows.groupby("seed")["target_sparsity"].transform("nunique")
    return rows[tested == rows["target_sparsity"].nunique()]


def _on_speed(latency: pd.DataFrame | None, model: str, width: float) -> list[Decision]:
    """Claim 4, for each device that networks of this kind and width were timed on with our kernels."""
    network = models.title(model, width)
    comparison = f"{BETWEEN}, {network}"
    nothing = Decision(4, "cpu", comparison, NO_DIFFERENCES, LATENCY_UNIT, UNTIMED)
    if latency is None:
        return [nothing]
    rows = _timed(latency, model, width)
    groups = rows[rows["target_sparsity"] >= DECIDED_FROM].groupby("device")
    remark = f"no latencies of all three patterns at {100 * DECIDED_FROM:.0f} % or more and {network}: make bench"
    found = [decision for device, group in groups for decision in _on_device_speed(device, group, comparison)]
    return found or [replace(nothing, remark=remark)]


def _timed(latency: pd.DataFrame, model: str, width: float) -> pd.DataFrame:
    """Rows of pruned networks of this kind and width in our kernels."""
    rows = latency[(latency["scope"] == "network") & (latency["implementation"] == SPARSE)]
    return rows[(rows["name"].str.split(",").str[0] == models.title(model, width)) & (rows["pattern"] != "dense")]


def _on_device_speed(device: str, latency: pd.DataFrame, comparison: str) -> list[Decision]:
    """How far inside the interval between block and balanced hybrid lies, on a logarithmic scale; negative outside.

    That is its distance to the nearer end, whichever of the two is the faster one. Nothing without all three patterns.
    """
    three, key = ["hybrid", "block", "balanced"], ["batch", "target_sparsity", "seed"]
    rows = latency[latency["pattern"].isin(three)]
    rows = rows[rows.groupby(key)["pattern"].transform("nunique") == len(three)]
    if rows.empty:
        return []
    logs = rows.assign(log=100 * np.log(rows["latency_us"])).pivot_table(index=key, columns="pattern", values="log")
    gaps = {rival: logs["hybrid"] - logs[rival] for rival in ("block", "balanced")}
    block, balanced = (gap.groupby("seed").mean() for gap in gaps.values())
    inside = np.maximum(np.minimum(block, -balanced), np.minimum(-block, balanced))
    batches = ", ".join(str(batch) for batch in logs.index.unique("batch"))
    tested = ", ".join(f"{100 * sparsity:g}" for sparsity in logs.index.unique("target_sparsity"))
    remark = f"mean over {tested} % sparsity and batches of {batches}"
    found = [Decision(4, device, comparison, inside, LATENCY_UNIT, remark, latencies=rows)]
    for rival, gap in gaps.items():
        two = rows[rows["pattern"].isin(["hybrid", rival])]
        parts = {f"hybrid − {rival}": (gap, two)}
        for batch, values in gap.groupby("batch"):
            parts[f"hybrid − {rival} at batch {batch}"] = values, two[two["batch"] == batch]
        for name, (values, behind) in parts.items():
            slower = values.groupby("seed").mean()
            words = _in_words(slower)
            found.append(Decision(4, device, name, slower, LATENCY_UNIT, words, latencies=behind, decides=False))
    return found


def _at_equal_latency(dataset: str, group: pd.DataFrame, rival: str, latency: pd.DataFrame | None) -> list[Decision]:
    """Claim 6: hybrid's accuracy, and the one that `rival` has at hybrid's latency, for each device and batch.

    The latency of a pattern and sparsity is the median of its timed networks. Between two tested sparsities the
    rival's accuracy is taken as linear in the logarithm of its latency; hybrids faster or slower than all that the
    rival was tested at are left out.
    """
    name = f"hybrid − {rival}"
    nothing = Decision(6, dataset, name, NO_DIFFERENCES, "points", UNTIMED)
    if latency is None:
        return [nothing]
    rows = _complete_pairs(group, rival)
    timed = _timed(latency, *group[["model", "width"]].iloc[0])
    timed = timed[timed["pattern"].isin(["hybrid", rival]) & timed["target_sparsity"].isin(rows["target_sparsity"])]
    if timed.loc[timed["pattern"] == rival, "target_sparsity"].nunique() < 2:
        remark = f"{rival} at two sparsities or more, trained and timed, is needed to know its accuracy at a latency"
        return [replace(nothing, remark=remark)]
    return [
        _at_latencies(replace(nothing, comparison=f"{name} at batch {batch}, {device.upper()}"), rival, rows, of_batch)
        for (device, batch), of_batch in timed.groupby(["device", "batch"])
    ]


def _at_latencies(nothing: Decision, rival: str, rows: pd.DataFrame, timed: pd.DataFrame) -> Decision:
    logs = np.log(timed.groupby(["pattern", "target_sparsity"])["latency_us"].median())
    own = logs.get("hybrid", pd.Series(dtype=float))
    own = own[own.index >= DECIDED_FROM]
    ends = {"faster": own < logs[rival].min(), "slower": own > logs[rival].max()}
    remarks = [
        f"hybrid of {_percents(own.index[out])} is {how} than any {rival}" for how, out in ends.items() if any(out)
    ]
    within = own[~ends["faster"] & ~ends["slower"]]
    if within.empty:
        return replace(nothing, remark="; ".join(remarks or ["hybrid was not timed"]))
    gains = {}
    for seed, accuracy in rows.set_index(["pattern", "target_sparsity"]).groupby("seed")["accuracy_pct"]:
        points = pd.DataFrame({"log": logs[rival], "accuracy": accuracy[rival]}).dropna().sort_values("log")
        gains[seed] = np.mean(accuracy["hybrid"][within.index] - np.interp(within, points["log"], points["accuracy"]))
    remark = "; ".join([f"mean over hybrids of {_percents(within.index)} sparsity", *remarks])
    return replace(nothing, differences=pd.Series(gains), remark=remark, accuracies=rows, latencies=timed)


def _percents(sparsities: pd.Index) -> str:
    return ", ".join(f"{100 * sparsity:g}" for sparsity in sparsities) + " %"


def _in_words(slower: pd.Series) -> str:
    """What a difference in latency, hybrid minus rival, means; only the interval may say that there is one."""
    _, low, high = interval(slower)
    return {"supported": "hybrid is slower", "contradicted": "hybrid is faster"}.get(verdict(low, high), "not decided")
