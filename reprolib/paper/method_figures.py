"""Figures of the method: masks, and the course of a training."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from reprolib.patterns import Hybrid, gemm_view


def mask_anatomy(weight: torch.Tensor, pattern: Hybrid, sparsity: float) -> Figure:
    """The fine mask, the coarse mask and their AND, in GEMM view, each with the sparsity it achieves."""
    fine, coarse = pattern.halves(weight, sparsity)
    panels = {f"{pattern.fine}": fine, f"{pattern.coarse}": coarse, "AND": pattern.mask(weight, sparsity)}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    for axis, (title, mask) in zip(axes, panels.items(), strict=True):
        draw_mask(mask, axis, title)
        axis.label_outer()
        axis.set_xlabel("")
    figure.supxlabel("column of the GEMM view (tap, channel)", fontsize="medium")
    return figure


def matrix_table(weight: torch.Tensor) -> Styler:
    """A small weight in GEMM view as a shaded table; a dot stands for zero."""
    shown = pd.DataFrame(gemm_view(weight).numpy())
    return shown.style.format(lambda value: f"{value:g}" if value else "·").background_gradient("Blues", axis=None)


def draw_mask(mask: torch.Tensor, axis: plt.Axes, title: str = "") -> None:
    """Draw a mask in GEMM view: dark = kept."""
    matrix = gemm_view(mask).cpu().numpy()
    axis.imshow(matrix, cmap=ListedColormap(["#f2f0eb", "#1f4e79"]), aspect="auto", interpolation="nearest", vmin=0)
    axis.set(
        xlabel="column of the GEMM view (tap, channel)",
        ylabel="output channel",
        title=f"{title}\n{100 * (1 - matrix.mean()):.1f} % sparse".strip(),
    )
    axis.grid(False)


def training_curves(curves: dict[str, list[dict]]) -> Figure:
    """Loss and validation accuracy over epochs; one line per named curve."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for name, curve in curves.items():
        frame = pd.DataFrame(curve)
        left.plot(frame["epoch"], frame["loss_train"], marker=".", label=name)
        right.plot(frame["epoch"], frame["accuracy_validation_pct"], marker=".", label=name)
    left.set(xlabel="epoch", ylabel="training loss (cross-entropy)", yscale="log")
    right.set(xlabel="epoch", ylabel="validation accuracy (%)")
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
    if len(curves) > 1:
        right.legend(frameon=False, fontsize="small")
    return figure
