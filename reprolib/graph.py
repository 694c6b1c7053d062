"""The front of the graph: run Snakemake for `make reproduce`, `make figures` and `make sweep`, and show progress.

Snakemake decides what is missing and runs it in parallel; this module picks the profile, holds a lock so that one run
at a time works on a folder, and shows one bar over the networks to train.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pandas as pd
import torch
import yaml
from tqdm import tqdm

from reprolib import notebooks, paths, profiles, records

# rules that train and time nothing
FIGURES = ["anatomy", "accuracy_figure", "ablation_figures", "kernel_figures", "latency_figure", "claims"]


def reproduce(profile_name: str | None, cores: int) -> None:
    """Compute everything that is missing of a profile; without a name, of the one that fits this machine."""
    if not profile_name:
        usable = torch.cuda.is_available()
        profile_name = "paper" if usable else "quick"
        print(f"PROFILE={profile_name}, because {'a GPU is usable' if usable else 'no GPU is usable'} here")
    profile = profiles.load(profile_name)
    print(f"{profile.name}: {profile.purpose}; {cores} cores")
    config = {"profile": profile.name}
    _snakemake(["all"], paths.results(profile.name), cores, _experiment_records(profile), "network", config)
    print(f"figures and tables: {paths.figures(profile.name)}")
    print(f"numbers: {paths.accuracy_csv(profile.name)}")


def figures(profile_name: str, cores: int) -> None:
    """Redraw all figures and tables of a profile from its tables, without training."""
    profiles.load(profile_name)
    for table in (paths.accuracy_csv, paths.ablations_csv, paths.latency_csv):
        records.read_csv(table(profile_name))
    targets = ["figures", "--forceall", "--allowed-rules", "figures", *FIGURES]
    _snakemake(targets, paths.results(profile_name), cores, [], "figure", {"profile": profile_name})
    print(f"redrawn: {paths.figures(profile_name)}")


def sweep(notebook: str, grid_file: Path, cores: int) -> None:
    """Run a notebook once per point of a grid (YAML: parameter → list of values), in parallel; resume by asking again.

    The executed notebooks land in ``results/sweeps/<notebook>-<grid>/``; if the notebook has a parameter ``table``, the
    tables of all points are joined in a CSV file of that name, with one column ``sweep_<parameter>`` per parameter.
    """
    path = paths.notebook(notebook)
    if not grid_file.is_file():
        raise FileNotFoundError(f"no grid {str(grid_file)!r}: name a YAML file such as 'seed: [0, 1, 2]' with GRID=")
    grid = yaml.safe_load(grid_file.read_text())
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ValueError(f"{grid_file} must map each parameter to a list of values, such as seed: [0, 1, 2]")
    notebooks.check_parameters(path, grid)
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    folder = paths.results("sweeps") / f"{path.stem[:2]}-{grid_file.stem}"
    has_table = "table" in notebooks.known_parameters(path)
    jobs = {}
    for point in points:
        name = records.fingerprint(point)
        jobs[name] = point | ({"table": str(folder / f"{name}.csv")} if has_table else {})
    plan = folder / "plan.json"
    records.write_atomically(plan, json.dumps({"notebook": str(path), "jobs": jobs}, indent=1))
    print(f"{path.stem}: {len(points)} points of {grid_file}; {cores} cores")
    outputs = [folder / f"{name}.ipynb" for name in jobs]
    _snakemake(["sweep"], folder, cores, outputs, "notebook", {"plan": str(plan)})
    if has_table:
        tables = [
            records.read_csv(folder / f"{name}.csv").assign(**{f"sweep_{k}": str(v) for k, v in point.items()})
            for name, point in zip(jobs, points, strict=True)
        ]
        records.write_csv(folder.with_suffix(".csv"), pd.concat(tables, ignore_index=True))
        print(f"numbers: {folder.with_suffix('.csv')}")
    print(f"notebooks: {folder}")


def _experiment_records(profile: profiles.Profile) -> list[Path]:
    experiments = [profile.dense(dataset, seed) for seed in profile.seeds for dataset in profile.datasets]
    for section in ("methods", "ablations"):
        for job in profile.jobs(section):
            experiments += profile.pruned(*job)
    folder = paths.runs(profile.name)
    return list(dict.fromkeys(folder / experiment.run_id / "record.json" for experiment in experiments))


# --- Snakemake ------------------------------------------------------------------------------------------------------


def _snakemake(
    targets: list[str], folder: Path, cores: int, awaited: list[Path], unit: str, config: dict[str, str]
) -> None:
    """Run Snakemake on `targets` with `folder` as its own, while a bar counts which of the `awaited` files are there.

    Raises RuntimeError with the errors of the log.
    """
    log_path = folder / "snakemake.log"
    command = [sys.executable, "-m", "snakemake", *targets, "--snakefile", str(paths.ROOT / "Snakefile")]
    command += ["--directory", str(folder), "--cores", str(cores)]
    command += ["--rerun-incomplete", "--keep-going", "--rerun-triggers", "mtime", "params", "input"]
    if torch.cuda.is_available():
        command += ["--resources", "gpu=1"]  # no two jobs on one GPU
    command += ["--config", *(f"{key}={value}" for key, value in config.items())]
    with _bar(awaited, unit) as look, _only_run(folder, look) as lock, log_path.open("w") as log:
        if any((folder / ".snakemake" / "locks").glob("*")):
            # Whoever holds our lock knows that a lock of Snakemake's own still lying there is a dead run's.
            subprocess.run([*command, "--unlock"], stdout=log, stderr=log, check=False)
        # The child keeps the lock open: it stays held while the graph runs, even if this process is killed.
        child = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=[lock.fileno()])
        try:
            while child.poll() is None:
                look()
                time.sleep(0.5)
            look()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            child.wait()
            raise
    if child.returncode:
        lines = log_path.read_text().splitlines()
        errors = list(dict.fromkeys(line for line in lines if line.startswith("error: ")))
        raise RuntimeError("\n".join(errors or [*lines[-15:], f"error: the graph failed, see {log_path}"]))


@contextmanager
def _only_run(folder: Path, look: Callable[[], None]) -> Iterator[IO]:
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
def _bar(awaited: list[Path], unit: str) -> Iterator[Callable[[], None]]:
    """A progress bar over files that appear; the yielded function looks for new ones and shows them."""
    waiting = [path for path in awaited if not path.exists()]
    interval_s = 1 if sys.stderr.isatty() else 60
    with tqdm(
        total=len(awaited),
        initial=len(awaited) - len(waiting),
        unit=unit,
        mininterval=interval_s,
        miniters=0,
        disable=not awaited,
    ) as bar:

        def look() -> None:
            for path in [path for path in waiting if path.exists()]:
                waiting.remove(path)
                bar.update()
                if path.name == "record.json":
                    bar.write(_summary(records.read(path)["row"]))
            bar.update(0)

        yield look


def _summary(row: dict) -> str:
    """One line on a network that is done."""
    sparsity = f" at {100 * row['sparsity']:.1f} %" if row["pattern"] != "dense" else ""
    return (
        f"{row['dataset']}, seed {row['seed']}, {row['pattern']}{sparsity}: "
        f"accuracy {row['accuracy_pct']:.2f} % in {row['wall_time_s']:.0f} s"
    )


def main() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cores", type=int, default=cores, help="networks or notebooks side by side")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("reproduce").add_argument("--profile", default="")
    commands.add_parser("figures").add_argument("--profile", default="quick")
    sweeping = commands.add_parser("sweep")
    sweeping.add_argument("--notebook", required=True)
    sweeping.add_argument("--grid", type=Path, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        match arguments.command:
            case "reproduce":
                reproduce(arguments.profile, arguments.cores)
            case "figures":
                figures(arguments.profile, arguments.cores)
            case "sweep":
                sweep(arguments.notebook, arguments.grid, arguments.cores)
    except KeyboardInterrupt:
        sys.exit("stopped; what is finished is kept: ask again to go on")
    except RuntimeError as error:
        sys.exit(str(error))
    except (ValueError, OSError, yaml.YAMLError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
