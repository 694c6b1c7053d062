"""What measured latencies say: over seeds, beside accuracies, and beside the work that was done."""

from __future__ import annotations

import pandas as pd

from reprolib import models
from reprolib.bench.latency import FULL
from reprolib.bench.rivals import COPY_NUMBERS, PRODUCT_SIDE, SPARSE

SURVEYED = models.title(FULL.model, FULL.width)
VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_SPEEDS = ["latency_us", "latency_q1_us", "latency_q3_us", "speedup", "speedup_q1", "speedup_q3"]


def networks(latency: pd.DataFrame, title: str = "") -> pd.DataFrame:
    """One whole network out of ``latency.csv``: medians over seeds, one row per way to run it.

    `title` is that of `models.title`; by default the network of the survey, else the only one. Of the dense rivals the
    fastest of each type stays. Columns: name, device, hardware, threads, batch, ours (run by our kernels), pattern,
    spec, target_sparsity, dtype, latency_us with its quartiles, speedup with its quartiles (the slow one first).
    """
    rows = latency[latency["scope"] == "network"]
    titles = rows["name"].str.split(",").str[0]  # behind a comma: the size of the images
    rows = _fastest(rows[titles == (title or (SURVEYED if (titles == SURVEYED).any() else titles.iloc[0]))])
    rows = rows.assign(
        speedup_q1=rows["speedup"] * rows["latency_us"] / rows["latency_q3_us"],
        speedup_q3=rows["speedup"] * rows["latency_us"] / rows["latency_q1_us"],
    )
    way = ["name", "device", "hardware", "threads", "batch", "ours", "pattern", "spec", "target_sparsity", "dtype"]
    return rows.groupby(way, as_index=False)[_SPEEDS].median()


def layers(latency: pd.DataFrame, batch: int | None = None) -> pd.DataFrame:
    """Single layers out of ``latency.csv`` at one batch (by default the largest), with what each of them had to do.

    Besides columns of the table: ours (run by our kernels), gflop (2 per stored weight, output pixel and image),
    megabytes (input, output and stored weights without indices, each moved once), intensity (FLOP per byte), all
    three computed from the shapes; and gflop_per_s, computed from gflop and the measured latency. Empty where the
    table holds no layers.
    """
    rows = latency[latency["scope"] == "layer"]
    rows = _fastest(rows[rows["batch"] == (rows["batch"].max() if batch is None else batch)])
    c_in, c_out, size = rows["name"].str.extract(r"(\d+)→(\d+), (\d+)×").astype(float).to_numpy().T
    images, weights = rows["batch"] * size**2, (1 - rows["sparsity"]) * 9 * c_in * c_out
    gflop = 2 * weights * images / 1e9
    megabytes = (images * (c_in + c_out) + weights) * rows["dtype"].map(VALUE_BYTES) / 1e6
    return rows.assign(
        gflop=gflop,
        megabytes=megabytes,
        intensity=1e3 * gflop / megabytes,
        gflop_per_s=1e6 * gflop / rows["latency_us"],
    )


def ceilings(latency: pd.DataFrame) -> tuple[float, float] | None:
    """GFLOP/s of a large matrix product and GB/s of a large copy, as measured beside the layers; None if not."""
    rows = latency[latency["scope"] == "ceiling"].set_index("implementation")
    if rows.empty:
        return None
    device, dtype = rows["device"].iloc[0], rows["dtype"].iloc[0]
    flop, moved = 2 * PRODUCT_SIDE[device] ** 3, 2 * VALUE_BYTES[dtype] * COPY_NUMBERS[device]
    return flop / rows.loc["matrix product", "latency_us"] / 1e3, moved / rows.loc["copy", "latency_us"] / 1e3


def _fastest(rows: pd.DataFrame) -> pd.DataFrame:
    """Our kernels' rows, and of the dense rivals of each type the fastest; peers that run sparse products go."""
    rows = rows.assign(ours=rows["implementation"] == SPARSE, spec=rows["spec"].fillna(""))
    rows = rows[rows["ours"] | (rows["pattern"] == "dense")]
    way = ["name", "batch", "seed", "ours", "pattern", "spec", "target_sparsity", "dtype"]
    return rows.loc[rows.groupby(way, sort=False)["latency_us"].idxmin()]


def accuracy_and_latency(accuracy: pd.DataFrame, latency: pd.DataFrame) -> pd.DataFrame:
    """Trained networks beside untrained ones of the same width, pattern and target sparsity that were timed.

    The rows of `networks` that have a trained counterpart, with columns: dataset, accuracy_pct (mean over seeds) and
    accuracy_sd (NaN for one seed), theoretical_speedup (FLOPs of the dense network over those of the pruned one).
    """
    trained = accuracy.fillna({"target_sparsity": 0.0, "spec": ""})
    trained = trained.groupby(["dataset", "pattern", "spec", "target_sparsity"], as_index=False).agg(
        accuracy_pct=("accuracy_pct", "mean"), accuracy_sd=("accuracy_pct", "std"), flops=("flops", "mean")
    )
    dense = trained[trained["pattern"] == "dense"].set_index("dataset")["flops"]
    trained["theoretical_speedup"] = trained["dataset"].map(dense) / trained.pop("flops")
    return networks(latency, models.title(*accuracy[["model", "width"]].iloc[0])).merge(
        trained, on=["pattern", "spec", "target_sparsity"]
    )


def recommend(latency: pd.DataFrame, accuracy: pd.DataFrame, batch: int, budget_us: float) -> pd.Series:
    """Which network for which budget: the most accurate one whose measured latency of a batch keeps to `budget_us`.

    From ``latency.csv`` and ``accuracy.csv`` of one profile and one data set: the row of `accuracy_and_latency`, dense
    networks included. Raises ValueError where nothing is fast enough, for a batch that was not timed, and for rows of
    several data sets.
    """
    if len(datasets := accuracy["dataset"].unique()) != 1:
        raise ValueError(f"accuracies of {len(datasets)} data sets ({', '.join(datasets)}): choose one")
    points = accuracy_and_latency(accuracy, latency)
    timed = points[points["batch"] == batch]
    if timed.empty:
        raise ValueError(f"no batch of {batch} was timed: there are {', '.join(map(str, points['batch'].unique()))}")
    fast = timed[timed["latency_us"] <= budget_us]
    if fast.empty:
        raise ValueError(f"nothing keeps to {budget_us:g} µs: the fastest takes {timed['latency_us'].min():.0f} µs")
    return fast.sort_values(["accuracy_pct", "latency_us"], ascending=[False, True]).iloc[0]


def pareto_front(points: pd.DataFrame, cost: str = "latency_us", gain: str = "accuracy_pct") -> pd.DataFrame:
    """The points that no other one beats, from the cheapest to the dearest.

    A point is beaten by one that is at least as good in both and better in one; of equal points all stay.
    """
    costs, gains = points[cost].to_numpy(), points[gain].to_numpy()
    as_good = (costs <= costs[:, None]) & (gains >= gains[:, None])
    better = (costs < costs[:, None]) | (gains > gains[:, None])
    return points[~(as_good & better).any(axis=1)].sort_values(cost, kind="stable")
