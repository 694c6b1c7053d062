"""A sparse model as one file, and back: `save` and `load`.

The file is of the kind safetensors. It holds each weight with its zeros packed (`reprolib.files.tensors`) under the
name of its part of the network, and in its notes, as JSON, what is computed: `reprolib.sparse.operations` of islands,
`reprolib.sparse.seams` between them. It needs no code of whoever made the network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn

from reprolib.files import tensors
from reprolib.sparse import operations, seams
from reprolib.sparse.network import SparseNetwork, backend_of
from reprolib.sparse.operations import Graph, Operation
from reprolib.sparse.sparsify import REASONS, holder, networks

FORMAT, VERSION = "reprolib sparse model", 1
KINDS = {kind.__name__: kind for kind in get_args(Operation)}
SHORT = (torch.float16, torch.bfloat16)


def save(sparse_model: nn.Module, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write what `sparsify` gave into one file (safetensors), which is there whole or not at all.

    With a `dtype` of float16 or bfloat16, weights of two and more dimensions are rounded to it in the file, which takes
    about half the room; `load` gives them their type back, not their last digits.

    Raises ValueError, with the remedy, for a model without islands, for a part that can't be written (it says which),
    for another `dtype`, and for weights too large for float16.
    """
    model = getattr(sparse_model, "_orig_mod", sparse_model)  # of torch.compile
    if not (isinstance(model, fx.GraphModule) and networks(model)):
        raise ValueError(
            f"{type(model).__name__} has no sparse part of its own: give save what sparsify returned (describe says "
            "what stayed dense); the weights of a dense network are kept with torch.save(model.state_dict(), path)"
        )
    if dtype not in (None, *SHORT):
        raise ValueError(f"dtype {dtype} is not supported: torch.float16, torch.bfloat16, or none")
    nodes = seams.written(model.graph)
    targets = {node.target: node.op for node in model.graph.nodes if node.op in ("call_module", "get_attr")}
    modules, found = {}, {}
    for name, op in targets.items():
        if op == "get_attr":
            continue
        module = model.get_submodule(name)
        if isinstance(module, SparseNetwork):
            modules[name] = _written_island(module)
            for layer in module.names:
                found[f"{name}/{layer}.weight"] = module.layer(layer).weight()
                found[f"{name}/{layer}.bias"] = module.layer(layer).bias
        else:
            modules[name] = seams.written_module(module, name)
            found |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    single = [name for name, op in targets.items() if op == "get_attr"]
    found |= {name: _attribute(model, name) for name in single}
    kept, shared = _without_repetitions(found)
    types = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in kept.items()}
    text = {
        "name": type(model).__name__,
        "nodes": nodes,
        "modules": modules,
        "tensors": single,
        "types": types,
        "shared": shared,
        "reasons": getattr(holder(model), REASONS, {}),
    }
    kept = {name: _rounded(name, tensor, dtype) for name, tensor in kept.items()}
    notes = {"format": FORMAT, "version": str(VERSION), "network": json.dumps(text, allow_nan=False)}
    tensors.write(Path(path), kept, notes)


def load(path: str | Path, device: str | torch.device | None = None) -> nn.Module:
    """The sparse model of a file that `save` wrote, on the CPU or on `device`; for inference only.

    On the same machine, with as many threads, its outputs are bit for bit those of the model that was saved (with a
    `dtype`: of its rounded weights). All that a file says is checked before it is used, and it may name functions and
    modules of torch only: a file of a stranger runs no code of theirs.

    Raises OSError; ValueError for a file that is damaged, not of this kind or of a later version; RuntimeError where
    the device's kernels can't run.
    """
    path = Path(path)
    notes = tensors.notes(path)
    if notes.get("format") != FORMAT:
        raise ValueError(f"{path} is no sparse model: give load a file that reprolib.sparse.save wrote")
    if notes.get("version") != str(VERSION):
        raise ValueError(
            f"{path} is of version {notes.get('version')}, and this reprolib reads version {VERSION}: "
            "install a newer reprolib, or save the model again with this one"
        )
    found = tensors.read(path)
    try:
        model = _model(json.loads(notes["network"]), found)
    except Exception as problem:  # of a text that is not ours nearly any comes
        raise ValueError(f"{path} is damaged ({problem!r}): save the model again") from None
    for network in networks(model):
        backend_of(torch.device(device or "cpu"), network.dtype)
    return model if device is None else model.to(device)


def _without_repetitions(found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, and the names of those that are one of these."""
    first: dict[tuple, str] = {}
    shared = {}
    for name, tensor in found.items():
        place = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device
        if tensor.numel() and place in first:
            shared[name] = first[place]
        first.setdefault(place, name)
    return {name: tensor for name, tensor in found.items() if name not in shared}, shared


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or tensor.dim() < 2 or tensor.dtype not in (torch.float32, torch.float64):
        return tensor
    rounded = tensor.to(dtype)
    if not torch.equal(rounded.isfinite(), tensor.isfinite()):
        raise ValueError(f"{name} has weights up to {tensor.abs().max():.3g}, too large for {dtype}: take bfloat16")
    return rounded


def _attribute(model: nn.Module, name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    return getattr(model.get_submodule(owner), last)


def _model(text: dict[str, Any], found: dict[str, Tensor]) -> fx.GraphModule:
    """Raises nearly anything for a text that is not ours."""
    found = {name: tensor.to(seams.DTYPES[text["types"][name]]) for name, tensor in found.items()}
    found |= {name: found[first] for name, first in text["shared"].items()}
    root: dict[str, Any] = {name: nn.Parameter(found[name], requires_grad=False) for name in text["tensors"]}
    for name, written in text["modules"].items():
        root[name] = _island(name, written, found) if "operations" in written else _module(name, written, found)
    graph = seams.graph_of(text["nodes"], set(root))
    model = fx.GraphModule(root, graph, seams.word(text["name"]))
    reasons = {str(name): str(reason) for name, reason in text["reasons"].items()}
    setattr(holder(model), REASONS, reasons)
    return model.requires_grad_(False).eval()


def _module(name: str, written: dict[str, Any], found: Mapping[str, Tensor]) -> nn.Module:
    module = seams.module_of(written)
    state = module.state_dict()
    given = {key: found[f"{name}.{key}"] for key in state}
    if any(state[key].is_floating_point() != tensor.is_floating_point() for key, tensor in given.items()):
        raise ValueError(f"tensors of {name} are of another type")
    module.load_state_dict(given, assign=True)
    return module


def _written_island(network: SparseNetwork) -> dict[str, Any]:
    layers = {name: network.layer(name) for name in network.names}
    operations.check(network.graph, {name: (layer.weight(), layer.bias) for name, layer in layers.items()})
    return {
        "inputs": network.graph.inputs,
        "operations": [
            {"kind": type(operation).__name__} | asdict(operation) for operation in network.graph.operations
        ],
        "outputs": network.graph.outputs,
        "layers": list(layers),
        "dtype": str(network.dtype).removeprefix("torch."),
    }


def _island(name: str, written: dict[str, Any], found: Mapping[str, Tensor]) -> SparseNetwork:
    weights = {layer: (found[f"{name}/{layer}.weight"], found[f"{name}/{layer}.bias"]) for layer in written["layers"]}
    steps = []
    for step in written["operations"]:
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in step.items()}
        steps.append(KINDS[fields.pop("kind")](**fields))
    graph = Graph(tuple(written["inputs"]), tuple(steps), tuple(written["outputs"]))
    operations.check(graph, weights)
    dtype = seams.DTYPES[written["dtype"]]
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"there are no kernels for {dtype}")
    return SparseNetwork(graph, weights, dtype)
