"""How long it takes to plan many networks, and to find out what is done of them."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from reprolib import experiments
from reprolib.experiments import profiles, records

SIZES = (100, 1_000, 10_000, 100_000)
SPARSITIES = tuple(round(0.5 + 0.0049 * number, 4) for number in range(100))  # of each dense network


def plan_times_s(networks: int) -> tuple[float, float]:
    """Seconds to plan so many networks, of one pattern, and to look at their records, all of them there and empty."""
    profile = profiles.load("quick")
    methods = {"unstructured": {"pattern": "Unstructured()"}}
    seeds = list(range(networks // len(SPARSITIES)))
    profile = replace(profile, seeds=seeds, sparsities=list(SPARSITIES), methods=methods, ablations={}, channels=[])
    with tempfile.TemporaryDirectory() as name:
        started = time.perf_counter()
        plan = profile.plan()
        planned_s = time.perf_counter() - started
        folder = Path(name)
        for experiment in plan:
            (folder / experiment.run_id).mkdir()
            record = {"experiment": {}, "row": {"run_id": experiment.run_id, "accuracy_pct": 0.0}}
            text = records.to_json(record | {"curve": [], "provenance": {}})
            (folder / experiment.run_id / "record.json").write_text(text)
        started = time.perf_counter()
        experiments.set_aside_damaged(plan, folder)
        assert all(experiments.is_done(experiment, folder) for experiment in plan)
        return planned_s, time.perf_counter() - started


def print_times() -> None:
    print(f"{'networks':>9} {'to plan':>9} {'to resume':>10}, {records.hardware()}")
    for networks in SIZES:
        planned_s, resumed_s = plan_times_s(networks)
        print(f"{networks:9,} {planned_s:7.2f} s {resumed_s:8.2f} s", flush=True)
