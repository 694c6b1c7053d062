"""The page of a profile holds everything, needs nothing from outside, and is HTML that closes what it opens."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import nbformat
import pandas as pd
import pytest

from reprolib.experiments import profiles, records
from reprolib.files import paths
from reprolib.paper import claims
from reprolib.paper import report as sections
from reprolib.workflow import diagram, embedding, report

VOID = embedding.VOID
LINKED = {"src", "href", "srcset", "poster", "data", "xlink:href"}


class Page(HTMLParser):
    """What a page opens and does not close, what it loads, and where its links within the page lead."""

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.loaded, self.ids, self.links, self.text = [], [], [], [], [], text
        self.feed(text)
        self.close()
        self.wrong += self.open
        self.loaded += re.findall(r"url\([^)]*\)|@import[^;]*", text)

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif tag == "a" and name == "href":
                self.links.append(value)
            elif name in LINKED and not value.startswith("data:"):
                self.loaded.append(value)
        self.loaded += [tag] * (tag in ("script", "link", "iframe", "object", "embed"))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"/{tag}")


def executed(path, cells, **parameters):
    """Write a notebook as if it had run."""
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"papermill": {"parameters": parameters}})
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with the committed tables and figures of a profile, and a notebook that has drawn two of them."""
    profile = profiles.load("laptop-cifar100")
    tables, figures = paths.results(profile.name), paths.figures(profile.name)
    monkeypatch.setenv("REPROLIB_HOME", str(tmp_path))
    shutil.copytree(figures, paths.figures(profile.name))
    paths.results(profile.name).mkdir(parents=True)
    for table in tables.glob("*.csv"):
        shutil.copy(table, paths.results(profile.name))
    markdown, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    drawing = 'drawing.save(figure, folder, "accuracy_vs_sparsity")\ndrawing.save_table(table, folder, "accuracy")'
    hostile = nbformat.v4.new_output(
        "display_data",
        {
            "text/html": '<script src="https://cdn.example/x.js">1 < 2</script><link href="https://cdn.example/x.css">'
            "<style>.dataframe td { color: red }</style><style>#T_1 td { color: blue }</style>"
            '<table id="T_1"><tr><td>a &lt; b<br></td></tr></table><img src="https://example.org/a.png">'
        },
    )
    widget = nbformat.v4.new_output("display_data", {embedding.WIDGET: {"model_id": "1"}, "text/plain": "VBox()"})
    cells = [
        markdown("# 03 · Accuracy\n\n**Question.** See [07](07_claims.ipynb), [the code](../docs/code.md)."),
        markdown(
            "## The figure\n\nA caption & its `code`.\n\nMore.\n\n![It](../figures/laptop/claims.png)\n![No](no.png)"
        ),
        code(drawing, execution_count=4, outputs=[hostile, widget], id="drawing-cell"),
    ]
    executed(paths.executed(profile.name) / "03.ipynb", cells, profile=profile.name)
    executed(
        paths.executed(profile.name) / "07.ipynb", [markdown("# 07 · Claims\n\n## Same\n\nA"), markdown("## Same")]
    )
    executed(paths.executed(profile.name) / "05.failed.ipynb", [markdown("# 05 · Failed")])
    return profile


@pytest.fixture
def page(home):
    return Page(report.write(home).read_text())


def test_page_needs_nothing_from_outside_and_closes_what_it_opens(page):
    assert page.loaded == []
    assert page.wrong == []
    assert [link for link in page.links if not link.startswith(("#", "https://doi.org/"))] == []
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


@pytest.mark.parametrize(
    "part",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="x.css">',
        '<img src="figure.png">',
        "<style>p { background: url(https://example.org/a.png) }</style>",
    ],
)
def test_what_a_page_would_load_is_found(part):
    assert Page(part).loaded


@pytest.mark.parametrize("part", ["<div><p></div>", "<div>", "</p>"])
def test_what_a_page_does_not_close_is_found(part):
    assert Page(part).wrong


def test_every_committed_figure_and_table_is_in_the_page(home, page):
    figures = sorted(paths.figures(home.name).glob("*.svg"))
    assert len(figures) >= 5
    for figure in figures:
        assert base64.b64encode(figure.read_bytes()).decode() in page.text, figure.name
        assert f"figure-{figure.stem}" in page.ids
    for table in paths.figures(home.name).glob("*.md"):
        for cell in sections.markdown_table(table.read_text())["rows"][-1]:
            assert cell.replace("&", "&amp;") in page.text, table.name


def test_a_figure_without_svg_is_there_as_png(home):
    svg = paths.figures(home.name) / "claims.svg"
    svg.unlink()
    assert sections.data_uri(svg.with_suffix(".png")) in report.page(home)


def test_figure_says_which_cell_drew_it_and_how_to_draw_it_again(page):
    assert '<a href="#nb03-cell-id=drawing-cell">notebook 03, cell [4]</a>' in page.text
    assert "<p>A caption &amp; its <code>code</code>.</p>" in page.text
    assert "reprolib.workflow.notebooks 03 results/laptop-cifar100/notebooks/03.ipynb --parameters" in page.text
    assert "make figures PROFILE=laptop-cifar100" in page.text
    assert page.text.count("No notebook that was run for this page draws it") >= 4


def test_claims_are_those_of_the_tables_with_their_traces(home, page):
    decided = records.read_csv(paths.claims_csv(home.name))
    rows = decided[decided["verdict"].isin(sections.MARKS)]
    assert {"supported", "contradicted", "no data"} <= set(rows["verdict"])
    for row in rows.itertuples():
        assert f"{row.claim}. {claims.CLAIMS[row.claim]}".replace("'", "&#39;") in page.text
        assert f">{sections.MARKS[row.verdict]} {row.verdict}<" in page.text
        if row.seeds > 1:
            assert f"{row.difference:+.2f} [{row.low:+.2f}, {row.high:+.2f}] {row.unit}" in page.text
    accuracy = records.read_csv(paths.accuracy_csv(home.name))
    assert all(run_id in page.text for run_id in accuracy.loc[accuracy["pattern"] == "hybrid", "run_id"])
    assert str(paths.home()) not in page.text, "the page is for other machines"


def test_another_number_gives_another_page(home):
    before = report.page(home)
    assert report.page(home) == before
    accuracy = records.read_csv(paths.accuracy_csv(home.name))
    accuracy.loc[accuracy["pattern"] == "hybrid", "accuracy_pct"] -= 30
    records.write_csv(paths.accuracy_csv(home.name), accuracy)
    contradicted = f">{sections.MARKS['contradicted']} contradicted<"
    assert report.page(home).count(contradicted) > before.count(contradicted)


def test_notebooks_stand_side_by_side(page):
    assert "nb03" in page.ids and "nb07" in page.ids and "nb05" not in page.ids
    of_notebooks = [name for name in page.ids if name.startswith("nb")]
    assert "#T_1 td { color: blue }" in page.text and ".dataframe td" not in page.text
    assert "cdn.example" not in page.text and "example.org" not in page.text and "a &lt; b<br>" in page.text
    assert '<a href="#nb07">07</a>' in page.text and "<a>the code</a>" in page.text
    assert "they move in <code>make lab</code>" in page.text
    assert len({name for name in of_notebooks if "cell-id" in name}) == 5


def test_a_committed_figure_that_a_notebook_names_is_in_the_page(page):
    committed = sections.data_uri(paths.ROOT / "figures" / "laptop" / "claims.png")
    assert f'<img alt="It" src="{committed}">' in page.text and '<img alt="No">' in page.text


def test_rows_are_counted_where_they_come_from():
    table = pd.DataFrame(
        {"commit": ["aa", "bb+", "bb+"], "hardware": ["x", "y", "y"], "threads": [1, 2, 2], "seed": [0, 1, 0]}
    )
    first, second = sections.provenance({"t.csv": table}, {"aa": "2025-01-02"})
    assert first == {
        "table": "t.csv", "rows": 1, "seeds": "0", "commit": "aa", "date": "2025-01-02", "hardware": "x", "threads": 1,
        "torch": "not recorded",
    }  # fmt: skip
    assert (second["rows"], second["seeds"], second["date"]) == (2, "0, 1", "not known")
    [row] = sections.provenance({"t.csv": table[["commit"]][:1]}, {})
    assert (row["seeds"], row["hardware"], row["rows"]) == ("not recorded", "not recorded", 1)


def test_provenance_counts_every_row_of_the_committed_tables(home):
    tables = {path.name: records.read_csv(path) for path in paths.results(home.name).glob("*.csv")}
    tables.pop("claims.csv")
    counted = pd.DataFrame(sections.provenance(tables, {})).groupby("table")["rows"].sum()
    assert counted.to_dict() == {name: len(table) for name, table in tables.items()}


def test_steps_are_those_of_the_graph():
    steps = diagram.needs()
    assert list(steps) == ["00", "01", "02", "03", "04", "05", "06", "07"]
    assert steps["00"] == {"rule": "anatomy", "tables": []}
    assert steps["04"]["tables"] == ["accuracy.csv", "ablations.csv"]
    assert steps["06"] == {"rule": "latency_figure", "tables": ["accuracy.csv", "latency.csv", "latency-short.csv"]}


def test_committed_picture_of_the_graph_is_drawn_from_the_snakefile():
    assert diagram.PICTURE.read_text() == diagram.graph(), "python -m reprolib.workflow.diagram draws it anew"


def test_diagram_draws_a_line_for_each_need():
    columns = {
        "a": [diagram.Box("1", ("one",)), diagram.Box("2", ("<two>",))],
        "b": [diagram.Box("3", ("x",), ("1", "2"))],
    }
    drawn = diagram.svg(columns)
    assert [drawn.count(f"<{part}") for part in ("path", "polygon", "rect")] == [2, 1, 3] and "&lt;two&gt;" in drawn
    with pytest.raises(KeyError):
        diagram.svg({"a": [diagram.Box("1", ("one",), ("nowhere",))]})


def test_what_is_older_than_its_table_is_drawn_first(home):
    rules = ["accuracy_figure"]
    assert report.is_drawn(home.name, rules)
    assert not report.is_drawn(home.name, [*rules, "kernel_figures"])
    paths.accuracy_csv(home.name).touch()
    assert not report.is_drawn(home.name, rules)


def test_command_of_a_notebook_can_be_read_back(home):
    command = report.again(paths.executed(home.name) / "03.ipynb")
    assert json.loads(re.search(r"--parameters '(.*)'$", command)[1]) == {"profile": home.name}
