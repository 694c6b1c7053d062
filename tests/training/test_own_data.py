"""Images of the user's own are read as they are, or refused with the file, the reason and the remedy."""

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from reprolib.training import data, own_data


def picture(value=0, size=(32, 32)):
    """An image of one colour, (width, height) as PIL says it."""
    return Image.new("RGB", size, (value, 0, 0))


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """A folder of two classes: of each 10 images for training and 2 for the test, 32 x 32 pixels."""
    monkeypatch.setenv("REPROLIB_DATA", str(tmp_path))
    monkeypatch.setattr(data, "load", data.load.__wrapped__)
    for part, count in (("train", 10), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for number in range(count):
                value = 10 * number + 100 * (name == "dog") + 5 * (part == "test")
                picture(value).save(tmp_path / "pets" / part / name / f"{number}.png")
    return tmp_path / "pets"


def test_a_folder_is_split_and_labelled_by_its_classes(pets):
    (pets / "train" / "cat" / "notes.txt").write_text("no image")
    (pets / "train" / ".cache").mkdir()
    loaded = data.load("folder:pets")
    assert loaded.classes == ("cat", "dog") and not loaded.flip and loaded.pad == 4
    assert [len(split) for split in (loaded.train, loaded.validation, loaded.test)] == [18, 2, 4]
    assert loaded.test.images.shape == (4, 32, 32, 3) and loaded.test.images.dtype == torch.uint8
    assert loaded.test.labels.tolist() == [0, 0, 1, 1]
    assert loaded.test.images[:, 0, 0, 0].tolist() == [5, 15, 105, 115]
    for split in (loaded.train, loaded.validation):
        assert torch.equal(split.labels, (split.images[:, 0, 0, 0] >= 100).long())
    assert data.shape("folder:pets") == (2, 32)
    assert loaded.std[0] > 0 and loaded.std[1:] == (1.0, 1.0), "two channels are black in all images"
    assert data.normalised(loaded.test.images, loaded)[:, 1:].eq(0).all()


def test_a_mirrored_image_shows_its_class_where_the_user_says_so(pets):
    assert data.load("folder:pets+flip").flip and data.load("folder:pets@16+flip").flip


def test_a_path_may_be_absolute(pets):
    assert len(data.load(f"folder:{pets}").test) == 4


def test_grey_palette_and_turned_images_become_upright_rgb(pets):
    Image.new("L", (32, 32), 7).save(pets / "test" / "cat" / "0.png")
    picture(9).convert("P", palette=Image.Palette.ADAPTIVE).save(pets / "test" / "cat" / "1.png")
    turned = Image.new("RGB", (32, 32))
    turned.putpixel((0, 31), (200, 0, 0))  # lower left; upper left when turned by a quarter to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(pets / "test" / "dog" / "0.png", exif=exif)
    test = data.load("folder:pets").test.images
    assert test[0, 0, 0].tolist() == [7, 7, 7]
    assert test[1, 0, 0].tolist() == [9, 0, 0]
    assert test[2, 0, 0].tolist() == [200, 0, 0] and test[2].sum() == 200


def test_images_of_several_sizes_are_scaled_and_cropped_around_their_middle(pets):
    wide = Image.new("RGB", (48, 16), (255, 0, 0))
    wide.paste((0, 255, 0), (16, 0, 32, 16))  # the middle square is green
    wide.save(pets / "test" / "cat" / "0.png")
    loaded = data.load("folder:pets@16")
    assert loaded.image_size == 16 and loaded.pad == 2
    assert loaded.test.images[0].reshape(-1, 3).unique(dim=0).tolist() == [[0, 255, 0]]


@pytest.mark.parametrize("file", [b"no image", None], ids=["not an image", "cut short"])
def test_damaged_image_is_named(pets, file):
    path = pets / "train" / "dog" / "3.png"
    path.write_bytes(path.read_bytes()[:60] if file is None else file)
    with pytest.raises(ValueError, match=f"{path} cannot be read as an image .* repair or remove it"):
        data.load("folder:pets")


def harm(folder, what):
    match what:
        case "other size":
            picture(size=(40, 40)).save(folder / "test" / "cat" / "1.png")
        case "not square":
            for path in folder.rglob("*.png"):
                picture(size=(40, 32)).save(path)
        case "empty class":
            (folder / "train" / "bird").mkdir()
        case "strange class":
            (folder / "test" / "bird").mkdir()
        case "one class":
            for part in ("train", "test"):
                (folder / part / "dog").rename(folder.parent / part)
        case "few images":
            for path in folder.glob("train/*/[1-9].png"):
                path.unlink()
        case "no test":
            for path in folder.glob("test/*/*"):
                path.unlink()
        case "no classes":
            (folder / "train").rename(folder / "old")
            (folder / "train").mkdir()
        case "deep":
            Image.new("I;16", (32, 32)).save(folder / "train" / "cat" / "0.png")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("other size", "cat/1.png has 40 x 40 pixels and .*train/cat/0.png 32 x 32: folder:pets@64 scales and crops"),
        ("not square", "has 40 x 32 pixels, and images must be square: folder:pets@64 scales and crops all"),
        ("empty class", "train/bird holds no images"),
        ("strange class", "test/bird is a class without a folder in .*train"),
        ("one class", "has one class, cat"),
        ("few images", "has 2 training images: 10 are the least"),
        ("no test", "has 0 test images: 1 are the least"),
        ("no classes", "train holds no folders: make one for each class"),
        ("deep", "cat/0.png has more than 8 bits per channel"),
    ],
)
def test_what_is_no_data_set_is_refused(pets, what, message):
    harm(pets, what)
    with pytest.raises(ValueError, match=message):
        data.load("folder:pets")


def test_missing_folder_says_where_it_was_looked_for(pets):
    message = f"no folder {pets.parent}/petz/train: .* a relative folder starts at {pets.parent} "
    with pytest.raises(FileNotFoundError, match=message):
        data.fetch("folder:petz")


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("cifar10", "cifar10"),
        ("folder:pets", "pets"),
        ("folder:~/my animals/pets/@64+flip", "pets-64-flip"),
        ("folder:my pets: 2@64", "my-pets-2-64"),
        ("folder:..", "folder"),
        ("mine.data:pets+flip", "mine.data-pets-flip"),
    ],
)
def test_names_have_labels_that_a_folder_may_bear(name, label):
    data.check(name)
    assert data.label(name) == label


@pytest.mark.parametrize("name", ["", "mnist", "folder:", ":pets", "a b:pets", "mine:", 7, "cifar10+flip"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=r"unknown data set .* your own are folder:PATH or module:function"):
        data.check(name)


# --- Functions --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Calls `load` on what a function of the user's own returns."""
    module = type(sys)("pets_of_mine")
    monkeypatch.setitem(sys.modules, "pets_of_mine", module)
    module.__file__ = "pets_of_mine.py"

    def load(value):
        module.pets = lambda: value
        return data.load.__wrapped__("pets_of_mine:pets")

    return load


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
FORMS = {
    "array": np.stack([GREY] * 3, axis=2),
    "grey array": GREY,
    "grey array with a channel": GREY[:, :, None],
    "tensor": torch.from_numpy(np.stack([GREY] * 3)),
    "grey tensor": torch.from_numpy(GREY),
    "image": Image.fromarray(GREY).convert("RGB"),
    "grey image": Image.fromarray(GREY),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_function_may_give_images_in_many_forms(form, mine):
    pairs = [(FORMS[form], label) for label in [np.int64(0), torch.tensor(1), 2, 0, 1, 2, 0, 1, 2, 2]]
    loaded = mine((pairs, pairs[:3]))
    assert loaded.classes == ("0", "1", "2") and loaded.test.labels.tolist() == [0, 1, 2]
    assert np.array_equal(loaded.test.images.numpy(), np.stack([np.stack([GREY] * 3, axis=2)] * 3))


def test_names_of_classes_are_those_of_the_data_set(mine):
    class Named(list):
        classes = ("cat", "dog", "bird")

    assert mine((Named([(GREY, 0), (GREY, 1)] * 5), [(GREY, 2)])).classes == ("cat", "dog", "bird")


PAIRS = [(GREY, 0), (GREY, 1)] * 5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (PAIRS, r"must return two data sets, \(train, test\), not list"),
        ((PAIRS, [(GREY.astype(np.float32), 0)]), "test image 0 of .* is float32: give PIL images, or bytes"),
        ((PAIRS, [(torch.zeros(3, 8, 8), 0)]), "is float32: .* without transforms"),
        ((PAIRS, [("cat.png", 0)]), "is str: give PIL images"),
        ((PAIRS, [(np.zeros((3, 8, 8), np.uint8), 0)]), r"has shape \(3, 8, 8\) as \[H, W, C\]"),
        ((PAIRS, [(GREY, 0.5)]), "test image 0 of .* has label 0.5: a label is a whole number"),
        ((PAIRS, [(GREY, 2)]), "test image 0 of .* has label 2: 2 classes are numbered from 0"),
        ((PAIRS, [(GREY, -1)]), "has label -1"),
        ((PAIRS, [GREY]), r"test image 0 of .* must be a pair \(image, label\)"),
        ((PAIRS, [(GREY[:4, :4], 0)]), "has 4 x 4 pixels and training image 0 .* 8 x 8: scale and crop them in your"),
    ],
)
def test_what_a_function_may_not_give_is_refused(value, message, mine):
    with pytest.raises(ValueError, match=message):
        mine(value)


def test_reading_is_kept(pets, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("REPROLIB_DATA", str(pets.parent))
    assert data.load(f"folder:{pets}") is data.load(f"folder:{pets}")
    assert re.fullmatch(r"[\w.-]+", own_data.label(f"folder:{pets}"))
