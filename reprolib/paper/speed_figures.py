"""Figures and tables of measured latencies, each a pure function of a tidy table."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from reprolib.paper import analysis
from reprolib.paper.drawing import data_title, label, method_line, nothing, ordered, sparsity_axis, style

DENSE = "#333333"
DENSE_FILLS = ("#333333", "white", "#BBBBBB")  # the best dense path, our kernels, the other type
NO_NETWORKS = "no networks of this width and these patterns were timed: make bench does that"


def roofline(layers: pd.DataFrame, sparsity: float, ceilings: tuple[float, float] | None = None) -> Figure:
    """Layers (see `analysis.layers`): measured GFLOP/s over computed intensity, dense and at one target sparsity.

    `ceilings` are GFLOP/s and GB/s that the same machine reaches at most; below them lies the roof.
    """
    if layers.empty:
        return nothing("no single layers were timed: make bench does that, for full VGG-16")
    kernel_type = layers.loc[layers["ours"], "dtype"].iloc[0]
    dense = layers[~layers["ours"] & (layers["dtype"] == kernel_type)]
    pruned = layers[layers["ours"] & (layers["target_sparsity"] == sparsity)]
    figure, axis = plt.subplots(figsize=(9.5, 5.6), layout="constrained")
    axis.set(xscale="log", yscale="log")
    axis.plot(dense["intensity"], dense["gflop_per_s"], "*", color=DENSE, markersize=12, label="dense")
    for method in ordered(pruned["pattern"].unique()):
        rows = pruned[pruned["pattern"] == method]
        color, marker = style(method)
        axis.plot(
            rows["intensity"],
            rows["gflop_per_s"],
            marker,
            color=color,
            markersize=7.5,
            markeredgecolor="white",
            label=label(method),
        )
    if ceilings:
        flops, bytes_ = ceilings
        knee, right = flops / bytes_, axis.get_xlim()[1]
        left = min(axis.get_xlim()[0], knee / 3)
        axis.plot([left, knee, right], [bytes_ * left, flops, flops], color="#777777", linewidth=1.5, zorder=1)
        axis.set_xlim(left, right)
        note = {"textcoords": "offset points", "fontsize": "small", "color": "#555555"}
        axis.annotate(f"matrix product: {flops:.0f} GFLOP/s", (knee, flops), (0, 5), **note)
        axis.annotate(f"copy: {bytes_:.0f} GB/s", (left, bytes_ * left), (16, 0), **note)
    _log_ticks(axis.xaxis)
    _log_ticks(axis.yaxis)
    axis.set(
        xlabel="FLOP per byte of input, output and stored weights (computed)",
        ylabel="GFLOP/s of useful work (measured time)",
        title=f"convolutions of VGG-16, batch {layers['batch'].iloc[0]}, {kernel_type}: "
        f"dense and {100 * sparsity:g} % sparse\n{machine(layers)}",
    )
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def latency_vs_sparsity(networks: pd.DataFrame) -> Figure:
    """Measured speedup over the best dense path against sparsity (see `analysis.networks`); one panel per batch.

    Points are medians, bars quartiles. Lines across: the dense rivals of each type, and our own kernels without zeros.
    """
    batches = sorted(networks["batch"].unique())
    figure, axes = plt.subplots(
        1, len(batches), figsize=(4.3 * len(batches) + 2, 4.8), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, batch in zip(axes[0], batches, strict=True):
        rows = networks[networks["batch"] == batch]
        pruned = rows[rows["pattern"] != "dense"]
        for (text, row), dashes in zip(_dense_ways(rows).items(), ("-", ":", "--", "-."), strict=False):
            axis.axhline(row["speedup"], color=DENSE, linewidth=1.3, linestyle=dashes, label=text, zorder=1)
        methods = ordered(pruned["pattern"].unique())
        for place, method in enumerate(methods):
            points = pruned[pruned["pattern"] == method].sort_values("target_sparsity")
            nudge = np.exp(0.03 * (place - (len(methods) - 1) / 2))
            low, high = points["speedup"] - points["speedup_q1"], points["speedup_q3"] - points["speedup"]
            method_line(axis, method, (1 - points["target_sparsity"]) / nudge, points["speedup"], yerr=[low, high])
        sparsity_axis(axis, sorted(pruned["target_sparsity"].unique()))
        axis.set_yscale("log", base=2)
        axis.set(title=f"batch {batch}", xlabel="")
    _speedup_ticks(axes[0, 0].yaxis)
    axes[0, 0].set_ylabel("speedup over the best dense path (measured)")
    axes[0, -1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.supxlabel("sparsity of the pruned layers (%), log scale of density", fontsize="medium")
    figure.suptitle(f"{networks['name'].iloc[0]}, {machine(networks)}", fontsize="medium")
    return figure


def _dense_ways(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """The dense rows of one batch by what to call them, the reference of all speedups first."""
    dense = rows[rows["pattern"] == "dense"].sort_values("ours")
    kernel_type = rows.loc[rows["ours"], "dtype"].iloc[0]
    ways = {}
    for _, row in dense.sort_values("dtype", key=lambda dtype: dtype != kernel_type, kind="stable").iterrows():
        ways["our kernels, no zeros" if row["ours"] else f"best dense {row['dtype']}"] = row
    return ways


def latency_table(networks: pd.DataFrame) -> pd.DataFrame:
    """Texts "latency (speedup)" of whole networks: rows are batch and pattern, columns target sparsities."""
    order = {name: n for n, name in enumerate(["dense", *ordered(networks["pattern"])])}
    texts = {}
    for batch, rows in networks.groupby("batch"):
        for text, row in _dense_ways(rows).items():
            texts[f"batch {batch}, {text}", 0.0] = row
        pruned = rows[rows["pattern"] != "dense"].sort_values("pattern", key=lambda names: names.map(order))
        for _, row in pruned.iterrows():
            texts[f"batch {batch}, {row['pattern']}: {row['spec']}", row["target_sparsity"]] = row
    index = list(dict.fromkeys(name for name, _ in texts))
    columns = sorted({sparsity for _, sparsity in texts})
    table = pd.DataFrame("", index=index, columns=columns)
    for (name, sparsity), row in texts.items():
        table.loc[name, sparsity] = f"{duration(row['latency_us'])} ({row['speedup']:.2f}×)"
    return table.rename(columns=lambda sparsity: f"{100 * sparsity:g} %")


def budget_table(latency: pd.DataFrame, accuracy: pd.DataFrame, budgets_us: dict[int, list[float]]) -> pd.DataFrame:
    """Which network for which budget, by `analysis.recommend`: for each batch the most accurate one in so many µs.

    Texts, a row per batch and budget. Columns: the network, its measured latency, and its test accuracy in percent
    (mean ± SD over seeds).
    """
    table = {}
    for batch, budgets in budgets_us.items():
        for budget_us in budgets:
            best = analysis.recommend(latency, accuracy, batch, budget_us)
            pruned = f"{label(best['pattern'])}, {100 * best['target_sparsity']:g} %"
            deviation = "" if np.isnan(best["accuracy_sd"]) else f" ± {best['accuracy_sd']:.2f}"
            table[f"{batch} image{'s' * (batch > 1)}, {duration(budget_us)}"] = {
                "the most accurate network": "dense" if best["pattern"] == "dense" else pruned,
                "number type": best["dtype"],
                "takes": duration(best["latency_us"]),
                "right, %": f"{best['accuracy_pct']:.2f}{deviation}",
            }
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("at most")


def condition_table(latency: pd.DataFrame) -> pd.DataFrame:
    """Texts of what threads and caches do to whole networks, out of ``latency.csv``: a row per batch and network.

    Columns are numbers of threads, and swept caches, where they were timed. Empty where none of that was.
    """
    rows = latency[latency["scope"] == "conditions"]
    if rows.empty:
        return pd.DataFrame()
    conditions = list(dict.fromkeys(rows["implementation"].str.rsplit(", ", n=1).str[1]))
    place = {name: n for n, name in enumerate(["dense", *ordered(rows["pattern"])])}
    order = {"batch": lambda batches: batches, "pattern": lambda names: names.map(place)}
    rows = rows.sort_values(["batch", "pattern"], key=lambda column: order[column.name](column))
    pruned = rows["pattern"] + ", " + (100 * rows["target_sparsity"]).map("{:g} %".format)
    named = rows["implementation"].str.rsplit(", ", n=1, expand=True)
    network = pruned.where(rows["pattern"] != "dense", "dense: " + named[0])
    names = network + ", batch " + rows["batch"].astype(str)
    texts = pd.DataFrame({"network": names, "condition": named[1], "text": rows["latency_us"].map(duration)})
    table = texts.pivot(index="network", columns="condition", values="text").fillna("")
    return table.loc[names.unique(), conditions].rename_axis(index=None, columns=None)


def duration(microseconds: float) -> str:
    """Three digits and a unit: 45.6 µs, 1.23 ms, 789 ms, 1.23 s."""
    value, unit = next(
        (microseconds / size, unit)
        for size, unit in ((1, "µs"), (1e3, "ms"), (1e6, "s"))
        if microseconds < 999.5 * size
    )
    return f"{value:#.3g}".rstrip(".") + f" {unit}"


def layer_heatmap(layers: pd.DataFrame, sparsity: float) -> Figure:
    """Measured speedup of single layers over the best dense path at one target sparsity: layers by patterns."""
    rows = layers[layers["ours"] & layers["target_sparsity"].isin([0.0, sparsity])]
    grid = rows.pivot_table(index="name", columns="pattern", values="speedup", sort=False)
    grid = grid[[name for name in ["dense", *ordered(grid.columns)] if name in grid]]
    grid = grid.rename(columns=lambda name: "no zeros" if name == "dense" else label(name).replace(" ", "\n"))
    bound = np.abs(np.log2(grid.to_numpy())).max()
    figure, axis = plt.subplots(figsize=(1.05 * grid.shape[1] + 3, 0.45 * len(grid) + 1.7), layout="constrained")
    sns.heatmap(
        np.log2(grid),
        annot=grid.map("{:.1f}×".format),
        fmt="",
        cmap="PuOr",
        vmin=-bound,
        vmax=bound,
        linewidths=1.5,
        cbar_kws={"label": "speedup", "format": FuncFormatter(lambda value, _: f"{2**value:.2g}×")},
        ax=axis,
    )
    axis.set(xlabel="", ylabel="layer: channels, map")
    axis.set_title(
        f"batch {layers['batch'].iloc[0]}, {100 * sparsity:g} % sparse, measured on {machine(layers)}",
        fontsize="medium",
    )
    axis.tick_params(axis="y", rotation=0)
    return figure


def accuracy_vs_latency(points: pd.DataFrame, front: Callable[[pd.DataFrame], pd.DataFrame]) -> Figure:
    """Accuracy of trained networks over their measured latency (see `analysis.accuracy_and_latency`).

    A row per data set, a panel per batch. Points are means, the bars standard deviations over seeds; the steps join
    what `front` returns of a panel's points.
    """
    if points.empty:
        return nothing(NO_NETWORKS)
    grid = points.groupby(["dataset", "batch"], sort=True)
    datasets, batches = points["dataset"].unique(), sorted(points["batch"].unique())
    figure, axes = plt.subplots(
        len(datasets),
        len(batches),
        figsize=(4.4 * len(batches) + 2, 4.6 * len(datasets) + 0.3),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for (dataset, batch), rows in grid:
        axis = axes[list(datasets).index(dataset), batches.index(batch)]
        rows = rows.assign(latency_ms=rows["latency_us"] / 1e3)
        axis.set_xscale("log")
        for method in ordered(rows["pattern"].unique()):
            line = rows[rows["pattern"] == method].sort_values("target_sparsity")
            method_line(axis, method, line["latency_ms"], line["accuracy_pct"], yerr=line["accuracy_sd"])
        for (text, row), fill in zip(_dense_ways(rows).items(), DENSE_FILLS, strict=False):
            axis.plot(row["latency_ms"], row["accuracy_pct"], **_star(fill), label=text)
        axis.margins(0.1)
        best = front(rows)
        right = axis.get_xlim()[1]
        x, y = [*best["latency_ms"], right], [*best["accuracy_pct"], best["accuracy_pct"].iloc[-1]]
        axis.step(x, y, where="post", color="#777777", linewidth=1, zorder=1, label="front: not beaten")
        axis.set_xlim(right=right)
        _log_ticks(axis.xaxis)
        axis.set(title=f"{data_title(dataset)}, batch {batch}", xlabel="latency of a batch (ms), measured")
    for row in axes:
        row[0].set_ylabel("test accuracy (%)")
    axes[0, -1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    targets = sorted(set(points.loc[points["pattern"] != "dense", "target_sparsity"]), reverse=True)
    tested = ", ".join(f"{100 * target:g}" for target in targets)
    figure.supxlabel(f"points of a line from bottom to top: {tested} % sparse, where tested", fontsize="medium")
    figure.suptitle(f"{points['name'].iloc[0]}, {machine(points)}", fontsize="medium")
    return figure


def theoretical_vs_measured(points: pd.DataFrame) -> Figure:
    """Measured speedup over the one that FLOPs promise (see `analysis.accuracy_and_latency`); one panel per batch."""
    if points.empty:
        return nothing(NO_NETWORKS)
    points = points[points["dataset"] == points["dataset"].iloc[0]]  # the data set changes neither of them
    batches = sorted(points["batch"].unique())
    figure, axes = plt.subplots(
        1, len(batches), figsize=(3.9 * len(batches) + 2, 4), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, batch in zip(axes[0], batches, strict=True):
        rows = points[points["batch"] == batch]
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        for method in ordered(rows["pattern"].unique()):
            line = rows[rows["pattern"] == method].sort_values("theoretical_speedup")
            method_line(axis, method, line["theoretical_speedup"], line["speedup"])
        for (text, row), fill in zip(_dense_ways(rows).items(), DENSE_FILLS, strict=False):
            axis.plot(row["theoretical_speedup"], row["speedup"], **_star(fill), label=text)
        axis.axline((1, 1), (2, 2), color="#777777", linewidth=1, zorder=1, label="as FLOPs promise")
        _speedup_ticks(axis.xaxis)
        axis.set(title=f"batch {batch}", xlabel="speedup from FLOPs (computed)")
    _speedup_ticks(axes[0, 0].yaxis)
    axes[0, 0].set_ylabel("speedup (measured)")
    axes[0, -1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{points['name'].iloc[0]}, {machine(points)}", fontsize="medium")
    return figure


def _star(fill: str) -> dict:
    return {
        "marker": "*",
        "markersize": 13,
        "markerfacecolor": fill,
        "markeredgecolor": DENSE,
        "linestyle": "",
        "zorder": 4,
    }


def machine(rows: pd.DataFrame) -> str:
    """What the rows were measured on, for a title."""
    hardware, device, threads = rows[["hardware", "device", "threads"]].iloc[0]
    return f"{hardware}, {threads} thread{'s' if threads > 1 else ''}" if device == "cpu" else hardware


def _speedup_ticks(axis: matplotlib.axis.Axis) -> None:
    """Powers of two, with an ×; where fewer than two octaves are in view, quarters of them between."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(base=2, subs=(1,) if high > 4 * low else (1, 1.25, 1.5, 1.75)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axis.set_minor_locator(NullLocator())


def _log_ticks(axis: matplotlib.axis.Axis) -> None:
    """Plain, round numbers on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
