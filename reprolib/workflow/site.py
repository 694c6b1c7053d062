"""`make site`: what is committed as pages that link to each other, for any web server. Nothing is run for it.

A page lies where its file lies in the checkout: docs/speed.md is site/docs/speed.html. README is the first page. From
there every link is followed: to pages, notebooks, sources and folders. Each profile that has results adds the page of
`make report`.
"""

from __future__ import annotations

import os
import posixpath
import shutil
from collections.abc import Callable
from html import escape
from pathlib import Path

import nbformat
from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound

from reprolib.experiments import profiles
from reprolib.files import paths
from reprolib.files.atomic import write_atomically
from reprolib.paper import report as sections
from reprolib.workflow import embedding, report

TEMPLATE = Path(__file__).with_name("site.html")
FIRST = "README.md"
NOT_RUN = "The notebook as it is committed, not run: its figures are committed results. make lab opens it to run."


def write(folder: Path) -> int:
    """Write all pages into `folder`, anew, and return their number. Raises FileNotFoundError for a link to nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    written, queue = set(), [FIRST, *documents(), *(str(path.relative_to(paths.ROOT)) for path in paths.notebooks())]
    while queue:
        source = queue.pop()
        if source not in written:
            written.add(source)
            html, links = page(source)
            write_atomically(folder / address(source), html)
            queue += links
    for name in with_results():
        place = folder / result(name)
        home = os.path.relpath(folder / address(FIRST), place.parent)
        write_atomically(place, report.page(profiles.load(name), home))
    return len(written) + len(with_results())


def documents() -> list[str]:
    return sorted(f"docs/{path.name}" for path in (paths.ROOT / "docs").glob("*.md"))


def with_results() -> list[str]:
    """The profiles that have a table of accuracies."""
    return [name for name in profiles.names() if paths.accuracy_csv(name).exists()]


def result(profile_name: str) -> str:
    return f"results/{profile_name}/report.html"


def address(source: str) -> str:
    """Where in the site the page of a file or folder lies; both as seen from the root: ``docs/a.md``."""
    if source == FIRST:
        return "index.html"
    if (paths.ROOT / source).is_dir():
        return f"{source}/index.html"
    return f"{source.removesuffix('.md').removesuffix('.ipynb')}.html" if is_page(source) else f"{source}.html"


def is_page(source: str) -> bool:
    return source.endswith((".md", ".ipynb"))


def page(source: str) -> tuple[str, list[str]]:
    """The page of a file or folder of the checkout, and the files and folders that it links to."""
    found = []

    def link(href: str) -> str:
        target, _, place = href.partition("#")
        if not target:
            return href
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (paths.ROOT / target).exists() or target.startswith(".."):
            raise FileNotFoundError(f"{source} links to {href}, which is not there")
        found.append(target)
        return relative(address(target), source) + (f"#{place}" if place else "")

    content = {
        "title": source,
        "here": posixpath.basename(address(source)),
        "menu": menu(source),
        "note": NOT_RUN if source.endswith(".ipynb") else "" if is_page(source) else source,
        "html": body(source, link),
    }
    return sections.render(content, TEMPLATE), found


def relative(target: str, source: str) -> str:
    """The link from the page of `source` to an address of the site."""
    return posixpath.relpath(target, posixpath.dirname(address(source)) or ".")


def menu(source: str) -> dict[str, list[tuple[str, str]]]:
    """Name and link of the pages that every page links to, in groups."""
    groups = {
        "reprolib": [("start", address(FIRST))],
        "results": [(name, result(name)) for name in with_results()],
        "notebooks": [(path.stem.replace("_", " "), address(f"notebooks/{path.name}")) for path in paths.notebooks()],
        "docs": [(Path(name).stem, address(name)) for name in documents()],
    }
    return {group: [(name, relative(page, source)) for name, page in pages] for group, pages in groups.items()}


def body(source: str, link: Callable[[str], str]) -> Markup:
    """The content of a file as HTML; of a folder, the list of what is in it."""
    path = paths.ROOT / source
    if path.is_dir():
        names = sorted(each.name for each in path.iterdir() if not each.name.startswith((".", "__pycache__")))
        items = [f'<li><a href="{link(f"{path.name}/{name}")}">{escape(name)}</a></li>' for name in names]
        return Markup(f"<ul>{''.join(items)}</ul>")
    if source.endswith(".ipynb"):
        return embedding.html(nbformat.read(path, as_version=4), path.parent, link)
    text = path.read_text(encoding="utf-8")
    if source.endswith(".md"):
        cells = [nbformat.v4.new_markdown_cell(text)]
        return embedding.html(nbformat.v4.new_notebook(cells=cells), path.parent, link)
    try:
        return Markup(highlight(text, get_lexer_for_filename(path.name), HtmlFormatter()))
    except ClassNotFound:
        return Markup(f"<pre>{escape(text)}</pre>")


def main() -> None:
    number = write(paths.site())
    print(f"{number} pages: open {paths.site() / address(FIRST)}")


if __name__ == "__main__":
    main()
