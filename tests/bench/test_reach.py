from dataclasses import replace

from reprolib.bench import reach
from reprolib.experiments import profiles
from reprolib.training import data


def test_vgg16_is_timed_and_nothing_else(monkeypatch):
    laptop = profiles.load("laptop")
    sizes = {"folder:pets": (2, 32), "folder:pets@64": (2, 64)}
    shape = data.shape
    monkeypatch.setattr(data, "shape", lambda name: sizes.get(name) or shape(name))
    assert reach.why_untimed(laptop) == reach.why_untimed(replace(laptop, datasets=["cifar10", "folder:pets"])) == ""
    assert reach.why_untimed(profiles.load("resnet")) == "only VGG-16 is timed, not resnet18"
    large = replace(laptop, datasets=["cifar10", "folder:pets@64"])
    assert reach.why_untimed(large).endswith("of 32 x 32 pixels is timed, and those of folder:pets@64 have 64 x 64")
