"""The networks have the layers, sizes and costs of the papers, counted by hand."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from reprolib import models
from reprolib.models import describe_layers, layer_flops, mode, resnet18, resnet20, vgg16, weights
from reprolib.models.resnet import Block


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        # Convolutions (9 * C_in * C_out each) + batch norm (2 per channel) + classifier.
        ({"num_classes": 10}, 14_710_464 + 8_448 + 5_130),
        ({"num_classes": 100}, 14_710_464 + 8_448 + 51_300),
        ({"num_classes": 10, "hidden": (512, 512)}, 14_710_464 + 8_448 + 2 * 262_656 + 5_130),
        ({"num_classes": 10, "width": 0.25}, 919_728 + 2_112 + 1_290),
    ],
    ids=["full", "cifar100", "two-hidden-layers", "quarter-width"],
)
def test_number_of_parameters(options, parameters):
    with torch.device("meta"):
        model = vgg16(**options)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("width", "channels"),
    [
        (1.0, [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]),
        (0.25, [16, 16, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128, 128]),
        (1 / 64, [1, 1, 2, 2, 4, 4, 4, 8, 8, 8, 8, 8, 8]),
    ],
)
def test_thirteen_convolutions_whose_channels_scale_with_the_width(width, channels):
    with torch.device("meta"):
        model = vgg16(10, width)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [conv.out_channels for conv in convolutions] == channels
    assert [conv.in_channels for conv in convolutions] == [3, *channels[:-1]]


def test_convolutions_start_with_the_variance_that_relu_asks_for():
    torch.manual_seed(0)
    conv = list(weights(vgg16(10, 0.25)).values())[7]  # from 64 to 128 channels
    assert conv.shape == (128, 64, 3, 3)
    assert conv.var().item() == pytest.approx(2 / (9 * 128), rel=0.03)  # He et al., 2015, by the outputs


def test_logits_have_one_column_per_class():
    assert vgg16(100, 1 / 16, hidden=(8,))(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize("width", [1 / 65, 0, -1])
def test_width_that_leaves_no_channels_is_refused(width):
    with pytest.raises(ValueError, match=f"width {width} leaves the first layer .* use at least 1/64"):
        vgg16(10, width)


def test_weights_are_those_of_convolutions_and_linear_layers_in_order():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Flatten(), nn.Linear(16, 2)))
    named = weights(model)
    assert list(named) == ["0", "2.1"]
    assert named["0"] is model[0].weight and named["2.1"] is model[2][1].weight


@pytest.mark.parametrize(
    "reparametrize",
    [
        weight_norm,
        spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3), nn.Linear(4, 4)], ids=["conv", "linear"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_that_is_computed_at_each_forward_pass_is_refused(layer, reparametrize):
    model = nn.Sequential(nn.Linear(4, 4), reparametrize(copy.deepcopy(layer)))
    with pytest.raises(ValueError, match=r"weight of layer 1 is computed anew .* would be lost: .*remove_param"):
        weights(model)


TIES = {
    "the same parameter": lambda a, b: setattr(b, "weight", a.weight),
    "the same memory": lambda a, b: setattr(b, "weight", nn.Parameter(a.weight.detach())),
    "transposed": lambda a, b: setattr(b, "weight", nn.Parameter(a.weight.detach().t())),
}


@pytest.mark.parametrize("tie", TIES.values(), ids=TIES)
@pytest.mark.parametrize("first", [nn.Linear(4, 4), nn.Embedding(4, 4)], ids=["linear", "embedding"])
def test_weight_that_shares_its_memory_is_refused(first, tie):
    model = nn.Sequential(copy.deepcopy(first), nn.ReLU(), nn.Linear(4, 4))
    tie(model[0], model[2])
    with pytest.raises(ValueError, match=r"weight of layer . shares its memory \(0.weight, 2.weight\)"):
        weights(model)


def test_forward_of_its_own_is_refused():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    with pytest.raises(ValueError, match="layer 0 is a Standardised with a forward of its own"):
        weights(nn.Sequential(Standardised(3, 4, 3)))


def test_layer_that_stands_in_two_places_counts_once():
    layer = nn.Linear(4, 4)
    assert list(weights(nn.Sequential(layer, nn.ReLU(), layer))) == ["0"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 4, 3),
        nn.Conv3d(4, 4, 3),
        nn.ConvTranspose1d(4, 4, 3),
        nn.ConvTranspose2d(4, 4, 3),
        nn.MultiheadAttention(4, 2),
        nn.LSTM(4, 4),
        nn.GRUCell(4, 4),
        nn.Bilinear(4, 4, 4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layer_that_patterns_cannot_prune_is_not_passed_over_in_silence(layer):
    with pytest.raises(ValueError, match=f"layer 0 is a {type(layer).__name__}, which patterns can't prune"):
        weights(nn.Sequential(layer, nn.Linear(4, 4)))


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_names_are_those_without_the_wrappers(wrap):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), nn.Linear(4 * 30 * 30, 2))
    plain = describe_layers(model)
    assert list(weights(wrap(model))) == list(plain.index) == ["0.0", "1"]
    assert describe_layers(wrap(model)).equals(plain)
    model[1] = torch.compile(model[1], backend="eager")
    assert list(weights(wrap(model))) == ["0.0", "1"]


class Twice(nn.Module):
    """Runs one convolution twice, a transposed one once, and multiplies by a matrix of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.up = nn.ConvTranspose2d(3, 2, 2, stride=2)
        self.matrix = nn.Parameter(torch.ones(8, 5))

    def forward(self, x):
        return self.up(self.conv(self.conv(x))) @ self.matrix


def test_flops_count_every_call_and_every_kind_of_layer():
    flops = layer_flops(nn.Sequential(Twice(), nn.Flatten(), nn.Linear(80, 2)), (3, 4, 4))
    assert flops == {
        "0": 2 * (2 * 8) * 8 * 5,  # two channels of 8 rows, times the matrix
        "0.conv": 2 * 2 * 16 * 3 * 27,
        "0.up": 2 * 16 * 3 * 2 * 4,  # each of 16 places writes 2 channels of 2 x 2
        "2": 2 * 80 * 2,
    }


class Around(nn.Module):
    """Runs a part of a module that it shares with others, then all of it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(self.inner[0](x))


def test_flops_of_shared_modules_are_those_of_the_module_and_add_up():
    shared = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False))
    assert layer_flops(nn.Sequential(Around(shared), Around(shared)), (3, 2, 2)) == {"0.inner.0": 4 * 2 * 4 * 9}


def test_flops_in_any_type_and_without_parameters():
    assert layer_flops(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double(), (3, 2, 2)) == {"1": 48}
    assert layer_flops(nn.Sequential(nn.Flatten(), nn.ReLU()), (3, 2, 2)) == {}


@pytest.mark.parametrize("layer", [nn.LSTM(2, 4), nn.TransformerEncoderLayer(2, 1, 4)])
def test_layer_whose_flops_nobody_counts_is_named(layer):
    with pytest.raises(ValueError, match=r"FLOPs of layer 0.*, an? .*can't be counted"):
        layer_flops(nn.Sequential(layer), (3, 2, 2))


def test_frozen_parts_keep_their_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    model[1].eval()
    with mode(model, training=False):
        assert not any(module.training for module in model.modules())
    layer_flops(model, (3, 2, 2))
    assert [module.training for module in model.modules()] == [True, True, False]


def test_flops_of_a_convolution_and_a_linear_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, 10))
    # 2 per multiply-add: 8x8 places, 4 filters of 3x3x3; then 256 x 10.
    assert layer_flops(model, (3, 16, 16)) == {"0": 2 * 64 * 4 * 27, "3": 2 * 256 * 10}


def test_flops_of_vgg16():
    flops = layer_flops(vgg16(10))
    assert len(flops) == 14
    assert sum(flops.values()) == 2 * 313_201_664


@pytest.mark.parametrize("training", [True, False])
def test_measuring_flops_leaves_the_model_as_it_was(training):
    model = vgg16(10, 1 / 16).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer_flops(model)
    assert all(module.training == training and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_description_has_a_row_per_layer_that_holds_weights():
    table = describe_layers(nn.Sequential(nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.Flatten(), nn.Linear(256, 2)))
    assert table.reset_index().to_dict("records") == [
        {"layer": "0", "shape": "4×3×3×3", "weights": 108, "FLOPs": 2 * 64 * 108},
        {"layer": "2", "shape": "2×256", "weights": 512, "FLOPs": 2 * 512},
    ]


# --- Residual networks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        # First convolution, the stages, the shortcuts; batch norm (2 per channel), classifier.
        (resnet20, 432 + 13_824 + 50_688 + 202_752 + 2_560 + 2 * (7 * 16 + 7 * 32 + 7 * 64) + 650),
        (
            resnet18,
            1_728 + 147_456 + 516_096 + 2_064_384 + 8_257_536 + 172_032 + 2 * (320 + 640 + 1_280 + 2_560) + 5_130,
        ),
    ],
)
def test_number_of_parameters_of_a_resnet(build, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in build(10).parameters()) == parameters


def test_layers_of_resnet20():
    """The first and the last layer stay dense, so order matters: what a block adds stands behind its convolutions."""
    shapes = [tuple(weight.shape) for weight in weights(resnet20(7)).values()]
    stage = [(32, 16, 3, 3), (32, 32, 3, 3), (32, 16, 1, 1), *[(32, 32, 3, 3)] * 4]
    assert shapes[:14] == [(16, 3, 3, 3), *[(16, 16, 3, 3)] * 6, *stage]
    assert shapes[-1] == (7, 64) and len(shapes) == 20 + 2


def test_a_block_adds_what_came_in():
    block = Block(16, 16).eval()
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(block(x), (block.main(x) + x).relu())
    nn.init.zeros_(block.main[3].weight)
    assert torch.equal(block(x), x.relu())
    wider = Block(16, 32, stride=2).eval()
    assert wider(x).shape == (2, 32, 3, 3)
    nn.init.zeros_(wider.main[3].weight)
    one_by_one = torch.einsum("oc,nchw->nohw", wider.shortcut[0].weight[:, :, 0, 0], x[:, :, ::2, ::2])
    torch.testing.assert_close(wider(x), (one_by_one / (1 + 1e-5) ** 0.5).relu())


def test_flops_of_a_resnet():
    # resnet20, 32 x 32, multiply-adds: 3x3 convolutions of each stage, the first of a stage from half the channels; the
    # shortcuts; the classifier.
    first, stages = 27 * 16 * 32**2, 9 * (6 * 16**2 * 32**2 + 5.5 * 32**2 * 16**2 + 5.5 * 64**2 * 8**2)
    shortcuts = 16 * 32 * 16**2 + 32 * 64 * 8**2
    assert sum(layer_flops(resnet20(10)).values()) == 2 * (first + stages + shortcuts + 640)


@pytest.mark.parametrize(("name", "size"), [("vgg16", 64), ("resnet18", 40), ("resnet20", 9)])
def test_networks_take_other_sizes_of_images_and_can_be_traced(name, size):
    model = models.build(name, 3, width=1 if name == "resnet20" else 0.25, image_size=size).eval()
    images = torch.randn(2, 3, size, size)
    logits = model(images)
    assert logits.shape == (2, 3)
    assert torch.equal(torch.fx.symbolic_trace(model)(images), logits)


@pytest.mark.parametrize("size", [0, 24, 33])
def test_vgg16_refuses_images_that_its_pools_do_not_divide(size):
    with pytest.raises(ValueError, match=f"multiple of 32 pixels, not {size} x {size}: scale them .* or use a ResNet"):
        vgg16(10, 0.25, image_size=size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet34",), "unknown model 'resnet34': known are vgg16, resnet18, resnet20; write module:function"),
        ((18,), "unknown model 18"),
        (("resnet18", 0.2), "width 0.2 leaves the first layer of resnet18 fewer than 16 channels, .* at least 0.25"),
        (("resnet20", 0.9), "at least 1$"),
        (("resnet20", 1, (8,)), r"hidden linear layers are for vgg16, not resnet20: leave hidden empty, not \[8\]"),
        (("nets:small", 0.5), "nets:small is a function of your own, which decides its width: leave width 1, not 0.5"),
    ],
)
def test_what_no_network_is_called_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.check(*arguments)


def test_names_of_networks():
    assert [models.label("vgg16", 0.25), models.label("resnet18", 1.0), models.label("my.nets:small", 1.0)] == [
        "vgg16x0.25",
        "resnet18x1",
        "my.nets-small",
    ]
    assert [models.title("resnet18", 0.25), models.title("nets:small", 1.0)] == ["ResNet-18 ×0.25", "nets:small"]


# --- Networks of the user's own ---------------------------------------------------------------------------------------

NETS = """
import torch
from torch import nn

def small(num_classes):
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *pooled, nn.Linear(8, num_classes))

def ten(num_classes):
    return small(10)

def text(num_classes):
    return "a network"

def pair(num_classes):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x
    return Pair()
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "nets_of_mine.py").write_text(NETS)
    (tmp_path / "broken_of_mine.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nets_of_mine", raising=False)


def test_a_function_of_the_users_own_builds_the_network(nets):
    model = models.build("nets_of_mine:small", 4, image_size=20)
    assert model(torch.zeros(3, 3, 20, 20)).shape == (3, 4) and model.training


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nets_of_mine:text", "must return a torch.nn.Module, not 'a network'"),
        ("nets_of_mine:ten", r"logits of shape \(2, 4\) for 2 images of 32 x 32 pixels: it gives shape \(2, 10\)"),
        ("nets_of_mine:pair", "it gives a tuple"),
        ("nets_of_mine:large", "there is no function large in .*nets_of_mine.py"),
        ("nowhere_to_be_found:small", "there is no module nowhere_to_be_found: put nowhere_to_be_found.py into "),
        ("broken_of_mine:small", "broken_of_mine cannot be imported: No module named 'no_such_package'"),
    ],
)
def test_a_function_that_builds_no_such_network_is_refused(nets, name, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, 4)
