"""Data sets are split, checked, normalised and augmented as they should be; nothing here downloads."""

import hashlib
import math
import pickle
import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision

from reprolib.files import paths
from reprolib.training import data

CIFAR_FILES = ["batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))]


# --- Loading ----------------------------------------------------------------------------------------------------------


def test_digits_have_three_splits(digits):
    # 1,797 scans: every fifth is for testing, a tenth of the others for validation; 2 or 5 copies of each.
    assert [len(split) for split in (digits.train, digits.validation, digits.test)] == [2 * 1295, 2 * 143, 5 * 359]
    assert digits.classes == tuple("0123456789")
    for split in (digits.train, digits.validation, digits.test):
        assert split.images.shape == (len(split), 32, 32, 3) and split.images.dtype == torch.uint8
        assert split.labels.unique().tolist() == list(range(10)) and split.labels.dtype == torch.int64


def test_digits_are_the_same_bytes_on_every_machine(digits):
    found = hashlib.sha256()
    for split in (digits.train, digits.validation, digits.test):
        found.update(split.images.numpy().tobytes())
        found.update(split.labels.numpy().astype("<i8").tobytes())
    assert found.hexdigest() == "dd7150174114537e7aaebb938c9bd504fd9cd8fbd86acb542a83a29c65ae416f"


def test_copies_of_a_scan_lie_in_one_split_with_its_label(monkeypatch):
    from sklearn.datasets import load_digits

    monkeypatch.setattr(data, "NOISE", 0.0)
    digits = data.load.__wrapped__("noisy-digits")
    found = [
        Counter(
            (image.numpy().tobytes(), label) for image, label in zip(split.images, split.labels.tolist(), strict=True)
        )
        for split in (digits.train, digits.validation, digits.test)
    ]
    # Some of the scans are equal to another one, at this resolution none of them across two splits.
    assert [set(copies.values()) <= {n, 2 * n} for copies, n in zip(found, (2, 2, 5), strict=True)] == [True] * 3
    assert len(set().union(*found)) == sum(map(len, found))
    scans = Counter()
    for copies, count in zip(found, (2, 2, 5), strict=True):
        scans += Counter({scan: times // count for scan, times in copies.items()})
    assert Counter(label for _, label in scans.elements()) == Counter(load_digits().target.tolist())


def test_noise_is_gaussian_of_its_own_in_each_copy_and_equal_in_all_channels(monkeypatch):
    monkeypatch.setattr(data, "NOISE", 20.0)
    grey = data.Split(torch.full((2, 32, 32, 3), 128, dtype=torch.uint8), torch.tensor([4, 7]))
    noisy = data._noisy_copies(grey, 3, np.random.default_rng(1))
    assert noisy.labels.tolist() == [4, 7, 4, 7, 4, 7]
    assert torch.equal(noisy.images[..., :1].expand(-1, -1, -1, 3), noisy.images)
    values = noisy.images[..., 0].double().flatten(1)
    assert values.mean().item() == pytest.approx(128, abs=1) and values.std().item() == pytest.approx(20, rel=0.05)
    assert (torch.corrcoef(values) - torch.eye(6)).abs().max() < 0.2


def test_noise_beyond_black_and_white_is_cut_off(digits):
    levels = digits.train.images.flatten().bincount(minlength=256) / digits.train.images.numel()
    assert levels[0] > 0.1 and levels[255] > 0.1 and levels[1:255].max() < 0.01


def test_statistics_are_those_of_the_training_split(digits):
    values = digits.train.images.double().flatten(0, 2) / 255
    assert digits.mean == pytest.approx(values.mean(dim=0).tolist())
    assert digits.std == pytest.approx(values.std(dim=0, correction=0).tolist())


def test_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="unknown data set 'mnist': known are noisy-digits, cifar10, cifar100"):
        data.load("mnist")


@pytest.fixture
def cifar_folder(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in CIFAR_FILES:
        (folder / name).write_bytes(b"no batch")
    return folder


def test_damaged_file_is_named_with_its_md5(cifar_folder):
    with pytest.raises(ValueError, match=f"data_batch_1 is damaged .*md5.* delete {cifar_folder} and get it again"):
        data.load("cifar10", cifar_folder.parent)


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
def test_missing_file_is_named(cifar_folder, monkeypatch, name):
    monkeypatch.setattr(torchvision.datasets.utils, "check_md5", lambda path, md5: True)
    for each in ("test_batch", "batches.meta", *(f"data_batch_{i}" for i in range(1, 6))):
        (cifar_folder / each).touch()
    (cifar_folder / name).unlink()
    with pytest.raises(ValueError, match=f"incomplete: .*{name} is missing; delete {cifar_folder}"):
        data.load("cifar10", cifar_folder.parent)


def test_wrong_number_of_images_is_refused(cifar_folder, monkeypatch):
    """Files that are sound in themselves, of another data set or a shortened one."""

    def write(name, content):
        (cifar_folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((cifar_folder / name).read_bytes()).hexdigest()

    batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}
    source = torchvision.datasets.CIFAR10
    meta = write("batches.meta", {"label_names": [str(i) for i in range(10)]})
    monkeypatch.setattr(source, "meta", source.meta | {"filename": meta[0], "md5": meta[1]})
    monkeypatch.setattr(source, "train_list", [write(f"data_batch_{i}", batch) for i in range(1, 6)])
    monkeypatch.setattr(source, "test_list", [write("test_batch", batch)])
    with pytest.raises(ValueError, match=r"\(10, 10, 2\) where cifar10 has \(10, 50000, 10000\)"):
        data.load("cifar10", cifar_folder.parent)


def no_network(*args, **kwargs):
    raise OSError("no route to host")


@pytest.mark.parametrize("ask", [data.load, data.fetch])
def test_failing_download_says_what_to_do(tmp_path, monkeypatch, ask):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(FileNotFoundError) as failed:
        ask("cifar100", tmp_path / "data")
    first, _, *remedies = str(failed.value).splitlines()
    assert first == f"cifar-100-python is not in {tmp_path / 'data'}, and it could not be downloaded: no route to host"
    assert [remedy[:4] for remedy in remedies] == ["  * "] * 3
    for remedy, word in zip(remedies, ("cifar-100-python.tar.gz", "REPROLIB_DATA", "PROFILE=quick"), strict=True):
        assert word in remedy


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small archive in the place of CIFAR-10's, put there by hand; without network."""
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    source, files = torchvision.datasets.CIFAR10, tmp_path / "files"
    files.mkdir()
    for name in CIFAR_FILES:
        (files / name).write_bytes(name.encode())
    path = tmp_path / "data" / source.filename
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(files, source.base_folder)
    md5 = {name: hashlib.md5(name.encode()).hexdigest() for name in CIFAR_FILES}
    monkeypatch.setattr(source, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(source, "meta", source.meta | {"md5": md5["batches.meta"]})
    monkeypatch.setattr(source, "train_list", [(f"data_batch_{i}", md5[f"data_batch_{i}"]) for i in range(1, 6)])
    monkeypatch.setattr(source, "test_list", [("test_batch", md5["test_batch"])])
    return path


def test_archive_that_lies_there_is_unpacked(archive):
    data.fetch("cifar10", archive.parent)
    assert sorted(path.name for path in archive.parent.iterdir()) == ["cifar-10-batches-py", archive.name]
    data.fetch("cifar10", archive.parent)


def test_unpacking_that_is_stopped_leaves_nothing_half(archive, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as first:
        first.setattr(tarfile.TarFile, "extractall", stopped)
        with pytest.raises(KeyboardInterrupt):
            data.fetch("cifar10", archive.parent)
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]
    data.fetch("cifar10", archive.parent)


@pytest.mark.parametrize(
    ("name", "folder", "classes"), [("cifar10", "cifar-10-batches-py", 10), ("cifar100", "cifar-100-python", 100)]
)
def test_cifar_has_its_splits_and_fine_labels(name, folder, classes):
    if not (paths.data() / folder).exists():
        pytest.skip(f"{folder} is not there")
    cifar = data.load.__wrapped__(name)  # not kept in memory for the tests that follow
    assert [len(split) for split in (cifar.train, cifar.validation, cifar.test)] == [45_000, 5_000, 10_000]
    assert len(cifar.classes) == len(cifar.train.labels.unique()) == classes
    assert cifar.test.labels.bincount().tolist() == [10_000 // classes] * classes
    assert cifar.flip and cifar.pad == 4


# --- Batches ----------------------------------------------------------------------------------------------------------


def test_normalised_by_hand(digits):
    dataset = replace(digits, mean=(0.5, 0.0, 1.0), std=(0.25, 1.0, 0.5))
    images = torch.tensor([255, 51, 0], dtype=torch.uint8).expand(2, 32, 32, 3)
    batch = data.normalised(images, dataset)
    assert batch.dtype == torch.float32 and batch.shape == (2, 3, 32, 32)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(batch[1, :, 3, 5], torch.tensor([2.0, 0.2, -2.0]))


def test_normalised_training_split_has_zero_mean_and_unit_variance(digits):
    batch = data.normalised(digits.train.images, digits)
    torch.testing.assert_close(batch.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(batch.var(dim=(0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)


def moved(image, down, right, mirror):
    """An image ``[size, size, 3]`` as nested lists, mirrored if asked, then moved pixel by pixel; zeros come in."""
    size = len(image)
    result = [[[0, 0, 0] for _ in range(size)] for _ in range(size)]
    for y in range(size):
        for x in range(size):
            if 0 <= y + down < size and 0 <= x + right < size:
                result[y + down][x + right] = image[y][size - 1 - x] if mirror else image[y][x]
    return result


def moves_found(dataset, count, seed=0):
    """For each of `count` random images: the one (down, right, mirror) that makes its augmented form."""
    images = torch.randint(1, 256, (count, 5, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
    draws = data.draw_augmentations(count, dataset, torch.Generator().manual_seed(seed))
    result = data.augmented(images, draws, dataset)
    assert result.dtype == torch.uint8 and result.shape == images.shape
    reach = range(-dataset.pad - 1, dataset.pad + 2)
    found = []
    for image, changed in zip(images.tolist(), result.tolist(), strict=True):
        candidates = [(down, right, mirror) for down in reach for right in reach for mirror in (False, True)]
        [move] = [candidate for candidate in candidates if moved(image, *candidate) == changed]
        found.append(move)
    return found


def test_each_image_is_shifted_and_mirrored_on_its_own(digits):
    found = Counter(moves_found(replace(digits, flip=True, pad=1), 400))
    # Nine shifts, mirrored or not, and nothing beyond; each about 400 / 18 = 22 times.
    assert set(found) == {(d, r, m) for d in (-1, 0, 1) for r in (-1, 0, 1) for m in (False, True)}
    assert min(found.values()) > 5 and max(found.values()) < 45


def test_images_whose_mirror_is_another_class_are_never_mirrored(digits):
    assert not digits.flip
    assert not any(mirror for _, _, mirror in moves_found(replace(digits, pad=1), 50))


def test_draws_say_how_an_image_moves(digits):
    """With pad 1: first down or up, then right or left, then the mirror."""
    image = torch.arange(1, 28, dtype=torch.uint8).view(1, 3, 3, 3)
    dataset = replace(digits, flip=True, pad=1)
    for draw, move in {
        (1, 1, 0): (0, 0, False),
        (0, 1, 0): (1, 0, False),
        (1, 2, 0): (0, -1, False),
        (2, 0, 1): (-1, -1, True),  # the mirror turns the shift round
    }.items():
        [result] = data.augmented(image, torch.tensor([draw]), dataset).tolist()
        assert result == moved(image[0].tolist(), *move)


def test_first_images_of_each_split(digits):
    few = digits.first(1000)
    assert (len(few.train), len(few.validation), len(few.test)) == (1000, 286, 1000)
    assert torch.equal(few.test.images, digits.test.images[:1000])
    assert torch.equal(few.test.labels, digits.test.labels[:1000])


def test_augmentation_follows_from_the_generator_alone(digits):
    images = digits.train.images[:16]
    before = images.clone()

    def draw(seed):
        return data.augmented(images, data.draw_augmentations(16, digits, torch.Generator().manual_seed(seed)), digits)

    first = draw(1)
    torch.rand(3)
    assert torch.equal(draw(1), first)
    assert not torch.equal(draw(2), first)
    assert torch.equal(images, before)


def test_split_sizes_do_not_depend_on_a_seed(digits):
    torch.manual_seed(5)
    np.random.seed(5)
    again = data.load.__wrapped__("noisy-digits")
    assert torch.equal(again.validation.images, digits.validation.images)
    assert math.isclose(again.mean[0], digits.mean[0], abs_tol=0)
