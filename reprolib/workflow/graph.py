"""The front of the graph: `make reproduce` and `make figures`; `make report` and `make sweep` begin here, too.

Networks are trained by `experiments.scheduling`, in the order of the profile's plan; their records become tables;
Snakemake runs the notebooks that draw on these tables. One run at a time works on a folder, and each shows a bar.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import pandas as pd
import torch
from tqdm import tqdm

from reprolib import experiments
from reprolib.experiments import Channels, Dense, Pruned, profiles, records, scheduling
from reprolib.experiments.profiles import Profile
from reprolib.files import paths
from reprolib.files.atomic import write_atomically
from reprolib.files.deadline import seconds
from reprolib.files.processes import environment
from reprolib.training import data
from reprolib.workflow import runner

FIGURES_S = 150.0  # of a budget, kept for tables and figures

# The rules of the Snakefile that draw, with the tables that each needs.
DRAWING = {
    "anatomy": [],
    "accuracy_figure": [paths.accuracy_csv],
    "ablation_figures": [paths.accuracy_csv, paths.ablations_csv],
    "kernel_figures": [paths.latency_csv],
    "latency_figure": [paths.accuracy_csv, paths.latency_csv],
    "claims": [paths.accuracy_csv],
}
REPORTS = ["dense_report", "pruning_report"]
UNMEASURED = "latencies could not be measured, see above: make bench tries again"


def reproduce(profile: Profile, cores: int, budget_s: float = math.inf, scheduler: str = "") -> None:
    """Compute everything that is missing of a profile, what tells most first, and draw what there is.

    Networks that another profile has trained are taken over. The data sets that are needed come first. With a budget,
    training stops in time, to go on when asked again, and latencies are not measured. With the address of a Dask
    `scheduler`, its workers train. Raises ValueError or OSError, before anything is done, where data can't be had;
    RuntimeError, behind everything else, for networks that could not be trained.
    """
    if budget_s <= FIGURES_S:
        raise ValueError(f"a budget of {budget_s:g} s is too short: tables and figures alone may take {FIGURES_S:g} s")
    deadline = time.time() + budget_s - FIGURES_S
    print(f"{profile.name}: {profile.purpose}; {cores} cores")
    with _networks(profile, cores, deadline, scheduler) as (errors, lock):
        write_tables(profile)
        whole = paths.trained(profile.name).exists() and budget_s == math.inf
        measured = whole and latencies(profile, cores)
        if whole and not measured:
            errors.append(UNMEASURED)
        try:
            if measured:
                rules = ["all", *REPORTS, *DRAWING]  # not those that ask for our lock: what they make is there
                targets = ["all", "--allowed-rules", *rules]
                runner.snakemake(targets, paths.results(profile.name), cores, lock, {"profile": profile.name})
            else:
                draw(profile.name, cores, lock)
        except (RuntimeError, OSError) as failed:
            errors.append(str(failed).removeprefix("error: "))
    _refuse(errors)
    print(f"figures and tables: {paths.figures(profile.name)}")
    print(f"numbers: {paths.accuracy_csv(profile.name)}")


def networks(profile: Profile, cores: int) -> None:
    """Train what has no record yet of a profile. Raises as `reproduce`."""
    with _networks(profile, cores) as (errors, _):
        _refuse(errors)


@contextmanager
def _networks(
    profile: Profile, cores: int, deadline: float = math.inf, scheduler: str = ""
) -> Iterator[tuple[list[str], IO]]:
    """Train what is missing of a profile; what went wrong, and the lock of its results, held until this is left."""
    runs, plan = paths.runs(profile.name), profile.plan()
    experiments.set_aside_damaged(plan, runs)
    missing = [experiment for experiment in plan if not experiments.is_done(experiment, runs)]
    others = sorted(paths.home().glob("results/*/runs"))
    if taken := [experiment for experiment in missing if experiments.take_over(experiment, runs, others)]:
        print(f"{len(taken)} of {len(plan)} networks are there already, from other profiles")
        missing = [experiment for experiment in missing if experiment not in taken]
    for dataset in dict.fromkeys((e if isinstance(e, Dense) else e.dense).dataset for e in missing):
        data.fetch(dataset)
    with ExitStack() as stack:
        with runner.bar(sum(map(experiments.epochs, plan)), _epochs_done(plan, runs), "epoch") as look:
            lock = stack.enter_context(runner.only_run(paths.results(profile.name), look))
            errors = scheduling.train(
                plan,
                runs,
                processes=torch.cuda.device_count() or max(1, cores // profile.threads),
                threads=profile.threads,
                deadline=deadline,
                look=look,
                scheduler=scheduler,
            )
        if missing := note_whole(profile):
            print(f"{len(plan) - missing} of {len(plan)} networks are trained: ask again to go on")
        yield errors, lock


def note_whole(profile: Profile) -> int:
    """How many networks of a profile have no record. Its note ``trained.txt`` is there as long as that is none."""
    plan, note = profile.plan(), paths.trained(profile.name)
    missing = sum(not experiments.is_done(experiment, paths.runs(profile.name)) for experiment in plan)
    if missing:
        note.unlink(missing_ok=True)
    elif not note.exists():
        write_atomically(note, f"{len(plan)} networks\n")
    return missing


def latencies(profile: Profile, cores: int) -> bool:
    """Measure the latencies of a profile's networks, unless that was done; whether they are there. Nothing else may run
    meanwhile.
    """
    path = paths.latency_csv(profile.name)
    if path.exists():
        return True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command = [sys.executable, "-m", "reprolib.bench", "latency", "--own", "--profile", profile.name]
    command += ["--device", device, "--threads", str(cores), "--output", str(path)]
    return subprocess.run(command, check=False, env=environment()).returncode == 0


def _refuse(errors: list[str]) -> None:
    if errors:
        raise RuntimeError("\n".join(f"error: {line}" for line in errors))


def figures(profile: Profile, cores: int) -> None:
    """Redraw the figures and tables of a profile from its tables of results, without training."""
    records.read_csv(paths.accuracy_csv(profile.name))
    with runner.only_run(paths.results(profile.name), lambda: None) as lock:
        draw(profile.name, cores, lock)
    folder, redrawn = paths.figures(profile.name), list(paths.drawn(profile.name).glob("*/[!.]*"))
    if not redrawn:
        raise RuntimeError(f"error: nothing was drawn into {folder}, see {paths.results(profile.name)}/snakemake.log")
    print(f"redrawn: {len(redrawn)} files in {folder}")


def drawable(profile_name: str) -> list[str]:
    """The rules whose tables are there."""
    accuracy = paths.accuracy_csv(profile_name)
    if accuracy.exists() and not _has_pair(records.read_csv(accuracy)):
        return ["anatomy"]
    return [rule for rule, tables in DRAWING.items() if all(table(profile_name).exists() for table in tables)]


def draw(profile_name: str, cores: int, lock: IO) -> None:
    """Draw everything that the tables of a profile allow: without a pair to compare, the anatomy of a mask alone.

    Raises RuntimeError for what could not be drawn; what could be is in its place nevertheless.
    """
    rules = drawable(profile_name)
    targets = [*rules, "--forcerun", *rules, "--allowed-rules", *rules]
    config = {"profile": profile_name, "latency": paths.latency_csv(profile_name).exists()}
    shutil.rmtree(paths.drawn(profile_name), ignore_errors=True)  # of another run
    runner.snakemake(targets, paths.results(profile_name), cores, lock, config)


def _has_pair(accuracy: pd.DataFrame) -> bool:
    """Whether hybrid and another method are there to compare."""
    methods = set(accuracy["pattern"]) - {"dense"}
    return "hybrid" in methods and len(methods) > 1


def write_tables(profile: Profile) -> None:
    """Write ``accuracy.csv`` and ``ablations.csv`` from the records of a profile's networks.

    Rows of networks that the profile asks for and that have no record here, of an earlier run elsewhere, stay.
    """
    sections = {
        paths.accuracy_csv: profile.reported(),
        paths.ablations_csv: {experiment: experiment.method for experiment in profile.asked("ablations")},
    }
    runs = paths.runs(profile.name)
    for path, asked in sections.items():
        done = {e: name for e, name in asked.items() if experiments.is_done(e, runs)}
        rows = [experiments.run(e, runs)["row"] | {"pattern": name} for e, name in done.items()]
        records.update(path(profile.name), pd.DataFrame(rows), [experiment.run_id for experiment in asked])


# --- Progress -------------------------------------------------------------------------------------------------------


def _epochs_done(plan: list[Dense | Pruned | Channels], runs: Path) -> Callable[..., float]:
    """A function that says how many epochs of a plan are trained, and tells of each network that got done meanwhile.

    Given the experiments that are running or just ran, it looks at these alone: a plan may be long.
    """
    stands = {experiment: experiments.epochs_done(experiment, runs) for experiment in plan}
    waiting = {experiment: None for experiment in plan if not experiments.is_done(experiment, runs)}

    def done(running: Collection[Dense | Pruned | Channels] | None = None) -> float:
        for experiment in [e for e in (waiting if running is None else running) if e in waiting]:
            stands[experiment] = experiments.epochs_done(experiment, runs)
            if experiments.is_done(experiment, runs):
                del waiting[experiment]
                tqdm.write(_summary(experiments.run(experiment, runs)["row"]), file=sys.stderr)
        return sum(stands.values())

    return done


def _summary(row: dict) -> str:
    """One line on a network that is done."""
    sparsity = f" at {100 * row['sparsity']:.1f} %" if row["pattern"] != "dense" else ""
    return (
        f"{data.label(row['dataset'])}, seed {row['seed']}, {row['pattern']}{sparsity}: "
        f"accuracy {row['accuracy_pct']:.2f} % in {row['wall_time_s']:.0f} s"
    )


def _profile(name: str) -> Profile:
    """The profile of that name; without a name, the one that fits this machine."""
    if not name:
        usable = torch.cuda.is_available()
        name = "paper" if usable else "quick"
        print(f"PROFILE={name}, because {'a GPU is usable' if usable else 'no GPU is usable'} here")
    return profiles.load(name)


def _cores(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of cores: write 1 or more")
    return int(text)


def main() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description="What `make reproduce`, `figures`, `report` and `sweep` call.")
    parser.add_argument("--cores", type=_cores, default=cores, help="networks or notebooks side by side")
    commands = parser.add_subparsers(dest="command", required=True)
    reproducing = commands.add_parser("reproduce")
    reproducing.add_argument("--profile", default="")
    reproducing.add_argument("--budget", type=seconds, default=math.inf, help="such as 20m or 1h30m")
    reproducing.add_argument("--scheduler", default="", help="of Dask, elsewhere: tcp://host:8786")
    for part in ("networks", "tables", "latencies"):  # of the Snakefile
        commands.add_parser(part).add_argument("--profile", required=True)
    commands.add_parser("figures").add_argument("--profile", default="quick")
    commands.add_parser("report").add_argument("--profile", default="quick")
    sweeping = commands.add_parser("sweep")
    sweeping.add_argument("--notebook", required=True)
    sweeping.add_argument("--grid", type=Path, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        match arguments.command:
            case "reproduce":
                reproduce(_profile(arguments.profile), arguments.cores, arguments.budget, arguments.scheduler)
            case "networks":
                networks(profiles.load(arguments.profile), arguments.cores)
            case "tables":
                write_tables(profiles.load(arguments.profile))
            case "latencies":
                _refuse([] if latencies(profiles.load(arguments.profile), arguments.cores) else [UNMEASURED])
            case "figures":
                figures(profiles.load(arguments.profile), arguments.cores)
            case "report":
                from reprolib.workflow import report  # here, as sweeps: nbconvert takes its time, too

                profile = profiles.load(arguments.profile)
                if not report.is_drawn(profile.name, drawable(profile.name)):
                    figures(profile, arguments.cores)
                print(f"one page: {report.write(profile)}")
            case "sweep":
                from reprolib.workflow import sweeps  # here: papermill takes a second, whatever is asked for

                sweeps.sweep(arguments.notebook, arguments.grid, arguments.cores)
    except KeyboardInterrupt:
        sys.exit("stopped; what is finished is kept: ask again to go on")
    except RuntimeError as error:
        sys.exit(str(error))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
