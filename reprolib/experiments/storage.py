"""Weights on disk: safetensors, where a tensor that is mostly zeros takes the room of what is left of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from reprolib.files.atomic import write_atomically

KEPT, MASK = ".kept", ".mask"
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch can't write into places of these


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors atomically. One with at most half of its numbers different from zero is stored as two: its other
    numbers in order, ``<name>.kept``, and where they are, ``<name>.mask``, eight places in a byte.
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
    write_atomically(path, save(stored, {"shapes": json.dumps(shapes)}))


def read(path: Path) -> dict[str, Tensor]:
    """The tensors that `write` was given, bit for bit but for the sign of zeros, on the CPU."""
    with safe_open(path, "pt") as file:
        shapes = json.loads((file.metadata() or {}).get("shapes", "{}"))
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    parts = {name + part for name in shapes for part in (KEPT, MASK)}
    tensors = {name: tensor for name, tensor in stored.items() if name not in parts}
    for name, shape in shapes.items():
        values, bits = stored[name + KEPT], stored[name + MASK].numpy()
        flat = torch.zeros(int(np.prod(shape)), dtype=values.dtype)
        flat[torch.from_numpy(np.unpackbits(bits, count=flat.numel())).bool()] = values
        tensors[name] = flat.reshape(shape)
    return tensors
