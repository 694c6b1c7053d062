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


TRAINED = """\
batch,dtype,pattern,target_sparsity,implementation,latency_us,file_bytes
1,fp32,dense,0,"oneDNN, channels last",900,4000000
1,fp32,dense,0,OpenVINO 2026.4.1,400,4000000
1,bf16,dense,0,OpenVINO 2026.4.1,100,4000000
1,fp32,dense,0,sparse kernels,300,4000000
16,fp32,dense,0,"oneDNN, channels last",3000,4000000
16,fp32,dense,0,OpenVINO 2026.4.1,3500,4000000
1,fp32,hybrid,0.9,sparse kernels,200,500000
1,fp32,hybrid,0.9,DeepSparse 1.8.0,350,
16,fp32,hybrid,0.9,sparse kernels,800,500000
1,fp32,unstructured,0.9,torch.nn.utils.prune,950,8000000
1,fp32,unstructured,0.9,sparse kernels,210,510000
1,fp32,channels,0.5,OpenVINO 2026.4.1,250,2000000
1,fp32,channels,0.5,torch.compile,260,2000000
1,fp32,channels,0.9,torch.compile,150,400000
"""
RIGHT = """\
pattern,target_sparsity,seed,accuracy_pct
dense,,0,90
dense,,1,92
hybrid,0.9,0,88
unstructured,0.9,0,89
channels,0.5,0,85
channels,0.9,0,70
"""


def test_table_of_trained_networks_by_hand():
    """Dense ones, narrower ones too, in their fastest engine, by name; what is not measured stays empty."""
    table = peer_figures.trained_table(pd.read_csv(io.StringIO(TRAINED)), pd.read_csv(io.StringIO(RIGHT)))
    assert list(table.columns) == ["right, %", "file, MB", "batch 1", "batch 16"]
    expected = {
        "dense: the fastest dense engine": ["91.00 ± 1.41", "4.00", "400 µs (OpenVINO)", "3.00 ms (oneDNN)"],
        "unstructured, 90 %: our kernels": ["89.00", "0.51", "210 µs", ""],
        "unstructured, 90 %: torch.nn.utils.prune": ["89.00", "8.00", "950 µs", ""],
        "hybrid, 90 %: DeepSparse 1.8.0": ["88.00", "", "350 µs", ""],
        "hybrid, 90 %: our kernels": ["88.00", "0.50", "200 µs", "800 µs"],
        "channels, 50 %: the fastest dense engine": ["85.00", "2.00", "250 µs (OpenVINO)", ""],
        "channels, 90 %: the fastest dense engine": ["70.00", "0.40", "150 µs (torch.compile)", ""],
    }
    assert table.fillna("").apply(list, axis=1).to_dict() == expected and list(table.index) == list(expected)
