"""Everything that takes part in a contest: dense rivals, sparse kernels, peers, and what bounds them all.

Those that run in processes of their own are in `peers`.

Only the masks matter for speed, so most networks are untrained; batch norm is folded on both sides.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import optimization
from torch.nn.utils import prune

from reprolib import experiments, pruning, sparse
from reprolib.bench import engine, peers
from reprolib.bench.timing import Contender, rotating
from reprolib.experiments import Channels, Dense, Pruned
from reprolib.patterns import gemm_view, parse
from reprolib.sparse import cpu, cuda, portable
from reprolib.training import data
from reprolib.training.precision import usable

SPARSE = "sparse kernels"
SPARSE_BF16 = "sparse kernels, bf16"  # a way of its own: claims and figures are about fp32
TORCH_MASKS = "torch.nn.utils.prune"
INPUTS = 4  # that take turns
SWEPT = "caches swept"
SWEEP_BYTES = 2**28  # written between two calls: more than caches hold
PEER_SPARSITY = 0.9  # at which PyTorch's BSR product is tuned and timed

# What bounds any layer: a product of square matrices, and a copy that no cache holds.
PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}
COPY_NUMBERS = {"cpu": 2**25, "cuda": 2**28}

Specs = tuple[tuple[str, str, float], ...]  # pattern's name in tables, its text form, target sparsity


def kernel_type(device: str) -> str:
    return "fp32" if device == "cpu" else "fp16"


def network_contenders(
    dense: Dense, batch: int, device: str, specs: Specs, others: peers.Peers | None = None, pruned_peers: bool = False
) -> list[Contender]:
    """An untrained network, dense and pruned as each of `specs` says; by our kernels in bf16, too, where a CPU can.

    `others` run the dense network; with `pruned_peers`, the engine that gains from zeros runs the pruned ones, too: it
    compiles each of them for seconds.
    """
    networks = _networks(dense, device, specs)
    return _contenders(networks, _images(batch, dense), device, others, pruned_peers)


def torchvision_contenders(
    name: str, size: int, batch: int, specs: Specs, others: peers.Peers | None
) -> list[Contender]:
    """The same with a network of torchvision, on a CPU, for images ``[batch, 3, size, size]``."""
    return _contenders(_torchvision_networks(name, specs), _random_images(batch, size, 0), "cpu", others, True)


def trained_contenders(
    dense: Dense, smaller: tuple[tuple[str, Pruned | Channels], ...], runs: Path, batch: int, others: peers.Peers | None
) -> list[Contender]:
    """Networks that were trained in the folder `runs`, on a CPU, each by all that a user would run it with.

    Those without channels are dense networks. The first unstructured one takes part with the masks of
    torch.nn.utils.prune, too. They know the size of their files.
    """
    networks, narrower = _trained_networks(dense, smaller, runs)
    images = _images(batch, dense)
    sizes = {(n.about.get("pattern", "dense"), n.about.get("target_sparsity", 0.0)): _file_bytes(n) for n in networks}
    found = [
        replace(contender, file_bytes=sizes[contender.pattern, contender.target_sparsity])
        if contender.implementation == SPARSE or contender.pattern == "dense"
        else contender
        for contender in _contenders(networks, images, "cpu", others, True)
    ]
    for network in [each for each in networks if each.about.get("pattern") == "unstructured"][:1]:
        masked = _with_torch_masks(network.masked)
        call = rotating(masked, _channels_last(images), "cpu")
        found.append(Contender(TORCH_MASKS, "fp32", call, **network.about, file_bytes=_state_bytes(masked)))
    for about, narrow in narrower:
        contenders = [*_dense_contenders(_folded(narrow), images, "cpu")]
        contenders += peers.dense_contenders(_folded(narrow), images, others) if others else []
        found += [replace(contender, **about, file_bytes=_state_bytes(narrow)) for contender in contenders]
    return found


class Network(NamedTuple):
    """A network: what tables say of it, nothing of a dense one; as torch runs it, zeros and all; by our kernels."""

    about: dict
    masked: nn.Module
    sparse: nn.Module


def _images(batch: int, dense: Dense) -> list[Tensor]:
    return _random_images(batch, data.shape(dense.dataset)[1], dense.seed)


def _random_images(batch: int, size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, size, size, generator=generator) for _ in range(INPUTS)]


def _channels_last(images: list[Tensor]) -> list[Tensor]:
    return [x.to(memory_format=torch.channels_last) for x in images]


def _contenders(
    networks: list[Network], images: list[Tensor], device: str, others: peers.Peers | None, pruned_peers: bool
) -> list[Contender]:
    """All that run the first of `networks`, a dense one, and our kernels for the others, which are pruned.

    With `pruned_peers`, the pruned ones by others, too.
    """
    dense, *pruned = networks
    found = list(_dense_contenders(_folded(dense.masked), images, device))
    found += [_sparse_contender(network.sparse, images, device, **network.about) for network in networks]
    if device == "cpu" and cpu.instruction_sets(pairs=True):
        for network in pruned:
            small = sparse.sparsify(network.masked, dtype=torch.bfloat16)
            found.append(Contender(SPARSE_BF16, "bf16", rotating(small, images, device), spins=False, **network.about))
    if others:
        found += peers.dense_contenders(_folded(dense.masked), images, others)
        for peer in others.engines:
            if peer.name == peers.USES_ZEROS and pruned_peers:
                found += [peers.peer_contender(peer, _folded(n.masked), images, **n.about) for n in pruned]
    return found


def condition_contenders(dense: Dense, batch: int, specs: Specs) -> list[Contender]:
    """An untrained network on a CPU, dense and pruned, on 1, 2, 4 .. threads, up to those torch may use now.

    One image also with caches that hold nothing of the network: other data were written before each call. The name of
    an implementation ends with its condition.
    """
    whole, *pruned = _networks(dense, "cpu", specs)
    images = _images(batch, dense)
    folded = _folded(whole.masked).to(memory_format=torch.channels_last)
    ways = [("oneDNN, channels last", rotating(folded, _channels_last(images), "cpu"), {})]
    ways += [(SPARSE, rotating(network.sparse, images, "cpu"), network.about) for network in pruned]
    most = torch.get_num_threads()
    found = []
    for threads in (2**n for n in range(most.bit_length())):
        for name, call, about in ways:
            condition = f"{threads} thread{'s' * (threads > 1)}"
            found.append(Contender(f"{name}, {condition}", "fp32", _on_threads(call, threads), **about))
    if batch == 1:
        memory = np.zeros(SWEEP_BYTES, np.uint8)
        for name, call, about in ways:
            swept = Contender(f"{name}, {SWEPT}", "fp32", call, **about, time_us=partial(_swept_us, call, memory))
            found.append(swept)
    return found


def _on_threads(call: Callable[[], object], threads: int) -> Callable[[], object]:
    def limited() -> object:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return call()
        finally:
            torch.set_num_threads(before)

    return limited


def _swept_us(call: Callable[[], object], memory: np.ndarray) -> float:
    """One call, in microseconds, when caches hold other things; then threads come to rest."""
    memory += 1
    started = time.perf_counter_ns()
    call()
    us = (time.perf_counter_ns() - started) / 1e3
    engine.rest()
    return us


@lru_cache(maxsize=1)  # the batches of a seed share its networks
def _networks(dense: Dense, device: str, specs: Specs) -> list[Network]:
    """An untrained network as it is, and pruned as each of `specs` says."""
    return _with_pruned(experiments.untrained(dense).eval(), device, specs)


@lru_cache(maxsize=1)
def _torchvision_networks(name: str, specs: Specs) -> list[Network]:
    from torchvision import models  # here: it takes a second

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = models.get_model(name, weights=None).eval()
    return _with_pruned(dense, "cpu", specs)


def _with_pruned(dense: nn.Module, device: str, specs: Specs) -> list[Network]:
    """A network, and copies of it that are pruned as each of `specs` says."""
    found = [Network({}, dense, sparse.sparsify(dense, device, dense=True))]
    for pattern, spec, sparsity in specs:
        model = copy.deepcopy(dense)
        weights = pruning.prunable(model)
        masks = pruning.make_masks(weights, parse(spec), pruning.uniform_ratios(weights, sparsity))
        pruning.apply_masks(weights, masks)
        about = {"pattern": pattern, "spec": spec, "target_sparsity": sparsity}
        about |= {"sparsity": pruning.achieved_sparsity(masks)}
        found.append(Network(about, model, sparse.sparsify(model, device)))
    return found


@lru_cache(maxsize=1)
def _trained_networks(
    dense: Dense, smaller: tuple[tuple[str, Pruned | Channels], ...], runs: Path
) -> tuple[list[Network], list[tuple[dict, nn.Module]]]:
    """Networks of `runs`: the dense one with the pruned ones behind it; and those without channels."""
    whole = experiments.load_model(dense, runs).cpu()
    networks, narrower = [Network({}, whole, sparse.sparsify(whole, dense=True))], []
    for name, experiment in smaller:
        row = experiments.run(experiment, runs)["row"]
        about = {"pattern": name} | {key: row[key] for key in ("spec", "target_sparsity", "sparsity")}
        model = experiments.load_model(experiment, runs).cpu()
        if isinstance(experiment, Channels):
            narrower.append((about, model))
        else:
            networks.append(Network(about, model, sparse.sparsify(model)))
    return networks, narrower


def _file_bytes(network: Network) -> int:
    """What `sparse.save` writes of a pruned network; of a dense one, its weights."""
    if not network.about:
        return _state_bytes(network.masked)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        sparse.save(network.sparse, path)
        return path.stat().st_size


def _state_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def _with_torch_masks(model: nn.Module) -> nn.Module:
    """A copy whose zeros are masks of torch.nn.utils.prune, as they are while it trains."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for name, weight in pruning.prunable(model).items():
        prune.custom_from_mask(model.get_submodule(name), "weight", weight != 0)
    return model


def layer_contenders(c_in: int, c_out: int, size: int, batch: int, device: str, specs: Specs) -> list[Contender]:
    """A convolution with bias and ReLU. Sparse kernels are timed on activations in their layout, as in a network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = nn.Conv2d(c_in, c_out, 3, padding=1).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(batch, c_in, size, size, generator=generator) for _ in range(INPUTS)]
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


def ceilings(device: str) -> list[Contender]:
    """A matrix product of 2 * side ** 3 FLOPs, and a copy that reads and writes its numbers once.

    The product is asked for as a 1x1 convolution: that is the library of the dense rivals.
    """
    dtype, side = torch.float32 if device == "cpu" else torch.float16, PRODUCT_SIDE[device]
    weight = torch.randn(side, side, 1, 1).to(device, dtype)
    pixels = torch.randn(1, side, 32, side // 32).to(device, dtype, memory_format=torch.channels_last)
    source = torch.zeros(COPY_NUMBERS[device], dtype=dtype, device=device).normal_()
    target = torch.empty_like(source)
    return [
        Contender("matrix product", kernel_type(device), rotating(lambda x: F.conv2d(x, weight), [pixels], device)),
        Contender("copy", kernel_type(device), rotating(target.copy_, [source], device)),
    ]


def _folded(model: nn.Module) -> nn.Module:
    """The model with every batch norm folded into the convolution before it; as it is where torch can't follow it."""
    try:
        return optimization.fuse(model).eval()
    except Exception:  # whatever code of the user's own raises when torch.fx runs it
        return copy.deepcopy(model).eval()


def _dense_contenders(model: nn.Module, images: list[Tensor], device: str) -> Iterator[Contender]:
    """The dense rivals: on a CPU oneDNN in both layouts and usable types, on a GPU cuDNN and the compiler, in fp16."""

    def run(model: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> Callable[[], object]:
        model = copy.deepcopy(model).to(device, dtype, memory_format=layout)
        return rotating(model, [x.to(device, dtype, memory_format=layout) for x in images], device)

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
    compiled = compiled_for_one_size(half, mode="max-autotune-no-cudagraphs")
    inputs = [x.to(device, torch.float16, memory_format=last) for x in images]
    yield Contender("torch.compile, max-autotune", "fp16", rotating(compiled, inputs, device))


def compiled_for_one_size(model: nn.Module, **options) -> nn.Module:
    """The model, compiled anew for the images that it gets first, whatever was compiled before.

    A rival that is not compiled is an error: without this, torch compiles a second batch for any size, and from the
    ninth on runs models without compiling them, and says nothing.
    """
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(model, dynamic=False, fullgraph=True, **options)


def _sparse_contender(model: nn.Module, images: list[Tensor], device: str, **about) -> Contender:
    dtype = torch.float32 if device == "cpu" else torch.float16
    inputs = [x.to(device, dtype) for x in images]
    call = rotating(model.to(dtype), inputs, device)
    return Contender(SPARSE, kernel_type(device), call, spins=not _runs_in_engine(device), **about)


def _runs_in_engine(device: str) -> bool:
    """Whether our kernels are the x86 engine: its helpers stay awake for less than a millisecond, Numba's for more."""
    return device == "cpu" and bool(cpu.instruction_sets())


def _sparse_layer_contender(conv: nn.Conv2d, images: list[Tensor], device: str, **about) -> Contender:
    [network] = sparse.networks(sparse.sparsify(nn.Sequential(conv, nn.ReLU()).eval(), dense=True))
    if _runs_in_engine(device):
        engine = network.engine()
        program = engine.program((images[0].shape[1:],), min(len(images[0]), engine.isa.LANES))
        calls = [program.alone([x.numpy()], torch.get_num_threads()) for x in images]

        def once(call: tuple) -> Callable:
            again, results = call
            again()
            return results

        return Contender(SPARSE, kernel_type(device), rotating(once, calls, device), spins=False, **about)
    kernels = portable if device == "cpu" else cuda
    plan = network.plan(network.graph.operations[0], kernels, torch.device(device), 1)
    inputs = [kernels.to_layout(x.to(device), 1).clone() for x in images]
    return Contender(SPARSE, kernel_type(device), rotating(lambda x: kernels.conv(x, plan), inputs, device), **about)


def _cuda_core_contender(conv: nn.Conv2d, images: list[Tensor], **about) -> Contender:
    """The kernel for single weights, which no tensor core can run: for comparison."""
    plan = cuda.plan(conv.weight, conv.bias, relu=True, halo_out=1, device="cuda", variant="v1")
    inputs = [cuda.to_layout(x.cuda(), 1) for x in images]
    return Contender("sparse, CUDA cores", "fp16", rotating(lambda x: cuda.conv(x, plan), inputs, "cuda"), **about)


def _gemm_peers(conv: nn.Conv2d, images: list[Tensor], **about) -> Iterator[Contender]:
    """PyTorch's own sparse products for the same masked weight: the product alone, and with the unfolding it needs.

    Each has one sparsity: 2:4 its own, BSR the one of `PEER_SPARSITY`, for it is tuned first, for this very matrix.
    """
    from torch.sparse import _triton_ops, _triton_ops_meta, to_sparse_semi_structured

    weight = gemm_view(conv.weight).half().cuda()
    inputs = [x.half().cuda() for x in images]
    unfolded = [unfolded_columns(x) for x in inputs]
    if about["pattern"] == "block" and about["target_sparsity"] == PEER_SPARSITY:
        bsr, out = weight.to_sparse_bsr((32, 32)), weight.new_zeros(len(weight), unfolded[0].shape[1])
        meta = _triton_ops_meta.tune_bsr_dense_addmm(out, bsr, unfolded[0], beta=0)

        def product(x: Tensor) -> Tensor:
            return _triton_ops.bsr_dense_addmm(out, bsr, x, beta=0, meta=meta).relu_()

        name = "torch BSR"
    elif about["pattern"] == "two-four-block" and about["target_sparsity"] == 0.5:
        two_four = to_sparse_semi_structured(weight.contiguous())

        def product(x: Tensor) -> Tensor:
            return torch.mm(two_four, x).relu_()

        name = "torch 2:4"
    else:
        return
    yield Contender(f"{name}, product only", "fp16", rotating(product, unfolded, "cuda"), **about)
    whole = rotating(lambda x: product(unfolded_columns(x)), inputs, "cuda")
    yield Contender(f"{name}, with unfold", "fp16", whole, **about)


def unfolded_columns(x: Tensor) -> Tensor:
    """What the GEMM view of a 3x3 weight multiplies: ``[N, C, H, W]`` as ``[9 C, N H W]``, rows by (tap, channel).

    One copy of a view: torch's own unfold launches a kernel for each image on a GPU.
    """
    n, c, h, w = x.shape
    padded = F.pad(x, (1, 1, 1, 1)).contiguous()
    image, channel, row, pixel = padded.stride()
    taps = padded.as_strided((3, 3, c, n, h, w), (row, pixel, channel, image, row, pixel))
    return taps.reshape(9 * c, n * h * w)
