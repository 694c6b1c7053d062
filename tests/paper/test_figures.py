import itertools
import re
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from reprolib.files import paths
from reprolib.files.processes import environment
from reprolib.paper import accuracy_figures, claims, drawing, method_figures
from reprolib.patterns import parse

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def accuracy() -> pd.DataFrame:
    rows = [
        {"dataset": "cifar10", "pattern": "dense", "seed": s, "accuracy_pct": 90.0 + s, "model": "vgg16", "width": 1.0}
        for s in (0, 1)
    ]
    for pattern, spec, base in (("hybrid", "Balanced(16) & Block(32, 32)", 88.0), ("block", "Block(32, 32)", 85.0)):
        for target in (0.9, 0.95):
            rows += [
                {
                    "dataset": "cifar10",
                    "pattern": pattern,
                    "spec": spec,
                    "target_sparsity": target,
                    "sparsity": target + 0.001,
                    "seed": seed,
                    "accuracy_pct": base + 2 * seed - 10 * (target - 0.9),
                    "accuracy_dense_pct": 90.0,
                    "model": "vgg16",
                    "width": 1.0,
                    "commit": "abc",
                }
                for seed in (0, 1)
            ]
    return pd.DataFrame(rows)


def test_accuracy_figure_draws_the_means_and_deviations(accuracy):
    axis = accuracy_figures.accuracy_vs_sparsity(accuracy).axes[0]
    drawn = {container.get_label(): container for container in axis.containers}
    line, _, (bars,) = drawn["hybrid"].lines
    assert line.get_ydata() == pytest.approx([89.0, 88.5])
    assert [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()] == pytest.approx([2 * np.sqrt(2)] * 2)
    assert set(drawn) == {"hybrid", "block"}


def test_accuracy_axis_is_labelled_with_targets(accuracy):
    axis = accuracy_figures.accuracy_vs_sparsity(accuracy).axes[0]
    axis.figure.canvas.draw()
    assert [label.get_text() for label in axis.get_xticklabels()] == ["90", "95"]
    assert "%" in axis.get_xlabel() and "%" in axis.get_ylabel()


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (lambda frame: frame, "mean ± SD of 2 seeds"),
        (lambda frame: frame[(frame["seed"] == 0) | (frame["target_sparsity"] == 0.95)], "mean ± SD of up to 2 seeds"),
        (lambda frame: frame[frame["seed"] == 0], "one seed"),
    ],
)
def test_accuracy_figure_says_how_many_seeds_it_rests_on(accuracy, rows, text):
    title = accuracy_figures.accuracy_vs_sparsity(rows(accuracy)).axes[0].get_title()
    assert title == f"CIFAR-10, VGG-16 ×1: {text}"


def test_accuracy_table_shows_mean_and_deviation(accuracy):
    table = accuracy_figures.accuracy_table(accuracy)
    assert table.columns.to_list() == ["0 %", "90 %", "95 %"]
    assert table.index[0] == "CIFAR-10, dense" and table.iloc[0].to_list() == ["90.50 ± 0.71", "", ""]
    assert table.loc["CIFAR-10, hybrid: Balanced(16) & Block(32, 32)", "90 %"] == "89.00 ± 1.41"


def test_a_method_with_a_plus_stands_behind_its_own_and_has_its_colour():
    names = ["mine+", "block+", "hybrid", "mine", "dense", "hybrid+", "block", "unstructured+"]
    assert drawing.ordered(names) == ["unstructured+", "hybrid", "hybrid+", "block", "block+", "mine", "mine+"]
    for name in ("hybrid", "mine"):
        (color, marker), (lifted, star) = drawing.style(name), drawing.style(f"{name}+")
        assert color == lifted and star == "*" != marker


def test_unknown_methods_get_a_style_of_their_own(accuracy):
    accuracy.loc[accuracy["pattern"] == "block", "pattern"] = "spiral"
    labels = [container.get_label() for container in accuracy_figures.accuracy_vs_sparsity(accuracy).axes[0].containers]
    assert labels == ["hybrid", "spiral"]


def test_equal_data_give_equal_files(accuracy, tmp_path):
    drawing.theme()
    for name in ("a", "b"):
        drawing.save(accuracy_figures.accuracy_vs_sparsity(accuracy), tmp_path, name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


DRAWN_ELSEWHERE = """
import sys
import matplotlib.pyplot as plt
from reprolib.paper import drawing
drawing.theme()
plt.rcParams["svg.hashsalt"] += sys.argv[2]
figure, axes = plt.subplots(1, 2)
for n, axis in enumerate(axes):
    drawing.method_line(axis, "hybrid", [1, 2], [n, 3], yerr=[0.1, 0.2])
drawing.save(figure, sys.argv[1], "figure")
"""


def test_processes_and_machines_draw_equal_files(tmp_path):
    """Another machine has other last bits of coordinates, so other hashes of clips: here, by another salt."""
    for name, seed, salt in (("a", "1", ""), ("b", "2", ""), ("c", "2", "another machine")):
        command = [sys.executable, "-c", DRAWN_ELSEWHERE, tmp_path / name, salt]
        subprocess.run(command, check=True, env=environment() | {"PYTHONHASHSEED": seed})
    first, *others = [(tmp_path / name / "figure.svg").read_text() for name in "abc"]
    assert others == [first, first]
    used = re.findall(r'url\(#(\w+)\)|xlink:href="#(\w+)"', first)
    ids = re.findall(r'\bid="(\w+)"', first)
    assert {a or b for a, b in used} <= set(ids) and len(ids) == len(set(ids)), "each part is there, once"
    assert "p1" in ids


def test_tables_are_written_as_markdown_and_latex(accuracy, tmp_path):
    drawing.save_table(accuracy_figures.accuracy_table(accuracy), tmp_path, "accuracy")
    assert "| CIFAR-10, dense" in (tmp_path / "accuracy.md").read_text()
    latex = (tmp_path / "accuracy.tex").read_text()
    assert r"Balanced(16) \& Block(32, 32) & " in latex and r"$\pm$" in latex and r"90 \%" in latex


def test_anatomy_shows_both_halves_and_their_and():
    weight = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    figure = method_figures.mask_anatomy(weight, parse("Balanced(8) & Block(16, 16)"), 0.9)
    fine, coarse, both = (np.asarray(axis.images[0].get_array()) for axis in figure.axes)
    assert np.array_equal(both, fine & coarse)


def test_heat_map_holds_the_cells_of_plain_hybrids():
    defaults = {
        "score": "magnitude",
        "schedule": "gradual",
        "masks": "nested",
        "ratios": "uniform",
        "retraining": "lr-rewinding",
        "group_lasso": 0.0,
        "target_sparsity": 0.95,
        "epochs": 4,
    }
    rows = [
        {
            "spec": f"Balanced({bank}) & Block({block}, {block})",
            "bank": bank,
            "block_rows": block,
            "accuracy_pct": bank + block,
        }
        | defaults
        for bank in (4, 8)
        for block in (16, 32)
    ]
    rows.append(rows[0] | {"schedule": "one-shot", "accuracy_pct": -99})
    rows.append(rows[0] | {"epochs": 8, "accuracy_pct": -99})
    rows.append(rows[0] | {"masks": "refitted", "accuracy_pct": -99})
    axis = accuracy_figures.bank_block_heatmap(pd.DataFrame(rows)).axes[0]
    assert [text.get_text() for text in axis.texts] == ["24.00", "40.00", "20.00", "36.00"]


def test_variations_name_the_one_thing_that_differs():
    base = {
        "pattern": "hybrid",
        "spec": "Balanced(4) & Block(4, 4)",
        "schedule": "gradual",
        "masks": "nested",
        "ratios": "uniform",
        "retraining": "lr-rewinding",
        "epochs": 4,
    }
    rows = [
        base,
        base | {"epochs": 8},
        base | {"epochs": 8, "schedule": "one-shot"},  # two things
        base | {"schedule": "one-shot"},
        base | {"spec": "Hybrid(Balanced(4), Block(4, 4), split=0.25)"},
        base | {"retraining": "fine-tuning"},
        base | {"retraining": "fine-tuning", "schedule": "one-shot"},  # two things
        base | {"spec": "Balanced(8) & Block(4, 4)"},  # another pattern
        base | {"pattern": "block", "spec": "Block(4, 4)"},
    ]
    named = accuracy_figures.variations(pd.DataFrame(rows), "Balanced(4) & Block(4, 4)")
    assert named["variation"].to_list() == ["default", "8 epochs", "one-shot schedule", "split 0.25", "fine-tuning"]


def test_variations_show_what_they_cost_beside_what_they_gain():
    rows = [
        {"variation": name, "accuracy_pct": accuracy, "flops": flops}
        for name, accuracy, flops in (
            ("default", 74.0, 2.5e6),
            ("sensitivity ratios", 81.0, 6e6),
            ("default", 75.0, 2.5e6),
        )
    ]
    axes = accuracy_figures.variation_dots(pd.DataFrame(rows).assign(target_sparsity=0.95)).axes
    dots = [np.concatenate([c.get_offsets()[:, 0] for c in axis.collections]).tolist() for axis in axes]
    assert sorted(dots[0]) == [74.0, 75.0, 81.0] and sorted(dots[1]) == [2.5, 2.5, 6.0]
    assert [axis.lines[0].get_xdata()[0] for axis in axes] == [74.5, 2.5]
    assert axes[1].get_xlim()[1] > 6.2, "the last dot is whole"


def test_budget_curve_goes_over_the_epochs_of_default_hybrids():
    rows = [
        {"variation": name, "epochs": epochs, "accuracy_validation_pct": validation, "accuracy_pct": test}
        for name, epochs, validation, test in (
            ("8 epochs", 8, 77.0, 76.0),
            ("default", 4, 75.0, 74.0),
            ("one-shot schedule", 4, 10.0, 10.0),
            ("default", 4, 76.0, 75.0),
        )
    ]
    axis = accuracy_figures.retraining_budget(pd.DataFrame(rows).assign(target_sparsity=0.95)).axes[0]
    validation, test, profile = axis.lines
    assert validation.get_xydata().tolist() == [[4, 75.5], [8, 77.0]]
    assert test.get_xydata().tolist() == [[4, 74.5], [8, 76.0]]
    assert profile.get_xdata()[0] == 4


def test_forest_draws_every_interval(accuracy):
    decided = claims.decide(accuracy)
    axis = accuracy_figures.claims_forest(decided).axes[0]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["95 %", "90 %", "claim 1, CIFAR-10:\nhybrid − block"]
    differences = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "o"]
    assert differences == pytest.approx([3.0, 3.0, 3.0])


@pytest.mark.parametrize("unit", ["points", claims.LATENCY_UNIT])
def test_forest_leaves_room_for_its_intervals(unit):
    """Names and legend once left a quarter of the width."""
    accuracy, latency = (pd.read_csv(paths.ROOT / f"results/laptop/{name}.csv") for name in ("accuracy", "latency"))
    figure = accuracy_figures.claims_forest(claims.decide(accuracy, latency), unit)
    figure.canvas.draw()
    assert figure.axes[0].get_window_extent().width > 0.5 * figure.bbox.width


@pytest.mark.parametrize("profile", ["laptop", "laptop-cifar100", "evening"])
def test_names_of_a_forest_stay_beside_its_axis(profile):
    """With few rows, two lines of a name once reached past the ends of the axis."""
    figure = accuracy_figures.claims_forest(claims.decide(pd.read_csv(paths.ROOT / f"results/{profile}/accuracy.csv")))
    figure.canvas.draw()
    [axis] = figure.axes
    frame, names = axis.get_window_extent(), [label.get_window_extent() for label in axis.get_yticklabels()]
    assert all(frame.y0 <= name.y0 and name.y1 <= frame.y1 for name in names)
    names = sorted(names, key=lambda name: name.y0)
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(names)), "one name on another"


def test_claims_table_holds_only_rows_that_decide(accuracy):
    table = accuracy_figures.claims_table(claims.decide(accuracy), claims.CLAIMS)
    assert "supported" in table["verdict"].to_list()
    assert not any(" at 9" in comparison for comparison in table["comparison"])


# --- Kernels --------------------------------------------------------------------------------------------------------
