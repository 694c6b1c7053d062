"""Which number type a device trains in."""

import pytest
import torch

from reprolib import training
from reprolib.training import Recipe, precision
from reprolib.training.precision import autocast, usable


@pytest.fixture
def processor(monkeypatch):
    """Pretend that this processor has bf16 instructions, or that it has none."""

    def pretend(has_bf16):
        precision._multiplies_bf16.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": has_bf16})

    yield pretend
    precision._multiplies_bf16.cache_clear()


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_bf16_is_used_where_the_processor_multiplies_it(processor, has_bf16, expected):
    processor(has_bf16)
    assert usable("bf16", "cpu") == expected
    assert usable("fp32", "cpu") == "fp32"
    with autocast("bf16", "cpu"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == precision.PRECISIONS[expected]


def test_processor_that_tells_nothing_trains_in_fp32(monkeypatch, processor):
    processor(False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert usable("bf16", "cpu") == "fp32"


def test_gpu_that_would_emulate_bf16_trains_in_fp32(monkeypatch, processor):
    processor(True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert usable("bf16", "cuda") == "fp32"


def test_fp32_is_no_tf32_while_it_trains_and_is_evaluated(few_digits, small_net, monkeypatch):
    """Convolutions of a GPU are TF32 unless told otherwise."""
    seen = []
    conv2d = torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional, "conv2d", lambda *a: seen.append(torch.backends.cudnn.allow_tf32) or conv2d(*a)
    )
    model, before = small_net(), torch.backends.cudnn.allow_tf32
    training.fit(model, few_digits, Recipe(epochs=1, batch_size=32, lr=0.01), seed=0)
    training.accuracy_pct(model, few_digits, few_digits.test)
    assert set(seen) == {False} and torch.backends.cudnn.allow_tf32 == before
