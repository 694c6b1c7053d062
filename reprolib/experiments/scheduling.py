"""Many networks side by side, on one machine or many: workers of Dask train a plan, the first of it first.

Dask starts processes, here or elsewhere, replaces those that die, and carries questions and answers. Networks are files
(`running.run`): only names and errors travel. Which network is next is decided here, one for each worker: whatever else
a worker held would go down with it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import os
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from tqdm import tqdm

from reprolib import experiments
from reprolib.experiments import Channels, Dense, Pruned, records
from reprolib.files import paths
from reprolib.files.deadline import OutOfTime

if TYPE_CHECKING:
    from distributed import Client, Future

LOOK_S = 0.5  # from one look at the networks to the next
GRACE_S = 10.0  # that a network in evaluation has behind the deadline; then its process is ended
DEATHS = 1  # of processes, after which a network is tried once more, from its last checkpoint
START_S = 120.0  # that processes may take to start
# What keeps every network from being written: a full disk, an exceeded quota, a folder that can't be written.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR}


class Answer(NamedTuple):
    """What came of an experiment: errors, a line each; whether the process that ran it may go on; whether to start no
    more of the plan anywhere; and whether to try it again.
    """

    errors: list[str]
    usable: bool = True
    stop: bool = False
    again: bool = False


class Turn(NamedTuple):
    """An experiment that a worker, by its address, has been given."""

    experiment: Dense | Pruned | Channels
    worker: str
    future: Future


def train(
    plan: list[Dense | Pruned | Channels],
    folder: Path,
    *,
    processes: int,
    threads: int,
    deadline: float = math.inf,
    look: Callable[[Collection[Dense | Pruned | Channels]], None] = lambda running: None,
    scheduler: str = "",
) -> list[str]:
    """Run the experiments of `plan` that have no record in `folder` yet; return what went wrong, a line each.

    `processes` networks train at a time on `threads` threads each, or as many as the workers of a Dask `scheduler`
    elsewhere, such as ``tcp://host:8786``; a pruned one as soon as its dense one is done. A process that dies costs its
    network two minutes at most: another one goes on from the checkpoint; if that dies, too, it is an error. When
    `time.time()` passes `deadline` all of them stop at a checkpoint; one that is being evaluated goes back to its last,
    two minutes ago at most. Where a network can't be written, no other one is started. `look` is called about twice a
    second with those that train or just did. What they tell meanwhile is appended to ``training.log`` beside `folder`.
    Raises OSError if the scheduler can't be reached.
    """
    waiting = [experiment for experiment in plan if not experiments.is_done(experiment, folder)]
    if not waiting or time.time() > deadline:
        return []
    from distributed import wait  # here: a second, whatever is asked for

    errors, deaths, known, turns, ended = [], Counter(), set(), [], {}
    with _client(min(processes, len(waiting)), threads, scheduler) as client:
        started_s = time.monotonic()
        while True:
            workers, late = set(client.nthreads()), time.time() > deadline
            # One that was there at the last look is through with its start: nobody replaces one that dies in that.
            idle = sorted((workers & known) - {turn.worker for turn in turns} - ended.keys())
            known = workers
            following = [] if late else _ready(waiting, folder, len(idle))
            for experiment, worker in zip(following, idle, strict=False):
                waiting.remove(experiment)
                key = f"{experiment.run_id}, {deaths[experiment]}, {records.fingerprint({'folder': str(folder)})}"
                future = client.submit(_run, experiment, folder, deadline, threads, key=key, workers=[worker])
                turns.append(Turn(experiment, worker, future))
            if (not turns and (late or not waiting or (idle and not following))) or time.time() > deadline + GRACE_S:
                return errors
            if workers or scheduler:
                started_s = time.monotonic()
            elif time.monotonic() - started_s > START_S:
                return [*errors, "no process that trains could be started: ask again to go on"]
            if turns:
                with contextlib.suppress(TimeoutError):
                    wait([turn.future for turn in turns], timeout=LOOK_S, return_when="FIRST_COMPLETED")
            else:
                time.sleep(LOOK_S)
            ran = [turn.experiment for turn in turns]
            for turn in [turn for turn in turns if turn.future.done() or turn.worker not in workers]:
                turns.remove(turn)
                answer = _answer(turn, deaths, folder)
                errors += [line for line in answer.errors if line not in errors]
                waiting = [] if answer.stop else [turn.experiment] * answer.again + waiting
                if not answer.usable:  # Dask replaces a process that ends; asked to restart one, it may hang
                    key = f"end of {turn.worker}"
                    ended[turn.worker] = client.submit(os._exit, 1, key=key, workers=[turn.worker])
            look(ran)  # those that are through with it, too


def _answer(turn: Turn, deaths: Counter, folder: Path) -> Answer:
    """What the worker says; for one that died, that its network is tried again, or an error."""
    if turn.future.status == "finished":
        return turn.future.result()
    turn.future.cancel()
    deaths[turn.experiment] += 1
    if deaths[turn.experiment] <= DEATHS:
        return Answer([], again=True)
    log = folder.parent / "training.log"
    return Answer([f"{turn.experiment.label}: its process died (see {log}); out of memory? Ask again to go on"])


def _ready(waiting: list[Dense | Pruned | Channels], folder: Path, most: int) -> list[Dense | Pruned | Channels]:
    """The first experiments, `most` of them, whose dense network is there."""
    found, done = [], functools.cache(lambda dense: experiments.is_done(dense, folder))
    for experiment in waiting:
        if len(found) >= most:
            break
        if isinstance(experiment, Dense) or done(experiment.dense):
            found.append(experiment)
    return found


# --- What workers do --------------------------------------------------------------------------------------------------


def _run(experiment: Dense | Pruned | Channels, folder: Path, deadline: float, threads: int) -> Answer:
    """Run an experiment, and say what came of it: no error if it is done or out of time."""
    _begin()
    torch.set_num_threads(threads)
    log = folder.parent / "training.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1) as file, contextlib.redirect_stderr(file):
        try:
            experiments.run(experiment, folder, deadline)
        except OutOfTime:
            pass
        except (ValueError, OSError) as error:
            if getattr(error, "errno", None) in UNWRITABLE:
                what = f"{folder}: {error.strerror}: nothing more is trained; make room there, and ask again to go on"
                return Answer([what], stop=True)
            return Answer([f"{experiment.label}: {error}"])
        except Exception as error:  # whatever it is, the plan goes on; a GPU may be unusable behind it, so not here
            traceback.print_exc()
            return Answer([f"{experiment.label}: {type(error).__name__}: {error} (see {log})"], usable=False)
    return Answer([])


@functools.cache
def _begin() -> None:
    """Once in a process."""
    tqdm.set_lock(threading.RLock())  # not one between processes, which would outlive a process that is ended
    records.commit()  # kept from here on: the code may change on disk while this process trains with what it has loaded


# --- Where they run ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _client(processes: int, threads: int, scheduler: str) -> Iterator[Client]:
    """A client of the scheduler, or of a cluster on this machine that ends with it."""
    import dask
    from distributed import Client, Nanny, Scheduler, SpecCluster

    config = {
        "distributed.nanny.pre-spawn-environ": dict.fromkeys(
            ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)
        ),
        "distributed.scheduler.allowed-failures": 0,  # who tries again is decided here
        "distributed.worker.daemon": True,
        "distributed.dashboard.link": "http://{host}:{port}/status",
        "temporary-directory": str(paths.home() / ".cache" / "dask"),
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(config))
        if not scheduler:
            options = {"nthreads": 1, "memory_limit": 0, "host": "127.0.0.1", "dashboard": False}
            options |= {"silence_logs": logging.CRITICAL}
            workers = [{"cls": Nanny, "options": options | {"env": each}} for each in _surroundings(processes)]
            head = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}}
            with _ctrl_c_held():
                cluster = SpecCluster(dict(enumerate(workers)), head, silence_logs=logging.CRITICAL)
            scheduler = stack.enter_context(cluster)
            tqdm.write(f"to watch the processes: {cluster.dashboard_link}")
        yield stack.enter_context(Client(scheduler, timeout="10 s"))


@contextlib.contextmanager
def _ctrl_c_held() -> Iterator[None]:
    """Ctrl-C waits until this is left, and never reaches a process whose start began here: who started it ends it."""
    resource_tracker.ensure_running()  # of multiprocessing: its start would let Ctrl-C through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _surroundings(processes: int) -> list[dict[str, str]]:
    """The environment variables of each process: with GPUs, which one is its own, from before CUDA starts."""
    if not torch.cuda.is_available():
        return [{} for _ in range(processes)]
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = named.split(",")
    return [{"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} for number in range(processes)]
