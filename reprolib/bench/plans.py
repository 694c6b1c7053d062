"""What many networks cost beside their training: to plan them, to find out what is done, to watch one that trains."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from reprolib import experiments
from reprolib.experiments import Dense, profiles, records, scheduling
from reprolib.training import Recipe

SIZES = (100, 1_000, 10_000, 100_000)
WATCHED_S = 20.0
SPARSITIES = tuple(round(0.5 + 0.0049 * number, 4) for number in range(100))  # of each dense network


def costs(networks: int) -> tuple[float, float, float]:
    """Seconds to plan so many networks, of one pattern, and to look at their records, all of them there and empty; then
    the share of a core, in %, that watching one costs while all others wait.
    """
    profile = profiles.load("quick")
    methods = {"unstructured": {"pattern": "Unstructured()"}}
    seeds = list(range(networks // len(SPARSITIES)))
    profile = replace(profile, seeds=seeds, sparsities=list(SPARSITIES), methods=methods, ablations={}, channels=[])
    with tempfile.TemporaryDirectory() as name:
        started = time.perf_counter()
        plan = profile.plan()
        planned_s = time.perf_counter() - started
        watched_pct = _watched_pct(plan, Path(name) / "none" / "runs")
        folder = Path(name) / "runs"
        for experiment in plan:
            (folder / experiment.run_id).mkdir(parents=True)
            record = {"experiment": {}, "row": {"run_id": experiment.run_id, "accuracy_pct": 0.0}}
            text = records.to_json(record | {"curve": [], "provenance": {}})
            (folder / experiment.run_id / "record.json").write_text(text)
        started = time.perf_counter()
        experiments.set_aside_damaged(plan, folder)
        assert all(experiments.is_done(experiment, folder) for experiment in plan)
        return planned_s, time.perf_counter() - started, watched_pct


def _watched_pct(plan: list[Dense], folder: Path) -> float:
    """What this process uses of a core while one network trains and those of the plan wait."""
    endless = Dense("noisy-digits", Recipe(epochs=10**6, batch_size=32), width=0.0625, images=64)
    looks = []

    def look(running: list[Dense]) -> None:
        if running:
            looks.append((time.monotonic(), time.process_time()))

    scheduling.train([endless, *plan], folder, processes=1, threads=1, deadline=time.time() + WATCHED_S, look=look)
    (began_s, used_s), (ended_s, used_in_all_s) = looks[2], looks[-2]
    return 100 * (used_in_all_s - used_s) / (ended_s - began_s)


def print_times() -> None:
    print(f"{'networks':>9} {'to plan':>9} {'to resume':>10} {'to watch':>10} of a core; {records.hardware()}")
    for networks in SIZES:
        planned_s, resumed_s, watched_pct = costs(networks)
        print(f"{networks:9,} {planned_s:7.2f} s {resumed_s:8.2f} s {watched_pct:8.2f} %", flush=True)
