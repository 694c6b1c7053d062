"""What a process that we start knows of its surroundings."""

import json
import os
import subprocess
import sys

import pytest

from reprolib.files import paths, processes

HOSTILE = {
    "PYTHONPATH": "/elsewhere",
    "PYTHONHOME": "/elsewhere",
    "PYTHONSTARTUP": "/elsewhere/start.py",
    "PYTHONOPTIMIZE": "2",
    "MATPLOTLIBRC": "/elsewhere/matplotlibrc",
    "MPLBACKEND": "nothing",
    "JUPYTER_PATH": "/elsewhere/jupyter",
    "IPYTHONDIR": "/elsewhere/ipython",
    "SNAKEMAKE_PROFILE": "/elsewhere/profile",
    "GIT_DIR": "/elsewhere/.git",
}


def test_nothing_of_the_users_settings_leaks_in(monkeypatch, tmp_path):
    monkeypatch.setenv("REPROLIB_HOME", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "proxy")
    before = processes.environment()
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    assert processes.environment() == before
    assert "elsewhere" not in str(before) and before["HTTPS_PROXY"] == "proxy"
    assert before["PYTHONPATH"] == str(paths.ROOT)


def test_id_without_a_name(monkeypatch):
    def nobody():
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr(processes.getpass, "getuser", nobody)
    assert processes.environment()["LOGNAME"] == str(os.getuid())


@pytest.mark.parametrize(
    ("variable", "named", "meant"),
    [
        ("REPROLIB_HOME", "scratch", paths.ROOT / "scratch"),
        ("REPROLIB_HOME", "~/scratch", "/home/a/scratch"),
        ("REPROLIB_HOME", "/scratch", "/scratch"),
        ("REPROLIB_HOME", "", paths.ROOT),
        ("REPROLIB_DATA", "../cifar", paths.ROOT.parent / "cifar"),
        ("REPROLIB_DATA", "", paths.ROOT / "data"),
    ],
)
def test_folders_mean_the_same_everywhere(variable, named, meant, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/a")
    monkeypatch.setenv(variable, named)
    monkeypatch.chdir(tmp_path)
    folder = {"REPROLIB_HOME": paths.home, "REPROLIB_DATA": paths.data}[variable]
    assert str(folder()) == processes.environment()[variable] == str(meant)


def test_copies_of_notebooks_are_not_notebooks(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    for name in ("02_prune", "02_prune-Copy1", "02_prune (copy)", "Untitled"):
        (tmp_path / f"{name}.ipynb").touch()
    assert paths.notebooks() == [paths.notebook("02")] == [paths.notebook("02_prune")] == [tmp_path / "02_prune.ipynb"]
    (tmp_path / "02_mine.ipynb").touch()
    with pytest.raises(FileNotFoundError, match="more than one notebook '02': there are 02_mine, 02_prune"):
        paths.notebook("02")


def test_figure_is_drawn_alike_among_hostile_settings(tmp_path):
    """Kernels and styles of the user, a Matplotlib that breaks, a home folder that is not there."""
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    kernel = {"argv": ["false"], "display_name": "Python 3", "language": "python"}
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(json.dumps(kernel))
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not ours')")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 40\n")
    home = tmp_path / "über {x} home"
    results = home / "results" / "laptop-cifar100"
    results.mkdir(parents=True)
    for name in ("accuracy.csv", "latency.csv"):
        (results / name).write_bytes((paths.ROOT / "results" / "laptop-cifar100" / name).read_bytes())
    hostile = HOSTILE | {
        "JUPYTER_PATH": str(tmp_path),
        "PYTHONPATH": str(tmp_path),
        "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
        "HOME": "/nonexistent",
        "REPROLIB_HOME": str(home),
    }
    hostile = {name: value for name, value in hostile.items() if name not in ("PYTHONHOME", "PYTHONSTARTUP")}
    command = [sys.executable, "-m", "reprolib.workflow.notebooks", "03", results / "out.ipynb"]
    command += ["--parameters", json.dumps({"profile": "laptop-cifar100", "folder": str(home)})]
    done = subprocess.run(
        list(map(str, command)), env=os.environ | hostile, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    committed = paths.ROOT / "figures" / "laptop-cifar100" / "accuracy_vs_sparsity.svg"
    assert (home / committed.name).read_bytes() == committed.read_bytes()
