"""Every command and code block of README and docs/ works as it stands there.

Python blocks run, in the order of their page. A YAML block is a profile, or a grid for `make sweep`: each of its points
can be computed. Commands that take seconds run; of the others, `make` must know target and variables, the values must
exist, and the programs that they start must accept their arguments.
"""

import argparse
import importlib.util
import itertools
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import mistune
import pytest
import torch
from ruamel.yaml import YAML

from reprolib import models, pruning
from reprolib.experiments import profiles, running
from reprolib.files import paths
from reprolib.files.deadline import seconds
from reprolib.patterns import parse
from reprolib.workflow import graph, notebooks

PAGES = [paths.ROOT / "README.md", *sorted((paths.ROOT / "docs").glob("*.md"))]
MAKEFILE = (paths.ROOT / "Makefile").read_text()
RUN = {"help", "trace"}  # make targets that take seconds and write nothing
OTHERS = {"git", "cd", "pip", "export", "compute-sanitizer", "dask", "srun", "snakemake"}  # programs that are not ours
# What the text around Python blocks speaks of: names of the module that it tells to edit, a network, a layer, images.
TOLD = """
from dataclasses import dataclass

import torch

from reprolib import models, pruning
from reprolib.patterns import Block, Pattern

torch.manual_seed(0)
model, images, conv = models.vgg16(10, width=0.125), torch.randn(2, 3, 32, 32), torch.nn.Conv2d(64, 64, 3)
loader, epochs = [(images, torch.tensor([3, 7]))], 3
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
weights = pruning.prunable(model)
pruning.apply_masks(weights, pruning.make_masks(weights, Block(4, 4), pruning.uniform_ratios(weights, 0.75)))
model.eval()
"""


def tokens(page, kind):
    """All parts of a page of one kind, wherever they stand in it."""
    found, queue = [], mistune.create_markdown(renderer="ast", plugins=["table"])(page.read_text())
    while queue:
        token = queue.pop(0)
        found += [token] if token["type"] == kind else []
        queue = token.get("children", []) + queue
    return found


def blocks(page, *languages):
    """The code blocks of a page in these languages; an indented one has none, and holds commands."""
    every = [(token.get("attrs", {}).get("info", "sh"), token["raw"]) for token in tokens(page, "block_code")]
    known = {"python", "yaml", "sh", "bash", "console", "text", "bibtex"}
    assert {language for language, _ in every} <= known, f"{page.name}: say here what is done with such a block"
    return [text for language, text in every if language in languages]


def commands(page):
    lines = [line for text in blocks(page, "sh", "bash", "console") for line in text.splitlines()]
    spans = [" ".join(token["raw"].split()) for token in tokens(page, "codespan")]
    spans = [span for span in spans if re.match(r"make [a-z]|python3? -m reprolib", span)]
    lines = [shlex.join(shlex.split(line.removeprefix("$ "), comments=True)) for line in lines]
    return list(dict.fromkeys(filter(None, lines + spans)))


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


# --- Python and YAML --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs_as_it_stands_there(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where files go that it writes
    with torch.random.fork_rng():
        names = {"__name__": page.stem}  # of the classes that it defines
        exec(TOLD, names)
        for number, block in enumerate(blocks(page, "python")):
            exec(compile(block, f"{page.name}, block {number + 1}", "exec", dont_inherit=True), names)
        for block in blocks(page, "yaml"):
            written = YAML(typ="safe").load(block)
            check_profile(block, tmp_path, monkeypatch) if "methods" in written else check_grid(page, written)


def check_profile(block, folder, monkeypatch):
    """A profile of the reader's own: its patterns express its sparsities on its network."""
    monkeypatch.setenv("REPROLIB_HOME", str(folder))
    (folder / "mine.yaml").write_text(block)
    profile = profiles.load(str(folder / "mine.yaml"))
    weights = pruning.prunable(models.build(profile.model, 2, profile.width, tuple(profile.hidden)))
    for experiment in [*profile.asked("methods"), *profile.asked("ablations")]:
        pattern, ratios = parse(experiment.pattern), pruning.uniform_ratios(weights, experiment.sparsity)
        running.check_target(pattern, experiment.sparsity, pruning.make_masks(weights, pattern, ratios))


def check_grid(page, grid):
    """Each point of a grid is an experiment whose masks meet its target, without training one."""
    [number] = {span for span in re.findall(r"make sweep NOTEBOOK=(\d\d)", page.read_text())}
    path = paths.notebook(number)
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        notebooks.check_parameters(path, point)
        if number != "02":
            continue
        defaults = {name: YAML(typ="safe").load(p["default"]) for name, p in notebooks.known_parameters(path).items()}
        asked = {name: value for name, value in (defaults | point).items() if name != "table"}
        profile = profiles.load(asked.pop("profile"))
        weights = pruning.prunable(models.vgg16(10, profile.width))
        for experiment in profile.experiments(asked.pop("dataset"), asked.pop("seed"), **asked):
            pattern, ratios = parse(experiment.pattern), pruning.uniform_ratios(weights, experiment.sparsity)
            running.check_target(pattern, experiment.sparsity, pruning.make_masks(weights, pattern, ratios))


def test_a_grid_with_an_impossible_point_is_found(tmp_path):
    (tmp_path / "page.md").write_text("`make sweep NOTEBOOK=02 GRID=grid.yaml`")
    check_grid(tmp_path / "page.md", {"sparsities": [[0.75]], "seed": [0]})
    with pytest.raises(ValueError, match=r"reaches 75\.00 % sparsity where 90 % was asked"):
        check_grid(tmp_path / "page.md", {"pattern": ["Balanced(4)"], "sparsities": [[0.9]]})
    with pytest.raises(ValueError, match="no parameter sead"):
        check_grid(tmp_path / "page.md", {"sead": [0]})


# --- Commands ---------------------------------------------------------------------------------------------------------

VALUES = {  # what raises ValueError for a wrong value of a make variable
    "PROFILE": lambda name: name == "mine.yaml" or profiles.load(name),  # the reader's own
    "BUDGET": seconds,
    "NOTEBOOK": paths.notebook,
    "GRID": lambda name: Path(name).suffix == ".yaml" or refuse(name),
    "DEVICE": lambda name: name in ("cpu", "cuda") or refuse(name),
    "CORES": graph._cores,
    "SCHEDULER": lambda address: address.startswith("tcp://") or refuse(address),
    "SHORT": lambda value: value == "1" or refuse(value),
    "PYTHON": str,
    "CLAIM": int,
    "CELL": str,
}
ANY = {"PROFILE": "quick", "BUDGET": "20m", "NOTEBOOK": "02", "GRID": "grid.yaml", "CLAIM": "1"}  # for "…"


def refuse(value):
    raise ValueError(f"{value!r} is none")


def recipe(target):
    """The lines of a make target and of the targets before it. Raises ValueError for an unknown target."""
    found = re.search(rf"^{re.escape(target)}:([^#\n]*)(.*)\n((?:\t.*\n)*)", MAKEFILE, flags=re.MULTILINE)
    if not found:
        raise ValueError(f"make has no target {target!r}")
    return found[3] + "".join(recipe(before) for before in found[1].split())


def variables(target):
    """The variables that a make target looks at."""
    defined = dict(re.findall(r"^([A-Z_]+) [:?]?= ?(.*)$", MAKEFILE, flags=re.MULTILINE))
    found, queue = set(), [recipe(target)]
    while queue:
        fresh = set(re.findall(r"\$\(([A-Z_]+)\)", queue.pop())) - found
        found |= fresh
        queue += [defined.get(name, "") for name in fresh]
    return found


def check(command):
    """Raise ValueError for a command that could not run as it stands there; run it if that takes seconds."""
    words = shlex.split(command)
    if words[0].startswith("python"):
        return accepts(words[1:])
    if words[0] != "make":
        return None if words[0].removeprefix(".venv/bin/") in OTHERS else refuse(words[0])
    given = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    for name, value in given.items():
        given[name] = ANY[name] if value in ("…", "...") else value
        VALUES.get(name, lambda _, name=name: refuse(name))(given[name])
    targets = [word for word in words[1:] if "=" not in word]
    for target in targets:
        if unused := set(given) - variables(target):
            raise ValueError(f"make {target} does not look at {', '.join(sorted(unused))}")
    really = set(targets) <= RUN
    call = ["make", "-o", "env", *([] if really else ["-n"]), *(f"{name}={value}" for name, value in given.items())]
    done = subprocess.run([*call, *targets], cwd=paths.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{command}: {done.stdout} {done.stderr}")
    if not really:
        for module in re.findall(r"-m (reprolib[^;|&\n]*)", done.stdout):
            accepts(["-m", *shlex.split(module)])
    return None


class Accepted(BaseException):
    pass


def accepts(arguments):
    """Raise ValueError if a program of ours, as ``-m module arguments``, refuses its arguments; it does not run."""
    module = arguments[1]
    if len(arguments) == 2:  # it may take none, and would begin
        return None if importlib.util.find_spec(module) else refuse(module)
    if module == "pytest":
        return None if (paths.ROOT / arguments[2]).exists() else refuse(arguments[2])
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *values):
        parse_args(self, *values)
        raise Accepted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", arguments[1:])
        patch.delitem(sys.modules, module, raising=False)
        try:
            runpy.run_module(module, run_name="__main__")
        except Accepted:
            return None
        except SystemExit as refused:
            raise ValueError(f"{module} refuses {arguments[2:]}: {refused}") from None
    raise ValueError(f"{module} takes no arguments")


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page.stem}: {text}" for page, text in COMMANDS])
def test_command_works_as_it_stands_there(page, command):
    check(command)


def test_pages_are_read():
    readme = commands(PAGES[0])
    assert {"make reproduce", "make test", "make lab", "make data"} <= set(readme)
    assert "make sweep NOTEBOOK=02 GRID=grid.yaml" in [command for _, command in COMMANDS]
    assert blocks(PAGES[0], "python")


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("make repoduce", "make has no target 'repoduce'"),
        ("make reproduce PROFILE=huge", "unknown profile 'huge'"),
        ("make figures BUDGET=1h", "make figures does not look at BUDGET"),
        ("make reproduce SPEED=2", "'SPEED' is none"),
        ("make sweep NOTEBOOK=77 GRID=grid.yaml", "no notebook '77'"),
        ("make trace CLAIM=9", "there is no claim 9"),
        ("python -m reprolib.workflow.graph figurs", "refuses"),
        ("rm -rf results", "'rm' is none"),
    ],
)
def test_wrong_command_is_found(command, why):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(why)):
        check(command)


def test_every_fault_of_the_page_on_reliability_has_its_test():
    page = (paths.ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(tests/[a-z_/]+\.py)::(test_\w+)`", page)
    rows = [line for line in page.partition("\n## ")[0].splitlines() if line.startswith("| ")][2:]
    assert len(named) == len(rows) >= 20
    missing = [name for file, name in named if f"def {name}(" not in (paths.ROOT / file).read_text()]
    assert missing == []
