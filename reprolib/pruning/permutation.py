"""Channels in another order: the network computes the same, and large weights meet in the same blocks.

Only the groups matter: which outputs of a layer share a row of blocks, and with that, which inputs of the next layer
share a column. Outputs are swapped between groups where that raises what the blocks that stay would hold (simulated
annealing; the idea is that of Ji et al., "TETRIS", NeurIPS 2018).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import fx, nn

from reprolib.patterns import NM, ORDERS, Balanced, Block, Hybrid, Pattern, gemm_view, pruned_count
from reprolib.pruning.masks import prunable

STATELESS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Dropout, nn.Identity, nn.Flatten)  # alike for all channels
STATELESS += (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
# Temperatures of the rounds, in shares of a layer's magnitude, and swaps tried in each, for layers of 128 channels.
TEMPERATURES = (4e-5, 2e-5, 1e-5, 3e-6, 0.0, 0.0)
SWAPS, FEWEST_SWAPS, CHANNELS = 40_000, 2_000, 128


class Units(NamedTuple):
    """What is kept of a matrix: of each bank of a row `keep` weights, and the share `blocks` of the blocks."""

    rows: int
    cols: int
    bank: int
    keep: int
    blocks: float


class Link(NamedTuple):
    """A layer, the only one that reads its outputs, and the batch norms between them."""

    layer: nn.Conv2d
    norms: list[nn.BatchNorm2d]
    reader: nn.Module


def is_permutable(pattern: Pattern) -> bool:
    """Whether the order of channels can matter to a pattern, in a way that `permute_channels` knows."""
    fine, coarse = (pattern.fine, pattern.coarse) if isinstance(pattern, Hybrid) else (None, pattern)
    if not isinstance(coarse, Block) or coarse.norm != "l1" or coarse.order != ORDERS[0]:
        return False
    bank = fine.bank if isinstance(fine, Balanced) else fine.m if isinstance(fine, NM) else coarse.cols
    known = fine is None or (isinstance(fine, (Balanced, NM)) and fine.order == ORDERS[0])
    return known and coarse.cols % bank == 0


def check_permutable(pattern: Pattern) -> None:
    """Raise ValueError for a pattern for which channels can't be ordered."""
    if not is_permutable(pattern):
        raise ValueError(
            f"channels can be ordered for blocks with the norm l1, alone or with banks that divide them, and {pattern} "
            "is something else: leave permuted out"
        )


def units_of(pattern: Pattern, sparsity: float) -> Units:
    """What a permutable pattern keeps at a sparsity."""
    if isinstance(pattern, Block):
        return Units(pattern.rows, pattern.cols, pattern.cols, pattern.cols, 1 - sparsity)
    fine, coarse = pattern.fine, pattern.coarse
    if isinstance(fine, NM):
        bank, keep = fine.m, fine.n
    else:
        bank, keep = fine.bank, fine.bank - pruned_count(fine.bank, pattern.fine_sparsity(sparsity))
    return Units(coarse.rows, coarse.cols, bank, keep, min(1.0, (1 - sparsity) * bank / keep))


@torch.no_grad()
def permute_channels(model: nn.Module, pattern: Pattern, sparsity: float, seed: int = 0) -> None:
    """Order the channels of a network in place, for blocks of a pattern at a sparsity. What it computes stays the same.

    Ordered are the outputs of each convolution that one other layer reads alone, through batch norms, activations and
    pools; those of which whole groups can't be made stay as they are. Equal weights and `seed` give equal orders.
    Raises ValueError for a pattern that `check_permutable` refuses, and for a network that torch.fx can't follow.
    """
    check_permutable(pattern)
    units, pruned = units_of(pattern, sparsity), {id(weight) for weight in prunable(model).values()}
    links = [link for link in _links(model) if link.layer.out_channels % np.lcm(units.rows, units.cols) == 0]
    for number, temperature in enumerate(TEMPERATURES):
        for place, link in enumerate(links):
            rows = _rows(link.layer.weight, units) if id(link.layer.weight) in pruned else None
            columns = _columns(link.reader.weight, units) if id(link.reader.weight) in pruned else None
            if rows is None and columns is None:
                continue
            order = _annealed(link.layer.out_channels, units, rows, columns, temperature, (seed, number, place))
            _reorder(link, torch.from_numpy(order).to(link.layer.weight.device))


def _links(model: nn.Module) -> Iterator[Link]:
    try:
        graph = fx.symbolic_trace(model)
    except Exception as problem:  # whatever code of the user's own raises when torch.fx runs it
        raise ValueError(f"channels can't be ordered, torch.fx can't follow the network: {problem}") from None
    modules = dict(model.named_modules())
    called = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
    read = {node.target.rpartition(".")[0] for node in graph.graph.nodes if node.op == "get_attr"}

    def module_of(node: fx.Node) -> nn.Module | None:
        """What the network calls here, and does nothing else with."""
        alone = node.op == "call_module" and called[node.target] == 1 and node.target not in read
        return modules[node.target] if alone else None

    for node in graph.graph.nodes:
        layer = module_of(node)
        if type(layer) is not nn.Conv2d or layer.groups > 1:
            continue
        module, between = None, []
        while len(node.users) == 1:
            node = next(iter(node.users))
            # One ReLU may serve many layers.
            free = node.op == "call_module" and type(modules[node.target]) in STATELESS
            module = modules[node.target] if free else module_of(node)
            if type(module) not in (*STATELESS, nn.BatchNorm2d):
                break
            between.append(module)
        rows = [module for module in between if isinstance(module, nn.Flatten)]
        reads = {nn.Conv2d: not rows, nn.Linear: len(rows) == 1 and (rows[0].start_dim, rows[0].end_dim) == (1, -1)}
        if not (reads.get(type(module)) and getattr(module, "groups", 1) == 1):
            continue
        if module.weight.shape[1] == layer.out_channels:  # rows hold one number of each channel
            yield Link(layer, [each for each in between if isinstance(each, nn.BatchNorm2d)], module)


def _reorder(link: Link, order: torch.Tensor) -> None:
    outputs = [link.layer.weight, link.layer.bias]
    for norm in link.norms:
        outputs += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    for tensor in outputs:
        if tensor is not None:
            tensor.copy_(tensor[order])
    link.reader.weight.copy_(link.reader.weight[:, order])


def _rows(weight: torch.Tensor, units: Units) -> tuple[np.ndarray, float, float] | None:
    """What each output keeps of each block, float32 ``[C_out, blocks across]``; what the last block that stays keeps;
    and one over the magnitude of the layer. None where blocks don't divide the matrix.
    """
    matrix = gemm_view(weight.detach()).abs().float().cpu().numpy()
    if matrix.shape[1] % units.cols or matrix.shape[0] % units.rows:
        return None
    banks = matrix.reshape(len(matrix), -1, units.cols // units.bank, units.bank)
    kept = np.sort(banks, axis=3)[..., units.bank - units.keep :].sum(axis=(2, 3), dtype=np.float32)
    scores = kept.reshape(-1, units.rows, kept.shape[1]).sum(axis=1)
    return np.ascontiguousarray(kept), _last(scores, units), 1 / max(float(matrix.sum()), 1e-30)


def _columns(weight: torch.Tensor, units: Units) -> tuple[np.ndarray, float, float] | None:
    """Magnitudes by input, float32 ``[C_in, taps * C_out]``; the other two as in `_rows`."""
    rows = _rows(weight, units)
    if rows is None or weight.shape[1] % units.cols:
        return None
    _, last, share = rows
    magnitudes = weight.detach().abs().float().cpu().numpy().reshape(*weight.shape[:2], -1)
    return np.ascontiguousarray(magnitudes.transpose(1, 2, 0).reshape(weight.shape[1], -1)), last, share


def _last(scores: np.ndarray, units: Units) -> float:
    stay = max(1, round(units.blocks * scores.size))
    return float(np.sort(scores, axis=None)[-stay])


def _annealed(count: int, units: Units, rows, columns, temperature: float, seed: tuple[int, ...]) -> np.ndarray:
    """An order of `count` channels: what stands at each place."""
    from reprolib.pruning.annealing import anneal  # here: compiling takes a second, and most experiments need none

    nothing = np.zeros((count, 0), np.float32), 0.0, 0.0
    order = np.arange(count)
    swaps = int(SWAPS * (count / CHANNELS) ** 2) + FEWEST_SWAPS
    chances = np.random.default_rng(seed)
    pairs = chances.integers(count, size=(swaps, 2))
    luck = chances.random(swaps)
    cooling = temperature * CHANNELS / count * (1 - np.arange(swaps) / swaps)
    anneal(order, pairs, luck, cooling, *units[:4], *(rows or nothing), *(columns or nothing))
    return order
