"""A process that trains networks: what it is asked for, and what it answers.

`scheduling` starts this module on the machine that asks; elsewhere, ``dask worker`` is such a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from reprolib import experiments
from reprolib.experiments import Channels, Dense, Pruned, records
from reprolib.files import paths
from reprolib.files.deadline import OutOfTime
from reprolib.files.processes import end_with_parent

# What keeps every network from being written: a full disk, an exceeded quota, a folder that can't be written.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR}


Files = dict[str, dict[str, bytes]]  # the content of the files of runs, by the id of the run and their names


def log(folder: Path) -> Path:
    """Where what is told while networks of `folder` train is written."""
    return folder.parent / "training.log"


class Answer(NamedTuple):
    """What came of an experiment: errors, a line each; whether the process that ran it may go on; whether to start no
    more of the plan anywhere; whether to try it again; whether its machine lacks the disk of those that ask, and needs
    and sends files.
    """

    errors: list[str]
    usable: bool = True
    stop: bool = False
    again: bool = False
    apart: bool = False
    files: Files | None = None


def train(
    experiment: Dense | Pruned | Channels,
    folder: Path,
    mark: str,
    deadline: float,
    threads: int,
    sent: Files | None = None,
) -> Answer:
    """Run an experiment, and say what came of it: no error if it is done or `time.time()` passes `deadline`.

    Where the file `mark` is not in `folder`, this machine lacks the disk of those that ask. Then it needs the files
    that are `sent`, trains in a folder of its own, and its files are part of the answer: of a network that is done, or
    the checkpoint of one that is out of time.
    """
    _begin()
    torch.set_num_threads(threads)
    if (folder / mark).exists():
        return _logged(experiment, folder, deadline)
    if sent is None:
        return Answer([], again=True, apart=True)
    paths.home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=paths.home(), prefix=".apart-") as own:
        runs = Path(own) / "runs"
        for run_id, files in sent.items():
            experiments.unpack(run_id, runs, files)
        answer = _logged(experiment, runs, deadline)
        return answer._replace(apart=True, files={experiment.run_id: experiments.packed(experiment.run_id, runs)})


def _logged(experiment: Dense | Pruned | Channels, folder: Path, deadline: float) -> Answer:
    """`experiments.run`, what it shows going to ``training.log``."""
    log(folder).parent.mkdir(parents=True, exist_ok=True)
    with log(folder).open("a", buffering=1) as file, contextlib.redirect_stderr(file):
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
            return Answer([f"{experiment.label}: {type(error).__name__}: {error} (see {log(folder)})"], usable=False)
    return Answer([])


@functools.cache
def _begin() -> None:
    """Once in a process."""
    tqdm.set_lock(threading.RLock())  # not one between processes, which would outlive a process that is ended
    records.commit()  # kept from here on: the code may change on disk while this process trains with what it has loaded


async def _serve(folder: str) -> None:
    from distributed import Worker

    scheduler = sys.stdin.read()  # its address, from whoever started this process before there was one
    host = scheduler.split("://")[-1].rsplit(":", 1)[0]
    options = {"nthreads": 1, "memory_limit": 0, "dashboard": False, "local_directory": folder}
    async with Worker(scheduler, host=host, **options) as worker:
        await worker.finished()
    os._exit(0)  # whoever started it starts another: what it trains would go on in a thread, and be told to nobody


if __name__ == "__main__":
    end_with_parent(int(sys.argv.pop()))
    asyncio.run(_serve(*sys.argv[1:]))
