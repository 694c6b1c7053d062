"""How activations lie in memory, and the memory that they lie in."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

LANES = 16  # float32 in a vector: one AVX-512 register, two of AVX2, four of NEON
KEPT_NUMBERS = 1 << 24  # of a workspace that is far too large for what comes next
SMALL_BATCH = 8  # below it, lanes are pixels instead of images


def interleaved(batch: int) -> int:
    """How many images the layout interleaves for this batch: 16, or 1 for small batches."""
    return LANES if batch >= SMALL_BATCH else 1


def to_layout(images: Tensor, halo: int) -> Tensor:
    """Float images ``[N, C, H, W]`` in the kernels' layout; missing images of the last 16 are zero."""
    batch, channels, height, width = images.shape
    n = interleaved(batch)
    x = workspace("input", (-(-batch // n), channels, height + 2 * halo, width + 2 * halo, n)).zero_()
    inner = x[:, :, halo : halo + height, halo : halo + width]
    whole = batch // n
    inner[:whole] = images[: whole * n].reshape(whole, n, channels, height, width).permute(0, 2, 3, 4, 1)
    if batch % n:
        inner[whole, ..., : batch % n] = images[whole * n :].permute(1, 2, 3, 0)
    return x


def from_layout(x: Tensor, batch: int) -> Tensor:
    """Undo `to_layout` for activations without a halo: a new tensor ``[N, C, H, W]``."""
    groups, channels, height, width, n = x.shape
    return x.permute(0, 4, 1, 2, 3).reshape(groups * n, channels, height, width)[:batch].clone()


_workspaces = threading.local()


def workspace(name: str, shape: tuple[int, ...]) -> Tensor:
    """Float32 memory of this thread that is used again by the next call with the same name: fresh pages are slow.

    Two vectors more than `shape` needs are there behind it: the last vector of a map may be read beyond its end.
    """
    size = math.prod(shape)
    held = vars(_workspaces)
    room = held[name].numel() - 2 * LANES if name in held else -1
    if not size <= room <= max(4 * size, KEPT_NUMBERS):
        with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside of it
            held[name] = torch.empty(size + 2 * LANES, dtype=torch.float32, device="cpu")
    return held[name][:size].view(shape)
