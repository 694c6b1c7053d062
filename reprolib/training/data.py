"""Data sets that live on the training device as uint8: CIFAR, the embedded noisy digits, and the user's own."""

from __future__ import annotations

import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reprolib.files import paths
from reprolib.training import own_data

SHAPES = {"noisy-digits": (10, 32), "cifar10": (10, 32), "cifar100": (100, 32)}  # classes, side of an image
NAMES = tuple(SHAPES)
NOISE = 200.0  # on digits: standard deviation, where black is 0 and white 255; without it pruning costs next to nothing
COPIES, TEST_COPIES = 2, 5  # of each digit, each with its own noise; more for the test, which is seldom read
CONNECTION_S = 15.0  # how long a silent network is waited for


@dataclass(frozen=True)
class Split:
    """Images uint8 ``[N, S, S, 3]`` and labels int64 ``[N]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def first(self, count: int) -> Split:
        return Split(self.images[:count], self.labels[:count])


@dataclass(frozen=True)
class Dataset:
    """A data set in three splits; `mean` and `std` are per channel, of the training split in [0, 1].

    `flip`: whether a mirrored image still shows its class; `pad`: how many pixels a random crop may shift it.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    pad: int

    @property
    def image_size(self) -> int:
        """Height and width of an image in pixels."""
        return self.train.images.shape[1]

    def to(self, device: torch.device | str) -> Dataset:
        return self._each(lambda split: split.to(device))

    def first(self, count: int) -> Dataset:
        """The first `count` images of each split, or all where there are fewer."""
        return self._each(lambda split: split.first(count))

    def _each(self, change: Callable[[Split], Split]) -> Dataset:
        return replace(self, train=change(self.train), validation=change(self.validation), test=change(self.test))


@cache
def load(name: str, root: Path | None = None) -> Dataset:
    """Load `name`: ``noisy-digits`` (comes with scikit-learn), ``cifar10``, ``cifar100`` (fine labels), or one's own.

    CIFAR is read from `root`, by default ``$REPROLIB_DATA`` or ``data/``, and downloaded there if it is missing; for
    the user's own see `own_data`. One tenth of the training images, the same ones for every seed, is set aside for
    validation. Own images are shifted by up to an eighth of their side, as those of CIFAR are.

    Raises ValueError for an unknown name and for damaged files, FileNotFoundError if the data can't be had.
    """
    check(name)
    root = Path(root) if root else paths.data()
    if name == "noisy-digits":
        return _noisy_digits()
    if name not in NAMES:
        own = own_data.read(name, root)
        return _dataset(name, own.classes, *own.train, own.test, flip=own.flip, pad=own.train[0].shape[1] // 8)
    train_images, train_labels, test, classes = _read_cifar(name, root)
    return _dataset(name, classes, train_images, train_labels, test, flip=True, pad=4)


def check(name: str) -> None:
    """Raise ValueError, with the choice, for a name that no data set can have; nothing is read."""
    if name not in NAMES and not (isinstance(name, str) and own_data.is_named(name)):
        raise ValueError(
            f"unknown data set {name!r}: known are {', '.join(NAMES)}; your own are folder:PATH or module:function"
        )


def label(name: str) -> str:
    """The name without slashes and colons, as it stands in figures and in names of folders."""
    return name if name in NAMES else own_data.label(name)


def shape(name: str) -> tuple[int, int]:
    """How many classes a data set has, and the side of its images in pixels. Own data are read for it, no others."""
    if name in NAMES:
        return SHAPES[name]
    dataset = load(name)
    return len(dataset.classes), dataset.image_size


def _dataset(name, classes, images, labels, test, flip, pad) -> Dataset:
    chosen = np.random.default_rng(0).permutation(len(labels))
    held_out = len(labels) // 10
    validation, train = np.sort(chosen[:held_out]), np.sort(chosen[held_out:])
    mean, std = _channel_statistics(images[train])
    return Dataset(
        name=name,
        classes=tuple(classes),
        train=_split(images[train], labels[train]),
        validation=_split(images[validation], labels[validation]),
        test=_split(*test),
        mean=mean,
        std=std,
        flip=flip,
        pad=pad,
    )


def _channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in [0, 1], from its histogram: exact, and fast.

    A channel that never changes gets a deviation of one: normalised, it is zero.
    """
    levels = np.arange(256) / 255
    counts = [np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)]
    means = [float(np.average(levels, weights=count)) for count in counts]
    spreads = [np.average((levels - mean) ** 2, weights=count) for mean, count in zip(means, counts, strict=True)]
    return tuple(means), tuple(float(spread**0.5) or 1.0 for spread in spreads)


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(np.asarray(labels, dtype=np.int64)))


def _noisy_digits() -> Dataset:
    """1,797 scans of handwritten digits, 8x8 grey, resized to 32x32 RGB, in noisy copies; every fifth is a test scan.

    All copies of a scan lie in the same split. The noise never changes: equal bytes on every machine.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    grey = F.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False).round().to(torch.uint8)
    images = grey.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    is_test = np.arange(len(images)) % 5 == 4
    test = images[is_test], digits.target[is_test]
    names = [str(label) for label in digits.target_names]
    clean = _dataset("noisy-digits", names, images[~is_test], digits.target[~is_test], test, flip=False, pad=2)
    generator = np.random.default_rng(0)
    train = _noisy_copies(clean.train, COPIES, generator)
    validation = _noisy_copies(clean.validation, COPIES, generator)
    test = _noisy_copies(clean.test, TEST_COPIES, generator)
    mean, std = _channel_statistics(train.images.numpy())
    return replace(clean, train=train, validation=validation, test=test, mean=mean, std=std)


def _noisy_copies(split: Split, copies: int, generator: np.random.Generator) -> Split:
    """The split `copies` times in a row, each pixel with its own Gaussian noise, the same in all channels."""
    images = split.images.numpy()
    noise = generator.normal(0, NOISE, (copies, *images.shape[:3], 1))
    noisy = np.rint(images + noise).clip(0, 255).astype(np.uint8)
    return _split(noisy.reshape(-1, *images.shape[1:]), np.tile(split.labels.numpy(), copies))


def fetch(name: str, root: Path | None = None) -> None:
    """Get a data set that is not there yet, while a bar shows how far it is, and look its files through.

    Raises ValueError for damaged files, FileNotFoundError, with what can be done, if the data can't be had.
    """
    if name not in NAMES:
        load(name, root)
    elif name != "noisy-digits":
        _fetch_cifar(name, root or paths.data())


def _fetch_cifar(name: str, root: Path):
    """torchvision's class for a CIFAR data set whose files are in `root`, whole and undamaged."""
    from torchvision import datasets  # here: it takes a second, in every process that imports reprolib.training

    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = root / source.base_folder
    if not folder.exists():
        _download(source, root)
    meta = source.meta["filename"], source.meta["md5"]
    for filename, md5 in [*source.train_list, *source.test_list, meta]:
        path = folder / filename
        if not path.exists():
            raise ValueError(f"{name} is incomplete: {path} is missing; delete {folder} and get it again (make data)")
        if not datasets.utils.check_md5(path, md5):
            raise ValueError(f"{path} is damaged (md5 is not {md5}): delete {folder} and get it again (make data)")
    return source


def _read_cifar(name: str, root: Path):
    source = _fetch_cifar(name, root)
    train, test = source(root, train=True), source(root, train=False)
    found = len(train.classes), len(train.data), len(test.data)
    expected = SHAPES[name][0], 50_000, 10_000
    if found != expected:
        raise ValueError(
            f"{root / source.base_folder} holds (classes, training, test images) {found} where {name} has {expected}"
        )
    return train.data, np.array(train.targets), (test.data, np.array(test.targets)), train.classes


def _download(source, root: Path) -> None:
    """Unpack the archive, downloaded unless it lies there, beside its place: the data are there whole or not at all."""
    from torchvision.datasets import utils

    print(f"{source.base_folder} is not in {root} yet: getting it")
    patience_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECTION_S)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as beside:
            utils.download_and_extract_archive(
                source.url, root, extract_root=beside, filename=source.filename, md5=source.tgz_md5
            )
            (Path(beside) / source.base_folder).replace(root / source.base_folder)
    except Exception as error:
        raise FileNotFoundError(
            f"{source.base_folder} is not in {root}, and it could not be downloaded: {error}\n"
            "There are three ways to go on:\n"
            f"  * get {source.url} on another machine and put it into {root}\n"
            f"  * set REPROLIB_DATA to a folder that holds {source.filename} or {source.base_folder}\n"
            "  * choose PROFILE=quick, which needs no data"
        ) from None
    finally:
        socket.setdefaulttimeout(patience_s)


# --- Batches --------------------------------------------------------------------------------------------------------


def normalised(images: Tensor, dataset: Dataset) -> Tensor:
    """uint8 ``[B, S, S, 3]`` to float32 ``[B, 3, S, S]`` in channels-last layout, zero mean and unit variance."""
    shift, scale = _shift_and_scale(dataset.mean, dataset.std, images.device)
    return ((images - shift) / scale).permute(0, 3, 1, 2)


@cache
def _shift_and_scale(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """`mean` and `std` in units of a uint8, on the device once and for all: a captured step can't fetch them."""
    return torch.tensor(mean, device=device) * 255, torch.tensor(std, device=device) * 255


def draw_augmentations(count: int, dataset: Dataset, generator: torch.Generator) -> Tensor:
    """Random numbers for `augmented`, int64 ``[count, 3]``: shift down, shift right, whether to mirror."""
    shifts = torch.randint(0, 2 * dataset.pad + 1, (count, 2), generator=generator)
    mirrored = torch.randint(0, 2, (count, 1), generator=generator)
    return torch.cat([shifts, mirrored], dim=1)


def augmented(images: Tensor, draws: Tensor, dataset: Dataset) -> Tensor:
    """Shift each image by up to `dataset.pad` pixels (zeros come in) and mirror it, each by its own `draws`.

    uint8 ``[B, S, S, 3]`` in and out; `draws` as `draw_augmentations` makes them, on the device of the images.
    """
    pad, line = dataset.pad, torch.arange(images.shape[1], device=images.device)
    rows = draws[:, 0:1] + line
    cols = draws[:, 1:2] + (torch.where(draws[:, 2:3].bool(), line.flip(0), line) if dataset.flip else line)
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    each = torch.arange(len(images), device=images.device)
    return padded[each[:, None, None], rows[:, :, None], cols[:, None, :]]


def main() -> None:
    """Get the data sets, where they are missing, and look them through."""
    try:
        for name in NAMES:
            print(f"{name}: {len(load(name).train)} training images")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
