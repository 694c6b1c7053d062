"""Engines of other makers, each in a process of its own, and torch's compiler: rivals that `make bench-peers` adds.

`engine` is the other end of the pipe. Every contender computes the logits that torch computes, or is an error.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from reprolib import sparse
from reprolib.bench import engine
from reprolib.bench.timing import Contender, rotating
from reprolib.files import environment
from reprolib.training.precision import usable

TYPES = {"DeepSparse": ("fp32",), "OpenVINO": ("fp32", "bf16"), "ONNX Runtime": ("fp32",)}
USES_ZEROS = "DeepSparse"  # the engine that pruned weights make faster
COMPILED = "torch.compile"
TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2}  # of the largest logit


@dataclass(frozen=True)
class Peer:
    """An engine that runs in another process: what it is, and how to talk to it."""

    name: str
    version: str
    process: subprocess.Popen
    numbers: Iterator[int] = field(default_factory=itertools.count)  # of its networks

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def ask(self, **command: object) -> dict:
        """Its answer; raises RuntimeError that names the engine."""
        return _ask(self.name, self.process, command)

    def release(self) -> None:
        """Let all networks go that it has compiled."""
        self.ask(do="release")


@dataclass(frozen=True)
class Peers:
    """Who takes part beside torch's eager mode and our kernels."""

    engines: tuple[Peer, ...]
    compiles: bool  # whether torch.compile does

    def __str__(self) -> str:
        return ", ".join([*map(str, self.engines), *[COMPILED] * self.compiles])

    def release(self) -> None:
        for peer in self.engines:
            peer.release()


def _ask(name: str, process: subprocess.Popen, command: dict | None) -> dict:
    try:
        if command is not None:
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        raise RuntimeError(f"{name} ended without an answer, with status {process.wait()}")
    answer = json.loads(line)
    if "error" in answer:
        raise RuntimeError(f"{name}: {answer['error']}".splitlines()[0])
    return answer


@contextmanager
def running(threads: int, python: Path | None = None, script: Path = Path(engine.__file__)) -> Iterator[Peers]:
    """The engines that run here, in processes that end with the block; one line says of each other one why it does not.

    Raises RuntimeError where there is no environment for them.
    """
    python = python or environment.python_of(environment.PEERS)
    if not python.exists():
        raise RuntimeError(f"there is no {environment.PEERS.folder}: make bench-peers builds it")
    with ExitStack() as stack:
        engines = []
        for name in engine.ENGINES:
            process = stack.enter_context(_process([python, "-I", script, name, threads]))
            try:
                engines.append(Peer(name, _ask(name, process, None)["version"], process))
            except RuntimeError as missing:
                tqdm.write(f"left out: {missing}")
        if any(peer.name == USES_ZEROS for peer in engines):
            tqdm.write(environment.PEERS_LICENCE)
        fault = compiler_fault()
        if fault:
            tqdm.write(f"left out: {COMPILED}: {fault}")
        yield Peers(tuple(engines), compiles=not fault)


@contextmanager
def _process(command: list) -> Iterator[subprocess.Popen]:
    """A process to talk with in lines, which ends with the block, or when this process does: then its input ends."""
    process = subprocess.Popen(
        [*map(str, command)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # banners
        text=True,
        env=os.environ | {"NM_DISABLE_ANALYTICS": "True"},  # DeepSparse would report its use
    )
    try:
        yield process
    finally:
        process.kill()  # nothing there is worth keeping
        process.communicate()


def dense_contenders(model: nn.Module, images: list[Tensor], peers: Peers) -> Iterator[Contender]:
    """A dense network, batch norm folded into it, by torch's compiler and by every engine, in the usable types."""
    with torch.inference_mode():
        expected = model(images[0])
    usable_types = dict.fromkeys(usable(dtype, "cpu") for dtype in ("fp32", "bf16"))
    if peers.compiles:
        torch._dynamo.reset()  # a few compiled networks are kept for one piece of code: beyond, torch would not compile
        for dtype in usable_types:
            yield checked(_compiled(model, images, dtype), expected)
    for peer in peers.engines:
        for dtype in TYPES[peer.name]:
            if dtype in usable_types:
                yield peer_contender(peer, model, images, dtype)


def peer_contender(peer: Peer, model: nn.Module, images: list[Tensor], dtype: str = "fp32", **about) -> Contender:
    """A network as an engine runs it, batch norm folded into it; `about` says how it was pruned."""
    network = next(peer.numbers)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "network.npz"
        write_network(weights, model, images)
        peer.ask(do="load", network=network, weights=str(weights), dtype=dtype)
    contender = Contender(
        str(peer),
        dtype,
        call=lambda: np.array(peer.ask(do="run", network=network)["logits"]),
        time_us=lambda: peer.ask(do="time", network=network)["us"],
        **about,
    )
    with torch.inference_mode():
        return checked(contender, model(images[0]))


def write_network(path: Path, model: nn.Module, images: list[Tensor]) -> None:
    """Operations, weights and inputs as the file that `engine` loads. Raises ValueError for a network that torch has to
    run a part of.
    """
    found = sparse.sparsify(model, dense=True)
    networks = sparse.networks(found)
    if len(networks) != 1 or set(found.children()) != set(networks) or len(networks[0].graph.inputs) != 1:
        raise ValueError("engines get networks whose operations our kernels have, all of them")
    [network] = networks
    operations = [{"kind": type(o).__name__} | dataclasses.asdict(o) for o in network.graph.operations]
    arrays = {"operations": np.array(json.dumps(operations))}
    for name, pair in network.arrays().items():
        arrays |= {f"{part} {name}": array for part, array in zip(("weight", "bias"), pair, strict=True)}
    np.savez(path, images=torch.stack(images).numpy(), **arrays)


def checked(contender: Contender, expected: Tensor) -> Contender:
    """The contender, once its first call has given the logits that torch gives; else RuntimeError, with its name."""
    logits = torch.as_tensor(contender.call()).double()
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCES[contender.dtype]:
        raise RuntimeError(
            f"{contender.implementation}, {contender.dtype}, {contender.pattern}: its logits are not torch's, "
            f"by {error:.1e} of the largest"
        )
    return contender


def _compiled(model: nn.Module, images: list[Tensor], dtype: str) -> Contender:
    """By inductor, weights frozen into the graph: so it packs them once. Its mode max-autotune tunes products of
    matrices, and the convolutions are none."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    last = torch.channels_last
    model = copy.deepcopy(model).to(dtype=kind, memory_format=last)
    compiled = torch.compile(model, dynamic=False)
    inputs = [x.to(dtype=kind, memory_format=last) for x in images]
    with torch._inductor.config.patch(freezing=True), torch.inference_mode():
        compiled(inputs[0])
    return Contender(COMPILED, dtype, rotating(compiled, inputs, "cpu"))


def compiler_fault() -> str:
    """Why torch cannot compile for this CPU, which takes a C++ compiler, in one line; empty if it can."""
    try:
        torch.compile(torch.relu)(torch.ones(1))
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
