import fcntl
import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import yaml

from reprolib import graph, paths, profiles


def make(*arguments, **environment):
    """What the Makefile calls."""
    return subprocess.run(
        [sys.executable, "-m", "reprolib.graph", "--cores", "2", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.fixture
def notebook(tmp_path, write_notebook):
    """A notebook with two parameters that writes its table and fails for n = 13."""
    return write_notebook(
        tmp_path / "50_product.ipynb",
        'n: int = 1  # number\nk: int = 1  # factor\ntable: str = ""  # result',
        'if n == 13:\n    raise ValueError("unlucky number")',
        'if table:\n    open(table, "w").write(f"product\\n{n * k}\\n")',
    )


def write_grid(folder, **grid):
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return folder / "grid.yaml"


def test_sweep_runs_every_point_once_and_joins_the_tables(notebook, tmp_path):
    grid = write_grid(tmp_path, n=[2, 3], k=[5, 7])
    done = make("sweep", "--notebook", notebook, "--grid", grid, REPROLIB_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "results" / "sweeps" / "50-grid.csv")
    assert table["product"].to_list() == [10, 14, 15, 21]
    assert table["sweep_n"].to_list() == [2, 2, 3, 3] and table["sweep_k"].to_list() == [5, 7, 5, 7]

    executed = {path: path.stat().st_mtime_ns for path in (tmp_path / "results/sweeps/50-grid").glob("*.ipynb")}
    assert len(executed) == 4
    write_grid(tmp_path, n=[2, 3, 4], k=[5, 7])
    assert make("sweep", "--notebook", notebook, "--grid", grid, REPROLIB_HOME=str(tmp_path)).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in executed} == executed, "what was done is not run again"
    assert len(pd.read_csv(tmp_path / "results" / "sweeps" / "50-grid.csv")) == 6


def test_failing_point_is_reported_and_the_others_are_kept(notebook, tmp_path):
    grid = write_grid(tmp_path, n=[12, 13])
    done = make("sweep", "--notebook", notebook, "--grid", grid, REPROLIB_HOME=str(tmp_path))
    assert done.returncode == 1
    assert "ValueError: unlucky number" in done.stderr
    folder = tmp_path / "results" / "sweeps" / "50-grid"
    assert [
        json.loads((folder / "plan.json").read_text())["jobs"][path.stem]["n"] for path in folder.glob("*.csv")
    ] == [12]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"m": [1]}, "error: 50_product has no parameter m: it knows n, k, table"),
        ({"n": 1}, "must map each parameter to a list of values"),
    ],
)
def test_wrong_grid_gets_one_clear_line(grid, message, notebook, tmp_path):
    done = make("sweep", "--notebook", notebook, "--grid", write_grid(tmp_path, **grid), REPROLIB_HOME=str(tmp_path))
    assert done.returncode == 1
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "--profile", "huge"], "error: unknown profile 'huge': known are laptop, paper, quick"),
        (["figures", "--profile", "quick"], "error: no results in "),
        (["sweep", "--notebook", "02", "--grid", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_call_gets_one_clear_line(arguments, message, tmp_path):
    done = make(*arguments, REPROLIB_HOME=str(tmp_path))
    assert done.returncode == 1
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    done = make("reproduce", "--profile", "quick", REPROLIB_HOME=str(tmp_path / "file"))
    assert done.returncode == 1 and str(tmp_path / "file") in done.stderr


@pytest.mark.parametrize("profile", profiles.names())
def test_graph_of_every_profile_can_be_planned(profile, tmp_path):
    command = [sys.executable, "-m", "snakemake", "all", "--dry-run", "--snakefile", paths.ROOT / "Snakefile"]
    command += ["--directory", tmp_path, "--config", f"profile={profile}"]
    planned = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert planned.returncode == 0, planned.stdout + planned.stderr


def test_a_second_run_follows_the_first_and_then_gets_the_lock(tmp_path):
    looks = []
    with (tmp_path / "run.lock").open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)

        def look():
            looks.append(1)
            if len(looks) == 2:
                fcntl.flock(first, fcntl.LOCK_UN)

        with graph._only_run(tmp_path, look) as second:
            assert len(looks) == 2
            with (tmp_path / "run.lock").open("w") as third, pytest.raises(BlockingIOError):
                fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert second.closed


def test_profile_follows_the_hardware(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(graph, "_snakemake", lambda *arguments: asked.append(arguments[-1]["profile"]))
    for usable in (False, True):
        monkeypatch.setattr(graph.torch.cuda, "is_available", lambda usable=usable: usable)
        graph.reproduce(None, cores=2)
    assert asked == ["quick", "paper"]
    assert "PROFILE=quick, because no GPU is usable here" in capsys.readouterr().out
