"""What the benchmark of training computes from; how long things take is not tested."""

import contextlib
import io
from dataclasses import replace

import pytest
import torch
from torch import nn

from reprolib import experiments
from reprolib.bench import throughput
from reprolib.bench.throughput import OURS, PLAIN, Case
from reprolib.experiments import profiles
from reprolib.training import Recipe
from reprolib.training.data import Split

CASES = [Case(loop, trains, 1, 1) for loop in (OURS, PLAIN) for trains in ("dense", "hybrid")]


def test_training_costs_three_passes_without_the_gradient_of_the_image():
    """Conv 3→4 on 32x32: 2 * 27 * 4 * 1024 = 221,184 FLOPs; linear 4096→10: 81,920; by hand."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(4096, 10))
    assert throughput.training_flops(model) == 2 * 221_184 + 3 * 81_920


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.loop}-{case.trains}")
def test_loops_train_the_networks_that_they_name(case, monkeypatch):
    monkeypatch.setitem(throughput.STEPS, "cpu", 2)
    networks = []
    untrained = experiments.untrained
    monkeypatch.setattr(experiments, "untrained", lambda dense: networks.append(untrained(dense)) or networks[-1])
    profile = profiles.load("quick")
    dense = profile.dense(profile.datasets[0], 0)
    train = throughput._loop(dense, profile.settings("hybrid")["pattern"], "cpu", case)
    before = networks[0][0].weight.detach().clone()
    train(1)
    assert not torch.equal(networks[0][0].weight, before)
    share = (networks[0][3].weight == 0).float().mean().item()
    assert share == pytest.approx(0.95 if case.trains == "hybrid" else 0.0, abs=0.02)


def test_plain_loop_learns(few_digits, small_net):
    labels = few_digits.train.labels[:64]
    images = (25 * labels).to(torch.uint8)[:, None, None, None].expand(-1, 32, 32, 3).contiguous()
    dataset = replace(few_digits, train=Split(images, labels), mean=(0.5,) * 3, std=(0.25,) * 3)
    model = small_net()

    def loss():
        with torch.no_grad():
            inputs = (images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
            return nn.functional.cross_entropy(model(inputs), labels).item()

    before = loss()
    with contextlib.redirect_stderr(io.StringIO()):
        throughput.plain_fit(model, dataset, Recipe(epochs=5, batch_size=32, lr=0.02), {})
    assert loss() < before
