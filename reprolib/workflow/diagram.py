"""The steps of the paper and what each needs, as a drawing in SVG: what is left makes what is right of it.

``python -m reprolib.workflow.diagram`` draws the rules of the Snakefile into ``figures/graph.svg``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from reprolib.files import paths
from reprolib.files.atomic import write_atomically
from reprolib.files.processes import environment

PICTURE = paths.ROOT / "figures" / "graph.svg"
STYLE = """<style>rect { fill: #f6f8fa; stroke: #57606a } path { fill: none; stroke: #8c959f } polygon { fill: #8c959f }
text { font: 12px sans-serif; fill: #1f2328 } .more { fill: #57606a } .heading { text-anchor: middle; fill: #57606a }
</style><rect width="100%" height="100%" style="fill: white; stroke: none"/>"""
LETTER, LINE, GAP, BETWEEN = 6.6, 17, 14, 40  # width of a letter, height of a line, space between boxes and columns
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


def graph() -> str:
    """The rules of the Snakefile as an SVG of its own: edges as Snakemake says, what a rule makes by its comment."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(paths.ROOT / "Snakefile"), "--cores", "1"]
    command += ["--config", "profile=laptop", "--rulegraph", "mermaid-js"]
    drawn = subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout
    rules = dict(re.findall(r"(id\d+)\[(\w+)\]", drawn))
    edges = {(rules[start], rules[end]) for start, end in re.findall(r"(id\d+) --> (id\d+)", drawn)}
    made = dict(re.findall(r"^    rule (\w+):  # ([^;\n]+)", (paths.ROOT / "Snakefile").read_text(), re.MULTILINE))
    columns: dict[str, list[Box]] = {"train": [], "collect, measure": [], "draw, decide": []}
    for rule in made:
        before = tuple(start for start in made if (start, rule) in edges)  # Snakemake's own order is by chance
        kind = "train" if rule == "networks" else "collect, measure" if before == ("networks",) else "draw, decide"
        columns[kind].append(Box(rule, (rule.replace("_", " "), made[rule]), before))
    return svg(columns, "Rules of the Snakefile: an arrow leads from a rule to each that needs what it makes.", STYLE)


def svg(
    columns: dict[str, list[Box]],
    told: str = "Which step needs what: the table below says the same in words.",
    style: str = "",
) -> Markup:
    """Boxes in columns under their headings, and an arrow to a box from each that it needs; `told` is for the blind.

    A box that is alone in its column stands level with what it needs, so that chains are straight.
    """
    place, parts, left = {}, [], 1.0
    for heading, boxes in columns.items():
        width = LETTER * max(len(line) for line in (heading, *(line for box in boxes for line in box.lines))) + 14
        parts.append(f'<text x="{left + width / 2:g}" y="16" class="heading">{escape(heading)}</text>')
        y = 30.0
        for box in boxes:
            height = LINE * len(box.lines) + 10.0
            middles = [place[need][1] + place[need][3] / 2 for need in box.needs if need in place]
            if len(boxes) == 1 and middles:
                y = max(y, sum(middles) / len(middles) - height / 2)
            place[box.key] = (left, y, width, height)
            parts.append(f'<rect x="{left:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5"/>')
            for number, line in enumerate(box.lines):
                kind = ' class="more"' if number else ""
                parts.append(f'<text x="{left + 7:g}" y="{y + LINE * (number + 1):g}"{kind}>{escape(line)}</text>')
            y += height + GAP
        left += width + BETWEEN
    boxes = [box for column in columns.values() for box in column]
    lines = [_line(place[need], place[box.key]) for box in boxes for need in box.needs]
    lines += [_head(place[box.key]) for box in boxes if box.needs]
    width, height = left - BETWEEN + 1, max(y + height for _, y, _, height in place.values()) + 1
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{told}">{style}{"".join(lines)}{"".join(parts)}</svg>'
    )


def _line(start: tuple[float, ...], end: tuple[float, ...]) -> str:
    """From the right side of one box to the left side of another; past columns between them, from below."""
    (x, y, width, height), (to_x, to_y) = start, (end[0], end[1] + end[3] / 2)
    if to_x - (x + width) <= BETWEEN + 1:
        x, y, bend = x + width, y + height / 2, BETWEEN * 0.6
        return f'<path d="M{x:g},{y:g} C{x + bend:g},{y:g} {to_x - bend:g},{to_y:g} {to_x:g},{to_y:g}"/>'
    x, y = x + width / 2, y + height
    return f'<path d="M{x:g},{y:g} C{x:g},{to_y:g} {x:g},{to_y:g} {x + 60:g},{to_y:g} L{to_x:g},{to_y:g}"/>'


def _head(end: tuple[float, ...]) -> str:
    """The head of the arrows that lead to a box."""
    x, y = end[0], end[1] + end[3] / 2
    return f'<polygon points="{x:g},{y:g} {x - 7:g},{y - 4:g} {x - 7:g},{y + 4:g}"/>'


if __name__ == "__main__":
    write_atomically(PICTURE, graph())
