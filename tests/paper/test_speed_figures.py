import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from reprolib.paper import analysis, kernel_figures, speed_figures
from reprolib.sparse import formats

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_stored_places_of_a_hand_worked_matrix():
    matrix = torch.tensor([[1.0, 0.0, 0.0, 2.0], [3.0, 0.0, 0.0, 4.0], [0.0, 5.0, 0.0, 0.0], [0.0, 6.0, 0.0, 0.0]])
    places, units = kernel_figures.stored_places(formats.ColumnVectors.pack(matrix, 2))
    assert places.tolist() == [[0, -1, -1, 2], [1, -1, -1, 3], [-1, 4, -1, -1], [-1, 5, -1, -1]]
    assert units.tolist() == [[0, -1, -1, 1], [0, -1, -1, 1], [-1, 2, -1, -1], [-1, 2, -1, -1]]


def test_format_picture_brackets_stored_zeros():
    matrix = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    (axis,) = kernel_figures.format_picture({"block": formats.Blocks.pack(matrix, 2, 2)}).axes
    assert [text.get_text() for text in axis.texts] == ["0", "(1)", "2", "3"]


def test_duration_has_three_digits_and_a_unit():
    texts = [speed_figures.duration(us) for us in (45.61, 999.4, 999.6, 1234, 12345, 789123, 2674000)]
    assert texts == ["45.6 µs", "999 µs", "1.00 ms", "1.23 ms", "12.3 ms", "789 ms", "2.67 s"]


def test_condition_table_by_hand():
    columns = ["scope", "batch", "pattern", "target_sparsity", "implementation", "latency_us"]
    latency = pd.DataFrame(
        [
            ("network", 1, "block", 0.9, "sparse kernels", 1.0),
            ("conditions", 16, "block", 0.9, "sparse kernels, 1 thread", 8000.0),
            ("conditions", 16, "block", 0.9, "sparse kernels, 2 threads", 4000.0),
            ("conditions", 1, "unstructured", 0.9, "sparse kernels, 1 thread", 3000.0),
            ("conditions", 1, "block", 0.9, "sparse kernels, 1 thread", 2000.0),
            ("conditions", 1, "dense", 0.0, "oneDNN, channels last, 1 thread", 9000.0),
            ("conditions", 1, "dense", 0.0, "oneDNN, channels last, 2 threads", 5000.0),
            ("conditions", 1, "block", 0.9, "sparse kernels, caches swept", 3000.0),
        ],
        columns=columns,
    )
    table = speed_figures.condition_table(latency)
    assert table.to_dict("index") == {
        "dense: oneDNN, channels last, batch 1": {"1 thread": "9.00 ms", "2 threads": "5.00 ms", "caches swept": ""},
        "unstructured, 90 %, batch 1": {"1 thread": "3.00 ms", "2 threads": "", "caches swept": ""},
        "block, 90 %, batch 1": {"1 thread": "2.00 ms", "2 threads": "", "caches swept": "3.00 ms"},
        "block, 90 %, batch 16": {"1 thread": "8.00 ms", "2 threads": "4.00 ms", "caches swept": ""},
    }
    assert list(table.columns) == ["1 thread", "2 threads", "caches swept"]
    assert [name.split()[0] for name in table.index] == ["dense:", "unstructured,", "block,", "block,"]
    assert speed_figures.condition_table(latency.head(1)).empty


@pytest.fixture
def networks():
    """Two batches of one network: dense ways, and two patterns at two sparsities."""
    ways = [("dense", 0.0, False, "fp32", 1.0), ("dense", 0.0, False, "bf16", 1.8), ("dense", 0.0, True, "fp32", 0.9)]
    ways += [(p, s, True, "fp32", v) for p, s, v in (("block", 0.9, 4.0), ("block", 0.5, 1.5), ("hybrid", 0.9, 3.0))]
    rows = [
        {
            "name": "VGG-16 ×1",
            "device": "cpu",
            "hardware": "a CPU",
            "threads": 2,
            "batch": batch,
            "ours": ours,
            "pattern": pattern,
            "spec": "Block(32, 32)" if pattern == "block" else "",
            "target_sparsity": sparsity,
            "dtype": dtype,
            "latency_us": 8000 / speedup,
            "speedup": speedup,
            "speedup_q1": 0.9 * speedup,
            "speedup_q3": 1.1 * speedup,
        }
        for batch in (1, 64)
        for pattern, sparsity, ours, dtype, speedup in ways
    ]
    return pd.DataFrame(rows)


def test_speedups_are_drawn_per_batch_and_pattern(networks):
    figure = speed_figures.latency_vs_sparsity(networks)
    assert [axis.get_title() for axis in figure.axes] == ["batch 1", "batch 64"]
    lines = {container.get_label(): container.lines[0].get_ydata() for container in figure.axes[1].containers}
    assert lines["block"].tolist() == [1.5, 4.0] and lines["hybrid"].tolist() == [3.0]
    across = {
        line.get_label(): line.get_ydata()[0] for line in figure.axes[0].lines if "dense" in str(line.get_label())
    }
    assert across == {"best dense fp32": 1.0, "best dense bf16": 1.8}


def test_latency_table_shows_time_and_speedup(networks):
    table = speed_figures.latency_table(networks)
    assert table.loc["batch 64, block: Block(32, 32)", "90 %"] == "2.00 ms (4.00×)"
    assert table.loc["batch 1, our kernels, no zeros", "0 %"] == "8.89 ms (0.90×)"
    assert table.loc["batch 1, hybrid: ", "50 %"] == ""


def test_front_is_drawn_as_steps(networks):
    points = networks.assign(dataset="cifar10", accuracy_pct=90 - 5 * networks["speedup"], accuracy_sd=0.1)
    axis = speed_figures.accuracy_vs_latency(points, analysis.pareto_front).axes[0]
    (steps,) = [line for line in axis.lines if line.get_label() == "front: not beaten"]
    best = analysis.pareto_front(points[points["batch"] == 1])
    assert steps.get_xdata()[:-1].tolist() == pytest.approx((best["latency_us"] / 1e3).tolist())


def test_roof_bends_where_memory_meets_arithmetic():
    row = {"batch": 64, "device": "cpu", "hardware": "a CPU", "threads": 2, "dtype": "fp32", "gflop_per_s": 90.0}
    dense = row | {"ours": False, "pattern": "dense", "target_sparsity": 0.0, "intensity": 100.0}
    pruned = row | {"ours": True, "pattern": "two-four-block", "target_sparsity": 0.9, "intensity": 20.0}
    other = pruned | {"target_sparsity": 0.5}
    axis = speed_figures.roofline(pd.DataFrame([dense, pruned, other]), 0.9, ceilings=(400.0, 40.0)).axes[0]
    (roof,) = [line for line in axis.lines if len(line.get_xdata()) == 3]
    assert roof.get_xydata()[1].tolist() == [10.0, 400.0]
    points = {line.get_label(): line.get_xdata().tolist() for line in axis.lines if len(line.get_xdata()) == 1}
    assert points == {"dense": [100.0], "2:4 block": [20.0]}


def test_missing_latencies_are_said_not_drawn(networks):
    for figure in (
        speed_figures.roofline(pd.DataFrame(), 0.9),
        speed_figures.accuracy_vs_latency(networks.head(0), analysis.pareto_front),
        speed_figures.theoretical_vs_measured(networks.head(0)),
    ):
        assert "make bench" in figure.axes[0].texts[0].get_text()
