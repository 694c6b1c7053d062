"""Networks by name, as experiments and profiles ask for them: the project's, and ``module:function`` of the user."""

from __future__ import annotations

from torch import nn

from reprolib.models.resnet import resnet18, resnet20
from reprolib.models.vgg import vgg16

NAMES = ("vgg16", "resnet18", "resnet20")


def check(name: str, width: float, hidden: tuple[int, ...]) -> None:
    """Raise ValueError, with the choice, for what `build` does not know; without building anything."""
    if name not in NAMES:
        raise ValueError(f"unknown model {name!r}: known are {', '.join(NAMES)}")
    if hidden and name != "vgg16":
        raise ValueError(f"{name} has no hidden linear layers: leave hidden empty, not {list(hidden)}")
    if name == "resnet20" and not width * 16 >= 1:
        raise ValueError(f"width {width!r} leaves the first layer of {name} without channels: use at least 1/16")


def build(name: str, num_classes: int, width: float = 1.0, hidden: tuple[int, ...] = ()) -> nn.Module:
    """A new network for float images ``[N, 3, H, W]`` that gives logits ``[N, num_classes]``."""
    check(name, width, hidden)
    if name == "vgg16":
        return vgg16(num_classes, width, hidden)
    return {"resnet18": resnet18, "resnet20": resnet20}[name](num_classes, width)
