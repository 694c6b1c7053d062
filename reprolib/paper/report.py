"""The paper as one page: what its sections hold, computed from tables and files, and the page around them.

Nothing is drawn or run here, and the page needs nothing outside itself: pictures are in it.
"""

from __future__ import annotations

import base64
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup

from reprolib.files import paths
from reprolib.paper import accuracy_figures, claims, trace

TEMPLATE, STYLE = Path(__file__).with_name("report.html"), Path(__file__).with_name("page.css")
MARKS = {"supported": "✓", "contradicted": "✗", "undecided": "?", "no data": "–"}  # beside the word, for every eye
TYPES = {".svg": "image/svg+xml", ".png": "image/png"}
UNKNOWN = "not recorded"
ORIGIN = ["commit", "hardware", "threads", "torch"]  # columns that say where a row comes from


def claims_section(profile_name: str, accuracy: pd.DataFrame, latency: pd.DataFrame | None) -> list[dict]:
    """Each claim with the rows of `claims_table` on it, and what they rest on as text."""
    table = accuracy_figures.claims_table(claims.decide(accuracy, latency), claims.CLAIMS)
    section = []
    for number, text in claims.CLAIMS.items():
        rows = table[table.index == f"{number}. {text}"].rename(columns={"difference, 95 % interval": "difference"})
        try:
            behind = trace.claim(profile_name, number)
        except ValueError as error:  # no data
            behind = str(error)
        section.append({"number": number, "text": text, "rows": rows.to_dict("records"), "trace": portable(behind)})
    return section


def portable(text: str) -> str:
    """The text with paths of results that start at the checkout, wherever that lies."""
    return text.replace(f"{paths.home() / 'results'}/", "results/")


def data_uri(path: Path) -> str:
    """A picture as an address that holds it."""
    return f"data:{TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def pictures(folder: Path) -> dict[str, Path]:
    """Every figure of a folder by its name, as SVG where there is one, else as PNG."""
    found = {path.stem: path for suffix in (".png", ".svg") for path in sorted(folder.glob(f"[!.]*{suffix}"))}
    return dict(sorted(found.items()))


def markdown_table(text: str) -> dict[str, list]:
    """The header and the rows of a Markdown table, as texts; ``numbers`` are the columns that it sets to the right."""
    lines = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in text.strip().splitlines()]
    header, rule, *rows = lines
    return {"header": header, "rows": rows, "numbers": [n for n, cell in enumerate(rule) if cell.endswith("-:")]}


def provenance(tables: dict[str, pd.DataFrame], dates: dict[str, str]) -> list[dict]:
    """Where the rows of each table come from, counted: one dict for each commit, machine and version of torch.

    `dates` are those of commits, where known; a ``+`` behind a commit marks code that differs from it.
    """
    found = []
    for name, table in tables.items():
        origin = table.reindex(columns=ORIGIN).astype(object)
        for key, rows in table.groupby([origin[column].fillna(UNKNOWN) for column in ORIGIN], sort=False):
            seeds = sorted(rows["seed"].dropna().astype(int).unique()) if "seed" in rows else []
            row = dict(zip(ORIGIN, key, strict=True)) | {"table": name, "rows": len(rows)}
            row["seeds"] = ", ".join(map(str, seeds)) or UNKNOWN
            row["date"] = dates.get(row["commit"].removesuffix("+"), "not known")
            found.append(row)
    return found


def render(content: dict, template: Path = TEMPLATE) -> str:
    """The page around its sections. Texts are escaped; what is HTML already comes as ``markupsafe.Markup``."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    style = Markup(STYLE.read_text(encoding="utf-8"))
    return environment.from_string(template.read_text(encoding="utf-8")).render(content, marks=MARKS, style=style)
