"""Tensors on disk: safetensors, where a tensor that is mostly zeros takes the room of what is left of it."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from reprolib.files.atomic import write_atomically

KEPT, MASK = ".kept", ".mask"
SHAPES, CHECKSUM = "shapes", "crc32"
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch can't write into places of these


def write(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """Write tensors atomically, with `notes` on them. One with at most half of its numbers different from zero is
    stored as two: its other numbers in order, ``<name>.kept``, and where they are, ``<name>.mask``, eight places in a
    byte. Raises ValueError for a name that can't be stored.
    """
    if "__metadata__" in tensors:
        raise ValueError("a tensor named '__metadata__' can't be stored: safetensors keeps that name for itself")
    stored, shapes = {}, {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        kept = tensor != 0
        whole = 2 * int(kept.sum()) > tensor.numel() or tensor.dtype in UNSIGNED
        if whole or {name + KEPT, name + MASK} & set(tensors):
            stored[name] = tensor.clone()  # tensors that share memory are two in the file
        else:
            stored[name + KEPT] = tensor[kept]
            stored[name + MASK] = torch.from_numpy(np.packbits(kept.numpy()))
            shapes[name] = list(tensor.shape)
    head = {SHAPES: json.dumps(shapes), **(notes or {})}
    write_atomically(path, save(stored, head | {CHECKSUM: _checksum(stored, head)}))


def read(path: Path) -> dict[str, Tensor]:
    """The tensors that `write` was given, bit for bit but for the sign of zeros, on the CPU.

    Takes any safetensors file. Raises OSError, and ValueError for a damaged one.
    """
    try:
        with safe_open(path, "pt") as file:
            head = file.metadata() or {}
            # Copies: a tensor of the file would be lost, and the process with it, where somebody writes into the file.
            stored = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
        if _checksum(stored, head) != head.get(CHECKSUM, _checksum(stored, head)):
            raise ValueError("its checksum is another one")
        shapes = json.loads(head.get(SHAPES, "{}"))
        parts = {name + part for name in shapes for part in (KEPT, MASK)}
        tensors = {name: tensor for name, tensor in stored.items() if name not in parts}
        return tensors | {name: _unpacked(stored[name + KEPT], stored[name + MASK], shapes[name]) for name in shapes}
    except OSError:
        raise
    except Exception as problem:  # of such a file nearly any comes
        raise ValueError(f"{path} is damaged, or no file of tensors ({problem!r}): write it again") from None


def notes(path: Path) -> dict[str, str]:
    """The notes of a file. Raises OSError, and ValueError as `read` does."""
    try:
        with safe_open(path, "pt") as file:
            return {name: note for name, note in (file.metadata() or {}).items() if name not in (SHAPES, CHECKSUM)}
    except SafetensorError as problem:
        raise ValueError(f"{path} is damaged, or no file of tensors ({problem!r}): write it again") from None


def _unpacked(values: Tensor, mask: Tensor, shape: list[int]) -> Tensor:
    """Raises ValueError where the parts do not fit each other."""
    count = math.prod(shape)
    if any(type(size) is not int or size < 0 for size in shape) or values.dim() != 1 or mask.dim() != 1:
        raise ValueError(f"{shape} is no shape")
    if mask.dtype != torch.uint8 or len(mask) != -(-count // 8):
        raise ValueError(f"{len(mask)} bytes are no mask of shape {shape}")
    kept = np.unpackbits(mask.numpy(), count=count)
    if int(kept.sum()) != len(values):
        raise ValueError(f"a mask keeps {int(kept.sum())} numbers of {len(values)}")
    flat = torch.zeros(count, dtype=values.dtype)
    flat[torch.from_numpy(kept).bool()] = values
    return flat.reshape(shape)


def _checksum(stored: Mapping[str, Tensor], head: Mapping[str, str]) -> str:
    """Of all names, notes and numbers: finds damage, and no forgery."""
    found = zlib.crc32(json.dumps(sorted(item for item in head.items() if item[0] != CHECKSUM)).encode())
    for name, tensor in sorted(stored.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), found)
    return f"{found:08x}"
