"""Activations and bfloat16 of the CPU engine, number by number, against torch and float64."""

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reprolib.sparse.cpu import activations
from reprolib.sparse.cpu.intrinsics import bits_of
from reprolib.sparse.cpu.planner import ACTIVATIONS
from reprolib.sparse.operations import ACTIVATIONS as IN_TORCH

exp, activated, bfloat16, paired, half = (
    getattr(activations, name) for name in ("exp", "activated", "bfloat16", "paired", "half")
)


@numba.njit(error_model="numpy")
def all_exp(x):
    return np.array([exp(number) for number in x])


@numba.njit(error_model="numpy")
def all_activated(x, kind):
    return np.array([activated(number, kind) for number in x])


@numba.njit
def all_rounded(x):
    return np.array([bfloat16(number) for number in x])


@numba.njit
def both(low, high):
    word = paired(low, high)
    return bits_of(word), half(word, False), half(word, True)


EDGES = np.array([0.0, -0.0, 1e-45, 1e-38, 1e-8, 0.5, 2.9999998, 3, 3.0000002, 6, 86.9, 87, 87.4, 88, 88.3, 88.8, 89,
                  90, 100, 1000, 1e10, 3e38, np.inf], np.float32)  # fmt: skip
EDGES = np.concatenate([EDGES, -EDGES, np.array([np.nan], np.float32)])


def test_exponential_is_that_of_float64():
    x = np.linspace(-87, 88, 200_001, dtype=np.float32)
    expected = np.exp(x.astype(np.float64))
    assert (np.abs(all_exp(x) - expected) / expected).max() < 2.5e-7


def test_exponential_at_the_ends_of_its_range():
    made = all_exp(np.array([89, 1e30, np.inf, -87, -89, -np.inf, 0, np.nan], np.float32))
    assert (made[:3] == np.inf).all()
    assert (made[3:6] == made[3]).all() and 0 < made[3] < 2e-38, "too small to count"
    assert made[6] == 1 and np.isnan(made[7])


@pytest.mark.parametrize("name", IN_TORCH)
def test_activations_are_those_of_torch(name):
    """Also of infinities, NaN, and numbers so large that products of them are infinite."""
    x = np.concatenate([EDGES, np.linspace(-20, 20, 10_001, dtype=np.float32)])
    expected = IN_TORCH[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(all_activated(x, ACTIVATIONS.index(name)), expected, rtol=1e-6, atol=1e-36)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1))
def test_rounding_to_bfloat16_is_that_of_torch(bits):
    x = np.concatenate([np.array(bits, np.uint32).view(np.float32), EDGES])
    made = torch.from_numpy(all_rounded(x).astype(np.uint16).view(np.int16)).view(torch.bfloat16).float().numpy()
    expected = torch.from_numpy(x).bfloat16().float().numpy()
    assert np.array_equal(made, expected, equal_nan=True)
    signs = np.signbit(made) == np.signbit(expected)
    assert signs[~np.isnan(x)].all()


@pytest.mark.parametrize(("low", "high", "bits"), [
    (1.0, -2.0, 0xC0003F80), (0.0, np.inf, 0x7F800000), (1.00390625, 1.01171875, 0x3F823F80),  # ties go to even
])  # fmt: skip
def test_pairs(low, high, bits):
    word, lower, upper = both(np.float32(low), np.float32(high))
    assert np.int64(word) & 0xFFFFFFFF == bits
    rounded = torch.tensor([low, high]).bfloat16().float().tolist()
    assert [lower, upper] == rounded
