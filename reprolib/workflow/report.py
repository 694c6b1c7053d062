"""`make report`: a profile's claims, figures, notebooks, steps and provenance as one page that needs nothing else."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path

import nbformat
import pandas as pd

from reprolib.experiments import records
from reprolib.experiments.profiles import Profile
from reprolib.files import paths
from reprolib.files.atomic import write_atomically
from reprolib.files.processes import environment
from reprolib.paper import report as sections
from reprolib.workflow import diagram, embedding
from reprolib.workflow.diagram import Box

TABLES = (
    paths.accuracy_csv,
    paths.ablations_csv,
    paths.latency_csv,
    paths.short_latency_csv,
    paths.training_csv,
)


def write(profile: Profile) -> Path:
    """Write the page of a profile and return its path."""
    path = paths.report(profile.name)
    write_atomically(path, page(profile))
    return path


def page(profile: Profile, home: str = "") -> str:
    """The page, from tables, figures and executed notebooks as they lie there: equal ones give equal pages.

    `home` is the address of the pages around it, if it stands among others.
    """
    tables = {
        path(profile.name).name: records.read_csv(path(profile.name)) for path in TABLES if path(profile.name).exists()
    }
    accuracy, latency = records.read_csv(paths.accuracy_csv(profile.name)), tables.get("latency.csv")
    claims = sections.claims_section(profile.name, accuracy, latency)
    notebooks = executed(profile.name)
    dates = commit_dates({c for table in tables.values() for c in table["commit"].dropna()})
    content = {
        "profile": profile,
        "home": home,
        "code": records.commit(),
        "claims": claims,
        "figures": figures(profile.name, notebooks),
        "notebooks": [
            {"number": path.stem, "title": embedding.title(path), "html": embedding.fragment(path)}
            for path in notebooks
        ],
        "diagram": diagram.svg(steps(profile, tables, notebooks)),
        "steps": diagram.needs(),
        "provenance": sections.provenance(tables, dates),
    }
    return sections.render(content)


def executed(profile_name: str) -> list[Path]:
    """The notebooks that the graph has run, to their end."""
    return sorted(paths.executed(profile_name).glob("[0-9][0-9].ipynb"))


def is_drawn(profile_name: str, rules: Iterable[str]) -> bool:
    """Whether the notebooks of these rules have run since their tables and they themselves changed."""
    for number, step in diagram.needs().items():
        made = paths.executed(profile_name) / f"{number}.ipynb"
        sources = [paths.results(profile_name) / table for table in step["tables"]] + [paths.notebook(number)]
        newest = max(path.stat().st_mtime for path in sources if path.exists())
        if step["rule"] in rules and not (made.exists() and made.stat().st_mtime >= newest):
            return False
    return True


def figures(profile_name: str, notebooks: list[Path]) -> list[dict]:
    """Every figure and table of a profile, those of one cell together: its text above them, itself, its command below.

    In the order of the notebooks; what none of them draws comes last, without these.
    """
    folder = paths.figures(profile_name)
    pictures = sections.pictures(folder)
    tables = {path.stem: path for path in sorted(folder.glob("[!.]*.md"))}
    found = {}
    for notebook in notebooks:
        for each in embedding.drawn(notebook):
            group = found.setdefault(each.anchor, {"by": each, "again": again(notebook), "pictures": {}, "tables": {}})
            kind, files, show = (
                ("tables", tables, _table) if each.is_table else ("pictures", pictures, sections.data_uri)
            )
            if each.name in files:  # it is drawn where its numbers are there
                group[kind][each.name] = show(files.pop(each.name))
    for name in sorted({*pictures, *tables}):
        left = {"pictures": {name: sections.data_uri(pictures[name])} if name in pictures else {}}
        left["tables"] = {name: _table(tables[name])} if name in tables else {}
        found[name] = {"by": None, "again": ""} | left
    return [group for group in found.values() if group["pictures"] or group["tables"]]


def _table(path: Path) -> dict[str, list]:
    return sections.markdown_table(path.read_text(encoding="utf-8"))


def again(notebook: Path) -> str:
    """The command that runs an executed notebook once more, as the graph did."""
    parameters = nbformat.read(notebook, as_version=4).metadata.get("papermill", {}).get("parameters", {})
    output = sections.portable(str(notebook))
    start = f".venv/bin/python -m reprolib.workflow.notebooks {notebook.stem} {shlex.quote(output)}"
    return f"{start} --parameters {shlex.quote(json.dumps(parameters))}"


def commit_dates(commits: Iterable[str]) -> dict[str, str]:
    """The days of those commits that this repository knows."""
    dates = {}
    for commit in sorted({commit.removesuffix("+") for commit in commits}):
        command = ["git", "-C", str(paths.ROOT), "log", "-1", "--format=%cs", commit, "--"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
        except (OSError, subprocess.CalledProcessError):
            continue
        dates[commit] = done.stdout.strip()
    return dates


def steps(profile: Profile, tables: dict[str, pd.DataFrame], notebooks: list[Path]) -> dict[str, list[Box]]:
    """The boxes of the diagram: from the profile over networks, tables and notebooks to figures and claims."""
    trained = pd.concat([tables[name] for name in ("accuracy.csv", "ablations.csv") if name in tables])
    trained = trained.drop_duplicates("run_id")
    is_dense = trained["pattern"] == "dense"
    source = {"accuracy.csv": ("pruned",), "ablations.csv": ("pruned",)}
    columns: dict[str, list[Box]] = {
        "profile": [Box("profile", (f"{profile.name}.yaml", "what is asked for"))],
        "dense": [Box("dense", ("dense networks", f"{is_dense.sum()} trained"), ("profile",))],
        "pruned": [Box("pruned", ("pruned networks", f"{(~is_dense).sum()} retrained"), ("dense",))],
        "tables": [
            Box(name, (name, f"{len(table)} rows"), source.get(name, ("profile",))) for name, table in tables.items()
        ],
        "notebooks": [],
        "figures and tables": [],
        "claims": [],
    }
    needed = diagram.needs()
    for path in notebooks:
        number = path.stem
        inputs = tuple(table for table in needed.get(number, {"tables": []})["tables"] if table in tables)
        words = embedding.title(path).partition("· ")[2]
        columns["notebooks"].append(Box(number, (f"notebook {number}", words), inputs))
        if made := tuple(dict.fromkeys(each.name for each in embedding.drawn(path))):
            columns["figures and tables"].append(Box(f"{number}-drawn", made, (number,)))
        if number == "07":
            columns["claims"].append(
                Box("claims", ("claims.csv", "verdicts"), (f"{number}-drawn" if made else number,))
            )
    return {heading: boxes for heading, boxes in columns.items() if boxes}
