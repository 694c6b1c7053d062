"""Data sets of the user's own: a folder of images, or a function that returns two data sets.

``folder:pets``          images of one size, square, in ``pets/train/<class>/`` and ``pets/test/<class>/``
``folder:pets@64``       images of any size, scaled and cropped to 64 x 64 pixels
``mydata:pets``          ``pets()`` in ``mydata.py`` returns (train, test), each with ``len`` and pairs (image, label)
``folder:pets@64+flip``  a mirrored image still shows its class
"""

from __future__ import annotations

import operator
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from reprolib.files import own_code, paths

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
FLIP = "+flip"
FOLDER = re.compile(r"folder:(?P<path>.+?)(@(?P<size>[1-9]\d*))?")
FEWEST = 10  # training images: one of them is held out


class OwnData(NamedTuple):
    """Images uint8 ``[N, S, S, 3]`` with labels int64 ``[N]``, and whether a mirrored image still shows its class."""

    classes: tuple[str, ...]
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    flip: bool


class _Example(NamedTuple):
    image: np.ndarray  # uint8 [H, W, 3]
    label: int
    where: str  # it was found, for messages


def is_named(name: str) -> bool:
    """Whether a name has one of the forms above; nothing is read."""
    plain = name.removesuffix(FLIP)
    return bool(FOLDER.fullmatch(plain)) or own_code.is_named(plain)


def label(name: str) -> str:
    """A short form for figures and names of folders: ``pets-64`` for ``folder:animals/pets@64``."""
    plain = name.removesuffix(FLIP)
    found = FOLDER.fullmatch(plain)
    parts = [Path(found["path"]).name, found["size"]] if found else [plain]
    parts += ["flip"] if plain != name else []
    return re.sub(r"[^\w.]+", "-", "-".join(filter(None, parts))).strip("-.") or "folder"


def read(name: str, root: Path) -> OwnData:
    """Read all images; a relative folder starts at `root`.

    Raises ValueError, which names the file or the image, for what is no data set of square images of one size, and
    FileNotFoundError for folders that are not there.
    """
    plain = name.removesuffix(FLIP)
    found = FOLDER.fullmatch(plain)
    if found:
        size = int(found["size"]) if found["size"] else None
        classes, train, test = _from_folder(root / Path(found["path"]).expanduser(), size)
        remedy = f"{plain}@64 scales and crops all images to 64 x 64"
    else:
        classes, train, test = _from_function(plain)
        remedy = "scale and crop them in your function"
    if len(classes) < 2:
        raise ValueError(f"{name} has one class, {classes[0]}: there is nothing to tell apart")
    for what, examples, least in (("training", train, FEWEST), ("test", test, 1)):
        if len(examples) < least:
            raise ValueError(f"{name} has {len(examples)} {what} images: {least} are the least")
    _check_sizes([*train, *test], remedy)
    arrays = [(np.stack([e.image for e in split]), np.array([e.label for e in split])) for split in (train, test)]
    return OwnData(tuple(classes), *arrays, flip=plain != name)


def _check_sizes(examples: list[_Example], remedy: str) -> None:
    first = examples[0]
    for each in examples:
        height, width, _ = each.image.shape
        if each.image.shape != first.image.shape:
            other = f"{first.image.shape[1]} x {first.image.shape[0]}"
            raise ValueError(f"{each.where} has {width} x {height} pixels and {first.where} {other}: {remedy}")
        if height != width:
            raise ValueError(f"{each.where} has {width} x {height} pixels, and images must be square: {remedy}")


# --- A folder of images ---------------------------------------------------------------------------------------------


def _from_folder(folder: Path, size: int | None) -> tuple[list[str], list[_Example], list[_Example]]:
    for part in (folder / "train", folder / "test"):
        if not part.is_dir():
            raise FileNotFoundError(
                f"there is no folder {part}: images lie in train/<class>/ and test/<class>/ of {folder}; a relative "
                f"folder starts at {paths.data()} ($REPROLIB_DATA)"
            )
    classes = _subfolders(folder / "train")
    if not classes:
        raise ValueError(f"{folder / 'train'} holds no folders: make one for each class")
    if strange := [name for name in _subfolders(folder / "test") if name not in classes]:
        raise ValueError(f"{folder / 'test' / strange[0]} is a class without a folder in {folder / 'train'}")
    train, test = (
        [
            _Example(_image(path, size), number, str(path))
            for number, name in enumerate(classes)
            for path in sorted((folder / part / name).glob("[!.]*"))
            if path.suffix.lower() in SUFFIXES
        ]
        for part in ("train", "test")
    )
    if empty := set(range(len(classes))) - {example.label for example in train}:
        raise ValueError(f"{folder / 'train' / classes[min(empty)]} holds no images ({', '.join(sorted(SUFFIXES))})")
    return classes, train, test


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())


def _image(path: Path, size: int | None) -> np.ndarray:
    """An image file as uint8 ``[H, W, 3]``, upright; with a `size`, scaled to it and cropped around its middle."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            return _rgb(image if size is None else ImageOps.fit(image.convert(_mode(image)), (size, size)), str(path))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): repair or remove it") from None


def _mode(image: Image.Image) -> str:
    """Of what scaling takes: colours of a palette can't be averaged by their numbers."""
    return image.mode if image.mode.startswith(("I", "F")) else "RGB"


# --- A function that returns two data sets ----------------------------------------------------------------------------


def _from_function(name: str) -> tuple[list[str], list[_Example], list[_Example]]:
    pair = own_code.function(name)()
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"{name} must return two data sets, (train, test), not {type(pair).__name__}")
    train, test = (
        [_example(split, index, f"{part} image {index} of {name}") for index in range(len(split))]
        for part, split in zip(("training", "test"), pair, strict=True)
    )
    count = 1 + max((example.label for example in train), default=0)
    classes = [str(each) for each in getattr(pair[0], "classes", range(count))]
    for example in [*train, *test]:
        if not 0 <= example.label < len(classes):
            raise ValueError(f"{example.where} has label {example.label}: {len(classes)} classes are numbered from 0")
    return classes, train, test


def _example(split, index: int, where: str) -> _Example:
    try:
        image, number = split[index]
    except (TypeError, ValueError):
        raise ValueError(f"{where} must be a pair (image, label), not {split[index]!r}") from None
    try:
        return _Example(_rgb(image, where), operator.index(number), where)
    except TypeError:
        raise ValueError(f"{where} has label {number!r}: a label is a whole number") from None


def _rgb(image: object, where: str) -> np.ndarray:
    """uint8 ``[H, W, 3]`` of a PIL image, of an array ``[H, W]`` or ``[H, W, C]``, or of a tensor ``[C, H, W]``."""
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"{where} has more than 8 bits per channel (mode {image.mode}): save it with 8")
        image = np.array(image.convert("RGB"))
    elif isinstance(image, Tensor):
        image = image.permute(1, 2, 0).numpy() if image.dim() == 3 else image.numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        found = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(
            f"{where} is {found}: give PIL images, or bytes (uint8, 0 to 255) as an array [H, W, 3] or a tensor "
            "[3, H, W], without transforms"
        )
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"{where} has shape {image.shape} as [H, W, C]: an image has 1 or 3 channels")
    return np.broadcast_to(image, (*image.shape[:2], 3))
