"""`make sweep`: one notebook over a grid of its parameters. What succeeded is kept, what failed is named."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import Field

from reprolib.experiments import records
from reprolib.files import paths, settings
from reprolib.files.atomic import write_atomically
from reprolib.files.settings import Some
from reprolib.workflow import notebooks, runner

NAME_LENGTH = 120  # of the readable part of a point's name; file systems end at 255


def sweep(notebook: str, grid_file: Path, cores: int) -> None:
    """Run a notebook once per point of a grid (YAML: parameter → list of values), in parallel.

    The executed notebooks land in ``results/sweeps/<notebook>-<grid>/``, named by their parameters. If the notebook has
    a parameter ``table``, the tables of the points are joined in a CSV file of that name, with one column
    ``sweep_<parameter>`` per parameter. Asking again runs only the points that are missing. Raises RuntimeError, behind
    everything else, with one line for each point that failed.
    """
    path = paths.notebook(notebook)
    points = {point_name(point): point for point in _points(path, grid_file)}
    folder = paths.results("sweeps") / f"{path.stem[:2]}-{grid_file.stem}"
    tables = {}
    if "table" in notebooks.known_parameters(path):
        tables = {name: folder / f"{name}.csv" for name in points}
    jobs = {name: point | ({"table": str(tables[name])} if tables else {}) for name, point in points.items()}
    outputs = {name: folder / f"{name}.ipynb" for name in points}
    for name, table in tables.items():
        if not table.exists():  # deleted by hand: its notebook runs again
            outputs[name].unlink(missing_ok=True)
    plan = folder / "plan.json"
    write_atomically(plan, json.dumps({"notebook": str(path), "jobs": jobs}, indent=1))
    print(f"{path.stem}: {len(points)} points of {grid_file}; {cores} cores")

    def finished() -> float:
        return sum(output.exists() for output in outputs.values())

    errors = ""
    with runner.bar(len(points), finished, "notebook") as look, runner.only_run(folder, look) as lock:
        try:
            runner.snakemake(["sweep"], folder, cores, lock, {"plan": str(plan)}, look)
        except RuntimeError as failed:
            errors = str(failed)
    done = [name for name in points if outputs[name].exists()]
    if tables and done:
        joined = folder.with_suffix(".csv")
        records.write_csv(joined, pd.concat([_table(tables[name], points[name]) for name in done], ignore_index=True))
        print(f"numbers: {joined}")
    print(f"notebooks: {folder}")
    if len(done) < len(points):
        told = [f"error: {_words(points[name])}: {_reason(name, errors)}" for name in points if name not in done]
        rest = "all others are kept, and " if done else ""
        told.append(f"{len(told)} of {len(points)} points failed: {rest}asking again tries these only")
        raise RuntimeError("\n".join(told))


def point_name(point: dict[str, Any]) -> str:
    """A file name for the parameters of a point: readable, without spaces or signs, and unique by the hash at its end.

    ``pattern=Filter,seed=0-`` and eight hex digits.
    """
    values = {name: re.sub(r"[^\w.+-]+", "-", str(value), flags=re.ASCII).strip("-") for name, value in point.items()}
    readable = ",".join(f"{name}={value}" for name, value in sorted(values.items()))
    return f"{readable[:NAME_LENGTH]}-{records.fingerprint(point)}"


def _points(notebook: Path, grid_file: Path) -> list[dict[str, Any]]:
    """All combinations of the grid's values. Raises ValueError for what the notebook does not know, OSError."""
    if not grid_file.is_file():
        raise FileNotFoundError(f"no grid {str(grid_file)!r}: name a YAML file such as 'seed: [0, 1, 2]' with GRID=")
    grid = settings.read(grid_file, Annotated[dict[str, Some[Any]], Field(min_length=1)])
    notebooks.check_parameters(notebook, *({name: value} for name, values in grid.items() for value in values))
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _table(path: Path, point: dict[str, Any]) -> pd.DataFrame:
    return records.read_csv(path).assign(**{f"sweep_{name}": str(value) for name, value in point.items()})


def _words(point: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in point.items())


def _reason(name: str, errors: str) -> str:
    """What the notebook of a point said when it failed, of all `errors`, a line each."""
    start = f"error: {name}: "
    own = [line.removeprefix(start) for line in errors.splitlines() if line.startswith(start)]
    others = [line.removeprefix("error: ") for line in errors.splitlines()[:1]]
    return (own or others or ["it did not run"])[0]
