"""Every notebook, as a reader runs it: all cells, on the defaults."""

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import matplotlib
import matplotlib.pyplot
import nbformat
import numpy
import pandas as pd
import papermill
import pytest
import torch
from PIL import Image

from reprolib import experiments
from reprolib.bench import latency
from reprolib.experiments import profiles, records
from reprolib.files import paths
from reprolib.files.atomic import write_atomically
from reprolib.workflow import graph, notebooks

ALL = paths.notebooks()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder for results and figures that holds the committed tables."""
    folder = tmp_path_factory.mktemp("home")
    for table in paths.ROOT.glob("results/laptop/*.csv"):
        target = folder / "results" / "laptop" / table.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(table, target)
    before = os.environ.get("REPROLIB_HOME")
    os.environ["REPROLIB_HOME"] = str(folder)
    yield folder
    os.environ.pop("REPROLIB_HOME") if before is None else os.environ.update(REPROLIB_HOME=before)


def written(home):
    """Files below `home` and when they were last written; without the trained networks, which git ignores."""
    files = [path for path in home.rglob("*") if path.is_file() and "runs" not in path.parts]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize("notebook", ALL, ids=lambda path: path.stem)
def test_runs_on_its_defaults_and_writes_nothing(notebook, home, tmp_path):
    before = written(home)
    notebooks.run(notebook, tmp_path / "out.ipynb", {})
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"], "it would look like an error"
    assert "Traceback" not in (tmp_path / "out.ipynb").read_text(), "not even inside a widget"
    assert written(home) == before


def show(notebook, **parameters):
    """Run the code of a notebook in this process, with these parameters, and render what its cells would show."""
    names = {}
    with torch.enable_grad():  # as before, whatever the notebook sets
        for cell in nbformat.read(notebook, as_version=4).cells:
            if cell.cell_type == "code":
                body = ast.parse(cell.source).body
                last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
                exec(compile(ast.Module(body, []), notebook.stem, "exec"), names)
                value = last and eval(compile(ast.Expression(last.value), notebook.stem, "eval"), names)
                getattr(value, "_repr_html_", lambda: None)()
                if "parameters" in cell.metadata.get("tags", []):
                    names |= parameters
    matplotlib.pyplot.close("all")


LATENCY = ["latency.md", "latency.tex"]
SUFFIXES = ("svg", "png", "md", "tex")
FILES = {
    "00": ["mask_anatomy.svg", "mask_anatomy.png"],
    "03": ["accuracy_vs_sparsity.svg", "accuracy_vs_sparsity.png", "accuracy.md", "accuracy.tex"],
    "04": [f"{name}.{kind}" for name in ("bank_block", "variations", "retraining_budget") for kind in ("svg", "png")],
    "05": [*(f"{name}.{kind}" for name in ("roofline", "latency_vs_sparsity") for kind in ("svg", "png")), *LATENCY],
    "06": ["accuracy_vs_latency.svg", "accuracy_vs_latency.png", *(f"peers.{kind}" for kind in SUFFIXES)],
    "07": [
        *(f"claims.{kind}" for kind in (*SUFFIXES, "csv")),
        "claims_at_equal_latency.svg",
        "claims_at_equal_latency.png",
    ],
}


@pytest.mark.parametrize("number", FILES)
def test_draws_into_the_folder_that_it_is_given(number, home, tmp_path, monkeypatch):
    before = written(home)
    matplotlib.use("agg")
    monkeypatch.setattr("timeit.repeat", lambda *_, **__: [1.0])
    with torch.random.fork_rng(), torch.no_grad():  # what a notebook sets stays here
        show(paths.notebook(number), folder=str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES[number])
    assert written(home) == before


OWN_NETWORK = """
from torch import nn

def small(num_classes):
    layers = []
    for c_in, c_out in ((3, 8), (8, 8), (8, 16)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))
"""
OWN_PROFILE = """
purpose: three colours, and a network of three convolutions
threads: 1
datasets: [folder:colours, folder:colours@12+flip]
model: nets_at_work:small
width: 1
hidden: []
seeds: [0, 1]
recipe: {epochs: 2, batch_size: 8, lr: 0.05}
retraining_epochs: 1
sparsities: [0.9]
methods:
  hybrid: {pattern: "Balanced(4) & Block(2, 2)"}
  block: {pattern: "Block(2, 2)"}
  balanced: {pattern: Balanced(72)}
ablations: {}
"""


def test_own_data_and_an_own_network_go_all_the_way(tmp_path, monkeypatch):
    """A profile by its path, two sizes of images, from the files to tables, figures and claims."""
    for name, folder in (("REPROLIB_HOME", "home"), ("REPROLIB_DATA", "data")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.syspath_prepend(tmp_path)
    matplotlib.use("agg")
    (tmp_path / "nets_at_work.py").write_text(OWN_NETWORK)
    (tmp_path / "mine.yaml").write_text(OWN_PROFILE)
    noise = numpy.random.default_rng(0)
    for part, colour in itertools.product(("train", "test"), range(3)):
        place = tmp_path / "data" / "colours" / part / ["red", "green", "blue"][colour]
        place.mkdir(parents=True)
        for number in range(8):
            pixels = noise.integers(0, 100, (16, 16, 3), dtype=numpy.uint8)
            pixels[..., colour] += 150
            Image.fromarray(pixels).save(place / f"{number}.png")

    profile = profiles.load(str(tmp_path / "mine.yaml"))
    monkeypatch.chdir("/")
    for experiment in profile.plan():
        experiments.run(experiment, paths.runs(profile.name))
    graph.write_tables(profile)
    one = {"profile": profile.name, "dataset": profile.datasets[1], "seed": 1}
    with torch.random.fork_rng():
        show(paths.notebook("01"), **one)
        show(paths.notebook("02"), **one, **profile.settings("hybrid"))
    for number in ("03", "07"):
        show(paths.notebook(number), profile=profile.name, folder=str(tmp_path / "drawn"))

    accuracy = records.read_csv(paths.accuracy_csv(profile.name))
    assert set(accuracy["dataset"]) == set(profile.datasets) and set(accuracy["model"]) == {"nets_at_work:small"}
    # 3x3 convolutions with 3, 8 and 8 channels in, 8, 8 and 16 out, on every pixel; the classifier; 2 per multiply-add.
    flops = accuracy[accuracy["pattern"] == "dense"].groupby("dataset")["flops"].first()
    assert flops.to_list() == [2 * (9 * (24 + 64 + 128) * size**2 + 48) for size in (16, 12)]
    assert "colours-12-flip, hybrid: Balanced(4) & Block(2, 2)" in (tmp_path / "drawn" / "accuracy.md").read_text()
    assert "colours, nets_at_work:small: mean ± SD" in (tmp_path / "drawn" / "accuracy_vs_sparsity.svg").read_text()
    decided = records.read_csv(tmp_path / "drawn" / "claims.csv").set_index(["claim", "dataset"])
    assert decided.loc[(1, "folder:colours"), "seeds"] == 2
    assert decided.loc[(4, "cpu"), "remark"] == "no latency.csv: make bench measures it"
    monkeypatch.setattr(latency, "SEEDS", 2)
    monkeypatch.setattr(latency, "BATCHES", {"cpu": (2,)})
    latency.benchmark(profile, "cpu", "own", paths.latency_csv(profile.name))
    for number in ("05", "06", "07"):
        show(paths.notebook(number), profile=profile.name, folder=str(tmp_path / "drawn"))
    decided = records.read_csv(tmp_path / "drawn" / "claims.csv").set_index(["claim", "dataset"])
    between = decided.loc[[(4, "cpu")], "comparison"]
    assert between.iloc[0].endswith("nets_at_work:small") and (decided.loc[[(4, "cpu")], "seeds"] == 2).all()


@pytest.mark.parametrize("trained", [4, 8])
def test_tables_of_an_unfinished_run_can_be_drawn(trained, tmp_path, monkeypatch):
    """The first networks of the plan; and a data set of which only the dense network is there."""
    monkeypatch.setenv("REPROLIB_HOME", str(tmp_path))
    matplotlib.use("agg")
    done = [experiment.run_id for experiment in profiles.load("laptop").plan()[:trained]]
    accuracy = records.read_csv(paths.ROOT / "results" / "laptop" / "accuracy.csv")
    accuracy = accuracy[accuracy["run_id"].isin(done)]
    dense = accuracy[accuracy["pattern"] == "dense"].assign(dataset="cifar100", run_id="another")
    assert len(accuracy) == trained and len(dense) == 1
    records.write_csv(paths.accuracy_csv("laptop"), pd.concat([dense, accuracy]))
    for number in ("03", "07"):
        show(paths.notebook(number), folder=str(tmp_path))
    assert (tmp_path / "accuracy_vs_sparsity.svg").exists()
    verdicts = set(records.read_csv(tmp_path / "claims.csv")["verdict"])
    assert verdicts <= {"undecided", "no data", "for orientation"}


@pytest.mark.parametrize("kept", [lambda row: row["schedule"] == "one-shot", lambda row: row["group_lasso"] > 0])
def test_ablations_of_an_unfinished_run_can_be_drawn(kept, tmp_path, monkeypatch):
    """Neither the default hybrid nor a pair of mask rules is there to compare with."""
    monkeypatch.setenv("REPROLIB_HOME", str(tmp_path))
    matplotlib.use("agg")
    for table in (paths.accuracy_csv, paths.ablations_csv):
        rows = records.read_csv(paths.ROOT / table("laptop").relative_to(tmp_path))
        if table is paths.ablations_csv:
            rows = rows[rows.apply(kept, axis=1)]
            assert len(rows)
        records.write_csv(table("laptop"), rows)
    show(paths.notebook("04"), folder=str(tmp_path))
    assert (tmp_path / "retraining_budget.svg").exists()


@pytest.mark.parametrize("timed", [False, True], ids=["not timed", "timed"])
def test_engines_of_other_makers_are_drawn_where_they_were_timed(timed, tmp_path, monkeypatch):
    monkeypatch.setenv("REPROLIB_HOME", str(tmp_path))
    matplotlib.use("agg")
    for table in (paths.accuracy_csv, paths.latency_csv):
        rows = records.read_csv(paths.ROOT / table("laptop").relative_to(tmp_path))
        if table is paths.latency_csv:
            rows = rows[rows["implementation"].str.startswith(("sparse kernels", "oneDNN"))]
        if timed and table is paths.latency_csv:
            same = rows[(rows["scope"] == "network") & (rows["width"] == 1) & (rows["pattern"] == "hybrid")]
            theirs = same[(same["seed"] == 0) & (same["dtype"] == "fp32")].assign(implementation="DeepSparse 1.8.0")
            rows = pd.concat([rows, theirs], ignore_index=True)
        records.write_csv(table("laptop"), rows)
    show(paths.notebook("06"), folder=str(tmp_path / "drawn"))
    drawn = {path.name for path in (tmp_path / "drawn").glob("peers.*")}
    assert drawn == ({f"peers.{suffix}" for suffix in SUFFIXES} if timed else set())


@pytest.mark.parametrize("notebook", ALL, ids=lambda path: path.stem)
def test_has_the_form_of_the_house(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    assert 15 <= len(cells) <= 36
    assert cells[0].source.startswith("# ") and "**Runtime.**" in cells[0].source
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert "parameters" in code[0].metadata.get("tags", [])
    assert all("#" in line for line in code[0].source.splitlines()), "each parameter has a comment"
    assert not any(cell.outputs for cell in code)
    assert max(len(cell.source.splitlines()) for cell in code) <= 25
    assert any("## Try this" in cell.source for cell in cells)


def test_figures_in_the_text_are_committed_and_say_so():
    listed = subprocess.run(["git", "ls-files"], cwd=paths.ROOT, capture_output=True, text=True, check=True)
    tracked, shown = listed.stdout.splitlines(), {}
    for notebook in ALL:
        for cell in nbformat.read(notebook, as_version=4).cells:
            if cell.cell_type == "markdown":
                pictures = re.findall(r"!\[(.*?)\]\((.*?)\)", cell.source)
                assert len(pictures) == cell.source.count("*Committed result:*") == cell.source.count("![")
                for told, source in pictures:
                    path = (notebook.parent / source).resolve()
                    assert str(path.relative_to(paths.ROOT)) in tracked and path.is_file()
                    assert len(told) > 20, "who cannot see the picture reads this"
                    shown.setdefault(notebook.stem[:2], []).append(path.name)
    drawn = {number: sorted(name for name in names if name.endswith(".png")) for number, names in FILES.items()}
    assert {number: sorted(names) for number, names in shown.items()} == drawn


def test_unknown_parameter_is_an_error_that_names_the_known_ones(tmp_path, write_notebook):
    notebook = write_notebook(tmp_path / "n.ipynb", "alpha: int = 1  # first\nbeta: int = 2  # second")
    with pytest.raises(ValueError, match="no parameter gamma: it knows alpha, beta"):
        notebooks.run(notebook, tmp_path / "out.ipynb", {"gamma": 3})
    assert not (tmp_path / "out.ipynb").exists()


def test_failed_notebook_leaves_no_output_but_a_failed_copy(tmp_path, write_notebook):
    notebook = write_notebook(tmp_path / "{n}.ipynb", "alpha: int = 1  # first", "1 / (alpha - 1)")
    with pytest.raises(papermill.PapermillExecutionError):
        notebooks.run(notebook, tmp_path / "out" / "n.ipynb", {})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["n.failed.ipynb"]


def command_line(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "reprolib.workflow.notebooks", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sparsities": [1.5]}, "sparsity must lie in [0, 1), not 1.5"),
        ({"pattern": "Blok(4, 4)"}, "unknown pattern 'Blok'"),
    ],
)
def test_wrong_input_is_refused(parameters, message, tmp_path, monkeypatch):
    monkeypatch.setenv("REPROLIB_HOME", str(tmp_path))
    matplotlib.use("agg")
    with pytest.raises(ValueError, match=re.escape(message)):
        show(paths.notebook("02"), **parameters)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"alpha": 13}, "error: out: ValueError: unlucky number"),
        ({"beta": 0.5}, "error: n has no parameter beta: it knows alpha"),
        ({"alpha": "1"}, "error: alpha must be a whole number, not '1'; its default is 1"),
        (
            [1],
            "error: argument --parameters: '[1]' is not understood: "
            "it must be a mapping, such as {name: value}, not [1]",
        ),
    ],
)
def test_wrong_input_gets_one_clear_line(parameters, message, tmp_path, write_notebook):
    cells = "alpha: int = 1  # first", 'if alpha == 13:\n    raise ValueError("unlucky number")'
    notebook = write_notebook(tmp_path / "n.ipynb", *cells)
    done = command_line(notebook, tmp_path / "out.ipynb", "--parameters", json.dumps(parameters))
    assert done.returncode in (1, 2)
    assert done.stderr.strip().splitlines()[-1].removeprefix("notebooks.py: ") == message


def test_unknown_notebook_names_the_choice(tmp_path):
    done = command_line("99", tmp_path / "out.ipynb")
    assert done.returncode == 1 and "no notebook '99': there are 00_anatomy_of_a_mask" in done.stderr


def test_unwritable_output_folder_is_named(tmp_path, write_notebook):
    (tmp_path / "file").write_text("")
    notebook = write_notebook(tmp_path / "n.ipynb", "alpha: int = 1  # first")
    done = command_line(notebook, tmp_path / "file" / "out.ipynb")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and str(tmp_path / "file") in done.stderr


def test_dead_kernel_gets_one_clear_line(tmp_path, write_notebook):
    cells = "alpha: int = 1  # first", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    done = command_line(write_notebook(tmp_path / "n.ipynb", *cells), tmp_path / "out.ipynb")
    assert done.returncode == 1 and "error: out: the notebook's kernel died" in done.stderr
    assert not (tmp_path / "out.ipynb").exists()


def test_what_a_notebook_drew_moves_to_its_place_if_it_gets_to_its_end(tmp_path, write_notebook, monkeypatch):
    monkeypatch.setenv("REPROLIB_HOME", str(tmp_path))
    drawn = tmp_path / "drawn"
    claims, svg, same = paths.claims_csv("p"), paths.figures("p") / "claims.svg", paths.figures("p") / "same.svg"
    for path in (drawn / "claims.csv", drawn / "claims.svg", drawn / "same.svg", same):
        write_atomically(path, "new")
    write_atomically(svg, "old")
    (drawn / ".snakemake_timestamp").touch()
    before = same.stat().st_ino
    notebook = write_notebook(tmp_path / "n.ipynb", "alpha: int = 0  # first", "1 / alpha")
    options = tmp_path / "out.ipynb", "--publish", drawn, "p"
    assert command_line(notebook, *options).returncode == 1
    assert svg.read_text() == "old" and not claims.exists()
    assert command_line(notebook, *options, "--parameters", '{"alpha": 1}').returncode == 0
    assert [path.read_text() for path in (claims, svg)] == ["new", "new"]
    assert same.stat().st_ino == before, "what does not change is left alone"
    assert sorted(path.name for path in svg.parent.iterdir()) == ["claims.svg", "same.svg"]
