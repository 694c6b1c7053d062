"""Worker processes train a plan: dense networks first, errors do not stop the others, and a deadline does."""

import os
import subprocess
import sys
import time

import pytest

from reprolib import experiments, training
from reprolib.experiments import Dense, Pruned, workers
from reprolib.training import Recipe

DENSE = Dense("noisy-digits", Recipe(epochs=1, batch_size=32), width=0.0625, images=64)
PRUNED = Pruned(DENSE, "Block(2, 2)", 0.5, epochs=1)


def train(plan, folder, **options):
    return workers.train(plan, folder, **{"workers": 2, "threads": 1} | options)


class Deadly(Dense):
    """Ends the process that receives it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_plan_is_trained_once_and_what_fails_is_named(tmp_path):
    impossible = Pruned(DENSE, "Balanced(4)", 0.98, epochs=1)
    other = Dense("noisy-digits", DENSE.recipe, DENSE.width, seed=1, images=64)
    looks = []
    plan = [DENSE, PRUNED, impossible, other]
    [error] = train(plan, tmp_path / "runs", look=lambda: looks.append(1))
    assert error.startswith("noisy-digits, seed 0, balanced at 98 %: Balanced(4) reaches 75.00 % sparsity")
    assert [experiments.is_done(experiment, tmp_path / "runs") for experiment in plan] == [True, True, False, True]
    assert looks
    assert "noisy-digits, seed 1, dense: 100%" in (tmp_path / "training.log").read_text()

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}
    assert len(train(plan, tmp_path / "runs")) == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")} == written


class Faulty(Dense):
    """Fails in a way that nobody foresees, in the process that trains it."""

    def __reduce__(self):
        return Faulty, (self.dataset, self.recipe, self.width, (), self.seed), {"recipe": None}


def test_dead_processes_and_unforeseen_errors_are_named_and_the_plan_goes_on(tmp_path):
    """One process at a time: each that is lost is replaced."""
    deadly = [Deadly("noisy-digits", DENSE.recipe, DENSE.width, seed=seed) for seed in (8, 9)]
    faulty = Faulty("noisy-digits", DENSE.recipe, DENSE.width, seed=7)
    *died, failed = train([*deadly, faulty, DENSE], tmp_path / "runs", workers=1)
    assert [error.split(" (see ")[0] for error in died] == [
        f"noisy-digits, seed {seed}, dense: its process died" for seed in (8, 9)
    ]
    assert "AttributeError" in failed and "training.log" in failed
    assert experiments.is_done(DENSE, tmp_path / "runs")


def test_a_full_disk_is_told_once_and_ends_the_plan(tmp_path, monkeypatch):
    """Networks of the user's own stand for the disk: none behind them is started."""
    (tmp_path / "full.py").write_text('def net(num_classes):\n    raise OSError(28, "No space left on device")\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    full = [Dense("noisy-digits", DENSE.recipe, model="full:net", seed=seed) for seed in range(2)]
    [error] = train([*full, DENSE], tmp_path / "runs")
    assert error.startswith(f"{tmp_path / 'runs'}: No space left on device: nothing more is trained; make room there")
    assert not experiments.is_done(DENSE, tmp_path / "runs")


ORPHAN = """
import os, pathlib, sys
from reprolib.experiments import workers
from reprolib.experiments import Dense
from reprolib.training import Recipe

if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    endless = Dense("noisy-digits", Recipe(epochs=10**6, batch_size=32), width=0.0625, images=64)
    workers._start(1, folder / "training.log").pipe.send((endless, folder, float("inf")))
    os._exit(9)  # killed before the worker has loaded anything
"""


def test_worker_ends_with_who_started_it_even_if_that_one_is_gone_before_it_looks(tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    # The worker inherits the pipe of the output: reading ends when the worker does.
    done = subprocess.run([sys.executable, script, tmp_path], stdout=subprocess.PIPE, timeout=120)
    assert done.returncode == 9


def test_deadline_leaves_a_checkpoint_to_go_on_from(tmp_path):
    endless = Dense("noisy-digits", Recipe(epochs=10**6, batch_size=32), width=0.0625, images=64)
    started = time.time()
    assert train([endless, PRUNED], tmp_path, workers=1, deadline=started + 20) == []
    assert 20 <= time.time() - started < 20 + workers.GRACE_S
    stands = training.position(tmp_path / endless.run_id / experiments.CHECKPOINT)
    assert 0 < stands.progress < 1 and 0 < stands.wall_time_s < 20
    assert experiments.epochs_done(endless, tmp_path) == pytest.approx(10**6 * stands.progress)
    assert not experiments.is_done(endless, tmp_path) and not experiments.is_done(DENSE, tmp_path)


def test_nothing_starts_behind_the_deadline(tmp_path):
    assert train([DENSE], tmp_path, deadline=time.time() - 1) == []
    assert not list(tmp_path.rglob("*.safetensors"))
