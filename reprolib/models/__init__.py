"""Networks, by name or one by one, and the weights in them that can be pruned.

model = build("resnet18", num_classes=10, width=0.25)
"""

from reprolib.models.layers import (
    describe_layers,
    foreign,
    is_finite,
    layer_flops,
    mode,
    named_modules,
    weight_in_place,
    weight_layers,
    weights,
    weights_in_place,
)
from reprolib.models.named import NAMES, build, check, label, title
from reprolib.models.resnet import resnet18, resnet20
from reprolib.models.vgg import vgg16

__all__ = [
    "NAMES",
    "build",
    "check",
    "describe_layers",
    "foreign",
    "is_finite",
    "label",
    "layer_flops",
    "mode",
    "named_modules",
    "resnet18",
    "resnet20",
    "title",
    "vgg16",
    "weight_in_place",
    "weight_layers",
    "weights",
    "weights_in_place",
]
