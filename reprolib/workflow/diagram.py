"""The steps of the paper and what each needs, as a drawing in SVG: what is left makes what is right of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from reprolib.files import paths

WIDTH, LINE, GAP, BETWEEN = 168, 17, 14, 44  # of a box, a line of text, and between boxes and columns, in pixels
TABLES = {
    "ACCURACY": "accuracy.csv",
    "ABLATIONS": "ablations.csv",
    "LATENCY": "latency.csv",
    "PEERS": "latency-short.csv",
}


@dataclass(frozen=True)
class Box:
    """A step: its first line is what it is, the others say more. `needs` are keys of other boxes."""

    key: str
    lines: tuple[str, ...]
    needs: tuple[str, ...] = ()


def needs() -> dict[str, dict]:
    """By number of a notebook: the rule of the Snakefile that runs it, and the names of the tables that it reads."""
    found = {}
    for rule, body in re.findall(
        r"^    rule (\w+):.*\n((?:        .*\n)+)", (paths.ROOT / "Snakefile").read_text(), re.MULTILINE
    ):
        if number := re.search(r'notebook\("(\d\d)"\)|draws\("(\d\d)"\)', body):
            inputs = body.split("output:")[0]
            read = [table for name, table in TABLES.items() if re.search(rf"\b{name}\b", inputs)]
            found[number[1] or number[2]] = {"rule": rule, "tables": read}
    return dict(sorted(found.items()))


def svg(columns: dict[str, list[Box]]) -> Markup:
    """Boxes in columns under their headings, each column centred, and a line to a box from each that it needs."""
    heights = {box.key: LINE * len(box.lines) + 10 for boxes in columns.values() for box in boxes}
    totals = [sum(heights[box.key] + GAP for box in boxes) - GAP for boxes in columns.values()]
    top, height, width = 34, max(totals) + 44, len(columns) * (WIDTH + BETWEEN) - BETWEEN + 4
    place, parts = {}, []
    for column, (heading, boxes) in enumerate(columns.items()):
        x, y = column * (WIDTH + BETWEEN) + 2, top + (max(totals) - totals[column]) / 2
        parts.append(f'<text x="{x + WIDTH / 2}" y="18" class="heading">{escape(heading)}</text>')
        for box in boxes:
            place[box.key] = (x, y)
            parts.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{heights[box.key]}" rx="5"/>')
            for number, line in enumerate(box.lines):
                kind = ' class="more"' if number else ""
                parts.append(f'<text x="{x + 8}" y="{y + LINE * (number + 1)}"{kind}>{escape(line)}</text>')
            y += heights[box.key] + GAP
    lines = []
    for box in (box for boxes in columns.values() for box in boxes):
        for need in box.needs:
            (x1, y1), (x2, y2) = place[need], place[box.key]
            x1, y1, y2 = x1 + WIDTH, y1 + heights[need] / 2, y2 + heights[box.key] / 2
            bend = min(x2 - x1, BETWEEN) * 0.6
            lines.append(f'<path d="M{x1},{y1} C{x1 + bend},{y1} {x2 - bend},{y2} {x2},{y2}"/>')
    told = "Which step needs what: the table below says the same in words."
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{told}">'
        f"{''.join(lines)}{''.join(parts)}</svg>"
    )
