"""Latency, measured: sparse kernels against the best dense path of the same machine.

All implementations of one network (or layer) and batch take turns, round by round in random order, on fresh random
inputs: whatever disturbs the machine disturbs all of them. On a GPU every implementation is captured in a CUDA graph.
Only the masks matter for speed, so the networks are untrained; batch norm is folded on both sides.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fusion
from tqdm.auto import tqdm

from reprolib import paths, pruning, records, sparse
from reprolib.deadline import OutOfTime
from reprolib.models import vgg16
from reprolib.patterns import gemm_view, parse
from reprolib.precision import usable
from reprolib.profiles import Profile
from reprolib.sparse import cpu, cuda
from reprolib.sparse.layers import SparseConv2d

BATCHES = {"cpu": (1, 16, 64), "cuda": (1, 128, 1024)}
ROUNDS = 9
SEEDS = 5  # networks per pattern and sparsity: the intervals of claim 4 are over them
INPUTS = 4  # that take turns
SPARSE = "sparse kernels"
CONTEST = ["scope", "name", "batch", "seed"]  # what is measured together

# The survey, at full width. Balanced(64) is the shortest bank that expresses all sparsities.
PATTERNS = {
    "block": "Block(32, 32)",
    "vector": "Vector(32)",
    "hybrid": "Balanced(16) & Block(32, 32)",
    "two-four-block": "NM(2, 4) & Block(32, 32)",
    "balanced": "Balanced(64)",
    "unstructured": "Unstructured()",
}
SPARSITIES = (0.5, 0.75, 0.9, 0.95)
PEER_SPARSITY = 0.9  # at which PyTorch's BSR product is tuned and timed
SURVEY_SEEDS = 3
# C_in, C_out, H = W: the distinct pruned convolutions of VGG-16
LAYERS = (
    (64, 64, 32),
    (64, 128, 16),
    (128, 128, 16),
    (128, 256, 8),
    (256, 256, 8),
    (256, 512, 4),
    (512, 512, 4),
    (512, 512, 2),
)

Specs = tuple[tuple[str, str, float], ...]  # pattern's name in tables, its text form, target sparsity
SURVEY: Specs = tuple((name, spec, sparsity) for name, spec in PATTERNS.items() for sparsity in SPARSITIES)

# What bounds any layer: a product of square matrices, and a copy that no cache holds.
PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}
COPY_NUMBERS = {"cpu": 2**25, "cuda": 2**28}


@dataclass(frozen=True)
class Contender:
    """One implementation: what it is, and a call without arguments that runs it once."""

    implementation: str
    dtype: str
    call: Callable[[], object]
    pattern: str = "dense"
    spec: str = ""
    target_sparsity: float = 0.0
    sparsity: float = 0.0


# --- What is measured -----------------------------------------------------------------------------------------------


def benchmark(profile: Profile, device: str, survey: bool, output: Path, deadline: float = math.inf) -> None:
    """Latencies of the profile's networks, with `survey` also of full-width VGG-16 and of its layers, as a CSV table.

    The table appears in `output` when all of it is measured. Until then a file beside it, ending in ``.partial``, holds
    what is: asking for the same again, with the same code on the same machine, goes on from there.

    One row per implementation, seed, batch and network or layer. Columns: scope (network, layer; ceiling: what bounds
    the layers), name, width, batch, device, dtype, pattern, spec, target_sparsity, sparsity (of the pruned layers),
    implementation, seed, rounds, latency_us (median) with latency_q1_us and latency_q3_us, speedup (over the fastest
    dense one of the same name, batch, seed and of the type of the kernels: fp32 on a CPU, fp16 on a GPU), kind
    (measured), commit, hardware, threads, torch.

    Raises OutOfTime when `time.time()` passes `deadline`, RuntimeError where the device's kernels can't run.
    """
    if device == "cuda":
        cuda.require()
    where = {"commit": records.commit(), "hardware": records.hardware(device), "threads": torch.get_num_threads()}
    where |= {"torch": torch.__version__}
    asked = records.fingerprint({"device": device, "survey": survey, "specs": profile_specs(profile)})
    partial_path = output.with_name(f"{output.name}.{asked}.partial")
    table = _continued(partial_path, where)
    plan = list(_contests(profile, device, survey))
    if not table.empty:
        measured = set(table[CONTEST].itertuples(index=False, name=None))
        plan = [(name, prepare) for name, prepare in plan if tuple(name[key] for key in CONTEST) not in measured]
    for name, prepare in tqdm(plan, desc=f"latency on {device}", unit="contest"):
        if time.time() > deadline:
            raise OutOfTime(f"out of time: what is measured is kept in {partial_path}; ask again to go on")
        with torch.inference_mode():
            rows = pd.DataFrame([name | row for row in _measure(prepare(), device)])
        rows["speedup"] = _best_dense_us(rows, device) / rows["latency_us"]
        rows = rows.assign(kind="measured", **where)
        table = pd.concat([table, rows], ignore_index=True) if len(table) else rows
        records.write_csv(partial_path, table)
    records.write_csv(output, table)
    partial_path.unlink(missing_ok=True)


def _continued(partial_path: Path, where: dict) -> pd.DataFrame:
    """What was measured before by the same code on the same machine; else nothing."""
    if not partial_path.exists():
        return pd.DataFrame()
    table = records.read_csv(partial_path)
    same = all((table[key] == value).all() for key, value in where.items())
    return table if same and not where["commit"].endswith("+") else pd.DataFrame()


def _best_dense_us(rows: pd.DataFrame, device: str) -> float:
    """Latency of the fastest dense rival in the type of the kernels; NaN in a contest without one."""
    dense = (rows["pattern"] == "dense") & (rows["dtype"] == _kernel_type(device))
    return rows.loc[dense & (rows["implementation"] != SPARSE), "latency_us"].min()


def _contests(profile: Profile, device: str, survey: bool) -> Iterator[tuple[dict, Callable[[], list[Contender]]]]:
    """Every network or layer, batch and seed, with a function that prepares its contenders."""

    def network(width: float, seed: int, batch: int, specs: Specs):
        name = {"scope": "network", "name": f"VGG-16 ×{width:g}", "width": width, "batch": batch, "seed": seed}
        return name | {"device": device}, partial(_network_contenders, width, seed, batch, device, specs)

    own = profile_specs(profile)
    if survey and profile.width == 1:  # one network, one list: what the profile times already is not timed again
        timed = {(pattern, sparsity) for pattern, _, sparsity in own}
        own += tuple(
            (pattern, spec, sparsity) for pattern, spec, sparsity in SURVEY if (pattern, sparsity) not in timed
        )
    for seed, batch in itertools.product(range(SEEDS), BATCHES[device]):
        yield network(profile.width, seed, batch, own)
    if not survey:
        return
    if profile.width != 1:
        for seed, batch in itertools.product(range(SURVEY_SEEDS), BATCHES[device]):
            yield network(1.0, seed, batch, SURVEY)
    for (c_in, c_out, size), batch in itertools.product(LAYERS, BATCHES[device]):
        name = {"scope": "layer", "name": f"{c_in}→{c_out}, {size}×{size}", "width": 1.0, "batch": batch, "seed": 0}
        yield name | {"device": device}, partial(_layer_contenders, c_in, c_out, size, batch, device, SURVEY)
    name = {"scope": "ceiling", "name": "arithmetic and memory", "width": 1.0, "batch": 1, "seed": 0, "device": device}
    yield name, partial(_ceilings, device)


def profile_specs(profile: Profile) -> Specs:
    """Method, pattern and target sparsity of the profile's methods; what shares the masks of another is left out."""
    chosen = {}
    for method, settings in profile.methods.items():
        if settings.get("score", "magnitude") == "magnitude" and not settings.get("group_lasso"):
            chosen |= {
                (method, settings["pattern"], sparsity): None for sparsity in profile.settings(method)["sparsities"]
            }
    return tuple(chosen)


def _network_contenders(width: float, seed: int, batch: int, device: str, specs: Specs) -> list[Contender]:
    dense, sparse_models = _networks(width, seed, device, specs)
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(batch, 3, 32, 32, generator=generator) for _ in range(INPUTS)]
    found = list(_dense_contenders(_folded(dense), images, device))
    return found + [_sparse_contender(model, images, device, **about) for about, model in sparse_models]


@lru_cache(maxsize=1)  # the batches of a seed share its networks
def _networks(width: float, seed: int, device: str, specs: Specs) -> tuple[nn.Module, list[tuple[dict, nn.Module]]]:
    """A dense VGG-16, and what `sparsify` makes of it: as it is, and pruned as each of `specs` says."""
    torch.manual_seed(seed)
    dense = vgg16(10, width).eval()
    found = [({}, sparse.sparsify(dense, device, dense=True))]
    for pattern, spec, sparsity in specs:
        model = copy.deepcopy(dense)
        weights = pruning.prunable(model)
        masks = pruning.make_masks(weights, parse(spec), pruning.uniform_ratios(weights, sparsity))
        pruning.apply_masks(weights, masks)
        about = {"pattern": pattern, "spec": spec, "target_sparsity": sparsity}
        about["sparsity"] = pruning.achieved_sparsity(masks)
        found.append((about, sparse.sparsify(model, device)))
    return dense, found


def _layer_contenders(c_in: int, c_out: int, size: int, batch: int, device: str, specs: Specs) -> list[Contender]:
    """A convolution with bias and ReLU. Sparse kernels are timed on activations in their layout, as in a network."""
    torch.manual_seed(0)
    conv = nn.Conv2d(c_in, c_out, 3, padding=1).requires_grad_(False)
    images = [torch.randn(batch, c_in, size, size) for _ in range(INPUTS)]
    found = list(_dense_contenders(nn.Sequential(conv, nn.ReLU()).eval(), images, device))
    found.append(_sparse_layer_contender(conv, images, device))
    for pattern, spec, sparsity in specs:
        pruned = copy.deepcopy(conv)
        mask = parse(spec).mask(pruned.weight, sparsity)
        pruned.weight.masked_fill_(~mask, 0)
        about = {"pattern": pattern, "spec": spec, "target_sparsity": sparsity}
        about["sparsity"] = 1 - mask.float().mean().item()
        found.append(_sparse_layer_contender(pruned, images, device, **about))
        if device == "cuda":
            found += _gemm_peers(pruned, images, **about)
            if pattern in ("balanced", "unstructured"):
                found.append(_cuda_core_contender(pruned, images, **about))
    return found


def _ceilings(device: str) -> list[Contender]:
    """A matrix product of 2 * side ** 3 FLOPs, and a copy that reads and writes its numbers once.

    The product is asked for as a 1x1 convolution: that is the library of the dense rivals.
    """
    dtype, side = torch.float32 if device == "cpu" else torch.float16, PRODUCT_SIDE[device]
    weight = torch.randn(side, side, 1, 1).to(device, dtype)
    pixels = torch.randn(1, side, 32, side // 32).to(device, dtype, memory_format=torch.channels_last)
    source = torch.zeros(COPY_NUMBERS[device], dtype=dtype, device=device).normal_()
    target = torch.empty_like(source)
    return [
        Contender("matrix product", _kernel_type(device), _rotating(lambda x: F.conv2d(x, weight), [pixels], device)),
        Contender("copy", _kernel_type(device), _rotating(target.copy_, [source], device)),
    ]


def _folded(model: nn.Sequential) -> nn.Sequential:
    """The model with every batch norm folded into the convolution before it."""
    layers = []
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            layers[-1] = fusion.fuse_conv_bn_eval(layers[-1], module)
        else:
            layers.append(module)
    return nn.Sequential(*layers).eval()


def _dense_contenders(model: nn.Module, images: list[Tensor], device: str) -> Iterator[Contender]:
    """The dense rivals: on a CPU oneDNN in both layouts and usable types, on a GPU cuDNN and the compiler, in fp16."""

    def run(model: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> Callable[[], object]:
        model = copy.deepcopy(model).to(device, dtype, memory_format=layout)
        return _rotating(model, [x.to(device, dtype, memory_format=layout) for x in images], device)

    first, last = torch.contiguous_format, torch.channels_last
    if device == "cpu":
        yield Contender("oneDNN, channels first", "fp32", run(model, torch.float32, first))
        yield Contender("oneDNN, channels last", "fp32", run(model, torch.float32, last))
        if usable("bf16", device) == "bf16":
            yield Contender("oneDNN, channels last", "bf16", run(model, torch.bfloat16, last))
        return
    torch.backends.cudnn.benchmark = True
    yield Contender("cuDNN, channels last", "fp16", run(model, torch.float16, last))
    half = copy.deepcopy(model).to(device, torch.float16, memory_format=last)
    compiled = torch.compile(half, mode="max-autotune-no-cudagraphs")
    inputs = [x.to(device, torch.float16, memory_format=last) for x in images]
    yield Contender("torch.compile, max-autotune", "fp16", _rotating(compiled, inputs, device))


def _sparse_contender(model: nn.Module, images: list[Tensor], device: str, **about) -> Contender:
    dtype = torch.float32 if device == "cpu" else torch.float16
    inputs = [x.to(device, dtype) for x in images]
    return Contender(SPARSE, _kernel_type(device), _rotating(model.to(dtype), inputs, device), **about)


def _sparse_layer_contender(conv: nn.Conv2d, images: list[Tensor], device: str, **about) -> Contender:
    layer = SparseConv2d.from_dense(conv, relu=True)
    kernels = cpu if device == "cpu" else cuda
    plan = layer.plan(kernels, torch.device(device), 1)
    inputs = [kernels.to_layout(x.to(device), 1).clone() for x in images]
    return Contender(SPARSE, _kernel_type(device), _rotating(lambda x: kernels.conv(x, plan), inputs, device), **about)


def _cuda_core_contender(conv: nn.Conv2d, images: list[Tensor], **about) -> Contender:
    """The kernel for single weights, which no tensor core can run: for comparison."""
    plan = cuda.plan(conv.weight, conv.bias, relu=True, halo_out=1, device="cuda", variant="v1")
    inputs = [cuda.to_layout(x.cuda(), 1) for x in images]
    return Contender("sparse, CUDA cores", "fp16", _rotating(lambda x: cuda.conv(x, plan), inputs, "cuda"), **about)


def _kernel_type(device: str) -> str:
    return "fp32" if device == "cpu" else "fp16"


def _gemm_peers(conv: nn.Conv2d, images: list[Tensor], **about) -> Iterator[Contender]:
    """PyTorch's own sparse products for the same masked weight: the product alone, and with the unfolding it needs.

    Each has one sparsity: 2:4 its own, BSR the one of `PEER_SPARSITY`, for it is tuned for every shape first.
    """
    from torch.sparse import _triton_ops, _triton_ops_meta, to_sparse_semi_structured

    weight = gemm_view(conv.weight).half().cuda()
    rows, columns = weight.shape
    pixels = images[0].shape[0] * images[0].shape[2] * images[0].shape[3]
    if about["pattern"] == "block" and about["target_sparsity"] == PEER_SPARSITY:
        bsr, out = weight.to_sparse_bsr((32, 32)), weight.new_zeros(rows, pixels)
        _triton_ops_meta.optimize_bsr_dense_addmm(rows, columns, pixels, 32, 32, beta=0, sparsity=PEER_SPARSITY)

        def product(x: Tensor) -> Tensor:
            return _triton_ops.bsr_dense_addmm(out, bsr, x, beta=0).relu_()

        name = "torch BSR"
    elif about["pattern"] == "two-four-block" and about["target_sparsity"] == 0.5:
        two_four = to_sparse_semi_structured(weight.contiguous())

        def product(x: Tensor) -> Tensor:
            return torch.mm(two_four, x).relu_()

        name = "torch 2:4"
    else:
        return
    inputs = [x.half().cuda() for x in images]
    unfolded = [unfolded_columns(x) for x in inputs]
    yield Contender(f"{name}, product only", "fp16", _rotating(product, unfolded, "cuda"), **about)
    whole = _rotating(lambda x: product(unfolded_columns(x)), inputs, "cuda")
    yield Contender(f"{name}, with unfold", "fp16", whole, **about)


def unfolded_columns(x: Tensor) -> Tensor:
    """What the GEMM view of a 3x3 weight multiplies: ``[N, C, H, W]`` as ``[9 C, N H W]``, rows by (tap, channel)."""
    n, c, h, w = x.shape
    return F.unfold(x, 3, padding=1).reshape(n, c, 9, h * w).permute(2, 1, 0, 3).reshape(9 * c, n * h * w)


# --- How it is measured ---------------------------------------------------------------------------------------------


def _rotating(function: Callable[[Tensor], object], inputs: list[Tensor], device: str) -> Callable[[], object]:
    """A call that runs `function` on the next of the inputs; on a GPU the replay of a graph captured for it."""
    if device == "cpu":
        turns = itertools.cycle(inputs)
        return lambda: function(next(turns))
    graphs = []
    for x in inputs:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # warm-up outside the capture: compilation, autotuning, cuDNN's search
            for _ in range(3):
                function(x)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function(x)
        graphs.append((graph, x))  # the graph reads x: keep it
    turns = itertools.cycle(graphs)
    return lambda: next(turns)[0].replay()


def _time_us(call: Callable[[], object], device: str) -> float:
    """One call, in microseconds, right after another one that is not counted."""
    call()
    if device == "cpu":
        started = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - started) / 1e3
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    call()
    after.record()
    after.synchronize()
    return 1e3 * before.elapsed_time(after)


def _measure(contenders: list[Contender], device: str) -> list[dict]:
    """Medians and quartiles over rounds in which every contender has one turn, in random order."""
    order = np.random.default_rng(0)
    for contender in contenders:
        contender.call()  # compiles, plans, allocates
    times = np.array(
        [_one_round(contenders, order.permutation(len(contenders)), device) for _ in range(ROUNDS)], dtype=float
    )
    q1, median, q3 = np.quantile(times, [0.25, 0.5, 0.75], axis=0)
    return [
        {
            "dtype": contender.dtype,
            "pattern": contender.pattern,
            "spec": contender.spec,
            "target_sparsity": contender.target_sparsity,
            "sparsity": contender.sparsity,
            "implementation": contender.implementation,
            "rounds": ROUNDS,
            "latency_us": median[i],
            "latency_q1_us": q1[i],
            "latency_q3_us": q3[i],
        }
        for i, contender in enumerate(contenders)
    ]


def _one_round(contenders: list[Contender], order: np.ndarray, device: str) -> list[float]:
    times = [0.0] * len(contenders)
    for i in order:
        times[i] = _time_us(contenders[i].call, device)
    return times


# --- Where it goes --------------------------------------------------------------------------------------------------


def folder(profile: Profile, device: str) -> Path:
    """``results/<profile>`` for the CPU; for a GPU ``results/<model>``, such as ``results/h100``."""
    if device == "cpu":
        return paths.results(profile.name)
    words = records.hardware(device).split()
    model = next((word for word in words if re.search(r"\d", word)), words[-1])
    return paths.results(model.lower())
