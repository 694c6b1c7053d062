"""Weights come back from the disk as they were, and zeros take no room there."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from reprolib.experiments import storage


@given(
    shape=st.lists(st.integers(1, 7), max_size=4),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_tensors_of_any_density_come_back(tmp_path_factory, shape, density, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    storage.write(path, {"a.weight": values, "a.count": torch.tensor(3)})
    found = storage.read(path)
    assert set(found) == {"a.weight", "a.count"} and found["a.count"].item() == 3
    assert found["a.weight"].dtype == values.dtype and torch.equal(found["a.weight"], values)


def test_memory_format_does_not_matter(tmp_path):
    values = torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last)
    pruned = values * (values % 4 == 0)
    storage.write(tmp_path / "w.safetensors", {"dense": values, "pruned": pruned})
    found = storage.read(tmp_path / "w.safetensors")
    assert torch.equal(found["dense"], values) and torch.equal(found["pruned"], pruned)


def test_pruned_tensor_takes_the_room_of_what_is_left(tmp_path):
    """1,000 of 10,000 numbers: 4,000 bytes of numbers and 1,250 of places, beside a header."""
    values = torch.zeros(10_000)
    values[::10] = 1.5
    storage.write(tmp_path / "w.safetensors", {"w": values})
    assert 5_250 <= (tmp_path / "w.safetensors").stat().st_size <= 5_250 + 500


@given(
    names=st.lists(
        st.sampled_from(["w", "w.mask", "w.kept", "mask", "kept", "a.mask", "w.mask.kept"]), unique=True, min_size=1
    ),
    seed=st.integers(0, 99),
)
def test_tensors_of_any_name_come_back(tmp_path_factory, names, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(9, generator=generator) * (torch.rand(9, generator=generator) < 0.4) for name in names}
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    storage.write(path, tensors)
    found = storage.read(path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in names)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.int8, torch.bool, torch.bfloat16, torch.float8_e4m3fn]
)
def test_zeros_of_every_type_come_back(tmp_path, dtype):
    storage.write(tmp_path / "w.safetensors", {"w": torch.zeros(9).to(dtype)})
    found = storage.read(tmp_path / "w.safetensors")["w"]
    assert found.dtype == dtype and found.float().tolist() == 9 * [0.0]


def test_name_that_the_format_keeps_for_itself_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'__metadata__' can't be stored"):
        storage.write(tmp_path / "w.safetensors", {"__metadata__": torch.ones(1)})


def test_tensors_that_share_memory_come_back(tmp_path):
    whole = torch.arange(1.0, 7.0)
    storage.write(tmp_path / "w.safetensors", {"whole": whole, "same": whole, "part": whole[2:4]})
    found = storage.read(tmp_path / "w.safetensors")
    assert torch.equal(found["whole"], whole) and torch.equal(found["same"], whole)
    assert found["part"].tolist() == [3, 4]
