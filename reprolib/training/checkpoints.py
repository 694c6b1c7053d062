"""Checkpoints: all that a stopped training needs to go on, on a CPU to the same bits."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from reprolib.files.atomic import write_atomically


class State(NamedTuple):
    """What a training changes in place: the network, the optimizer with its momentum, the generator of its draws, the
    learning rate and the sum of losses (scalars on the device), and by module name which weights are pruned (bool).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    lr: Tensor
    total: Tensor
    pruned: dict[str, Tensor]


@dataclass(frozen=True)
class Position:
    """Where a training stands: steps done of an epoch (the first is 0), the share of the whole training behind it,
    the seconds that took, one row per finished epoch, and the sparsities that were due when its masks were made.
    """

    epoch: int = 0
    step: int = 0
    progress: float = 0.0
    wall_time_s: float = 0.0
    curve: tuple[dict, ...] = ()
    due: tuple[float, ...] | None = None


def position(checkpoint: Path) -> Position:
    """Where the training stood when it wrote `checkpoint`; at its start if there is none."""
    try:
        with checkpoint.open("rb") as file:  # one handle: the training may replace the file meanwhile
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        here = json.loads(header["__metadata__"]["position"])
    except FileNotFoundError:
        return Position()
    except (ValueError, KeyError):
        raise ValueError(f"the checkpoint {checkpoint} is damaged: delete it and ask again") from None
    due = here.get("due")
    return Position(**here | {"due": due if due is None else tuple(due)})


def save(checkpoint: Path, state: State, drawn_from: Tensor, here: Position, of: dict) -> None:
    """Write a checkpoint, atomically.

    `drawn_from` is the generator's state before the draws of this epoch, `of` tells this training from others.
    """
    tensors = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        if parameter in state.optimizer.state:  # not a frozen one
            tensors[f"momentum.{name}"] = state.optimizer.state[parameter]["momentum_buffer"]
    tensors |= {"generator": drawn_from, "total": state.total}
    tensors |= {f"pruned.{name}": gone for name, gone in state.pruned.items()}
    # Copies, because safetensors takes no two tensors that share memory.
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    write_atomically(
        checkpoint, safetensors.torch.save(tensors, {"position": json.dumps(asdict(here)), "of": json.dumps(of)})
    )


def restore(checkpoint: Path | None, state: State, of: dict) -> Position:
    """Fill `state` from the checkpoint and return its position; without a checkpoint leave it as it is.

    Raises ValueError for a damaged file, and for the checkpoint of another training than `of` says.
    """
    if not (checkpoint and checkpoint.exists()):
        return Position()
    here = position(checkpoint)
    try:
        tensors = load_file(checkpoint)
    except SafetensorError:
        raise ValueError(f"the checkpoint {checkpoint} is damaged: delete it and ask again") from None
    with safe_open(checkpoint, "pt") as file:
        found = json.loads(file.metadata().get("of", "null"))  # version 0.1 did not say
    if found not in (None, of):
        raise ValueError(f"the checkpoint {checkpoint} is of another training ({found}): delete it and ask again")
    state.model.load_state_dict({name: tensors[f"model.{name}"] for name in state.model.state_dict()})
    for name, parameter in state.model.named_parameters():
        if f"momentum.{name}" in tensors:
            # Laid out in memory like the parameter: the fused optimizer walks over both alike.
            momentum = torch.empty_like(parameter).copy_(tensors[f"momentum.{name}"])
            state.optimizer.state[parameter]["momentum_buffer"] = momentum
    state.generator.set_state(tensors["generator"])
    state.total.copy_(tensors["total"])
    for name, tensor in tensors.items():
        if name.startswith("pruned."):
            state.pruned[name.removeprefix("pruned.")] = tensor.to(state.total.device)
    return here
