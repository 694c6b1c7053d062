"""The three runs of a first day on a GPU, on a GPU that is pretended: no line may fail on a slip of the pen.

The kernels' own tests; the benches, end to end and layer by layer; training, its speed and a profile. `test_gpu_image`
runs all of this, as on a machine that has what a GPU's image has and no more.
"""

import inspect
import re
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from pretended_gpu import NAME, pretend_gpu
from torch.sparse import _triton_ops, _triton_ops_meta

from reprolib.bench import __main__ as bench
from reprolib.bench import latency, rivals, throughput, timing
from reprolib.experiments import Dense, Pruned, epochs_done, run
from reprolib.files import paths
from reprolib.files.deadline import OutOfTime
from reprolib.sparse import cuda
from reprolib.sparse.cuda import backend, tuning
from reprolib.training import Recipe


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("REPROLIB_HOME", str(tmp_path))
    with pretend_gpu(monkeypatch, tmp_path):
        yield tmp_path


def test_what_is_moved_there_says_so(gpu):
    there = torch.ones(2, 3).to("cuda")
    places = [there, there + 1, torch.zeros(2, device="cuda"), torch.ones(1).cuda(), there[0].view(3, 1)]
    assert {value.device.type for value in places} == {"cuda"} and there.is_cuda
    module = torch.nn.Linear(3, 2).to("cuda")
    assert module(there).device.type == module.weight.device.type == "cuda"
    assert {value.device.type for value in (torch.ones(2), there.cpu(), there.to("cpu"))} == {"cpu"}


def test_a_graph_does_again_what_was_captured(gpu):
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = 2 * x + 1
    x.fill_(5)
    graph.replay()
    assert y.tolist() == [11, 11, 11]


# --- (a) The kernels' tests -------------------------------------------------------------------------------------------


def test_tests_of_the_kernels(gpu, monkeypatch):
    monkeypatch.syspath_prepend(paths.ROOT / "tests" / "sparse")
    import test_cuda

    cuda.require()
    for name in ("v32, pool, odd map", "2:4", "sliced linear", "scalar, pool"):
        test_cuda.test_gpu_computes_the_convolution(test_cuda.ON_GPU[name])
    test_cuda.test_gpu_graph_replays_the_convolution("scalar, pool")
    test_cuda.test_gpu_kernels_run_on_the_current_stream()
    written = {name for name, _ in inspect.getmembers(test_cuda, inspect.isfunction) if name.startswith("test_gpu_")}
    assert len(written) == 4, "a new one belongs here"


# --- (b) The benches --------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """The survey with little work: a narrow network, two small layers, few images."""
    monkeypatch.setitem(latency.BATCHES, "cuda", (1,))
    specs = [("hybrid", "Balanced(4) & Block(4, 4)", 0.9), ("unstructured", "Unstructured()", 0.9)]
    specs += [("block", "Block(4, 4)", 0.9), ("two-four-block", "NM(2, 4)", 0.5)]
    monkeypatch.setattr(latency, "SURVEY", tuple(specs))
    monkeypatch.setattr(latency, "SEEDS", 1)
    monkeypatch.setattr(rivals, "INPUTS", 1)
    monkeypatch.setattr(tuning, "TRIED", 2)
    monkeypatch.setattr(backend, "TIMINGS", 1)
    monkeypatch.setattr(latency, "FULL", replace(latency.FULL, width=1 / 16))
    monkeypatch.setattr(latency, "LAYERS", [(32, 32, 4)])
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setitem(rivals.PRODUCT_SIDE, "cuda", 64)
    monkeypatch.setitem(rivals.COPY_NUMBERS, "cuda", 1024)
    monkeypatch.setattr(_triton_ops_meta, "tune_bsr_dense_addmm", lambda out, bsr, x, beta: {"num_warps": 4})
    monkeypatch.setattr(
        _triton_ops, "bsr_dense_addmm", lambda out, bsr, x, beta, meta: (bsr.to_dense().float() @ x.float()).half()
    )
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight)


@pytest.mark.parametrize("extent", ["short", "all"])
def test_benches_of_latency(gpu, small, monkeypatch, capsys, extent):
    output = gpu / "latency.csv"
    command = ["latency", "--device", "cuda", "--output", str(output), "--budget", "9m"]
    monkeypatch.setattr(sys, "argv", ["bench", *command, *["--short"] * (extent == "short")])
    bench.main()
    rows = pd.read_csv(output)
    assert set(rows["device"]) == {"cuda"} and set(rows["hardware"]) == {NAME}
    ways = {"cuDNN, channels last", "torch.compile, max-autotune", "sparse kernels"}
    assert ways <= set(rows["implementation"])
    if extent == "all":
        peers = {"torch BSR, product only", "torch 2:4, with unfold", "sparse, CUDA cores", "matrix product", "copy"}
        assert peers <= set(rows["implementation"])
        assert rows["scope"].iloc[0] == "first look" and {"network", "layer", "ceiling"} <= set(rows["scope"])


# --- (c) Training -----------------------------------------------------------------------------------------------------


def test_speed_of_training(gpu, monkeypatch):
    for name, value in {"STEPS": 6, "EPOCHS": (1, 2), "SIDE_BY_SIDE": (1,), "PEAK_SIDE": 64}.items():
        monkeypatch.setitem(getattr(throughput, name), "cuda", value)
    monkeypatch.setattr(throughput, "ROUNDS", 1)

    class Inline:
        """Networks side by side, one after the other in this process."""

        def __init__(self, target, args):
            self.target, self.args, self.exitcode = target, args, 0

        def start(self):
            self.target(*self.args)

        def join(self):
            pass

    class Queue(list):
        put, get = list.append, list.pop

    class Barrier:
        def wait(self, timeout):
            pass

        def abort(self):
            pass

    context = type("Context", (), {"Process": Inline, "SimpleQueue": Queue, "Barrier": lambda self, count: Barrier()})
    monkeypatch.setattr(throughput.multiprocessing, "get_context", lambda method: context())
    monkeypatch.setattr(throughput, "CORES", 1)
    loader = torch.utils.data.DataLoader
    alone = {"pin_memory": False, "num_workers": 0, "persistent_workers": False}
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *args, **options: loader(*args, **options | alone))
    monkeypatch.setattr(
        latency, "FULL", replace(latency.FULL, recipe=Recipe(1, batch_size=8, precision="bf16"), width=1 / 16)
    )
    monkeypatch.setattr(sys, "argv", ["bench", "training", "--device", "cuda"])
    bench.main()
    rows = pd.read_csv(gpu / "results" / "1" / "training.csv")
    assert set(rows["precision"]) == {"tf32", "bf16"} and set(rows["hardware"]) == {NAME}
    assert len(throughput.speed_table(rows)) == len(rows)


def test_a_profile_trains(gpu):
    """All its kinds of networks but sizes of banks, with the steps that a GPU captures. Needs what reads profiles."""
    from reprolib.experiments import profiles
    from reprolib.experiments.scheduling import train

    profile = profiles.load("quick-dry-run")
    named = profile.reported() | profile.asked("ablations")
    plan = [e for e, name in named.items() if getattr(e, "dense", e).seed == 0 and not re.search("bank|retrain", name)]
    plan = [experiment for experiment in plan if getattr(experiment, "sparsity", 0.96) == 0.96]
    for experiment in plan:
        assert run(experiment, gpu / "runs")["row"]["hardware"] == NAME
    assert train(plan, gpu / "runs", processes=1, threads=1) == []


def test_training_stops_in_time_and_goes_on(gpu):
    dense = Dense("noisy-digits", Recipe(epochs=2, batch_size=8, precision="bf16"), width=1 / 16, images=16)
    hybrid = Pruned(dense, "Balanced(4) & Block(4, 4)", 0.9, epochs=2, distillation=0.5)
    for experiment in (dense, hybrid):
        with pytest.raises(OutOfTime):
            run(experiment, gpu / "runs", deadline=0.0)
        assert 0 < epochs_done(experiment, gpu / "runs") < 2
        stopped = run(experiment, gpu / "runs")["row"]
        assert stopped["accuracy_pct"] == run(experiment, gpu / "whole")["row"]["accuracy_pct"]
