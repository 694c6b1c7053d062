"""The environment in .venv is this checkout's, or is built again; and the package comes with what it needs."""

import importlib.metadata
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from reprolib.files import environment, paths


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of its own whose two environments have just been built, by this Python."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    for built in (environment.MAIN, environment.PEERS):
        for name in built.inputs:
            shutil.copy(paths.ROOT / name, tmp_path / name)
        environment.python_of(built).parent.mkdir(parents=True)
        environment.python_of(built).symlink_to(sys.executable)
        change_stamp(built)
    return tmp_path


def stamp(built):
    return environment.ROOT / built.folder / ".complete"


def change_stamp(built=environment.MAIN, **values):
    stamp(built).write_text(json.dumps(environment.wanted(built) | environment.this_interpreter() | values))


def point_to(built, target):
    python = environment.python_of(built)
    python.unlink()
    python.symlink_to(target)


FAULTS = {
    "there is none yet": lambda built: shutil.rmtree(environment.ROOT / built.folder),
    "the one here is unfinished": lambda built: stamp(built).unlink(),
    "or of an earlier version": lambda built: stamp(built).write_text(""),
    "the one here was built in /elsewhere": lambda built: change_stamp(built, checkout="/elsewhere"),
    ".lock": lambda built: (environment.ROOT / built.inputs[0]).write_text("new"),
    "Python 3.11.0 of the one here is gone": lambda built: change_stamp(built, python="3.11.0"),
    "of the one here is gone": lambda built: point_to(built, "/nowhere"),
}


@pytest.mark.parametrize("built", [environment.MAIN, environment.PEERS], ids=lambda built: built.folder)
@pytest.mark.parametrize(("why", "happen"), FAULTS.items())
def test_environment_that_is_foreign_or_stale_is_built_again(checkout, built, why, happen):
    assert environment.fault(built, this_python=True) == ""
    happen(built)
    assert why in environment.fault(built)
    [other] = {environment.MAIN, environment.PEERS} - {built}
    assert environment.fault(other) == ""


def test_change_of_any_input_is_told(checkout):
    (checkout / "pyproject.toml").write_text("new")
    assert environment.fault(environment.MAIN) == "requirements.lock or pyproject.toml changed"
    (checkout / "requirements-peers.lock").write_text("new")
    assert environment.fault(environment.PEERS) == "requirements-peers.lock changed"


def test_another_python_may_stay_until_one_is_asked_for(checkout):
    change_stamp(interpreter="/usr/bin/python3.12")
    assert environment.fault(environment.MAIN) == ""
    assert environment.fault(environment.MAIN, this_python=True).endswith(", /usr/bin/python3.12")


def test_stale_environment_is_built_again_by_the_python_that_was_chosen_for_it(checkout, monkeypatch):
    chosen = checkout / "python3.12"
    shutil.copy("/bin/sh", chosen)
    change_stamp(interpreter=str(chosen), inputs="changed")
    called = []
    monkeypatch.setattr(environment, "build", lambda: called.append(sys.executable))
    monkeypatch.setattr(environment.os, "execv", lambda program, arguments: called.append(program))
    monkeypatch.setattr(environment.os, "chdir", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["environment"])
    environment.main()
    assert called[0] == str(chosen)
    called.clear()
    monkeypatch.setattr(sys, "argv", ["environment", "--this-python"])
    environment.main()
    assert called == [sys.executable]
    chosen.unlink()
    assert environment.former() is None


@pytest.fixture
def installed(checkout, monkeypatch):
    """What the environment of the peers is built with, here with Pythons that the test names."""
    commands, pythons = [], []

    def run(command, check, cwd, env, **streams):
        commands.append(command)
        if command[1] == "venv":
            if command[4] not in pythons:
                raise subprocess.CalledProcessError(2, command)
            package = checkout / ".venv-peers" / "lib" / "python3.11" / "site-packages"
            package.mkdir(parents=True)
            if command[4] == "3.11":
                (package / "deepsparse").mkdir()
            (checkout / ".venv-peers" / "bin").mkdir()
            environment.python_of(environment.PEERS).symlink_to(sys.executable)

    monkeypatch.setattr(environment.subprocess, "run", run)
    monkeypatch.setattr(environment, "_version", lambda python: "3.11.9" if python.exists() else "")
    return commands, pythons


def test_peers_get_the_python_of_deepsparse_and_its_licence_is_told(installed, capsys):
    commands, pythons = installed
    pythons.append("3.11")
    environment.build_peers()
    assert [command[1] for command in commands] == ["venv", "pip"]
    assert "requirements-peers.lock" in commands[1] and str(environment.python_of(environment.PEERS)) in commands[1]
    assert capsys.readouterr().out.splitlines() == [environment.PEERS_LICENCE]
    assert environment.fault(environment.PEERS) == ""


def test_without_that_python_the_peers_go_on_with_this_one(installed, capsys):
    _, pythons = installed
    pythons.append(sys.executable)
    environment.build_peers()
    [line] = capsys.readouterr().out.splitlines()
    assert "no Python 3.11" in line and "without DeepSparse" in line
    assert environment.fault(environment.PEERS) == ""


def test_peers_are_built_when_asked_for_and_not_before(checkout, monkeypatch, capsys):
    built = []
    monkeypatch.setattr(environment, "build", lambda: built.append(".venv"))
    monkeypatch.setattr(environment, "build_peers", lambda: built.append(".venv-peers"))
    shutil.rmtree(checkout / ".venv-peers")
    for arguments in ([], ["--peers"]):
        monkeypatch.setattr(sys, "argv", ["environment", *arguments])
        environment.main()
    assert built == [".venv-peers"]
    assert capsys.readouterr().out == "building the environment in .venv-peers: there is none yet\n"


def test_lock_of_the_peers_holds_what_is_asked_for_and_names_no_index():
    listed = (paths.ROOT / "requirements-peers.in").read_text()
    lines = [line.split(" #")[0].strip() for line in listed.splitlines() if line and not line.startswith("#")]
    asked = {Requirement(line).name for line in lines}
    assert asked == {"deepsparse", "openvino", "onnxruntime", "onnx", "numpy"}
    lock = (paths.ROOT / "requirements-peers.lock").read_text()
    assert asked <= {Requirement(line).name for line in lock.splitlines()} and "://" not in lock
    [deepsparse] = [Requirement(line) for line in lock.splitlines() if line.startswith("deepsparse==")]
    for version, there in (("3.11", True), ("3.12", False)):
        of = {"python_full_version": f"{version}.1", "sys_platform": "linux", "platform_machine": "x86_64"}
        assert deepsparse.marker.evaluate(of) is there


def test_installers_are_not_led_elsewhere(monkeypatch):
    for name in ("PIP_USER", "PYTHONPATH", "VIRTUAL_ENV"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror")
    outside = environment._outside()
    assert (
        not {"PIP_USER", "PYTHONPATH", "VIRTUAL_ENV"} & outside.keys() and outside["PIP_INDEX_URL"] == "https://mirror"
    )


def test_supported_versions_are_told_alike():
    oldest, end = environment.supported()
    assert oldest <= sys.version_info[:2] < end
    assert f"Python 3.{oldest[1]} to 3.{end[1] - 1}" in (paths.ROOT / "README.md").read_text()
    [of_conda] = re.findall(r"python=3\.(\d+)", (paths.ROOT / "environment.yml").read_text())
    assert oldest <= (3, int(of_conda)) < end


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        ("make", ["PYTHON=/nowhere/python"], "error: there is no /nowhere/python: name a Python with make PYTHON="),
        ("bmake", [], "error: this is not GNU make: call gmake"),
    ],
)
def test_make_says_what_it_needs(make, arguments, message, tmp_path):
    if not shutil.which(make):
        pytest.skip(f"no {make} here")
    shutil.copy(paths.ROOT / "Makefile", tmp_path)
    done = subprocess.run([make, "env", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode and message in done.stdout + done.stderr


def test_too_little_address_space_gets_one_line():
    allowed = environment.ADDRESSES_GB * 10**9 // 2
    done = subprocess.run(
        [sys.executable, "-m", "reprolib.files.environment"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed)),
        capture_output=True,
        text=True,
    )
    assert done.returncode and done.stderr == (
        "error: a process may use 3.0 GB of addresses here (ulimit -v), and 6 GB are needed: ulimit -v unlimited\n"
    )


def test_folder_of_the_same_name_does_not_hide_the_package(tmp_path):
    (tmp_path / "reprolib" / "reprolib").mkdir(parents=True)
    command = [sys.executable, "-c", "from reprolib import patterns; print(patterns.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(paths.ROOT / "reprolib" / "patterns.py")


# --- The wheel --------------------------------------------------------------------------------------------------------

USE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[2:]:
            raise ModuleNotFoundError(f"{name} is not among the dependencies")

sys.meta_path.insert(0, Missing())
sys.path.insert(0, sys.argv[1])

import torch
from reprolib import models, patterns, pruning
from reprolib.sparse import describe, sparsify

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.ReLU()).eval()
mask = patterns.parse("Balanced(4) & Block(4, 4)").mask(model[0].weight, 0.75)
model[0].weight.data *= mask
images = torch.randn(2, 8, 8, 8)
with torch.no_grad():
    torch.testing.assert_close(sparsify(model)(images), model(images))
print(patterns.__file__)
"""


def closure(requirements: list[str], extra: str = "") -> set[str]:
    """Names of the distributions that these requirements bring along here."""
    found = set()
    for requirement in map(Requirement, requirements):
        name = canonicalize_name(requirement.name)
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": each}) for each in ("", *requirement.extras, extra)
        ):
            continue
        found.add(name)
        for each in requirement.extras or {""}:
            found |= closure(importlib.metadata.requires(name) or [], each)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(paths.ROOT / "reprolib", source / "reprolib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(paths.ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", target, source]
    subprocess.run(list(map(str, command)), capture_output=True, check=True)
    [path] = target.glob("*.whl")
    return path


def test_wheel_works_with_what_it_declares_and_nothing_else(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    [metadata] = tmp_path.glob("*.dist-info")
    declared = importlib.metadata.Distribution.at(metadata).requires
    there = closure(declared)
    modules = importlib.metadata.packages_distributions()
    missing = [module for module, owners in modules.items() if not there & set(map(canonicalize_name, owners))]
    assert {"torch", "numba"} <= there and {"torchvision", "seaborn", "pydantic"} <= set(missing)
    command = [sys.executable, "-I", "-c", USE, tmp_path, *missing]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "reprolib" / "patterns.py")


def test_wheel_says_what_an_index_asks_for(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    [metadata] = tmp_path.glob("*.dist-info")
    said = importlib.metadata.Distribution.at(metadata).metadata
    for name in ("Name", "Version", "Summary", "License-Expression", "Requires-Python", "Keywords", "Classifier"):
        assert said[name], name
    assert said["Description-Content-Type"] == "text/markdown" and "# " in said.get_payload()
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("reprolib")], "and brings nothing else"


def test_declared_dependencies_are_those_of_the_environment():
    """pyproject.toml and environment.yml name the same packages; the tools that develop it stand in the second only."""

    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    declared = {canonicalize_name(Requirement(each).name) for each in asked}
    lines = re.findall(r"      - ([a-z][^#\n]*?) *(?:#.*)?\n", (paths.ROOT / "environment.yml").read_text())
    listed = {canonicalize_name(Requirement(line).name) for line in lines}
    tools = {"cuda-toolkit", "setuptools", "uv", "pytest", "pytest-xdist", "hypothesis", "psutil", "ruff", "nbstripout"}
    tools |= {"websocket-client"}
    assert listed - declared == tools and declared <= listed


# --- Provenance -------------------------------------------------------------------------------------------------------


def git(folder, *arguments):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", folder, *arguments]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    subprocess.run(list(map(str, command)), capture_output=True, check=True, env=clean)


def test_commit_is_the_one_of_this_checkout(tmp_path, monkeypatch):
    from reprolib.experiments import records

    ours, others = tmp_path / "ours", tmp_path / "others"
    for folder in (ours, others, others / "unpacked"):
        folder.mkdir()
    for repository in (ours, others):
        git(repository, "init")
        git(repository, "commit", "--allow-empty", "-m", repository.name)

    def commit_of(root):
        monkeypatch.setattr(paths, "ROOT", root)
        return records.commit.__wrapped__()

    named = commit_of(ours)
    assert re.fullmatch(r"[0-9a-f]{12}", named) and named != commit_of(others)
    assert commit_of(others / "unpacked") == "unknown"
    monkeypatch.setenv("GIT_DIR", str(others / ".git"))
    assert commit_of(ours) == named


def test_binder_finds_what_it_builds_from():
    """repo2docker reads environment.yml at the top, unless there is a folder of its own, and does no more."""
    assert not (paths.ROOT / "binder").exists() and not (paths.ROOT / ".binder").exists()
    lines = (paths.ROOT / "environment.yml").read_text().splitlines()
    assert "      - -c requirements.lock" in lines
    assert any(line.startswith("      - -e .") for line in lines), "notebooks import reprolib"
