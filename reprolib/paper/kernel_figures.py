"""Small pictures of how pruned weights are stored, and of what a kernel reads."""

from __future__ import annotations

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from reprolib.patterns import gemm_view
from reprolib.sparse.formats import Format

EMPTY, HALO, READ, WRITTEN = "#e6e3dc", "#f6f5f2", "#56B4E9", "#D55E00"  # cells
TAPS = {"left tap": "#56B4E9", "middle tap": "#F0E442", "right tap": "#E69F00"}


def format_picture(packed: dict[str, Format]) -> Figure:
    """Small packed matrices in GEMM view, one panel each. Weights of one stored unit share a colour.

    The number in a cell is the weight's place in the format's array `values`; a stored zero has it in brackets.
    """
    figure, axes = plt.subplots(1, len(packed), figsize=(4.6 * len(packed), 3.2), squeeze=False, layout="constrained")
    palette = np.array([HALO, *sns.color_palette("pastel", 7).as_hex()])
    for axis, (name, form) in zip(axes[0], packed.items(), strict=True):
        places, units = stored_places(form)
        zero = form.unpack().numpy() == 0
        texts = np.where(zero, np.char.add(np.char.add("(", places.astype(str)), ")"), places.astype(str))
        _cells(axis, palette[np.where(units < 0, 0, 1 + units % 7)], np.where(units < 0, "", texts))
        dense = form.shape.numel() * form.values.element_size()
        axis.set_title(f"{name}\n{form}\n{form.storage_bytes} bytes, dense {dense}", fontsize="medium")
        axis.set(xlabel="column", ylabel="output channel")
        axis.label_outer()
    return figure


def stored_places(form: Format) -> tuple[np.ndarray, np.ndarray]:
    """Where each weight of a packed matrix stands in `values`, and the number of its unit there; -1: not stored.

    A unit is what one index of the format finds: a block or a column vector. Both are ``[C_out, columns]``.
    """
    count = torch.arange(1, form.values.numel() + 1).reshape(form.values.shape)
    places = gemm_view(replace(form, values=count).unpack()).numpy() - 1
    return places, np.where(places < 0, -1, places // max(math.prod(form.values.shape[1:]), 1))


def reads_picture(weight: torch.Tensor, channel: int, place: tuple[int, int], size: int) -> Figure:
    """What one output pixel of a 3x3 convolution reads: the remaining weights of its channel, over the input maps.

    `weight` is ``[C_out, C_in, 3, 3]``, maps are `size` x `size` with a halo of zeros around; `place` is the pixel.
    """
    row, column = place
    figure, axes = plt.subplots(
        1, weight.shape[1] + 1, figsize=(2.3 * (weight.shape[1] + 1), 2.9), layout="constrained"
    )
    for number, (axis, taps) in enumerate(zip(axes, weight[channel].numpy(), strict=False)):
        colors, texts = np.full((size + 2, size + 2), HALO), np.full((size + 2, size + 2), "", dtype=object)
        colors[1:-1, 1:-1] = EMPTY
        window = np.s_[row : row + 3, column : column + 3]
        colors[window] = np.where(taps, READ, colors[window])
        texts[window] = [[f"{tap:+.1f}" if tap else "" for tap in line] for line in taps]
        _cells(axis, colors, texts)
        axis.add_patch(Rectangle((column - 0.5, row - 0.5), 3, 3, fill=False, edgecolor=WRITTEN, linewidth=2))
        axis.set(xticks=[], yticks=[], xlabel=f"input channel {number}")
    colors = np.full((size, size), EMPTY)
    colors[row, column] = WRITTEN
    _cells(axes[-1], colors, np.full((size, size), ""))
    axes[-1].set(xticks=[], yticks=[], xlabel=f"output channel {channel}")
    left, all_ = int(weight[channel].count_nonzero()), weight[channel].numel()
    figure.suptitle(
        f"one output pixel: {left} of {all_} weights are left, so it reads {left} pixels", fontsize="medium"
    )
    return figure


def layout_picture(many: torch.Tensor, one: torch.Tensor) -> Figure:
    """The start of the first row of a map in memory, as the portable kernels lay it out, and what taps read of it.

    `many` and `one` are activations in their layout, of 16 images and of one; what they hold, numbers of images and
    of pixels, say, stands in the cells.
    """
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(9.5, 3.9), height_ratios=[4, 2.4], layout="constrained")
    pixels, lanes = many[0, 0, 1, :4].int().numpy(), many.shape[4]
    line = one[0, 0, 1, : lanes + len(TAPS) - 1, 0].int().numpy()[None]
    rows = np.array([*TAPS.values(), EMPTY])
    _cells(upper, np.broadcast_to(rows[:, None], pixels.shape), pixels.astype(str))
    _cells(lower, np.where(line == 0, HALO, EMPTY), line.astype(str))
    for shift, (tap, color) in enumerate(TAPS.items()):
        lower.plot([shift - 0.4, shift + lanes - 0.6], [-0.8 - 0.4 * shift] * 2, color=color, linewidth=5)
        upper.text(lanes - 0.2, shift, tap, va="center", fontsize="small")
        lower.text(lanes + shift - 0.3, -0.8 - 0.4 * shift, tap, va="center", fontsize="x-small")
    upper.set(xticks=[], yticks=range(4), yticklabels=["halo", "pixel 1", "pixel 2", "pixel 3"])
    upper.set_title("batch 16: one vector is one pixel of 16 images (numbers: image; memory goes on row by row)")
    lower.set(xticks=[], yticks=[], ylim=(0.6, -2))
    lower.set_title("batch 1: one vector is 16 neighbouring pixels (numbers: pixel; 0 is the halo)")
    for axis in (upper, lower):
        axis.set_xlim(-0.6, lanes + 4)
        axis.title.set_fontsize("medium")
    return figure


def code_picture(weight: torch.Tensor) -> Figure:
    """A small group ``[output channels, columns]`` beside the code that the CPU engine makes for it.

    Columns and the instructions that they cause share a colour.
    """
    kept = weight.numpy() != 0
    palette = np.array(sns.color_palette("pastel", 8).as_hex())
    column_colors = palette[np.arange(kept.shape[1]) % len(palette)]
    lines, number = [], 0
    for column in np.flatnonzero(kept.any(axis=0)):
        sums = []
        for row in np.flatnonzero(kept[:, column]):
            sums.append(f"sum{row}+=x·w{number}")
            number += 1
        lines.append((column, f"x = column {column:2};  {'; '.join(sums)}"))
    places = np.full(kept.shape, "", dtype=object)
    by_column = np.argwhere(kept.T)
    places[by_column[:, 1], by_column[:, 0]] = [str(i) for i in range(len(by_column))]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=[1, 1.1], layout="constrained")
    _cells(left, np.where(kept, column_colors[None], EMPTY), places)
    left.set(xlabel="column (tap, input channel)", ylabel="output channel = register of a sum")
    left.set_title(f"the mask of a group: {number} kept weights, in the order of the code", fontsize="medium")
    left.set_aspect("auto")
    for i, (column, text) in enumerate(lines):
        style = {"boxstyle": "square,pad=0.25", "facecolor": column_colors[column], "edgecolor": "none"}
        right.text(0, -i, text, family="monospace", fontsize=7, va="center", bbox=style)
    right.set(xlim=(0, 1), ylim=(-len(lines) + 0.4, 0.6))
    right.set_title(f"its code: {len(lines)} loads, {number} multiply-adds, no index, no branch", fontsize="medium")
    right.axis("off")
    return figure


def _cells(axis: plt.Axes, colors: np.ndarray, texts: np.ndarray) -> None:
    """Draw a matrix as cells of the given colours with texts in them."""
    axis.imshow(to_rgba_array(colors.ravel()).reshape(*colors.shape, 4))
    for (row, column), text in np.ndenumerate(texts):
        if text:
            axis.text(column, row, text, ha="center", va="center", fontsize=7)
    axis.set_xticks(np.arange(-0.5, colors.shape[1]), minor=True)
    axis.set_yticks(np.arange(-0.5, colors.shape[0]), minor=True)
    axis.grid(False)
    axis.grid(which="minor", color="white", linewidth=1)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
