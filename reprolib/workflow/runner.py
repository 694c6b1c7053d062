"""What runs a graph: Snakemake, one run at a time in a folder, and a bar that shows how far it is."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from tqdm import tqdm

from reprolib.files import paths
from reprolib.files.atomic import write_atomically
from reprolib.files.processes import environment

SNAKEFILE = paths.ROOT / "Snakefile"
# Snakemake, which ends with the process of this id.
SNAKEMAKE = """
import sys
from reprolib.files.processes import end_with_parent
end_with_parent(int(sys.argv.pop(1)))
from snakemake.cli import main
main()
"""


def snakemake(
    targets: list[str],
    folder: Path,
    cores: int,
    lock: IO,
    config: dict[str, object],
    look: Callable[[], None] = lambda: None,
) -> None:
    """Run Snakemake on `targets` with `folder`, whose `lock` is held, as its own; meanwhile call `look`.

    Raises RuntimeError with the errors of the log.
    """
    for path in folder.glob("*.csv"):
        if path.stat().st_mtime > time.time():  # from a machine with another clock: what is made of it would be deleted
            os.utime(path)
    log_path = folder / "snakemake.log"
    command = [sys.executable, "-c", SNAKEMAKE, str(os.getpid()), *targets, "--snakefile", str(SNAKEFILE)]
    command += ["--directory", str(folder), "--cores", str(cores)]
    command += ["--rerun-incomplete", "--keep-going", "--rerun-triggers", "mtime", "params", "input"]
    if torch.cuda.is_available():
        command += ["--resources", "gpu=1"]  # no two jobs on one GPU
    values = folder / "graph.json"  # on a command line, Snakemake would read them as YAML
    write_atomically(values, json.dumps(config))
    command += ["--configfile", str(values)]
    with log_path.open("w") as log:
        if any((folder / ".snakemake" / "locks").glob("*")):
            # Whoever holds our lock knows that a lock of Snakemake's own still lying there is a dead run's.
            subprocess.run([*command, "--unlock"], stdout=log, stderr=log, check=False, env=environment())
        # The child keeps the lock open: it stays held while the graph runs, even if this process is killed. It is a
        # process group of its own: Ctrl-C reaches it and its jobs once, through us; two would leave it hanging.
        child = subprocess.Popen(
            command, stdout=log, stderr=log, pass_fds=[lock.fileno()], env=environment(), process_group=0
        )
        try:
            while child.poll() is None:
                look()
                time.sleep(0.5)
            look()
        except KeyboardInterrupt:
            os.killpg(child.pid, signal.SIGINT)
            child.wait()
            raise
    if child.returncode:
        lines = log_path.read_text().splitlines()
        errors = list(dict.fromkeys(line for line in lines if line.startswith("error: ")))
        told = [number for number, line in enumerate(lines) if re.match(r"\w*(Error|Exception)\b", line)]
        reason = " ".join(lines[told[-1] : told[-1] + 3]) if told else "no reason given"
        raise RuntimeError("\n".join(errors or [f"error: the graph failed: {reason}, see {log_path}"]))


@contextmanager
def only_run(folder: Path, look: Callable[[], None]) -> Iterator[IO]:
    """Hold the lock of `folder`; while another run holds it, follow that one. A dead holder's lock is free."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "run.lock").open("w") as lock:
        told = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    tqdm.write("another run of this is going on: following it, then completing what it leaves")
                told = True
                look()
                time.sleep(0.5)
        yield lock


@contextmanager
def bar(total: float, done: Callable[..., float], unit: str) -> Iterator[Callable[..., None]]:
    """A progress bar; the yielded function shows how far things are, as `done` says, to which it hands what it gets."""
    interval_s = 1 if sys.stderr.isatty() else 60
    with tqdm(total=total, initial=done(), unit=unit, mininterval=interval_s, miniters=0, unit_scale=True) as shown:

        def look(*given: object) -> None:
            shown.n = done(*given)
            shown.update(0)

        yield look
