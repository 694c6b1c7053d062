"""Checkpoints: all that a stopped training needs to go on, on a CPU to the same bits."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reprolib.files import tensors as files
from reprolib.pruning import Pruner


class State(NamedTuple):
    """What a training changes in place: the network, the optimizer with its momentum, the generator of its draws, the
    learning rate and the sum of losses (scalars on the device), and the pruner with its masks, if any.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    lr: Tensor
    total: Tensor
    pruner: Pruner | None


@dataclass(frozen=True)
class Position:
    """Where a training stands: steps done of an epoch (the first is 0), the share of the whole training behind it,
    the seconds that took, and one row per finished epoch.
    """

    epoch: int = 0
    step: int = 0
    progress: float = 0.0
    wall_time_s: float = 0.0
    curve: tuple[dict, ...] = ()


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
    here.pop("due", None)  # of former versions: what was due when the masks were made
    return Position(**here)


def save(checkpoint: Path, state: State, drawn_from: Tensor, here: Position, of: dict) -> None:
    """Write a checkpoint, atomically.

    `drawn_from` is the generator's state before the draws of this epoch, `of` tells this training from others.
    """
    tensors = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        if parameter in state.optimizer.state:  # not a frozen one
            tensors[f"momentum.{name}"] = state.optimizer.state[parameter]["momentum_buffer"]
    tensors |= {"generator": drawn_from, "total": state.total}
    metadata = {"position": json.dumps(asdict(here)), "of": json.dumps(of)}
    if state.pruner:
        pruner = state.pruner.state_dict()
        tensors |= {f"pruned.{name}": ~mask for name, mask in pruner.pop("masks").items()}
        metadata["pruner"] = json.dumps(pruner)
    files.write(checkpoint, tensors, metadata)


def restore(checkpoint: Path | None, state: State, of: dict) -> Position:
    """Fill `state` from the checkpoint and return its position; without a checkpoint leave it as it is.

    Raises ValueError for a damaged file, and for the checkpoint of another training than `of` says.
    """
    if not (checkpoint and checkpoint.exists()):
        return Position()
    here = position(checkpoint)
    try:
        tensors, metadata = files.read(checkpoint), files.notes(checkpoint)
    except ValueError:
        raise ValueError(f"the checkpoint {checkpoint} is damaged: delete it and ask again") from None
    found = json.loads(metadata.get("of", "null"))  # version 0.1 did not say
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
    masks = {name.removeprefix("pruned."): ~tensor for name, tensor in tensors.items() if name.startswith("pruned.")}
    _restore_pruner(state.pruner, masks, metadata.get("pruner"), here, checkpoint)
    return here


def _restore_pruner(
    pruner: Pruner | None, masks: dict[str, Tensor], rest: str | None, here: Position, checkpoint: Path
) -> None:
    """Load the pruner's state: its masks, and the rest of it as JSON, which checkpoints of former versions lack."""
    if pruner is None:
        if masks:
            raise ValueError(f"the checkpoint {checkpoint} is of a pruned training: delete it and ask again")
        return
    of_now = pruner.state_dict()
    done = round(here.progress * of_now["of"]["steps"])
    state = json.loads(rest) if rest else of_now | {"step": done - 1}  # masks are made in front of a step
    try:
        pruner.load_state_dict(state | {"masks": masks})
    except ValueError as error:
        what = f"the checkpoint {checkpoint} is of another training ({error})"
        raise ValueError(f"{what}: delete it and ask again") from None
