"""The map of the house: which floor each room is on, and that arrows run down only.

A newcomer reads FLOORS from the bottom: each floor knows those below it, and the two wings on one floor do not know
each other.
"""

import ast
from pathlib import Path

import pytest

from reprolib.files import paths

FLOORS = [
    {"files": "where files lie and how they are written, deadlines, processes: disks, and nothing of pruning"},
    {
        "checks": "what a parameter may be",
        "patterns": "masks: the paper's own idea",
        "models": "the network, and the weights in it that can be pruned",
        "pruning": "which layers, how much of each, when",
    },
    {
        "training": "data sets, the loop, checkpoints: knows masks, and not what they are for",
        "sparse": "kernels that skip zeros: knows weights, and nothing of how they were trained",
    },
    {"experiments": "what is asked for, computed once and kept"},
    {"bench": "what is measured, beside rivals"},
    {"paper": "what the numbers say: claims, figures, tables"},
    {"workflow": "what `make` starts: the graph, and single notebooks"},
]
SOURCES = sorted((paths.ROOT / "reprolib").rglob("*.py"))


def room(module: str) -> str:
    """``reprolib.sparse.cpu.kernels`` is in the room ``sparse``."""
    return module.split(".")[1] if "." in module else ""


def arrows(source: str) -> set[str]:
    """The rooms that a module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {room(alias.name) for alias in node.names if alias.name.split(".")[0] == "reprolib"}
        elif isinstance(node, ast.ImportFrom) and node.module == "reprolib":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reprolib."):
            found.add(room(node.module))
        assert not (isinstance(node, ast.ImportFrom) and node.level), "imports name their room in full"
    return found - {""}


def wrong_arrows(here: str, found: set[str]) -> set[str]:
    """Those that lead up, or to the other wing of a floor. In the method's floor all rooms are one."""
    height = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    method = 1
    return {
        there
        for there in found
        if there != here and not height[there] < height[here] and not height[there] == height[here] == method
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(paths.ROOT)))
def test_arrows_run_down(path: Path):
    parts = path.relative_to(paths.ROOT / "reprolib").with_suffix("").parts
    if parts != ("__init__",):
        assert wrong_arrows(parts[0], arrows(path.read_text())) == set()


def test_a_turned_arrow_is_found():
    assert wrong_arrows("training", arrows("from reprolib.experiments import records")) == {"experiments"}
    assert wrong_arrows("sparse", arrows("def f():\n    from reprolib.training.data import load")) == {"training"}
    assert wrong_arrows("bench", arrows("from reprolib import pruning\nimport reprolib.paper.claims")) == {"paper"}
    assert wrong_arrows("pruning", arrows("from reprolib.patterns import Block")) == set()


def test_every_room_is_on_the_map():
    rooms = {path.stem if path.is_file() else path.name for path in (paths.ROOT / "reprolib").iterdir()}
    assert rooms - {"__init__", "__pycache__"} == {name for floor in FLOORS for name in floor}
    assert len(list((paths.ROOT / "reprolib").glob("*.py"))) <= 5
