"""The pages of `make site` hold what is committed, lead to each other and load nothing from outside."""

import posixpath
from urllib.parse import unquote

import pytest
from test_report import Page

from reprolib.files import paths
from reprolib.paper.report import data_uri
from reprolib.workflow import site


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "site"
    folder.mkdir()
    (folder / "old.html").write_text("of an earlier version")
    assert site.write(folder) == len(list(folder.rglob("*.html")))
    return folder


@pytest.fixture(scope="module")
def pages(folder):
    return {str(path.relative_to(folder)): Page(path.read_text()) for path in folder.rglob("*") if path.is_file()}


def test_every_link_leads_to_a_place_in_the_site(pages):
    count = 0
    for name, page in pages.items():
        for link in page.links:
            if not link.startswith("http"):
                target, _, place = unquote(link).partition("#")
                target = posixpath.normpath(posixpath.join(posixpath.dirname(name), target)) if target else name
                assert target in pages and (not place or place in pages[target].ids), f"{name}: {link}"
                count += 1
    assert count > 1000


def test_pages_load_nothing_and_close_what_they_open(pages):
    assert {name: page.loaded for name, page in pages.items() if page.loaded} == {}
    assert {name: page.wrong for name, page in pages.items() if page.wrong} == {}


def test_everything_to_read_is_there(pages):
    names = {"index.html", "LICENSE.html", "reprolib/patterns.py.html", "reprolib/sparse/cpu/index.html"}
    names |= {f"docs/{path.stem}.html" for path in (paths.ROOT / "docs").glob("*.md")}
    names |= {f"notebooks/{path.stem}.html" for path in paths.notebooks()}
    names |= {f"results/{name}/report.html" for name in ("laptop", "laptop-cifar100", "evening")}
    assert names <= set(pages) and "old.html" not in pages
    reached, queue = set(), ["index.html"]
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            links = [link.partition("#")[0] for link in pages[name].links if not link.startswith(("http", "#"))]
            queue += [posixpath.normpath(posixpath.join(posixpath.dirname(name), link)) for link in links]
    assert reached == set(pages)


@pytest.mark.parametrize(
    ("page", "figure"),
    [
        ("index.html", "peers"),
        ("notebooks/03_accuracy_vs_sparsity.html", "accuracy_vs_sparsity"),
        ("notebooks/07_claims.html", "claims"),
    ],
)
def test_committed_figures_are_in_the_pages(page, figure, pages):
    assert data_uri(paths.ROOT / "figures" / "laptop" / f"{figure}.png") in pages[page].text


def test_a_link_to_nothing_is_an_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("[here](docs/no.md)")
    with pytest.raises(FileNotFoundError, match=r"README\.md links to docs/no\.md"):
        site.page("README.md")
