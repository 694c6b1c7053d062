"""Many networks, trained side by side in processes of their own: the first of the plan first, until a deadline."""

from __future__ import annotations

import math
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from tqdm import tqdm

from reprolib import experiments
from reprolib.deadline import OutOfTime
from reprolib.experiments import Dense, Pruned
from reprolib.processes import end_with_parent

GRACE_S = 10.0  # that a network in evaluation has behind the deadline; then its process is ended


def train(
    plan: list[Dense | Pruned],
    folder: Path,
    *,
    workers: int,
    threads: int,
    deadline: float = math.inf,
    look: Callable[[], None] = lambda: None,
) -> list[str]:
    """Run the experiments of `plan` that have no record in `folder` yet; return what went wrong, a line each.

    `workers` networks train at a time on `threads` threads each, a pruned one as soon as its dense one is done. When
    `time.time()` passes `deadline` all of them stop at a checkpoint. `look` is called about twice a second. What the
    networks tell while they train is appended to ``training.log`` beside `folder`.
    """
    log = folder.parent / "training.log"
    waiting = [experiment for experiment in plan if not experiments.is_done(experiment, folder)]
    idle = [_start(threads, log) for _ in range(min(workers, len(waiting)))]
    processes = dict(idle)
    idle, busy, errors = [pipe for pipe, _ in idle], {}, []
    try:
        while True:
            ready = (e for e in waiting if isinstance(e, Dense) or experiments.is_done(e.dense, folder))
            while idle and time.time() < deadline and (experiment := next(ready, None)):
                pipe = idle.pop()
                pipe.send((experiment, folder, deadline))
                busy[pipe] = experiment
            waiting = [experiment for experiment in waiting if experiment not in busy.values()]
            if not busy or time.time() > deadline + GRACE_S:
                return errors
            for pipe in wait(list(busy), timeout=0.5):
                experiment = busy.pop(pipe)
                try:
                    errors += pipe.recv()
                    idle.append(pipe)
                except EOFError:
                    errors.append(
                        f"{experiment.label}: its process died (see {log}); out of memory? Ask again to go on"
                    )
            look()
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join()


def _start(threads: int, log: Path) -> tuple[Connection, multiprocessing.Process]:
    """A process that trains what it is sent, and the pipe to it."""
    context = multiprocessing.get_context("spawn")  # a fork would share the threads and the GPU of this process
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, threads, log), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _work(pipe: Connection, threads: int, log: Path) -> None:
    """Answer every experiment with a list of errors: none if it is done, or stopped at the deadline."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    sys.stderr = log.open("a")
    tqdm.set_lock(threading.RLock())  # not one between processes, which would outlive a process that is ended
    torch.set_num_threads(threads)
    while True:
        experiment, folder, deadline = pipe.recv()
        try:
            experiments.run(experiment, folder, deadline)
            pipe.send([])
        except OutOfTime:
            pipe.send([])
        except (ValueError, OSError, RuntimeError) as error:
            pipe.send([f"{experiment.label}: {error}"])
