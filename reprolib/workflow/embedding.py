"""Notebooks as parts of a page: no script, no style that reaches beyond its table, nothing from outside."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import nbformat
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from nbformat import NotebookNode

from reprolib.files import paths
from reprolib.paper.report import TYPES, data_uri

WIDGET = "application/vnd.jupyter.widget-view+json"
STILL = "<p><em>Controls stood here: they move in <code>make lab</code>.</em></p>"
SAVED = re.compile(r'drawing\.save(_table)?\(.*folder, "(\w+)"\)')
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


@dataclass(frozen=True)
class Drawn:
    """A figure or table that an executed notebook saves: in which cell, and the text above that cell."""

    name: str
    is_table: bool
    notebook: str
    anchor: str
    count: int
    heading: str
    caption: Markup


def drawn(path: Path) -> list[Drawn]:
    """What the cells of an executed notebook save, in its order."""
    found, heading, text = [], "", ""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            first, _, rest = cell.source.partition("\n")
            heading, text = (first.lstrip("# "), rest.strip()) if first.startswith("#") else (heading, cell.source)
        for table, name in SAVED.findall(cell.source):
            anchor = f"{_prefix(path)}-cell-id={cell.id}"
            caption = Markup(markdown2html(text.split("\n\n")[0]))
            found.append(Drawn(name, bool(table), path.stem, anchor, cell.execution_count, heading, caption))
    return found


def title(path: Path) -> str:
    """The first heading of a notebook."""
    headings = re.findall(r"^# (.+)$", nbformat.read(path, as_version=4).cells[0].source, flags=re.MULTILINE)
    return headings[0] if headings else path.stem


def fragment(path: Path) -> Markup:
    """An executed notebook as HTML that can stand inside a page, beside others."""

    def link(href: str) -> str:
        if href.startswith("#"):
            return f"#{_prefix(path)}-{href[1:]}"
        return f"#nb{href[:2]}" if re.match(r"\d\d_\w+\.ipynb", href) else ""

    return html(nbformat.read(path, as_version=4), paths.NOTEBOOKS, link, f"{_prefix(path)}-")


def html(notebook: NotebookNode, folder: Path, link: Callable[[str], str], prefix: str = "") -> Markup:
    """A notebook as HTML that can stand inside a page.

    Its Markdown names pictures as seen from `folder`: they are in the HTML. `link` says where a link leads, other than
    to the web; an empty text takes the link away. `prefix` goes before each id.
    """
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("data", {}).pop(WIDGET, None):
                output.data["text/html"] = STILL
    body, _ = HTMLExporter(template_name="basic", exclude_anchor_links=True).from_notebook_node(notebook)
    inside = _Inside(folder, link, prefix)
    inside.feed(body)
    inside.close()
    return Markup("".join(inside.parts))


def _prefix(path: Path) -> str:
    return f"nb{path.stem}"


class _Inside(HTMLParser):
    """Copies HTML, with ids that no other notebook has, and without what would act on, or ask for, anything outside."""

    def __init__(self, folder: Path, link: Callable[[str], str], prefix: str) -> None:
        super().__init__(convert_charrefs=False)
        self.folder, self.link, self.prefix = folder, link, prefix
        self.parts, self.style, self.skipped = [], "", ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "style"):
            self.skipped = tag
        elif tag not in ("link", "iframe", "base", "meta"):
            kept = [self._attribute(tag, name, value or "") for name, value in attributes]
            self.parts.append(f"<{tag}{''.join(kept)}>")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def _attribute(self, tag: str, name: str, value: str) -> str:
        if name == "id":
            value = self._own(value)
        elif name == "href" and not value.startswith("http"):
            value = self.link(value)
        elif name == "src" and not value.startswith("data:"):
            value = self._picture(value)
        elif name.startswith("on") or name == "srcset":
            return ""
        if name in ("href", "src") and not value:
            return ""  # it would lead out of the page
        return f' {name}="{escape(value)}"'

    def _own(self, name: str) -> str:
        """Pandas' own names, which its styles use, are unique already."""
        return name if name.startswith("T_") else f"{self.prefix}{name}"

    def _picture(self, source: str) -> str:
        """A committed figure as an address that holds it; empty for any other source."""
        path = (self.folder / source).resolve()
        is_figure = path.is_relative_to(paths.ROOT / "figures") and path.suffix in TYPES and path.is_file()
        return data_uri(path) if is_figure else ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "style" and "#T_" in self.style:  # of one table; pandas' others would reach every table of the page
            self.parts.append(f"<style>{self.style}</style>")
        if tag == self.skipped:
            self.skipped, self.style = "", ""
        elif tag not in VOID and tag not in ("link", "iframe", "base", "meta"):
            self.parts.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if self.skipped == "style":
            self.style += data
        elif not self.skipped:
            self.parts.append(data)

    def handle_entityref(self, name: str) -> None:
        self.parts.append(f"&{name};")

    def handle_charref(self, name: str) -> None:
        self.parts.append(f"&#{name};")
