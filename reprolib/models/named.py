"""Networks by name, as experiments and profiles ask for them: the project's, and ``module:function`` of the user."""

from __future__ import annotations

import torch
from torch import nn

from reprolib.files import own_code
from reprolib.models import resnet
from reprolib.models.layers import mode
from reprolib.models.vgg import vgg16

TITLES = {"vgg16": "VGG-16", "resnet18": "ResNet-18", "resnet20": "ResNet-20"}
NAMES = tuple(TITLES)


def check(name: str, width: float = 1.0, hidden: tuple[int, ...] = ()) -> None:
    """Raise ValueError, with the choice, for what `build` does not know; without building anything."""
    own = isinstance(name, str) and own_code.is_named(name)
    if not own and name not in NAMES:
        raise ValueError(f"unknown model {name!r}: known are {', '.join(NAMES)}; write module:function for your own")
    if own and width != 1:
        raise ValueError(f"{name} is a function of your own, which decides its width: leave width 1, not {width:g}")
    if hidden and name != "vgg16":
        raise ValueError(f"hidden linear layers are for vgg16, not {name}: leave hidden empty, not {list(hidden)}")
    if name in resnet.FIRST:
        resnet.check_width(name, width)


def build(
    name: str, num_classes: int, width: float = 1.0, hidden: tuple[int, ...] = (), image_size: int = 32
) -> nn.Module:
    """A new network for float images ``[N, 3, image_size, image_size]`` that gives logits ``[N, num_classes]``.

    A function of the user's own is called with ``num_classes`` alone. Raises ValueError for what `check` refuses, and
    where that function returns something else.
    """
    check(name, width, hidden)
    match name:
        case "vgg16":
            return vgg16(num_classes, width, hidden, image_size)
        case "resnet18":
            return resnet.resnet18(num_classes, width)
        case "resnet20":
            return resnet.resnet20(num_classes, width)
    model = own_code.function(name)(num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} must return a torch.nn.Module, not {model!r}")
    with mode(model, training=False), torch.no_grad():
        logits = model(torch.zeros(2, 3, image_size, image_size))
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, num_classes):
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"{name} must return a network that gives logits of shape (2, {num_classes}) for 2 images of {image_size} "
            f"x {image_size} pixels: it gives {found}"
        )
    return model


def label(name: str, width: float) -> str:
    """Name and width as they stand in names of folders: ``vgg16x0.25``; ``nets-small`` for ``nets:small``."""
    return f"{name}x{width:g}" if name in NAMES else name.replace(":", "-")


def title(name: str, width: float) -> str:
    """Name and width as figures show them: ``VGG-16 ×0.25``; ``nets:small`` for one of the user's own."""
    return f"{TITLES[name]} ×{width:g}" if name in NAMES else name
