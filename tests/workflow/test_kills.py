"""Whatever is killed, whenever: asking again gives the tables of an undisturbed run, and no process is left.

`make test` kills a few times while networks train; `make test-faults` kills whole runs, in training, latencies and
drawing, REPROLIB_KILLS times.
"""

import os
import random
import subprocess
import sys
import time

import psutil
import pytest

KILLS = int(os.environ.get("REPROLIB_KILLS", 0))
PROFILE = """
purpose: four small networks
threads: 1
datasets: [noisy-digits]
width: 0.0625
hidden: []
seeds: [0]
recipe: {epochs: 1, batch_size: 64, lr: 0.02, weight_decay: 5.0e-4, precision: fp32}
retraining_epochs: 1
sparsities: [0.75]
methods:
  hybrid: {pattern: "Balanced(4) & Block(4, 4)"}
  block: {pattern: "Block(4, 4)"}
  balanced: {pattern: Balanced(4)}
ablations: {}
"""
WHOLE = ["-m", "reprolib.workflow.graph", "--cores", "2", "reproduce", "--profile"]
TRAINING = """
import sys
from reprolib.experiments import profiles, scheduling
from reprolib.files import paths
from reprolib.workflow import graph

if __name__ == "__main__":
    profile = profiles.load(sys.argv[1])
    errors = scheduling.train(profile.plan(), paths.runs(profile.name), processes=2, threads=1)
    graph.write_tables(profile)
    sys.exit("; ".join(errors) or 0)
"""


@pytest.fixture
def start(tmp_path):
    """Start a run in a folder of its own."""
    (tmp_path / "four.yaml").write_text(PROFILE)
    (tmp_path / "training.py").write_text(TRAINING)
    command = WHOLE if KILLS else [str(tmp_path / "training.py")]

    def call(home):
        surroundings = os.environ | {"REPROLIB_HOME": str(home), "PYTHONPATH": os.getcwd()}
        with (tmp_path / "log").open("a") as log:
            command_line = [sys.executable, *command, str(tmp_path / "four.yaml")]
            return subprocess.Popen(command_line, env=surroundings, stdout=log, stderr=log, start_new_session=True)

    return call


def family(process):
    """A process and all that it has started, with what these have started."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def test_kills_at_random_moments_change_no_table(start, computed, tmp_path):
    chance, began = random.Random(0), time.monotonic()
    assert start(tmp_path / "whole").wait() == 0, (tmp_path / "log").read_text()
    duration_s = time.monotonic() - began
    for number in range(KILLS or 2):
        home = tmp_path / f"kill {number} ä"
        front = psutil.Process(start(home).pid)
        time.sleep(chance.uniform(0.1, 0.9) * duration_s)
        seen = family(front)
        if seen:
            chance.choice(seen).kill()
        while start(home).wait():
            assert time.monotonic() - began < 100 * (number + 2) * duration_s, (tmp_path / "log").read_text()
        assert computed(home, "four") == computed(tmp_path / "whole", "four"), f"kill {number}"
        _, alive = psutil.wait_procs(seen, timeout=30)
        assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
