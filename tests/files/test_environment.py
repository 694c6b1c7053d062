"""The environment in .venv is this checkout's, or is built again; and the package comes with what it needs."""

import importlib.metadata
import itertools
import json
import os
import re
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
    """A checkout of its own whose environment has just been built, by this Python."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(environment, "STAMP", tmp_path / ".venv" / ".complete")
    for name in environment.INPUTS:
        shutil.copy(paths.ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    environment.STAMP.write_text(json.dumps(environment.wanted()))
    return tmp_path


def change_stamp(**values):
    environment.STAMP.write_text(json.dumps(environment.wanted() | values))


def point_to(checkout, target):
    python = checkout / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to(target)


FAULTS = {
    "there is none yet": lambda checkout: shutil.rmtree(checkout / ".venv"),
    "the one here is unfinished": lambda checkout: environment.STAMP.unlink(),
    "or of an earlier version": lambda checkout: environment.STAMP.write_text(""),
    "the one here was built in /elsewhere": lambda checkout: change_stamp(checkout="/elsewhere"),
    "requirements.lock or pyproject.toml changed": lambda checkout: (checkout / "requirements.lock").write_text("new"),
    "Python 3.11.0 of the one here is gone": lambda checkout: change_stamp(python="3.11.0"),
    "of the one here is gone": lambda checkout: point_to(checkout, "/nowhere"),
}


@pytest.mark.parametrize(("why", "happen"), FAULTS.items())
def test_environment_that_is_foreign_or_stale_is_built_again(checkout, why, happen):
    assert environment.fault(this_python=True) == ""
    happen(checkout)
    assert why in environment.fault(this_python=False)


def test_another_python_may_stay_until_one_is_asked_for(checkout):
    change_stamp(interpreter="/usr/bin/python3.12")
    assert environment.fault(this_python=False) == ""
    assert environment.fault(this_python=True).endswith(", /usr/bin/python3.12")


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
    tools = {"cuda-toolkit", "setuptools", "uv", "pytest", "pytest-xdist", "hypothesis", "ruff", "nbstripout"}
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
