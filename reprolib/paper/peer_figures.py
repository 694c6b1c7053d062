"""Our kernels beside the engines of other makers: a table and a figure, each a pure function of ``latency.csv``.

    python -m reprolib.paper.peer_figures laptop

prints the table of what ``make bench-peers SHORT=1`` measured for a profile.
"""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from reprolib.bench.peers import USES_ZEROS
from reprolib.bench.rivals import SPARSE, SPARSE_BF16
from reprolib.experiments import Channels, records
from reprolib.files import paths
from reprolib.paper.drawing import label, mean_sd, ordered, style
from reprolib.paper.speed_figures import DENSE, duration, machine

NOTE = {"textcoords": "offset points", "va": "center", "fontsize": "small"}
NOTE["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # no grid line through the number
CHANNELS = Channels.method
CONTEST = ["scope", "name", "batch", "seed"]  # what was measured together


def peer_rows(latency: pd.DataFrame, sparsity: float = 0.9) -> pd.DataFrame:
    """Dense networks, and those pruned to the target `sparsity` that our kernels and a peer ran, on the same weights.

    Out of ``latency.csv``: all rows of those contests that hold both, in the order of the table. Additional columns:
    ours (run by our kernels); over_ours (the latency over that of our fp32 kernels on the same weights, NaN for dense
    ones). Empty where no such peer was timed.
    """
    both = latency["implementation"].str.startswith(USES_ZEROS) & (latency["target_sparsity"] == sparsity)
    rows = latency.merge(latency.loc[both, CONTEST].drop_duplicates(), on=CONTEST)
    rows = rows[rows["target_sparsity"].isin([0.0, sparsity])]
    rows = rows.assign(ours=rows["implementation"].isin([SPARSE, SPARSE_BF16]))
    ours = rows[(rows["implementation"] == SPARSE) & (rows["pattern"] != "dense")].set_index([*CONTEST, "pattern"])[
        "latency_us"
    ]
    rows = rows.join(ours.rename("ours_us"), on=[*CONTEST, "pattern"])
    rows["over_ours"] = rows["latency_us"] / rows.pop("ours_us")
    place = {name: n for n, name in enumerate(["dense", *ordered(rows["pattern"])])}
    order = {"pattern": lambda names: names.map(place), "dtype": lambda names: names != "fp32"}
    return rows.sort_values(
        ["pattern", "ours", "dtype", "implementation", "batch"],
        key=lambda column: order.get(column.name, lambda same: same)(column),
        ignore_index=True,
    )


def measured(profile: str) -> pd.DataFrame:
    """`peer_rows` of the profile's short table, which docs show; without it, of ``latency.csv``; empty without both."""
    for path in (paths.short_latency_csv(profile), paths.latency_csv(profile)):
        rows = peer_rows(records.read_csv(path)) if path.exists() else pd.DataFrame()
        if len(rows):
            return rows
    return pd.DataFrame()


def peer_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Texts of `peer_rows`: a row per engine or pattern and engine, a column per batch; a peer's ratio is over ours."""
    texts = rows["latency_us"].map(duration)
    compared = rows["over_ours"].notna() & (rows["implementation"] != SPARSE)
    ratio = rows["over_ours"].map(" ({:.2f}× ours)".format).where(compared, "")
    named = pd.DataFrame({"way": _names(rows), "batch": rows["batch"], "text": texts + ratio})
    table = named.pivot(index="way", columns="batch", values="text").loc[named["way"].unique()].fillna("")
    return table.rename(columns="batch {}".format).rename_axis(index=None, columns=None)


def _names(rows: pd.DataFrame) -> pd.Series:
    engines = rows["implementation"].where(~rows["ours"], "our kernels")
    engines = engines.mask(rows["ours"] & (rows["pattern"] == "dense"), "our kernels, no zeros")
    engines = engines.mask(rows["implementation"] == SPARSE_BF16, "our kernels in bf16")
    pruned = rows["pattern"].map(label) + ", " + (100 * rows["target_sparsity"]).map("{:g} %".format)
    dense = "dense " + rows["dtype"]
    return dense.where(rows["pattern"] == "dense", pruned) + ": " + engines


def peer_latency(rows: pd.DataFrame) -> Figure:
    """Measured latencies of `peer_rows`: dense engines above, below them pruned weights in two; a panel per batch.

    Points are medians, bars quartiles. The number on a line is the peer's latency over ours.
    """
    batches = sorted(rows["batch"].unique())
    dense, pruned = rows[rows["pattern"] == "dense"], rows[rows["pattern"] != "dense"]
    lines = [*_names(dense).unique(), *ordered(pruned["pattern"])]
    figure, axes = plt.subplots(
        1,
        len(batches),
        figsize=(4 * len(batches) + 2.4, 0.36 * len(lines) + 1.9),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis, batch in zip(axes[0], batches, strict=True):
        axis.set_xscale("log")
        for name, row in zip(_names(dense), dense.itertuples(), strict=True):
            if row.batch == batch:
                _point(axis, row, lines.index(name), DENSE, "*", filled=row.ours)
        for pattern, pair in pruned[pruned["batch"] == batch].groupby("pattern"):
            y, (color, marker) = lines.index(pattern), style(pattern)
            for row in pair.itertuples():
                small = row.implementation == SPARSE_BF16
                _point(axis, row, y, color, "|" if small else marker, filled=row.ours)
            theirs, ours = pair[~pair["ours"]], pair[pair["implementation"] == SPARSE]
            if len(theirs) and len(ours):
                ends = [ours["latency_us"].iloc[0] / 1e3, theirs["latency_us"].iloc[0] / 1e3]
                axis.plot(ends, [y, y], color=color, linewidth=1.2, zorder=1)
                text = f"{theirs['over_ours'].iloc[0]:.2f}×"
                axis.annotate(text, (pair["latency_q3_us"].max() / 1e3, y), (7, 0), **NOTE)
        axis.axhline(len(lines) - len(ordered(pruned["pattern"])) - 0.5, color="#777777", linewidth=0.8)
        axis.margins(x=0.18)
        left, right = axis.get_xlim()
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if right < 50 * left else (1,)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set(title=f"batch {batch}", xlabel="latency of a batch (ms), measured")
    names = [label(name) for name in lines]
    axes[0, 0].set_yticks(range(len(lines)), names)
    axes[0, 0].set_ylim(len(lines) - 0.5, -0.5)
    peer = pruned.loc[~pruned["ours"], "implementation"].iloc[0]
    ways = [("o", "#777777", "our kernels"), ("o", "white", peer)]
    if (rows["implementation"] == SPARSE_BF16).any():
        ways.insert(1, ("|", "#777777", "our kernels in bf16"))
    for marker, face, text in ways:
        axes[0, -1].plot([], [], marker, color="#777777", markerfacecolor=face, label=text, linestyle="")
    axes[0, -1].legend(
        title=f"{100 * pruned['target_sparsity'].iloc[0]:g} % sparse; on lines:\n{peer.split()[0]} over ours",
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1, 1),
    )
    figure.suptitle(f"{rows['name'].iloc[0]}, {machine(rows)}", fontsize="medium")
    return figure


def _point(axis: plt.Axes, row: tuple, y: int, color: str, marker: str, filled: bool) -> None:
    median, low, high = (us / 1e3 for us in (row.latency_us, row.latency_q1_us, row.latency_q3_us))
    axis.errorbar(
        median,
        y,
        xerr=[[median - low], [high - median]],
        color=color,
        marker=marker,
        markersize={"*": 10, "|": 12}.get(marker, 7),
        markerfacecolor=color if filled else "white",
        linestyle="",
        linewidth=1,
        zorder=3,
    )


def network_tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """`peer_table` of each network, by its name."""
    return {name: peer_table(part) for name, part in rows.groupby("name", sort=False)}


def measured_trained(profile: str) -> pd.DataFrame:
    """`trained_table` of a profile; empty where its trained networks were not timed."""
    path = paths.trained_latency_csv(profile)
    if not path.exists():
        return pd.DataFrame()
    return trained_table(records.read_csv(path), records.read_csv(paths.accuracy_csv(profile)))


def trained_table(latency: pd.DataFrame, accuracy: pd.DataFrame) -> pd.DataFrame:
    """Texts of ``latency-trained.csv`` beside ``accuracy.csv``: a row per network and way to run it, in fp32.

    Columns: test accuracy in percent (mean ± SD over seeds), megabytes of the file (of the timed seed), and a latency
    per batch. Dense networks, and those without channels, run in the engine that is fastest for the batch, by its name.
    """
    accuracy = accuracy.fillna({"target_sparsity": 0.0})
    right = accuracy.groupby(["pattern", "target_sparsity"])["accuracy_pct"].agg(mean_sd)
    rows = latency[
        (latency["dtype"] == "fp32") & ((latency["pattern"] != "dense") | (latency["implementation"] != SPARSE))
    ]
    for_dense = rows["pattern"].isin(["dense", CHANNELS])
    rows = rows.assign(
        way=rows["implementation"].replace(SPARSE, "our kernels").mask(for_dense, "the fastest dense engine"),
        share=rows["target_sparsity"],
        text=rows["latency_us"].map(duration)
        + (" (" + rows["implementation"].str.replace(r",.*| \d.*", "", regex=True) + ")").where(for_dense, ""),
    )
    key = ["pattern", "share", "way", "batch"]
    fastest = rows.loc[rows.groupby(key)["latency_us"].idxmin()].set_index(key)
    place = {pattern: n for n, pattern in enumerate(["dense", *ordered(rows["pattern"])])}
    table = {}
    for pattern, share, way in sorted(
        {each[:3] for each in fastest.index}, key=lambda each: (place[each[0]], each[1:])
    ):
        what = fastest.loc[pattern, share, way]
        size = what["file_bytes"].max()
        name = pattern if pattern == "dense" else f"{label(pattern)}, {100 * share:g} %"
        table[f"{name}: {way}"] = {
            "right, %": right[pattern, share],
            "file, MB": f"{size / 1e6:.2f}" if size > 0 else "",
        } | {f"batch {batch}": text for batch, text in what["text"].items()}
    return pd.DataFrame.from_dict(table, orient="index")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The tables of make bench-peers SHORT=1, bench-networks, bench-trained."
    )
    parser.add_argument("profile")
    parser.add_argument("--networks", action="store_true", help="those of larger networks")
    parser.add_argument("--trained", action="store_true", help="that of trained networks")
    arguments = parser.parse_args()
    if arguments.trained:
        table = measured_trained(arguments.profile)
        print(table.to_markdown() if len(table) else "")
        return
    found = (paths.networks_latency_csv if arguments.networks else paths.short_latency_csv)(arguments.profile)
    if found.exists():  # not where the benchmark ran out of time
        for name, table in network_tables(peer_rows(records.read_csv(found))).items():
            print(f"{name}\n\n{table.to_markdown()}\n")


if __name__ == "__main__":
    main()
