"""VGG-16 with batch normalisation, for small images."""

from torch import nn

# Configuration D of Simonyan & Zisserman (2015), output channels; "M" is a 2 x 2 max-pool.
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def vgg16(num_classes: int, width: float = 1.0, hidden: tuple[int, ...] = (), image_size: int = 32) -> nn.Sequential:
    """VGG-16-BN: 13 3x3 convolutions, each with batch norm and ReLU, five max-pools, then the classifier.

    Takes float images ``[N, 3, image_size, image_size]``, gives logits ``[N, num_classes]``. `width` scales all
    channels; `hidden` names the sizes of linear layers before the last one (the paper does not say: ``()``,
    ``(512, 512)`` and ``(4096, 4096)`` are in use). Raises ValueError for a width that leaves a layer without channels,
    and for an image that the five max-pools do not divide.
    """
    if not width * 64 >= 1:
        raise ValueError(f"width {width!r} leaves the first layer of VGG-16 without channels: use at least 1/64")
    if image_size < 1 or image_size % 32:
        raise ValueError(
            f"VGG-16 takes images whose side is a multiple of 32 pixels, not {image_size} x {image_size}: scale them "
            "(folder:PATH@64), or use a ResNet"
        )
    layers, channels = [], 3
    for entry in VGG16:
        if entry == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        out = round(entry * width)
        layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        channels = out
    layers.append(nn.Flatten())
    channels *= (image_size // 32) ** 2
    for size in hidden:
        layers += [nn.Linear(channels, size), nn.ReLU(inplace=True)]
        channels = size
    layers.append(nn.Linear(channels, num_classes))
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
