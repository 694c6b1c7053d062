"""The table and figure of other makers' engines, from a table of latencies written by hand."""

import io

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from reprolib.experiments import records
from reprolib.files import paths
from reprolib.paper import peer_figures

matplotlib.use("agg")

MEASURED = """\
batch,seed,dtype,pattern,target_sparsity,implementation,latency_us
1,0,fp32,dense,0,"oneDNN, channels last",9000
1,0,bf16,dense,0,OpenVINO 2026.4.1,2000
1,0,fp32,dense,0,OpenVINO 2026.4.1,4000
1,0,fp32,dense,0,sparse kernels,11000
1,0,fp32,hybrid,0.9,sparse kernels,4000
1,0,fp32,hybrid,0.9,DeepSparse 1.8.0,3000
1,0,fp32,hybrid,0.5,sparse kernels,8000
1,0,fp32,hybrid,0.5,DeepSparse 1.8.0,7000
1,0,fp32,unstructured,0.9,sparse kernels,5000
1,0,fp32,unstructured,0.9,DeepSparse 1.8.0,3500
1,0,bf16,unstructured,0.9,"sparse kernels, bf16",4500
64,0,fp32,dense,0,"oneDNN, channels last",200000
64,0,fp32,hybrid,0.9,sparse kernels,40000
64,0,fp32,hybrid,0.9,DeepSparse 1.8.0,50000
64,1,fp32,hybrid,0.9,sparse kernels,1
"""


@pytest.fixture
def latency():
    table = pd.read_csv(io.StringIO(MEASURED))
    where = {"scope": "network", "name": "VGG-16 ×1", "device": "cpu", "hardware": "a CPU", "threads": 2}
    quartiles = {"latency_q1_us": 0.9 * table["latency_us"], "latency_q3_us": 1.2 * table["latency_us"]}
    return table.assign(**where, **quartiles)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_table_holds_engines_then_patterns_and_who_is_faster(latency):
    table = peer_figures.peer_table(peer_figures.peer_rows(latency))
    assert list(table.columns) == ["batch 1", "batch 64"]
    assert table.apply(list, axis=1).to_dict() == {
        "dense fp32: OpenVINO 2026.4.1": ["4.00 ms", ""],
        "dense fp32: oneDNN, channels last": ["9.00 ms", "200 ms"],
        "dense bf16: OpenVINO 2026.4.1": ["2.00 ms", ""],
        "dense fp32: our kernels, no zeros": ["11.0 ms", ""],
        "unstructured, 90 %: DeepSparse 1.8.0": ["3.50 ms (0.70× ours)", ""],
        "unstructured, 90 %: our kernels": ["5.00 ms", ""],
        "unstructured, 90 %: our kernels in bf16": ["4.50 ms (0.90× ours)", ""],
        "hybrid, 90 %: DeepSparse 1.8.0": ["3.00 ms (0.75× ours)", "50.0 ms (1.25× ours)"],
        "hybrid, 90 %: our kernels": ["4.00 ms", "40.0 ms"],
    }
    assert list(table.index)[:3] == [name for name in table.index if name.startswith("dense")][:3]
    assert list(table.index)[-1] == "hybrid, 90 %: our kernels"


def test_other_sparsities_have_their_own_table(latency):
    table = peer_figures.peer_table(peer_figures.peer_rows(latency, 0.5))
    assert table.loc["hybrid, 50 %: DeepSparse 1.8.0"].tolist() == ["7.00 ms (0.88× ours)"]


def test_table_without_peers_holds_nothing(latency):
    alone = latency[~latency["implementation"].str.startswith("DeepSparse")]
    assert peer_figures.peer_rows(alone).empty
    dense_only = latency[~latency["implementation"].str.startswith("DeepSparse") | (latency["pattern"] == "dense")]
    assert peer_figures.peer_rows(dense_only).empty
    committed = records.read_csv(paths.ROOT / "results" / "evening" / "latency.csv")
    assert peer_figures.peer_rows(committed.head(0)).empty


def test_figure_joins_the_two_that_ran_the_same_weights(latency):
    rows = peer_figures.peer_rows(latency)
    figure = peer_figures.peer_latency(rows)
    assert [axis.get_title() for axis in figure.axes] == ["batch 1", "batch 64"]
    texts = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    assert texts == [["0.75×", "0.70×"], ["1.25×"]]
    joined = [list(line.get_xdata()) for line in figure.axes[1].lines if len(line.get_xdata()) == 2]
    assert [40.0, 50.0] in joined
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names[-2:] == ["unstructured", "hybrid"] and names[0] == "dense fp32: OpenVINO 2026.4.1"
    marks = {text.get_text() for text in figure.axes[-1].get_legend().get_texts()}
    assert marks == {"our kernels", "our kernels in bf16", "DeepSparse 1.8.0"}
