"""How CUDA layers are cut: what a block has to do, which way the model prefers, and that a timing is made once."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reprolib.patterns import parse
from reprolib.sparse import cuda
from reprolib.sparse.cuda import backend, packing, tuning
from reprolib.sparse.cuda.tuning import Choice, Gpu, Work

H100 = Gpu(132, 228 * 1024)


def test_blocks_have_no_more_warps_than_there_is_work_for():
    assert tuning.block_shapes(64, 32) == [(2, 1), (2, 2), (2, 4)]
    assert tuning.block_shapes(16, 16) == [(2, 2), (2, 4)]
    assert tuning.block_shapes(512, 32) == [(2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)]


def test_slices_have_two_steps_at_least():
    assert [choice.slices for choice in tuning.candidates(16, 16, 1)] == [1, 1]
    assert [choice.slices for choice in tuning.candidates(16, 16, 9)] == [1, 2, 4] * 2


def test_work_counts_steps_groups_and_the_warps_that_others_wait_for():
    # Row groups of 16: the first keeps 40 columns of chunk 0 (three groups of 16), the second 16 of chunk 0 and 16 of
    # chunk 1, the third and fourth, in a row block of their own, 16 of chunk 1 and none.
    weight = np.zeros((64, 3, 3, 32), np.float16)
    weight[:16].reshape(16, 9, 32)[:, :5, :8] = 1
    weight[16:32, 0, 0, :] = 1
    weight[32:48, 0, 0, 16:] = 1
    work = tuning.work_of(packing.pack(weight, 16, 2), 2, 2)
    assert work == Work(steps=(2 + 1) / 2, groups=(3 + 2 + 1) / 2, critical=(3 + 1 + 1) / 2)
    shared = tuning.work_of(packing.pack(weight, 16, 2, splits=2), 4, 2)
    assert shared.critical < work.critical and shared.steps == work.steps


def test_warps_share_the_columns_of_a_row_group_evenly():
    weight = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    weight = weight * parse("Unstructured()").mask(weight, 0.9)
    plan = cuda.plan(weight, torch.zeros(64), device="cpu", variant="v32")
    alone, shared = (plan.packed(2, splits)[1] for splits in (1, 4))
    assert alone.groups <= shared.groups <= 1.2 * alone.groups  # a few more are filled up
    assert shared.critical <= 0.35 * alone.critical


@pytest.mark.parametrize(
    ("groups", "height", "expected"),
    [
        (1, 4, {"slices": True, "splits": True}),  # one image: all multiprocessors are free
        (16, 4, {"slices": False, "splits": True}),  # 128 images: warps share columns, and no sums go through memory
        (128, 4, {"slices": False, "splits": False}),  # 1024 images: there are blocks enough
    ],
)
def test_the_model_cuts_finer_where_there_are_fewer_blocks(groups, height, expected):
    weight = torch.randn(512, 512, 3, 3, generator=torch.Generator().manual_seed(0))
    weight = weight * parse("Block(32, 32)").mask(weight, 0.9)
    plan = cuda.plan(weight, torch.zeros(512), device="cpu")
    best, *_ = plan.ordered(groups, height, height, H100)
    assert {"slices": best.slices > 1, "splits": best.splits > 1} == expected


@pytest.mark.parametrize(("channels", "size"), [(128, 16), (512, 4)])
def test_two_of_four_in_blocks_is_the_hybrid_that_costs_no_more_than_blocks(channels, size):
    """At equal sparsity and 1024 images, by the model: the paper's hybrid multiplies what its blocks alone would."""

    def estimate_us(spec):
        weight = torch.randn(channels, channels, 3, 3, generator=torch.Generator().manual_seed(0))
        plan = cuda.plan(weight * parse(spec).mask(weight, 0.9), torch.zeros(channels), device="cpu")
        best, *_ = plan.ordered(128, size, size, H100)
        tile, (_, work) = plan.tile(size, size, best), plan.packed(best.warps, best.splits)
        count = math.prod(backend.blocks(tile, channels, 128, size, size))
        return tuning.estimate_us(tile, work, count, best.slices, H100)

    block = estimate_us("Block(32, 32)")
    assert (
        estimate_us("NM(2, 4) & Block(32, 32)")
        <= 1.01 * block
        < 1.5 * block
        < estimate_us("Balanced(16) & Block(32, 32)")
    )


def test_more_work_takes_longer_and_more_multiprocessors_less():
    tile, work = packing.tile_for(3, 8, 8, 32, 4, 2), Work(10, 100, 30)
    us = tuning.estimate_us(tile, work, 500, 1, H100)
    assert us > tuning.estimate_us(tile, Work(10, 50, 15), 500, 1, H100)
    assert us > tuning.estimate_us(tile, work, 100, 1, H100)
    assert us < tuning.estimate_us(tile, work, 500, 1, H100._replace(multiprocessors=66))
    assert us < tuning.estimate_us(tile, work, 500, 4, H100), "sums go through memory"


# --- Timed once -------------------------------------------------------------------------------------------------------

WAYS = [Choice(2, 1, 1), Choice(4, 1, 1), Choice(8, 1, 1)]


def test_the_fastest_by_the_clock_is_kept_in_a_file(tmp_path):
    file, asked = tmp_path / "cache" / "gpu.json", []

    def time_us(choice):
        asked.append(choice)
        return {2: 3.0, 4: 1.0, 8: 2.0}[choice.warps]

    assert tuning.chosen(WAYS, "layer", file, time_us) == Choice(4, 1, 1) and asked == WAYS
    assert tuning.chosen(WAYS, "layer", file, time_us) == Choice(4, 1, 1) and asked == WAYS, "not timed again"
    assert tuning.chosen(WAYS, "layer", file) == Choice(4, 1, 1)
    assert tuning.chosen(WAYS, "another", file) == WAYS[0], "nobody may time it: the best by the model"
    assert tuning.chosen(WAYS[:1], "layer", file) == WAYS[0], "no such way any more"
    tuning.chosen(WAYS, "another", file, time_us)
    assert json.loads(file.read_text()) == {"layer": [4, 1, 1], "another": [4, 1, 1]}


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_file_is_as_none(tmp_path, content):
    file = tmp_path / "gpu.json"
    file.write_text(content)
    assert tuning.chosen(WAYS, "layer", file, lambda choice: choice.warps) == WAYS[0]
    assert json.loads(file.read_text()) == {"layer": [2, 1, 1]}


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "taken").write_text("")
    assert tuning.chosen(WAYS, "layer", tmp_path / "taken" / "gpu.json", lambda choice: -choice.warps) == WAYS[2]


def test_the_file_bears_the_name_of_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.file_for("NVIDIA H100 80GB HBM3") == tmp_path / "reprolib" / "cuda-nvidia-h100-80gb-hbm3.json"


def test_a_layer_is_cut_once_for_each_shape_of_its_input(monkeypatch):
    plan = cuda.plan(torch.ones(16, 16, 3, 3), torch.zeros(16), device="cpu")
    asked, found = [], backend._found
    monkeypatch.setattr(backend, "_found", lambda x, plan, shape: asked.append(shape) or found(x, plan, shape))
    for size in (4, 4, 6):
        cuda.conv(cuda.to_layout(torch.ones(1, 16, size, size), 1), plan)
    assert asked == [(1, 4, 4), (1, 6, 6)] and list(plan.choices) == asked


class Clock:
    """Stands for the GPU: each launch takes as long as the way that it was cut, and events tell that."""

    def __init__(self, monkeypatch, folder):
        self.now_us, self.ways, self.held = 0.0, [], 0
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.us = clock.now_us

            def synchronize(self):
                pass

            def elapsed_time(self, later):
                return (later.us - self.us) / 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(backend, "_gpu", lambda device: H100)
        monkeypatch.setattr(backend, "_run", self.run)
        monkeypatch.setattr(tuning, "file_for", lambda name: folder / f"{name}.json")
        self.capturing = False

    def sleep(self, cycles):
        self.held += 1

    def run(self, x, plan, choice):
        self.ways.append(choice)
        self.now_us += 1 if choice.warps == 4 else 5


def test_on_a_gpu_ways_are_timed_at_the_first_call_and_never_while_a_graph_is_captured(tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch, tmp_path)
    weight = torch.randn(128, 64, 3, 3)
    plan = cuda.plan(weight, torch.zeros(128), device="cpu", variant="v32")
    x = SimpleNamespace(device=torch.device("cuda"))
    ordered = plan.ordered(16, 4, 4, H100)
    clock.capturing = True
    assert backend._found(x, plan, (16, 4, 4)) == ordered[0] and not clock.ways
    clock.capturing = False
    best = backend._found(x, plan, (16, 4, 4))
    assert best.warps == 4 and best == next(way for way in ordered if way.warps == 4)
    assert set(clock.ways) == set(ordered[: tuning.TRIED])
    assert clock.held == len(clock.ways) == (backend.TIMINGS + 1) * min(tuning.TRIED, len(ordered))
    assert "once for each layer and batch" in capsys.readouterr().err
    assert backend._found(x, plan, (16, 4, 4)) == best and clock.held == len(clock.ways)
    [kept] = json.loads((tmp_path / "A GPU.json").read_text()).values()
    assert kept == list(best)
