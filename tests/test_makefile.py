"""The front door, where it does more than call Python."""

import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest

from reprolib.files import paths

REPRODUCE = ["make", "-C", str(paths.ROOT), "-o", "env", f"VENV={sys.prefix}", "reproduce"]


@pytest.fixture
def make(tmp_path):
    """Call make in a folder of its own, with the environment that runs this test."""

    def call(target):
        command = ["make", "-f", paths.ROOT / "Makefile", "-C", tmp_path, "-o", "env", f"VENV={sys.prefix}", target]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return call


def test_notebook_with_outputs_fails_lint_which_names_the_remedy(tmp_path, make):
    (tmp_path / "notebooks").mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1", execution_count=1)])
    notebook.cells[0].outputs = [nbformat.v4.new_output("stream", text="2")]
    nbformat.write(notebook, tmp_path / "notebooks" / "a.ipynb")
    refused = make("lint")
    assert refused.returncode and "error: these notebooks hold outputs: make strip removes them" in refused.stdout
    assert make("strip").returncode == 0
    assert make("lint").returncode == 0, make("lint").stdout


def test_who_ends_make_ends_the_training(tmp_path):
    """SIGTERM reaches what trains; what is finished is kept; no process is left."""
    command = [*REPRODUCE, "PROFILE=quick-dry-run"]
    surroundings = os.environ | {"REPROLIB_HOME": str(tmp_path)}
    started = subprocess.Popen(command, env=surroundings, stderr=subprocess.PIPE, text=True, process_group=0)
    log = tmp_path / "results" / "quick-dry-run" / "training.log"
    while not (log.exists() and log.read_text()) and started.poll() is None:
        time.sleep(0.1)
    os.kill(started.pid, signal.SIGTERM)
    _, told = started.communicate()  # ends when nobody holds the pipe any more
    assert "stopped; what is finished is kept: ask again to go on" in told
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    left = [line.split(None, 2) for line in listed.splitlines() if line.split()[0] == str(started.pid)]
    assert [words for words in left if not words[1].startswith("Z")] == []


@pytest.mark.parametrize("budget", ["-5m", "soon"])
def test_a_budget_that_is_none_is_told_as_one(budget):
    refused = subprocess.run([*REPRODUCE, "PROFILE=quick", f"BUDGET={budget}"], capture_output=True, text=True)
    assert f"'{budget}' is not understood: write 90s, 20m or 1h30m" in refused.stderr
