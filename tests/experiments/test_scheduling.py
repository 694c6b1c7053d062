"""Workers train a plan: dense networks first, errors do not stop the others, and a deadline does."""

import contextlib
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch

from reprolib import experiments, training
from reprolib.experiments import Dense, Pruned, scheduling
from reprolib.files import tensors
from reprolib.training import Recipe

DENSE = Dense("noisy-digits", Recipe(epochs=1, batch_size=32), width=0.0625, images=64)
PRUNED = Pruned(DENSE, "Block(2, 2)", 0.5, epochs=1)


def train(plan, folder, **options):
    return scheduling.train(plan, folder, **{"processes": 2, "threads": 1} | options)


def test_plan_is_trained_once_and_what_fails_is_named(tmp_path):
    impossible = Pruned(DENSE, "Balanced(4)", 0.98, epochs=1)
    other = Dense("noisy-digits", DENSE.recipe, DENSE.width, seed=1, images=64)
    looks = []
    plan = [DENSE, PRUNED, impossible, other]
    [error] = train(plan, tmp_path / "runs", look=looks.extend)
    assert error.startswith("noisy-digits, seed 0, balanced at 98 %: Balanced(4) reaches 75.00 % sparsity")
    assert [experiments.is_done(experiment, tmp_path / "runs") for experiment in plan] == [True, True, False, True]
    assert set(looks) <= set(plan) and DENSE in looks
    assert "noisy-digits, seed 1, dense: 100%" in (tmp_path / "training.log").read_text()

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}
    assert len(train(plan, tmp_path / "runs")) == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")} == written


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Networks of the user's own, that do other things than to compute; the name of each."""
    (tmp_path / "mine.py").write_text(OWN.format(folder=tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name, seed=0: Dense("noisy-digits", DENSE.recipe, model=f"mine:{name}", seed=seed)


OWN = """
import os, pathlib, time
from torch import nn

def deadly(num_classes):
    os._exit(1)

def deadly_once(num_classes):
    return at_first(num_classes, lambda: os._exit(1))

def lost_once(num_classes):
    from distributed import get_worker
    worker = get_worker()
    return at_first(num_classes, lambda: (worker.loop.add_callback(worker.batched_stream.abort), time.sleep(1000)))

def at_first(num_classes, end):
    told = pathlib.Path("{folder}") / "died"
    if not told.exists():
        told.touch()
        end()
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))

def faulty(num_classes):
    return None.attribute

def full(num_classes):
    raise OSError(28, "No space left on device")
"""


def test_dead_processes_and_unforeseen_errors_are_named_and_the_plan_goes_on(tmp_path, own):
    """One process at a time: each that is lost is replaced."""
    errors = train([own("deadly", 8), own("deadly", 9), own("faulty"), DENSE], tmp_path / "runs", processes=1)
    died, failed = errors[:2], errors[2]
    assert [error.split(" (see ")[0] for error in died] == [
        f"noisy-digits, seed {seed}, dense: its process died" for seed in (8, 9)
    ]
    assert "AttributeError" in failed and "training.log" in failed and len(errors) == 3
    assert experiments.is_done(DENSE, tmp_path / "runs")


@pytest.mark.parametrize("name", ["deadly_once", "lost_once"])
def test_a_network_whose_process_dies_or_loses_its_scheduler_once_is_tried_again(tmp_path, own, name):
    assert train([own(name)], tmp_path / "runs", processes=1) == []
    assert (tmp_path / "died").exists() and experiments.is_done(own(name), tmp_path / "runs")


def test_a_full_disk_is_told_once_and_ends_the_plan(tmp_path, own):
    """None behind those is started that can't be written."""
    [error] = train([own("full", 0), own("full", 1), DENSE], tmp_path / "runs")
    assert error.startswith(f"{tmp_path / 'runs'}: No space left on device: nothing more is trained; make room there")
    assert not experiments.is_done(DENSE, tmp_path / "runs")


def test_workers_of_a_scheduler_elsewhere_train_and_go_on_when_one_is_killed(tmp_path):
    """As on several machines that share a disk."""
    log, port = (tmp_path / "log").open("w"), 18_786
    dask = [sys.executable, "-m", "dask"]
    address = f"tcp://127.0.0.1:{port}"
    commands = [["scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]]
    commands += [["worker", address, "--nthreads", "1", "--local-directory", str(tmp_path), "--no-nanny"]] * 2
    processes = [subprocess.Popen([*dask, *command], stdout=log, stderr=log) for command in commands]

    def kill_one(running):
        if len(running) == 2 and processes[-1].poll() is None:
            processes[-1].kill()

    try:
        others = [replace(DENSE, seed=seed) for seed in (1, 2)]
        errors = train([DENSE, *others, PRUNED], tmp_path / "runs", scheduler=address, look=kill_one)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert errors == [], (tmp_path / "log").read_text()
    assert processes[-1].returncode == -9 and experiments.is_done(PRUNED, tmp_path / "runs")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The folder of two networks, each trained by a process that shares our disk: with as many threads as others."""
    folder = tmp_path_factory.mktemp("expected")
    assert train([DENSE, PRUNED], folder, processes=1) == []
    return folder


@pytest.fixture
def no_disk_in_common(tmp_path, monkeypatch):
    """As on a machine that does not see the folder of those that ask: the mark that lies there is not found."""
    monkeypatch.setattr(scheduling, "_mark", lambda folder: contextlib.nullcontext("another disk"))
    monkeypatch.setenv("REPROLIB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_worker_without_our_disk_gets_and_sends_files(tmp_path, expected, no_disk_in_common):
    assert train([DENSE, PRUNED], tmp_path / "runs", processes=1) == []
    for experiment in (DENSE, PRUNED):
        folders = tmp_path / "runs", expected
        curves = [experiments.run(experiment, folder)["curve"] for folder in folders]
        assert curves[0] == curves[1] != []
        files = [experiments.packed(experiment.run_id, folder) for folder in folders]
        assert files[0].keys() == files[1].keys() == {"record.json", "weights.safetensors"}
        # not of files: safetensors writes the notes of a file in an order by chance
        weights = [tensors.read(folder / experiment.run_id / "weights.safetensors") for folder in folders]
        assert weights[0].keys() == weights[1].keys() != set()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [path.name for path in no_disk_in_common.iterdir()] == [".cache"]  # nothing stays on the other machine


def test_a_worker_without_our_disk_sends_its_checkpoint_when_time_is_over(tmp_path, no_disk_in_common):
    long = Dense("noisy-digits", Recipe(epochs=10**6, batch_size=32), width=0.0625, images=64)
    progress = []
    for seconds in (20, 15):
        assert train([long], tmp_path / "runs", processes=1, deadline=time.time() + seconds) == []
        progress.append(experiments.epochs_done(long, tmp_path / "runs"))
    assert 0 < progress[0] < progress[1]


def test_a_scheduler_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"tcp://127\.0\.0\.1:9"):
        train([DENSE], tmp_path / "runs", scheduler="tcp://127.0.0.1:9")


ORPHAN = """
import os, pathlib, sys
from reprolib.experiments import Dense, scheduling
from reprolib.training import Recipe

def look(running):
    if "dense" in (folder / "training.log").read_text():
        os._exit(9)  # as if killed, while it trains

if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    endless = Dense("noisy-digits", Recipe(epochs=10**6, batch_size=32), width=0.0625, images=64)
    scheduling.train([endless], folder / "runs", processes=1, threads=1, look=look)
"""


def test_no_process_is_left_of_who_is_killed(tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    front = subprocess.Popen([sys.executable, script, tmp_path])
    assert front.wait(timeout=120) == 9
    end = time.monotonic() + 20
    while left := [process.pid for process in psutil.process_iter(["cmdline"]) if is_worker_of(front.pid, process)]:
        assert time.monotonic() < end, left
        time.sleep(0.2)


def is_worker_of(pid, process):
    command = process.info["cmdline"] or []
    return scheduling.worker.__name__ in command and command[-1] == str(pid)


def test_deadline_leaves_a_checkpoint_to_go_on_from(tmp_path):
    endless = Dense("noisy-digits", Recipe(epochs=10**6, batch_size=32), width=0.0625, images=64)
    started = time.time()
    assert train([endless, PRUNED], tmp_path, processes=1, deadline=started + 20) == []
    assert 20 <= time.time() - started < 20 + scheduling.GRACE_S
    stands = training.position(tmp_path / endless.run_id / experiments.CHECKPOINT)
    assert 0 < stands.progress < 1 and 0 < stands.wall_time_s < 20
    assert experiments.epochs_done(endless, tmp_path) == pytest.approx(10**6 * stands.progress)
    assert not experiments.is_done(endless, tmp_path) and not experiments.is_done(DENSE, tmp_path)


def test_nothing_starts_behind_the_deadline(tmp_path):
    assert train([DENSE], tmp_path, deadline=time.time() - 1) == []
    assert not list(tmp_path.rglob("*.safetensors"))
