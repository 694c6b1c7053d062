"""VGG-16 with batch normalisation for 32 x 32 images."""

from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Configuration D of Simonyan & Zisserman (2015), output channels; "M" is a 2 x 2 max-pool.
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")

OTHER_CONVOLUTIONS = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def vgg16(num_classes: int, width: float = 1.0, hidden: tuple[int, ...] = ()) -> nn.Sequential:
    """VGG-16-BN: 13 3x3 convolutions, each with batch norm and ReLU, five max-pools, then the classifier.

    Takes float images ``[N, 3, 32, 32]``, gives logits ``[N, num_classes]``. `width` scales all channels; `hidden`
    names the sizes of linear layers before the last one (the paper does not say: ``()``, ``(512, 512)`` and
    ``(4096, 4096)`` are in use). Raises ValueError for a width that leaves a layer without channels.
    """
    if not width * 64 >= 1:
        raise ValueError(f"width {width!r} leaves the first layer of VGG-16 without channels: use at least 1/64")
    layers, channels = [], 3
    for entry in VGG16:
        if entry == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        out = round(entry * width)
        layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        channels = out
    layers.append(nn.Flatten())
    for size in hidden:
        layers += [nn.Linear(channels, size), nn.ReLU(inplace=True)]
        channels = size
    layers.append(nn.Linear(channels, num_classes))
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all convolutions and linear layers, by module name, in the order of the network.

    Raises ValueError for a layer whose weight can't be pruned in place, and names the remedy: one that is computed anew
    at each forward pass, one that two layers share, and the weight of a convolution that is not two-dimensional.
    """
    named = {}
    for name, module in model.named_modules():
        if isinstance(module, OTHER_CONVOLUTIONS):
            raise ValueError(
                f"layer {name} is a {type(module).__name__}, which patterns can't prune: they take Conv2d and Linear "
                "layers; give `make_masks` the weights that you want to prune by name"
            )
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        if "weight" not in module._parameters:
            raise ValueError(
                f"the weight of layer {name} is computed anew at each forward pass, so masks on it would be lost: "
                "make it a plain parameter first, with torch.nn.utils.parametrize.remove_parametrizations, "
                "remove_weight_norm, remove_spectral_norm or prune.remove of torch.nn.utils"
            )
        twin = next((other for other, weight in named.items() if weight is module.weight), None)
        if twin is not None:
            raise ValueError(
                f"layers {twin} and {name} share one weight, and a mask holds for one layer: "
                f"give {name} its own, as in layer.weight = nn.Parameter(layer.weight.detach().clone())"
            )
        named[name] = module.weight
    return named


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """In this context all modules are in training mode, or in eval mode; behind it, each is in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training


def layer_flops(model: nn.Module, image_shape: tuple[int, int, int] = (3, 32, 32)) -> dict[str, int]:
    """FLOPs (2 per multiply-add) of each dense layer that has any, for one image, by module name.

    A layer that runs twice counts twice. Only products count: convolutions, transposed ones too, and matrix products.
    """
    with mode(model, training=False), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *image_shape, device=next(model.parameters()).device))
    root, counts = type(model).__name__, counter.get_flop_counts()
    total = {name: sum(counts.get(f"{root}.{name}", {}).values()) for name, _ in model.named_modules()}
    own = {
        name: flops - sum(total.get(f"{name}.{child}", 0) for child, _ in module.named_children())
        for (name, module), flops in zip(model.named_modules(), total.values(), strict=True)
        if name
    }
    return {name: flops for name, flops in own.items() if flops}


def describe_layers(model: nn.Module) -> pd.DataFrame:
    """One row per convolution and linear layer: weight shape, count of weights, FLOPs for one image."""
    named, flops = weights(model), layer_flops(model)
    return pd.DataFrame(
        {
            "shape": {name: "×".join(map(str, weight.shape)) for name, weight in named.items()},
            "weights": {name: weight.numel() for name, weight in named.items()},
            "FLOPs": {name: flops[name] for name in named},
        }
    ).rename_axis("layer")
