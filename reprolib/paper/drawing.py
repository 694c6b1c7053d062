"""What all figures and tables share: their look, how they are written, and the hand that a method is drawn with."""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from reprolib.files.atomic import write_atomically
from reprolib.training import data

# One colour and marker per method in every figure (Okabe & Ito's palette, safe for colour-blind readers).
STYLE = {
    "unstructured": ("#999999", "D"),
    "balanced": ("#0072B2", "s"),
    "vector": ("#009E73", "v"),
    "hybrid": ("#D55E00", "o"),
    "block": ("#CC79A7", "^"),
    "two-four-block": ("#5D3A9B", "p"),
    "block-group-lasso": ("#E69F00", "P"),
    "random-hybrid": ("#56B4E9", "X"),
    "channels": ("#8B5A2B", "*"),
}
SPARE_COLORS = sns.color_palette("dark")
VERDICT_COLORS = {"supported": "#009E73", "contradicted": "#D55E00", "undecided": "#777777", "no data": "#BBBBBB"}
DATASETS = {"noisy-digits": "noisy digits", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "cpu": "CPU", "cuda": "GPU"}


def data_title(dataset: str) -> str:
    """A data set's name as figures show it, or a device's."""
    return DATASETS.get(dataset) or data.label(dataset)


def theme() -> None:
    """Set the look of all figures."""
    plt.style.use("default")  # whatever a matplotlibrc says
    sns.set_theme(context="notebook", style="whitegrid", rc={"axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"figure.dpi": 110, "savefig.dpi": 160, "svg.hashsalt": "reprolib", "svg.fonttype": "none"})


def save(figure: Figure, folder: str | Path, name: str) -> None:
    """Write ``name.svg`` and ``name.png`` into a folder, without a date: equal data give equal files.

    Without a folder, an empty text, nothing is written: a notebook that is opened by hand only shows.
    """
    if not folder:
        return
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    write_atomically(Path(folder) / f"{name}.svg", numbered(buffer.getvalue()))
    write_atomically(Path(folder) / f"{name}.png", png(figure))


def numbered(svg: str) -> str:
    """An SVG of matplotlib whose shared parts are called by their number in the file: ``p1``, ``m2``.

    Matplotlib calls a clip by a hash of its corners, as they are before rounding: their last bits differ from machine
    to machine, where all that is drawn is the same.
    """
    names = dict.fromkeys(re.findall(r'\bid="([A-Za-z][0-9a-f]{10})"|url\(#([A-Za-z][0-9a-f]{10})\)', svg))
    numbers = {name: f"{name[0]}{number}" for number, name in enumerate(dict.fromkeys(a or b for a, b in names), 1)}
    return re.sub(r'(id="|#)([A-Za-z][0-9a-f]{10})\b', lambda found: found[1] + numbers.get(found[2], found[2]), svg)


def png(figure: Figure) -> bytes:
    """The figure as the content of a PNG file, without a date or version in it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def save_table(table: pd.DataFrame, folder: str | Path, name: str) -> None:
    """Write a table of texts as ``name.md`` and ``name.tex`` into a folder; without one, write nothing."""
    if not folder:
        return
    write_atomically(Path(folder) / f"{name}.md", table.to_markdown() + "\n")
    escaped = table.rename(columns=_tex, index=_tex).map(_tex)
    write_atomically(Path(folder) / f"{name}.tex", escaped.style.to_latex(hrules=True))


def _tex(value: object) -> str:
    text = str(value).replace("%", r"\%").replace("&", r"\&").replace("_", r"\_").replace("±", r"$\pm$")
    return text.replace("×", r"$\times$").replace("µ", r"$\mu$")


# --- Methods ---------------------------------------------------------------------------------------------------------


def label(method: str) -> str:
    """A method's name as legends show it."""
    return method.replace("two-four", "2:4").replace("-", " ")


def style(method: str) -> tuple:
    """Colour and marker of a method; ``hybrid+`` has the colour of hybrid and a star. Methods of your own get spare
    colours, the same in every figure.
    """
    plain = method.removesuffix("+")
    color, marker = STYLE.get(plain, (SPARE_COLORS[sum(plain.encode()) % len(SPARE_COLORS)], "h"))
    return color, marker if plain == method else "*"


def ordered(methods) -> list[str]:
    """Methods as figures and tables show them, without dense: those of `STYLE`, then others, each before its plus."""
    places = {method: place for place, method in enumerate(STYLE)}
    return sorted(
        set(methods) - {"dense"}, key=lambda method: (places.get(method.removesuffix("+"), len(places)), method)
    )


def method_line(axis: plt.Axes, method: str, x, y, **bars) -> None:
    color, marker = style(method)
    axis.errorbar(
        x,
        y,
        color=color,
        marker=marker,
        markersize=10 if marker == "*" else 6.5,
        markeredgecolor="white",
        linewidth=2.4 if method == "hybrid" else 1.5,
        linestyle="--" if method.startswith("random") else "-",
        capsize=2,
        zorder=3 if method == "hybrid" else 2,
        label=label(method),
        **bars,
    )


def sparsity_axis(axis: plt.Axes, targets: list[float]) -> None:
    axis.set_xscale("log")
    axis.set_xlim((1 - targets[0]) * 1.25, (1 - targets[-1]) / 1.25)
    axis.set_xticks([1 - target for target in targets])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda density, _: f"{100 * (1 - density):.4g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("sparsity of the pruned layers (%), log scale of density")


def mean_sd(values: pd.Series) -> str:
    """ "mean ± SD", or the value alone if there is one."""
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")


def nothing(text: str) -> Figure:
    """A figure that says what is missing."""
    figure, axis = plt.subplots(figsize=(8, 1))
    axis.set_axis_off()
    axis.text(0.5, 0.5, text, ha="center", va="center")
    return figure
