"""Residual networks for small images (He et al., CVPR 2016): a 3x3 convolution first, and no pool behind it."""

from torch import Tensor, nn

FIRST = {"resnet18": 64, "resnet20": 16}  # channels of the first layer
# In torch 2.14, the gradient of a 1x1 convolution with a stride writes beyond its memory where the input has fewer
# channels than a vector has numbers (issue 6035 of oneDNN): 8 on AVX2, where it was seen, and 16 on AVX-512.
FEWEST = 16


def resnet18(num_classes: int, width: float = 1.0) -> nn.Sequential:
    """ResNet-18: four stages of two blocks with 64, 128, 256 and 512 channels, scaled by `width`.

    Takes float images ``[N, 3, H, W]`` of any size, gives logits ``[N, num_classes]``. The paper's network for
    ImageNet, but for its first layers: a 7x7 convolution and a max-pool would leave little of a 32 x 32 image. Raises
    ValueError for a width that leaves the first layer fewer than 16 channels.
    """
    check_width("resnet18", width)
    return _resnet(num_classes, (64, 128, 256, 512), 2, width)


def resnet20(num_classes: int, width: float = 1.0) -> nn.Sequential:
    """ResNet-20, the paper's smallest for CIFAR: three stages of three blocks with 16, 32 and 64 channels.

    Images, logits, `width` and errors as for `resnet18`. Where a stage begins, the shortcut is a 1x1 convolution
    (option B of the paper), as in ResNet-18. For CIFAR the paper fills up with zeros instead (option A): 2,752
    parameters fewer, and none in shortcuts that patterns could be tried on.
    """
    check_width("resnet20", width)
    return _resnet(num_classes, (16, 32, 64), 3, width)


def check_width(name: str, width: float) -> None:
    """Raise ValueError for a width that leaves the first layer of the network `name` fewer than `FEWEST` channels."""
    if not width * FIRST[name] >= FEWEST:
        raise ValueError(
            f"width {width!r} leaves the first layer of {name} fewer than {FEWEST} channels, with which torch may "
            f"crash on a CPU: use at least {FEWEST / FIRST[name]:g}"
        )


def _resnet(num_classes: int, stages: tuple[int, ...], blocks: int, width: float) -> nn.Sequential:
    channels = round(stages[0] * width)
    layers = [*_convolution(3, channels, 3), nn.ReLU(inplace=True)]
    for stage in stages:
        out = round(stage * width)
        for index in range(blocks):
            layers.append(Block(channels, out, stride=2 if index == 0 and stage != stages[0] else 1))
            channels = out
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _convolution(c_in: int, c_out: int, size: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(c_out)]


class Block(nn.Module):
    """Two 3x3 convolutions whose result is added to what came in: ``relu(main(x) + shortcut(x))``.

    The shortcut is the identity, or a 1x1 convolution where stride or channels change the shape.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1):
        super().__init__()
        same = c_in == c_out and stride == 1
        self.main = nn.Sequential(
            *_convolution(c_in, c_out, 3, stride), nn.ReLU(inplace=True), *_convolution(c_out, c_out, 3)
        )
        self.shortcut = nn.Identity() if same else nn.Sequential(*_convolution(c_in, c_out, 1, stride))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + self.shortcut(x))
