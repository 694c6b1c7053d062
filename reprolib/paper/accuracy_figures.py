"""Figures and tables of accuracies, ablations and claims, each a pure function of a tidy table."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from reprolib import models
from reprolib.paper.drawing import (
    STYLE,
    VERDICT_COLORS,
    data_title,
    mean_sd,
    method_line,
    nothing,
    ordered,
    sparsity_axis,
)

NOT_TRAINED = "no such networks in the table:\nthe profile asks for none, or make reproduce has not trained them yet"


def accuracy_vs_sparsity(accuracy: pd.DataFrame) -> Figure:
    """Mean ± SD over seeds of the test accuracy against achieved sparsity; one panel per data set.

    The horizontal axis is logarithmic in density. Methods are set apart by a few per cent of density at each target,
    so that their bars can be told apart; the ticks are the targets.
    """
    pruned = accuracy[accuracy["pattern"] != "dense"]
    datasets = list(pruned["dataset"].unique())
    figure, axes = plt.subplots(
        1, len(datasets), figsize=(7.2 * len(datasets), 4.8), squeeze=False, layout="constrained"
    )
    for axis, dataset in zip(axes[0], datasets, strict=True):
        rows = pruned[pruned["dataset"] == dataset]
        _dense_line(axis, accuracy[(accuracy["dataset"] == dataset) & (accuracy["pattern"] == "dense")])
        methods = ordered(rows["pattern"].unique())
        for place, method in enumerate(methods):
            points = rows[rows["pattern"] == method].groupby("target_sparsity")
            density = 1 - points["sparsity"].mean()
            nudge = np.exp(0.025 * (place - (len(methods) - 1) / 2))
            mean, deviation = points["accuracy_pct"].mean(), points["accuracy_pct"].std(ddof=1)
            method_line(axis, method, density / nudge, mean, yerr=deviation)
        sparsity_axis(axis, sorted(rows["target_sparsity"].unique()))
        axis.set(title=_panel_title(rows), ylabel="test accuracy (%)")
    axes[0, -1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _dense_line(axis: plt.Axes, dense: pd.DataFrame) -> None:
    if dense.empty:
        return
    mean, deviation = dense["accuracy_pct"].mean(), dense["accuracy_pct"].std(ddof=1)
    axis.axhline(mean, color="#333333", linewidth=1.2, linestyle=":", label="dense")
    if len(dense) > 1:
        axis.axhspan(mean - deviation, mean + deviation, color="#333333", alpha=0.08, linewidth=0)


def _panel_title(rows: pd.DataFrame) -> str:
    counts = rows.groupby(["pattern", "target_sparsity"], dropna=False)["seed"].nunique()
    seeds = f"{'up to ' if counts.min() < counts.max() else ''}{counts.max()} seeds"
    first = rows.iloc[0]
    network = f"{data_title(first['dataset'])}, {models.title(first['model'], first['width'])}"
    return f"{network}: {f'mean ± SD of {seeds}' if counts.max() > 1 else 'one seed'}"


def accuracy_table(accuracy: pd.DataFrame) -> pd.DataFrame:
    """Texts "mean ± SD" of test accuracy in percent: rows are data set and method, columns target sparsities."""
    rows = accuracy.assign(
        method=accuracy["pattern"] + (": " + accuracy["spec"]).fillna(""),
        place=accuracy["pattern"].map({name: n for n, name in enumerate(["dense", *ordered(accuracy["pattern"])])}),
        target_sparsity=accuracy["target_sparsity"].fillna(0),
    )
    grid = rows.pivot_table(
        index=["dataset", "place", "method"], columns="target_sparsity", values="accuracy_pct", aggfunc=mean_sd
    )
    grid.index = [f"{data_title(dataset)}, {method}" for dataset, _, method in grid.index]
    grid.columns = [f"{100 * target:g} %" for target in grid.columns]
    return grid.fillna("")


# --- Ablations ------------------------------------------------------------------------------------------------------


def bank_block_heatmap(ablations: pd.DataFrame) -> Figure:
    """Mean test accuracy of plain hybrids over bank (K) and block size (R = S) at one sparsity."""
    rows = ablations[ablations["spec"].str.fullmatch(r"Balanced\(\d+\) & Block\(\d+, \d+\)") & plain(ablations)]
    if rows.empty:
        return nothing(NOT_TRAINED)
    rows = rows.astype({"bank": int, "block_rows": int})
    grid = rows.pivot_table(index="bank", columns="block_rows", values="accuracy_pct").sort_index(ascending=False)
    figure, axis = plt.subplots(figsize=(1.25 * grid.shape[1] + 2.6, 0.85 * grid.shape[0] + 1.6), layout="constrained")
    sns.heatmap(
        grid.astype(float),
        annot=True,
        fmt=".2f",
        cmap="cividis",
        linewidths=1.5,
        cbar_kws={"label": "test accuracy (%)"},
        ax=axis,
    )
    axis.set(xlabel="block (rows = columns)", ylabel="bank K", title=f"{_sparsity_text(rows)} sparsity")
    axis.tick_params(axis="y", rotation=0)
    return figure


def plain(frame: pd.DataFrame) -> pd.Series:
    """Rows that vary nothing but the pattern: all else is the default, and there is no penalty."""
    return (
        (frame["score"] == "magnitude")
        & (frame["masks"] == "nested")
        & (frame["schedule"] == "gradual")
        & (frame["ratios"] == "uniform")
        & (frame["retraining"] == "lr-rewinding")
        & (frame["epochs"] == _usual_epochs(frame))
        & (frame["group_lasso"] == 0)
    )


def _usual_epochs(ablations: pd.DataFrame) -> int:
    """The epochs of retraining that most networks have."""
    return int(ablations["epochs"].mode()[0])


def variations(ablations: pd.DataFrame, default_spec: str) -> pd.DataFrame:
    """The rows that differ from the plain `default_spec` in one thing, with a column `variation` that names it."""
    rows, usual_epochs = ablations.copy(), _usual_epochs(ablations)

    def name(row) -> str | None:
        if row["pattern"] != "hybrid" or row["masks"] != "nested":
            return None
        changed = []
        if row["schedule"] != "gradual":
            changed.append(f"{row['schedule']} schedule")
        if row["retraining"] != "lr-rewinding":
            changed.append(row["retraining"])
        if row["ratios"] != "uniform":
            changed.append(f"{row['ratios']} ratios")
        if row["epochs"] != usual_epochs:
            changed.append(f"{row['epochs']} epoch{'s' if row['epochs'] > 1 else ''}")
        if "split=" in row["spec"]:
            changed.append("split " + row["spec"].split("split=")[1].rstrip(")"))
        if row["spec"] == default_spec and not changed:
            return "default"
        return changed[0] if len(changed) == 1 else None

    rows["variation"] = rows.apply(name, axis=1)
    return rows.dropna(subset="variation")


def variation_dots(rows: pd.DataFrame) -> Figure:
    """Test accuracy of each variation (see `variations`), one dot per network, and what it costs: remaining FLOPs.

    The default is a line in both panels: a variation that is more accurate and keeps more FLOPs is no gift.
    """
    if rows.empty:
        return nothing(NOT_TRAINED)
    order = rows.groupby("variation")["accuracy_pct"].mean().sort_values(ascending=False).index
    rows = rows.assign(mflop=rows["flops"] / 1e6, is_default=rows["variation"] == "default")
    figure, axes = plt.subplots(
        1, 2, figsize=(9.6, 0.42 * len(order) + 1.4), width_ratios=[3, 2], sharey=True, layout="constrained"
    )
    labels = {"accuracy_pct": "test accuracy (%)", "mflop": "FLOPs left, one image (MFLOP, theoretical)"}
    for axis, (column, label) in zip(axes, labels.items(), strict=True):
        default = rows.loc[rows["is_default"], column].mean()
        axis.axvline(default, color=STYLE["hybrid"][0], linewidth=1.2, linestyle=":")
        sns.stripplot(
            rows,
            y="variation",
            x=column,
            order=order,
            hue="is_default",
            jitter=False,
            size=8,
            palette={True: STYLE["hybrid"][0], False: "#444444"},
            legend=False,
            ax=axis,
        )
        axis.set(xlabel=label, ylabel="")
        axis.grid(axis="y", alpha=0.4)
    axes[1].set_xlim(0, 1.06 * rows["mflop"].max())
    figure.suptitle(f"hybrid at {_sparsity_text(rows)} sparsity", fontsize="medium")
    return figure


def retraining_budget(rows: pd.DataFrame) -> Figure:
    """Accuracy over epochs of retraining, out of `variations`: validation, which may decide, and test beside it."""
    longer = rows[(rows["variation"] == "default") | rows["variation"].str.contains(r" epochs?$")]
    if longer.empty:
        return nothing(NOT_TRAINED)
    means = longer.groupby("epochs")[["accuracy_validation_pct", "accuracy_pct"]].mean()
    color = STYLE["hybrid"][0]
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    axis.plot(means.index, means["accuracy_validation_pct"], marker="o", color=color, label="validation")
    axis.plot(means.index, means["accuracy_pct"], marker="o", color=color, mfc="white", linestyle="--", label="test")
    axis.axvline(
        longer.loc[longer["variation"] == "default", "epochs"].mean(), color="#888888", linewidth=1, linestyle=":"
    )
    axis.set_xscale("log", base=2)
    axis.set_xticks(means.index, [str(epochs) for epochs in means.index], minor=False)
    title = f"hybrid at {_sparsity_text(longer)} sparsity"
    axis.set(xlabel="epochs of retraining (dotted: the profile's)", ylabel="accuracy (%)", title=title)
    axis.legend(frameon=False)
    return figure


def _sparsity_text(rows: pd.DataFrame) -> str:
    return ", ".join(f"{100 * s:g} %" for s in sorted(rows["target_sparsity"].unique()))


# --- Claims ---------------------------------------------------------------------------------------------------------


def claims_forest(claims: pd.DataFrame, unit: str = "points") -> Figure:
    """Paired differences in one unit with 95 % intervals; the rows that decide are coloured by their verdict."""
    rows = claims[(claims["unit"] == unit) & claims["difference"].notna()].iloc[::-1]
    figure, axis = plt.subplots(figsize=(10, 0.4 * max(len(rows), 2) + 1.7), layout="constrained")
    axis.axvline(0, color="#333333", linewidth=1)
    labels = []
    for place, row in enumerate(rows.itertuples()):
        decides = row.verdict in VERDICT_COLORS
        color = VERDICT_COLORS.get(row.verdict, "#AAAAAA")
        if not np.isnan(row.low):
            axis.plot([row.low, row.high], [place, place], color=color, linewidth=3 if decides else 1.5)
        axis.plot(row.difference, place, "o", color=color, markersize=8 if decides else 5, markeredgecolor="white")
        name = f"claim {row.claim}, {data_title(row.dataset)}:\n{row.comparison}"
        labels.append(name if decides else row.comparison.split(" at ")[-1])
    axis.set_yticks(range(len(rows)), labels)
    axis.set_ylim(-0.7, max(len(rows), 2) - 0.3)  # room for two lines at either end
    for label, row in zip(axis.get_yticklabels(), rows.itertuples(), strict=True):
        label.set_fontweight("bold" if row.verdict in VERDICT_COLORS else "normal")
    shown = [v for v in VERDICT_COLORS if v in set(rows["verdict"])]
    handles = [plt.Line2D([], [], color=VERDICT_COLORS[v], marker="o", linewidth=3, label=v) for v in shown]
    axis.legend(handles=handles, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=max(len(shown), 1))
    what = (
        "hybrid minus rival" if unit == "points" else "bold: distance inside the interval, others: hybrid minus rival"
    )
    axis.set_xlabel(f"{what} ({unit}):\nmean and 95 % interval over seeds")
    axis.grid(axis="y", alpha=0)
    return figure


def claims_table(claims: pd.DataFrame, texts: dict[int, str]) -> pd.DataFrame:
    """The deciding rows of `claims` as texts: claim, data set, comparison, difference with interval, verdict."""
    rows = claims[claims["verdict"].isin(VERDICT_COLORS)]

    def difference(row) -> str:
        if np.isnan(row.difference):
            return "–"
        bounds = "" if np.isnan(row.low) else f" [{row.low:+.2f}, {row.high:+.2f}]"
        return f"{row.difference:+.2f}{bounds} {row.unit}"

    return pd.DataFrame(
        {
            "claim": [f"{row.claim}. {texts[row.claim]}" for row in rows.itertuples()],
            "data": [data_title(row.dataset) for row in rows.itertuples()],
            "comparison": rows["comparison"].to_list(),
            "difference, 95 % interval": [difference(row) for row in rows.itertuples()],
            "seeds": rows["seeds"].to_list(),
            "verdict": rows["verdict"].to_list(),
            "remark": rows["remark"].to_list(),
        }
    ).set_index("claim")
