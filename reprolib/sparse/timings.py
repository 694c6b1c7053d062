"""Where the time of a sparse model goes: its sparse parts, and the seams between them that torch runs."""

from __future__ import annotations

import operator
import time
from collections import defaultdict

import pandas as pd
import torch
from torch import Tensor, fx, nn

from reprolib.sparse.network import SparseNetwork

ROUNDS = 5


def timings(sparse_model: nn.Module, *inputs: Tensor) -> pd.DataFrame:
    """Call a model of `sparsify` or `load` part by part; one row per part, in the order in which they run.

    Index: the part, a module by its name in the network, or a function of torch. Columns: kind (class or function),
    runs_in (sparse kernels, or torch), layers (how many a sparse part holds), ms (the median of a few calls behind a
    first one that does not count) and share_pct of their sum. A model that `sparsify` could not trace is one part.
    """
    parts = sparse_model if isinstance(sparse_model, fx.GraphModule) else _whole(sparse_model)
    clock = _Clock(parts, inputs[0].device.type)
    with torch.inference_mode():
        for _ in range(1 + ROUNDS):
            clock.run(*inputs)
    rows, modules = {}, dict(parts.named_modules())
    for node, seconds in clock.seconds.items():
        module = modules.get(node.target) if node.op == "call_module" else None
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        sparse = isinstance(module, SparseNetwork)
        rows[name if name not in rows else node.name] = {
            "kind": name if module is None else type(module).__name__,
            "runs_in": "sparse kernels" if sparse else "torch",
            "layers": len(module.names) if sparse else 0,
            "ms": 1e3 * torch.tensor(seconds[1:]).median().item(),
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("part")
    return table.assign(share_pct=100 * table["ms"] / table["ms"].sum())


class _Clock(fx.Interpreter):
    """Runs a graph node by node, and keeps what each call took, but for those that only hand values on."""

    def __init__(self, module: fx.GraphModule, device: str):
        super().__init__(module, garbage_collect_values=False)
        self.device = device
        self.seconds: dict[fx.Node, list[float]] = defaultdict(list)

    def run_node(self, n: fx.Node) -> object:
        if n.op in ("placeholder", "output", "get_attr") or n.target is operator.getitem:
            return super().run_node(n)
        started = self._now()
        result = super().run_node(n)
        self.seconds[n].append(self._now() - started)
        return result

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _whole(model: nn.Module) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_module("network", (graph.placeholder("x"),)))
    return fx.GraphModule({"network": model}, graph)
