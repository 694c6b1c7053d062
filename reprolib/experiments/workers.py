"""Many networks, trained side by side in processes of their own: the first of the plan first, until a deadline."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from reprolib import experiments
from reprolib.experiments import Channels, Dense, Pruned, records
from reprolib.files.deadline import OutOfTime
from reprolib.files.processes import end_with_parent

GRACE_S = 10.0  # that a network in evaluation has behind the deadline; then its process is ended
# What keeps every network from being written: a full disk, an exceeded quota, a folder that can't be written.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR}


class Worker(NamedTuple):
    pipe: Connection
    process: multiprocessing.Process


class Answer(NamedTuple):
    """What a worker says of an experiment that it is through with: errors, a line each; whether to send it another one;
    and whether to start no more of the plan anywhere.
    """

    errors: list[str]
    usable: bool = True
    stop: bool = False


def train(
    plan: list[Dense | Pruned | Channels],
    folder: Path,
    *,
    workers: int,
    threads: int,
    deadline: float = math.inf,
    look: Callable[[], None] = lambda: None,
) -> list[str]:
    """Run the experiments of `plan` that have no record in `folder` yet; return what went wrong, a line each.

    `workers` networks train at a time on `threads` threads each, a pruned one as soon as its dense one is done. When
    `time.time()` passes `deadline` all of them stop at a checkpoint; one that is being evaluated goes back to its last,
    two minutes ago at most. Where a network can't be written, no other one is started. `look` is called about twice a
    second. What the networks tell while they train is appended to ``training.log`` beside `folder`.
    """
    log = folder.parent / "training.log"
    waiting = [experiment for experiment in plan if not experiments.is_done(experiment, folder)]
    workers_ = [_start(threads, log) for _ in range(min(workers, len(waiting)))]
    idle, busy, errors = workers_[:], {}, []

    def replaced(worker: Worker) -> Worker:
        workers_.remove(worker)
        workers_.append(_start(threads, log))
        return workers_[-1]

    try:
        while True:
            ready = (e for e in waiting if isinstance(e, Dense) or experiments.is_done(e.dense, folder))
            while idle and time.time() < deadline and (experiment := next(ready, None)):
                worker = idle.pop() if idle[-1].process.is_alive() else replaced(idle.pop())
                worker.pipe.send((experiment, folder, deadline))
                busy[worker.pipe] = worker, experiment
            started = [experiment for _, experiment in busy.values()]
            waiting = [experiment for experiment in waiting if experiment not in started]
            if not busy or time.time() > deadline + GRACE_S:
                return errors
            for pipe in wait(list(busy), timeout=0.5):
                worker, experiment = busy.pop(pipe)
                try:
                    answer = pipe.recv()
                    errors += [line for line in answer.errors if line not in errors]
                    waiting = [] if answer.stop else waiting
                    idle.append(worker if answer.usable else replaced(worker))
                except (EOFError, ConnectionError):
                    errors.append(
                        f"{experiment.label}: its process died (see {log}); out of memory? Ask again to go on"
                    )
                    idle.append(replaced(worker))
            look()
    finally:
        for worker in workers_:
            worker.process.terminate()
        for worker in workers_:
            worker.process.join()


def _start(threads: int, log: Path) -> Worker:
    """A process that trains what it is sent."""
    context = multiprocessing.get_context("spawn")  # a fork would share the threads and the GPU of this process
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, threads, log), daemon=True)
    process.start()
    theirs.close()
    return Worker(ours, process)


def _work(pipe: Connection, threads: int, log: Path) -> None:
    """Run every experiment that is sent, and say what came of it: no error if it is done or out of time."""
    end_with_parent(multiprocessing.parent_process().pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    with log.open("a") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    tqdm.set_lock(threading.RLock())  # not one between processes, which would outlive a process that is ended
    torch.set_num_threads(threads)
    records.commit()  # kept from here on: the code may change on disk while this process trains with what it has loaded
    while True:
        experiment, folder, deadline = pipe.recv()
        try:
            experiments.run(experiment, folder, deadline)
            pipe.send(Answer([]))
        except OutOfTime:
            pipe.send(Answer([]))
        except (ValueError, OSError) as error:
            if getattr(error, "errno", None) in UNWRITABLE:
                what = f"{folder}: {error.strerror}: nothing more is trained; make room there, and ask again to go on"
                pipe.send(Answer([what], stop=True))
            else:
                pipe.send(Answer([f"{experiment.label}: {error}"]))
        except Exception as error:  # whatever it is, the plan goes on; a GPU may be unusable behind it, so not here
            traceback.print_exc()
            pipe.send(Answer([f"{experiment.label}: {type(error).__name__}: {error} (see {log})"], usable=False))
            return
