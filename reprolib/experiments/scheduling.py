"""Many networks side by side, on one machine or many: workers of Dask train a plan, the first of it first.

Dask carries questions and answers, here or to other machines. Networks are files (`running.run`): only names and errors
travel, and files to and from machines without a disk in common. Which network is next is decided here, one for each
worker: whatever else a worker held would go down with it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from tqdm import tqdm

from reprolib import experiments
from reprolib.experiments import Channels, Dense, Pruned, worker
from reprolib.experiments.worker import Answer
from reprolib.files import paths

if TYPE_CHECKING:
    from distributed import Client, Future

LOOK_S = 0.5  # from one look at the networks to the next
GRACE_S = 10.0  # that a network in evaluation has behind the deadline; then its process is ended
DEATHS = 1  # of processes, after which a network is tried once more, from its last checkpoint
START_S = 120.0  # that processes may take to start


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
    errors, deaths, apart, turns, ended = [], Counter(), set(), [], {}
    here = 0 if scheduler else min(processes, len(waiting))
    with _mark(folder) as mark, _processes(here, threads, folder) as keep, _client(scheduler) as client:
        from distributed import wait

        started_s = time.monotonic()
        while True:
            keep(client.scheduler.address)
            workers, late = set(client.nthreads()), time.time() > deadline
            ended = {address: future for address, future in ended.items() if address in workers and not future.done()}
            idle = sorted(workers - {turn.worker for turn in turns} - ended.keys())
            following = [] if late else _ready(waiting, folder, len(idle))
            for experiment, address in zip(following, idle, strict=False):
                waiting.remove(experiment)
                key = f"{experiment.run_id}, {deaths[experiment]}, {address in apart}, {mark}"
                sent = _files(experiment, folder) if address in apart else None
                arguments = (experiment, folder, mark, deadline, threads, sent)
                future = client.submit(worker.train, *arguments, key=key, workers=[address])
                turns.append(Turn(experiment, address, future))
            if (not turns and (late or not waiting or (idle and not following))) or time.time() > deadline + GRACE_S:
                return errors
            if workers or scheduler:
                started_s = time.monotonic()
            elif time.monotonic() - started_s > START_S:
                return [*errors, f"no process that trains could be started, see {worker.log(folder)}"]
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
                apart |= {turn.worker} if answer.apart else set()
                for run_id, files in (answer.files or {}).items():
                    experiments.unpack(run_id, folder, files)
                if not answer.usable:  # whoever started it replaces it
                    key = f"end of {turn.worker}, {mark}"
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
    log = worker.log(folder)
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


# --- Where they run ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _client(scheduler: str) -> Iterator[Client]:
    """A client of the scheduler, or of one in this process that ends with it."""
    import dask  # here: a second, whatever is asked for
    from distributed import Client, LocalCluster

    config = {
        "distributed.scheduler.allowed-failures": 0,  # who tries again is decided here
        "distributed.dashboard.link": "http://{host}:{port}/status",
        "distributed.admin.large-graph-warning-threshold": "1 TB",  # networks are large, and sent on purpose
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(config))
        if not scheduler:
            options = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "silence_logs": logging.CRITICAL}
            scheduler = stack.enter_context(LocalCluster(n_workers=0, **options))
            tqdm.write(f"to watch the processes: {scheduler.dashboard_link}")
        yield stack.enter_context(Client(scheduler, timeout="10 s"))


@contextlib.contextmanager
def _processes(processes: int, threads: int, folder: Path) -> Iterator[Callable[[str], None]]:
    """Processes here that train, until this is left; the function replaces those that have ended, and tells all of them
    the address of the scheduler, once there is one: they take as long to start as it does.

    Dask's own way, a nanny for each, ends with a process that has lost its connection.
    """
    running: dict[int, subprocess.Popen] = {}
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    ours = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "DASK_LOGGING__DISTRIBUTED": "critical"}
    ours |= {"DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False"}  # of what a process is at, 100 times a second
    log = worker.log(folder)
    log.parent.mkdir(parents=True, exist_ok=True)
    scratch = paths.home() / ".cache" / "dask"
    command = [sys.executable, "-m", worker.__name__, str(scratch), str(os.getpid())]
    with log.open("a") as told:

        def keep(scheduler: str = "") -> None:
            for number, surroundings in enumerate(_surroundings(processes)):
                if number not in running or running[number].poll() is not None:
                    # Without our group: Ctrl-C does not reach it.
                    running[number] = subprocess.Popen(
                        command,
                        env=os.environ | counts | surroundings | ours,
                        stdin=subprocess.PIPE,
                        stdout=told,
                        stderr=told,
                        process_group=0,
                    )
                if scheduler and not (stdin := running[number].stdin).closed:
                    with contextlib.suppress(BrokenPipeError), stdin:  # of one that has ended already
                        stdin.write(scheduler.encode())

        try:
            keep()
            yield keep
        finally:
            for process in running.values():
                process.kill()  # what it has not finished lies in a checkpoint
            for process in running.values():
                process.communicate()


@contextlib.contextmanager
def _mark(folder: Path) -> Iterator[str]:
    """The name of a file in `folder`, as long as this is not left: who sees it has our disk."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".mark-*"):  # by a run that was killed
        left.unlink(missing_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".mark-") as file:
        yield Path(file.name).name


def _files(experiment: Dense | Pruned | Channels, folder: Path) -> worker.Files:
    """What a worker without our disk needs: the dense network, and a checkpoint to go on from."""
    needed = [experiment] if isinstance(experiment, Dense) else [experiment.dense, experiment]
    return {each.run_id: experiments.packed(each.run_id, folder) for each in needed}


def _surroundings(processes: int) -> list[dict[str, str]]:
    """The environment variables of each process: with GPUs, which one is its own, from before CUDA starts."""
    if not torch.cuda.is_available():
        return [{} for _ in range(processes)]
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = named.split(",")
    return [{"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} for number in range(processes)]
