"""From a pruned network to one that is faster: `sparsify`, and `describe`, which says what it did."""

from __future__ import annotations

from functools import partial
from types import ModuleType

import pandas as pd
import torch
from torch import nn

from reprolib.sparse import cpu, cuda, portable
from reprolib.sparse.capture import capture
from reprolib.sparse.network import SparseNetwork, backend_of, problem
from reprolib.sparse.operations import Convolution, Linear

KERNELS = {portable: "Numba", cuda: "CUDA"}
REASONS = "reprolib_reasons"  # where a sparse model keeps why torch runs a layer


def sparsify(
    model: nn.Module,
    device: str | torch.device | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    dense: bool = False,
) -> nn.Module:
    """A copy of a pruned network, for inference only, whose pruned layers run in kernels that skip their zeros.

    What the network does is traced (`torch.fx`). Parts for which there are kernels become one `SparseNetwork` each:
    convolutions and linear layers with batch norm, activations, sums, products and concatenations, pools. The rest runs
    in torch as before: layers with hooks or a `forward` of their own, and large layers without zeros; `dense` takes these
    too, to see what fusion alone gives. A network that can't be traced stays as it is. `describe` has the reasons. The
    outputs are those of `model` up to rounding; on a GPU the kernels calculate in fp16 with fp32 sums. What else its
    Python code does, such as to count calls, is not repeated.

    `device` moves the copy; by default it stays where the model is. With the `dtype` bfloat16, weights and activations
    of sparse parts are rounded to it (8 bits of a fraction), and sums stay float32: half the instructions where kept
    weights are neighbours (docs/speed.md: what it costs). It needs a CPU that has instructions for it.

    Raises ValueError for a model in training mode, for weights that are computed anew at each forward pass and for
    another `dtype`, and RuntimeError where the device's kernels can't run.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype {dtype} is not supported: torch.float32 or torch.bfloat16")
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode: call model.eval() first, batch norm is folded as it is then")
    if device is not None or dtype == torch.bfloat16:
        backend_of(torch.device(device or "cpu"), dtype)
    sparse, reasons = capture(model, partial(SparseNetwork, dtype=dtype), dense)
    setattr(holder(sparse), REASONS, reasons)
    sparse.requires_grad_(False)
    return sparse if device is None else sparse.to(device)


def describe(sparse_model: nn.Module) -> pd.DataFrame:
    """One row per sparse layer: format, sparsity, bytes of the format beside those of the dense weight, what runs it.

    Also one per layer with zeros that torch runs, with the reason.
    """
    rows = {}
    for network in networks(sparse_model):
        for name in network.names:
            layer = network.layer(name)
            rows[name] = {
                "layer": "×".join(map(str, layer.shape)),
                "format": str(layer.format),
                "sparsity_pct": 100 * layer.sparsity,
                "storage_bytes": layer.format.storage_bytes,
                "dense_bytes": layer.shape.numel() * layer.values.element_size(),
                "runs_in": _runs_in(network, name),
            }
    for name, reason in getattr(holder(sparse_model), REASONS, {}).items():
        try:
            weight = sparse_model.get_submodule(name).weight
        except AttributeError:  # the network does not call it
            continue
        if not bool(weight.all()):
            rows[name] = {
                "layer": "×".join(map(str, weight.shape)),
                "format": "dense",
                "sparsity_pct": 100 * (1 - weight.count_nonzero().item() / weight.numel()),
                "storage_bytes": weight.nbytes,
                "dense_bytes": weight.nbytes,
                "runs_in": f"torch: {reason}",
            }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("module")


def networks(sparse_model: nn.Module) -> list[SparseNetwork]:
    """The parts of a sparse model that kernels run."""
    return [module for module in sparse_model.modules() if isinstance(module, SparseNetwork)]


def holder(sparse_model: nn.Module) -> nn.Module:
    """The module that has the reasons: the first island, if there is one. Copies of a GraphModule lose attributes."""
    return next(iter(networks(sparse_model)), sparse_model)


def _runs_in(network: SparseNetwork, name: str) -> str:
    backend = backend_of(network.layer(name).bias.device, network.dtype)
    if backend is cpu:
        return f"code made for the weights ({_instructions(network.dtype)})"
    layers = (o for o in network.graph.operations if isinstance(o, (Convolution, Linear)) and o.weight == name)
    reason = next((reason for reason in (problem(layer, network.layers) for layer in layers) if reason), None)
    return f"torch: {reason}" if reason else KERNELS[backend]


def _instructions(dtype: torch.dtype) -> ModuleType:
    return cpu.instruction_sets(dtype == torch.bfloat16)[0].NAME
