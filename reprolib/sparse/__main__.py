"""From a checkpoint of a pruned network to a file for `reprolib.sparse.load`.

python -m reprolib.sparse torchvision.models:resnet18 checkpoint.pt net.safetensors
python -m reprolib.sparse reprolib.models:vgg16 weights.safetensors net.safetensors --dtype float16 num_classes=10
"""

from __future__ import annotations

import argparse
import ast
import importlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reprolib.files import tensors
from reprolib.sparse import describe, save, sparsify

INSIDE = ("state_dict", "model_state_dict", "model", "module")  # where training scripts put the weights
PARALLEL = "module."  # before each name, of nn.DataParallel


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m reprolib.sparse", description="Turn a checkpoint of a pruned network into a sparse file."
    )
    parser.add_argument("network", help="what makes the network, as MODULE:FUNCTION: torchvision.models:resnet18")
    parser.add_argument("checkpoint", type=Path, help="its state_dict: a .safetensors, or what torch.save wrote")
    parser.add_argument("output", type=Path, help="the file for reprolib.sparse.load, .safetensors")
    parser.add_argument("arguments", nargs="*", metavar="name=value", help="of FUNCTION: num_classes=10")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], help="to which weights are rounded in the file")
    arguments = parser.parse_args()
    try:
        model = make(arguments.network, dict(map(argument, arguments.arguments)))
        fill(model, state_dict(arguments.checkpoint), arguments.checkpoint)
        if all(bool(tensor.all()) for tensor in model.state_dict().values() if tensor.dim() > 1):
            raise ValueError(f"{arguments.checkpoint} has no zeros: prune the network first (reprolib.pruning.Pruner)")
        sparse_model = sparsify(model.eval())
        save(sparse_model, arguments.output, dtype=arguments.dtype and getattr(torch, arguments.dtype))
    except (ValueError, OSError, RuntimeError) as problem:
        raise SystemExit(f"error: {problem}") from None
    print(describe(sparse_model).round(1).to_string())
    before = sum(tensor.nbytes for tensor in model.state_dict().values())
    after = arguments.output.stat().st_size
    print(f"{arguments.output}: {after / 1e6:.2f} MB, {after / before:.1%} of the {before / 1e6:.2f} MB of all weights")


def argument(text: str) -> tuple[str, Any]:
    """``num_classes=10`` as a name and a value of Python; what is none is a text. Raises ValueError."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise ValueError(f"argument {text!r} of the network is not name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def make(network: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call MODULE:FUNCTION. Raises ValueError, with the remedy, where that gives no network."""
    module, _, name = network.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as problem:
        raise ValueError(
            f"there is no {network!r} ({problem}): name what makes the network as MODULE:FUNCTION, such as "
            "torchvision.models:resnet18; a module of yours must be in this folder or installed"
        ) from None
    try:
        model = function(**arguments)
    except TypeError as problem:
        raise ValueError(f"{network} could not be called ({problem}): give its arguments as name=value") from None
    if not isinstance(model, nn.Module):
        raise ValueError(f"{network} gives a {type(model).__name__}, and a torch.nn.Module is needed")
    return model


def state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name, of a file of safetensors or of torch; no code of the file runs. Raises OSError, ValueError."""
    with path.open("rb") as file:
        of_torch = file.read(4) in (b"PK\x03\x04", b"\x80\x02\x8a\x0a")
    if not of_torch:
        return tensors.read(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as problem:
        line = str(problem).strip().splitlines()[0]
        raise ValueError(
            f"{path} is damaged, or holds more than tensors ({line}): write torch.save(model.state_dict(), path)"
        ) from None
    while isinstance(found, Mapping) and (inside := next((key for key in INSIDE if key in found), None)):
        found = found[inside]
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        keys = ", ".join(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"{path} has no state_dict ({keys}): write torch.save(model.state_dict(), path)")
    return dict(found)


def fill(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load weights. Raises ValueError where names or shapes are others than the network's."""
    if state and all(name.startswith(PARALLEL) for name in state):
        state = {name.removeprefix(PARALLEL): tensor for name, tensor in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as problem:
        raise ValueError(f"{path} does not fit the network, are its arguments right? {problem}") from None


if __name__ == "__main__":
    main()
