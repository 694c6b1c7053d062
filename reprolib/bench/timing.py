"""How implementations are timed: in turns, round by round, on inputs that change."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from reprolib.bench import engine

ROUNDS = 9
HOLD_CYCLES = 200_000  # of a GPU, about 0.1 ms


@dataclass(frozen=True)
class Contender:
    """One implementation: what it is, and a call without arguments that runs it once.

    One that runs in another process is timed there: `time_us` asks for it. One that `spins` has threads that look for
    more work for milliseconds after a call.
    """

    implementation: str
    dtype: str
    call: Callable[[], object]
    pattern: str = "dense"
    spec: str = ""
    target_sparsity: float = 0.0
    sparsity: float = 0.0
    file_bytes: int = 0  # of the network's weights; 0 where nobody asks
    spins: bool = True
    time_us: Callable[[], float] | None = None


def rotating(function: Callable[[Tensor], object], inputs: list[Tensor], device: str) -> Callable[[], object]:
    """A call that runs `function` on the next of the inputs; on a GPU the replay of a graph captured for it."""
    if device == "cpu":
        turns = itertools.cycle(inputs)
        return lambda: function(next(turns))
    graphs = []
    for x in inputs:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())  # which makes x
        with torch.cuda.stream(side):  # warm-up outside the capture: compilation, autotuning, cuDNN's search
            for _ in range(3):
                function(x)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_pool()):
            function(x)
        graphs.append((graph, x))  # the graph reads x: keep it
    turns = itertools.cycle(graphs)
    return lambda: next(turns)[0].replay()


@cache
def _pool() -> tuple[int, int]:
    """The memory that all graphs share: they run one after the other, and nobody reads what one has left."""
    return torch.cuda.graph_pool_handle()


def _time_us(contender: Contender, device: str) -> float:
    """One call, in microseconds, right after another one that is not counted; then its threads come to rest."""
    if contender.time_us:
        return contender.time_us()
    call = contender.call
    if device == "cpu":
        us = engine.time_us(call)
        engine.rest(engine.REST_S if contender.spins else engine.BRIEF_REST_S)
        return us
    call()
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # The GPU waits until all that follows is asked for: else, of a short call, the time between two launches counts.
    torch.cuda._sleep(HOLD_CYCLES)
    before.record()
    call()
    after.record()
    after.synchronize()
    return 1e3 * before.elapsed_time(after)


def measure(contenders: list[Contender], device: str) -> list[dict]:
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
        | ({"file_bytes": contender.file_bytes} if contender.file_bytes else {})
        for i, contender in enumerate(contenders)
    ]


def _one_round(contenders: list[Contender], order: np.ndarray, device: str) -> list[float]:
    times = [0.0] * len(contenders)
    for i in order:
        times[i] = _time_us(contenders[i], device)
    return times
