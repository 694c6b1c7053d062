"""Weights come back from the disk as they were, and zeros take no room there."""

import json

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file

from reprolib.files import tensors


@given(
    shape=st.lists(st.integers(1, 7), max_size=4),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_tensors_of_any_density_come_back(tmp_path_factory, shape, density, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    tensors.write(path, {"a.weight": values, "a.count": torch.tensor(3)})
    found = tensors.read(path)
    assert set(found) == {"a.weight", "a.count"} and found["a.count"].item() == 3
    assert found["a.weight"].dtype == values.dtype and torch.equal(found["a.weight"], values)


def test_memory_format_does_not_matter(tmp_path):
    values = torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last)
    pruned = values * (values % 4 == 0)
    tensors.write(tmp_path / "w.safetensors", {"dense": values, "pruned": pruned})
    found = tensors.read(tmp_path / "w.safetensors")
    assert torch.equal(found["dense"], values) and torch.equal(found["pruned"], pruned)


def test_pruned_tensor_takes_the_room_of_what_is_left(tmp_path):
    """1,000 of 10,000 numbers: 4,000 bytes of numbers and 1,250 of places, beside a header."""
    values = torch.zeros(10_000)
    values[::10] = 1.5
    tensors.write(tmp_path / "w.safetensors", {"w": values})
    assert 5_250 <= (tmp_path / "w.safetensors").stat().st_size <= 5_250 + 500


@given(
    names=st.lists(
        st.sampled_from(["w", "w.mask", "w.kept", "mask", "kept", "a.mask", "w.mask.kept"]), unique=True, min_size=1
    ),
    seed=st.integers(0, 99),
)
def test_tensors_of_any_name_come_back(tmp_path_factory, names, seed):
    generator = torch.Generator().manual_seed(seed)
    named = {name: torch.randn(9, generator=generator) * (torch.rand(9, generator=generator) < 0.4) for name in names}
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    tensors.write(path, named)
    found = tensors.read(path)
    assert found.keys() == named.keys() and all(torch.equal(found[name], named[name]) for name in names)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.int8, torch.bool, torch.bfloat16, torch.float8_e4m3fn]
)
def test_zeros_of_every_type_come_back(tmp_path, dtype):
    tensors.write(tmp_path / "w.safetensors", {"w": torch.zeros(9).to(dtype)})
    found = tensors.read(tmp_path / "w.safetensors")["w"]
    assert found.dtype == dtype and found.float().tolist() == 9 * [0.0]


def test_name_that_the_format_keeps_for_itself_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'__metadata__' can't be stored"):
        tensors.write(tmp_path / "w.safetensors", {"__metadata__": torch.ones(1)})


def test_tensors_that_share_memory_come_back(tmp_path):
    whole = torch.arange(1.0, 7.0)
    tensors.write(tmp_path / "w.safetensors", {"whole": whole, "same": whole, "part": whole[2:4]})
    found = tensors.read(tmp_path / "w.safetensors")
    assert torch.equal(found["whole"], whole) and torch.equal(found["same"], whole)
    assert found["part"].tolist() == [3, 4]


def test_notes_come_back(tmp_path):
    tensors.write(tmp_path / "w.safetensors", {"w": torch.ones(2)}, {"of": "VGG-16 – pruned", "version": "1"})
    assert tensors.notes(tmp_path / "w.safetensors") == {"of": "VGG-16 – pruned", "version": "1"}


def test_what_was_read_does_not_need_the_file(tmp_path):
    tensors.write(tmp_path / "w.safetensors", {"w": torch.ones(1 << 16)})
    found = tensors.read(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"")
    assert found["w"].sum() == 1 << 16


# --- Files that are damaged, foreign, or older ------------------------------------------------------------------------


@pytest.fixture
def pruned(tmp_path):
    """A file of ten numbers, of which 3 and 8 are kept."""
    path = tmp_path / "w.safetensors"
    tensors.write(path, {"w": torch.tensor([[0, 0, 0, 3.0, 0], [0, 0, 0, 8, 0]])}, {"note": "pruned"})
    return path


def test_the_parts_of_a_pruned_tensor(pruned):
    stored = load_file(pruned)
    assert {name: part.tolist() for name, part in stored.items()} == {
        "w.kept": [3, 8],
        "w.mask": [0b00010000, 0b10000000],
    }


def test_files_of_others_and_of_earlier_versions_are_read(pruned, tmp_path):
    stored, old = load_file(pruned), tmp_path / "old.safetensors"
    save_file(stored, old, {"shapes": json.dumps({"w": [2, 5]})})  # as version 0.2 wrote it
    assert torch.equal(tensors.read(old)["w"], tensors.read(pruned)["w"])
    save_file({"v": torch.arange(3)}, old)
    assert tensors.read(old)["v"].tolist() == [0, 1, 2] and tensors.notes(old) == {}


def test_every_cut_and_every_changed_byte_is_found(pruned):
    whole, found = pruned.read_bytes(), tensors.read(pruned)["w"]
    for length in range(len(whole)):
        pruned.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"w\.safetensors is damaged, or no file of tensors .*: write it again"):
            tensors.read(pruned)
    for place in range(8, len(whole)):
        pruned.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert torch.equal(tensors.read(pruned)["w"], found)  # a space between the words of the header
        except ValueError as problem:
            assert "is damaged" in str(problem)
        except KeyError as problem:  # no checksum any more, and a name that is another one
            assert str(problem) == "'w'"


@pytest.mark.parametrize(
    ("parts", "shapes"),
    [
        ({"w.kept": torch.ones(2), "w.mask": torch.tensor([3], dtype=torch.uint8)}, {"w": [17]}),
        ({"w.kept": torch.ones(2), "w.mask": torch.tensor([3, 0], dtype=torch.uint8)}, {"w": [8]}),
        ({"w.kept": torch.ones(1), "w.mask": torch.tensor([3], dtype=torch.uint8)}, {"w": [8]}),
        ({"w.kept": torch.ones(3), "w.mask": torch.tensor([3], dtype=torch.uint8)}, {"w": [8]}),
        ({"w.kept": torch.ones(2), "w.mask": torch.tensor([3], dtype=torch.uint8)}, {"w": [7]}),  # the last bit is none
        ({"w.kept": torch.ones(2, 1), "w.mask": torch.tensor([3], dtype=torch.uint8)}, {"w": [8]}),
        ({"w.kept": torch.ones(2), "w.mask": torch.tensor([3], dtype=torch.int32)}, {"w": [8]}),
        ({"w.kept": torch.ones(2), "w.mask": torch.tensor([3], dtype=torch.uint8)}, {"w": [-2, -4]}),
        ({"w.kept": torch.ones(2), "w.mask": torch.tensor([3], dtype=torch.uint8)}, {"w": [8.0]}),
        ({"w.kept": torch.ones(0), "w.mask": torch.ones(0, dtype=torch.uint8)}, {"w": [0, 10**30]}),
        ({"w.kept": torch.ones(2)}, {"w": [8]}),
        ({"w.kept": torch.ones(2)}, ["w"]),
        ({"w.kept": torch.ones(2)}, 7),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(tmp_path, parts, shapes):
    path = tmp_path / "w.safetensors"
    save_file(parts, path, {"shapes": json.dumps(shapes)})
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged"):
        tensors.read(path)


def test_a_file_that_is_not_there_is_no_damaged_one(tmp_path):
    for look in (tensors.read, tensors.notes):
        with pytest.raises(FileNotFoundError):
            look(tmp_path / "w.safetensors")
