"""Networks with islands: what they compute is what the network computes, whatever its code does."""

import copy
import random
import types
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn.utils import parametrizations, prune
from torch.utils import _pytree as pytree
from torchvision import models

from reprolib.sparse.capture import capture
from reprolib.sparse.capture import islands as capture_islands
from reprolib.sparse.capture.network import two_dimensional
from reprolib.sparse.operations import Convolution, Graph, Linear, fused, interpret


class Island(nn.Module):
    """Runs the definition of each operation."""

    def __init__(self, graph, weights):
        super().__init__()
        self.graph, self.weights = graph, weights

    def forward(self, *inputs):
        assert all(value.dim() == 4 for value, maps in zip(inputs, self.graph.inputs, strict=True) if maps)
        return interpret(fused(self.graph), inputs, self.weights)


@torch.no_grad()
def pruned(model, density=0.3, seed=0):
    """The model in float64 and eval mode, with random numbers in every tensor, and zeros in weights."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5)
            if name == "weight" and isinstance(module, (nn.Conv2d, nn.Linear)):
                parameter[torch.rand(parameter.shape, generator=generator) >= density] = 0
                parameter.view(-1)[0] = 0
        if getattr(module, "running_var", None) is not None:
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    model.double()
    for module in model.modules():
        module.training = False
    return model


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def islands(model):
    return [module for module in model.modules() if isinstance(module, Island)]


def outline(model):
    """Operations of each island by their short names."""
    short = {"Convolution": "conv", "Concatenation": "cat", "MaxPool": "pool"}

    def name(operation):
        kind = type(operation).__name__
        return operation.activation if kind == "Activation" else short.get(kind, kind.lower())

    return [" ".join(map(name, island.graph.operations)) for island in islands(model)]


def check(model, *inputs, dense=False, **options):
    """Capture; the outputs are those of the model, whose tensors nobody touched. The captured one, and reasons."""
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(*copy.deepcopy(inputs), **copy.deepcopy(options))
        result, reasons = capture(model, Island, dense)
        for _ in range(2):
            y = result(*copy.deepcopy(inputs), **copy.deepcopy(options))
            assert pytree.tree_structure(y) == pytree.tree_structure(expected)
            for left, right in zip(pytree.tree_leaves(y), pytree.tree_leaves(expected), strict=True):
                torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return result, reasons


def conv(c_in=4, c_out=4, size=3, **options):
    return nn.Conv2d(c_in, c_out, size, **{"padding": 0 if isinstance(size, tuple) else size // 2, **options})


class Net(nn.Module):
    """A network whose forward is ``function(self, *inputs)``, with these modules."""

    def __init__(self, function, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def between(part, **modules):
    """A module, or what a function makes of a value, between two pruned convolutions."""
    if isinstance(part, nn.Module):
        return pruned(nn.Sequential(OrderedDict(a=conv(), part=copy.deepcopy(part), b=conv())))
    return pruned(Net(lambda net, x: net.b(part(net, net.a(x))), a=conv(), b=conv(), **modules))


def function(part):
    return part if isinstance(part, nn.Module) else lambda net, x: part(x)


# --- Islands ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, channels=4, out=4, stride=1):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, out, stride=stride, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = conv(out, out, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride != 1:
            self.shortcut = nn.Sequential(conv(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        identity = x if self.shortcut is None else self.shortcut(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += identity
        return self.relu(y)


def residual():
    return nn.Sequential(
        conv(3, 4, 7, stride=2), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        Block(), Block(4, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 5),
    )  # fmt: skip


def test_a_residual_network_is_one_island():
    result, reasons = check(pruned(residual()), images(2, 3, 20, 20))
    assert reasons == {}
    (island,) = islands(result)
    block = "conv relu conv sum relu"
    assert outline(result) == [f"conv relu pool {block} conv conv relu conv sum relu mean flatten linear"]
    assert set(island.weights) == {"0", "4.conv1", "4.conv2", "5.shortcut.0", "5.conv1", "5.conv2", "9"}
    assert island.graph.inputs == (True,)
    assert [node.op for node in result.graph.nodes] == ["placeholder", "call_module", "call_function", "output"]
    assert [type(operation) for operation in fused(island.graph).operations].count(Convolution) == 6


def test_the_graph_of_a_block_written_out():
    result, _ = check(pruned(Block()), images(2, 4, 5, 5))
    (island,) = islands(result)
    one = (1, 1)
    assert fused(island.graph) == Graph(
        (True,),
        (
            Convolution(0, "conv1", one, one, one, 1, None, "relu"),
            Convolution(1, "conv2", one, one, one, 1, 0, "relu"),
        ),
        (2,),
    )


def test_a_layer_alone():
    for layer, x in ((conv(3, 4), images(2, 3, 5, 5)), (nn.Linear(6, 4), images(2, 7, 6))):
        result, reasons = check(pruned(layer), x)
        assert reasons == {} and list(islands(result)[0].weights) == [""]


def test_without_zeros_the_network_is_only_copied():
    model = pruned(residual(), density=2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.fill_(0.1)
    result, reasons = check(model, images(2, 3, 20, 20))
    assert str(result) == str(model) and result is not model
    assert reasons["4.conv1"] == "it has no zeros and 144 weights, and no layer with zeros is beside it"
    assert len(outline(check(model, images(2, 3, 20, 20), dense=True)[0])) == 1


@pytest.mark.parametrize(
    ("zeros", "expected"),
    [
        ({0}, ["conv relu conv"]),  # the second is small and beside it
        ({1}, ["conv relu conv relu conv"]),
        ({0, 3}, ["conv relu conv relu conv relu conv relu conv"]),
        ({0, 4}, ["conv relu conv relu conv relu conv relu conv"]),  # the third lies between
        ({4}, ["conv relu conv"]),
    ],
)
def test_small_layers_join_those_beside_them(zeros, expected):
    model = pruned(nn.Sequential(*(layer for _ in range(5) for layer in (conv(), nn.ReLU()))))
    with torch.no_grad():
        for number in set(range(5)) - zeros:
            model[2 * number].weight.fill_(0.1)
    result, reasons = check(model, images(2, 4, 5, 5))
    assert [text.removesuffix(" relu") for text in outline(result)] == expected
    assert len(reasons) == 5 - expected[0].count("conv")


def test_a_small_layer_that_a_seam_cuts_off_is_no_island():
    def forward(net, x):
        return net.b(net.small(x) + torch.tanh(net.a(x)))

    model = pruned(Net(forward, a=conv(), b=conv(), small=conv()))
    nn.init.ones_(model.small.weight)
    result, reasons = check(model, images(2, 4, 5, 5))
    assert outline(result) == ["conv", "conv"] and list(reasons) == ["small"]


def test_a_large_layer_without_zeros_is_a_seam(monkeypatch):
    monkeypatch.setattr(capture_islands, "SMALL_CONVOLUTION", 143)
    model = pruned(nn.Sequential(conv(), nn.ReLU(), conv(), nn.BatchNorm2d(4), nn.ReLU(), conv()))
    with torch.no_grad():
        model[2].weight.fill_(0.1)
    result, reasons = check(model, images(2, 4, 5, 5))
    assert outline(result) == ["conv relu", "conv"]
    assert reasons == {"2": "it has no zeros and 144 weights"}


def test_a_large_linear_layer_with_few_zeros_is_a_seam(monkeypatch):
    monkeypatch.setattr(capture_islands, "SMALL_CONVOLUTION", 63)
    monkeypatch.setattr(capture_islands, "SMALL_LINEAR", 63)
    model = pruned(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), 0.2)
    with torch.no_grad():
        model[2].weight.fill_(0.1)[0] = 0
    result, reasons = check(model, images(3, 8))
    assert outline(result) == ["linear relu", "linear"]
    assert reasons == {"2": "88% of its weights are kept, dense is faster"}


def test_a_linear_layer_without_zeros_joins_those_beside_it():
    """Else torch would run it on threads of its own, which disturb those of the engine for a while."""
    model = pruned(nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 300)))
    for layer in (model[2], model[4]):
        nn.init.constant_(layer.weight, 0.1)
    model[4].weight.data[0, 0] = 0
    result, reasons = check(model, images(3, 300))
    assert outline(result) == ["linear relu linear relu linear"] and not reasons


def test_what_does_nothing_for_an_island_stays_outside():
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), conv(), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU(), nn.MaxPool2d(3))
    assert outline(check(pruned(model), images(2, 4, 16, 16))[0]) == ["conv relu pool"]
    model = pruned(Net(lambda net, x: torch.cat([net.a(x), F.relu(net.b(x))], 1).mean((2, 3)), a=conv(), b=conv()))
    assert outline(check(model, images(2, 4, 6, 6))[0]) == ["conv", "conv relu"]


def test_what_others_read_too_is_no_reason_to_stay():
    model = pruned(Net(lambda net, x: (lambda y: (y, F.relu(y)))(net.a(x)), a=conv()))
    assert outline(check(model, images(2, 4, 5, 5))[0]) == ["conv"]


def test_a_layer_that_reads_a_buffer():
    model = pruned(Net(lambda net, x: net.a(net.template) + net.a(x), a=conv()))
    model.register_buffer("template", images(2, 4, 5, 5, seed=1))
    assert outline(check(model, images(2, 4, 5, 5))[0]) == ["conv conv sum"]


def test_values_that_torch_reads_are_outputs():
    def forward(net, x):
        a = net.a(x)
        b = net.b(F.relu(a))
        return {"all": (b, a.shape[0], None), "mean": a.mean() + b.size(1)}

    result, _ = check(pruned(Net(forward, a=conv(), b=conv())), images(2, 4, 5, 5))
    assert islands(result)[0].graph.outputs == (1, 3)


def test_one_layer_called_twice_has_one_weight_and_norms_of_its_own():
    def forward(net, x):
        return net.second(net.a(F.relu(net.first(net.a(F.relu(net.a(x)))))))

    model = pruned(Net(forward, a=conv(), first=nn.BatchNorm2d(4), second=nn.BatchNorm2d(4)))
    model.again = model.a
    result, _ = check(model, images(2, 4, 5, 5))
    assert set(islands(result)[0].weights) == {"a", "a#2", "a#3"}
    model = pruned(Net(lambda net, x: net.again(F.relu(net.a(x))), a=conv()))
    model.again = model.a
    assert set(islands(check(model, images(2, 4, 5, 5))[0])[0].weights) == {"a"}


def test_tied_weights_are_one():
    model = pruned(nn.Sequential(conv(bias=False), nn.ReLU(), conv(bias=False)))
    model[2].weight = model[0].weight
    result, reasons = check(model, images(2, 4, 5, 5))
    assert set(islands(result)[0].weights) == {"0"} and reasons == {}


# --- Words for the same -----------------------------------------------------------------------------------------------

SAME = {
    "relu": [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, lambda x: x.relu(), lambda x: x.relu_(), torch.relu_,
             lambda x: F.relu(x, inplace=True), lambda x: F.relu(input=x), F.relu_],
    "relu6": [nn.ReLU6(), nn.Hardtanh(0, 6), F.relu6, lambda x: F.hardtanh(x, 0, 6), nn.ReLU6(inplace=True)],
    "silu": [nn.SiLU(), F.silu, nn.SiLU(inplace=True)],
    "sigmoid": [nn.Sigmoid(), torch.sigmoid, F.sigmoid, lambda x: x.sigmoid(), lambda x: x.sigmoid_()],
    "hardswish": [nn.Hardswish(), F.hardswish, nn.Hardswish(inplace=True)],
    "hardsigmoid": [nn.Hardsigmoid(), F.hardsigmoid],
    "pool": [nn.MaxPool2d(2), nn.MaxPool2d((3, 2), stride=(1, 2), padding=(1, 0)), lambda x: F.max_pool2d(x, 2),
             lambda x: torch.max_pool2d(x, 3, padding=1), lambda x: F.max_pool2d(input=x, kernel_size=2, stride=1)],
    "conv": [nn.AvgPool2d(2), nn.AvgPool2d(3, 1, 1), lambda x: F.avg_pool2d(x, (2, 1)), nn.BatchNorm2d(4),
             nn.BatchNorm2d(4, affine=False), conv(stride=2), conv(groups=2), conv(4, 4, 5, dilation=(2, 1)),
             conv(4, 4, (1, 3), padding=(0, 1)), conv(padding="same"), conv(padding="valid"),
             conv(4, 4, 1, padding="valid"), conv(dilation=2, padding="same"), conv(4, 4, 1, padding=1),
             conv(groups=4, bias=False)],
    "mean": [nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((1, 1)), lambda x: F.adaptive_avg_pool2d(x, 1),
             lambda x: x.mean((2, 3), keepdim=True), lambda x: torch.mean(x, dim=[-1, -2], keepdim=True),
             lambda x: x.mean((-2, 3), True)],
    "": [nn.Dropout(), nn.Dropout2d(inplace=True), nn.Identity(), lambda x: F.dropout(x, 0.3, False),
         lambda x: F.dropout(x, training=False, inplace=True), lambda x: F.dropout2d(x, training=False)],
    "sum": [lambda x: x + x, lambda x: torch.add(x, x), lambda x: x.add(x), lambda x: x.add(other=x),
            lambda x: torch.add(input=x, other=x, alpha=1), lambda x: x.__add__(x)],
    "product": [lambda x: x * x, lambda x: torch.mul(x, x), lambda x: x.mul(x), lambda x: torch.multiply(x, other=x)],
    "relu sum": [lambda x: F.relu(x).add_(x), lambda x: x.add_(F.relu(x))],
}  # fmt: skip


@pytest.mark.parametrize(("expected", "part"), [(name, part) for name, parts in SAME.items() for part in parts])
def test_recognised(expected, part):
    result, reasons = check(between(function(part)), images(2, 4, 6, 6))
    words = ["conv", "norm" if isinstance(part, nn.BatchNorm2d) else expected, "conv"]
    assert outline(result) == [" ".join(word for word in words if word not in ("", "norm"))]
    assert reasons == {}


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.flatten(1), lambda x: torch.flatten(x, 1), lambda x: torch.flatten(x, start_dim=1),
        lambda x: x.view(x.size(0), -1), lambda x: x.reshape(x.shape[0], -1), lambda x: x.view((x.size()[0], -1)),
        lambda x: x.view(x.size(dim=0), -1),
        lambda x: torch.reshape(x, (x.size(0), -1)), lambda x: x.flatten(1, -1),
    ],
)  # fmt: skip
def test_flatten_in_other_words(flatten):
    model = pruned(Net(lambda net, x: net.b(flatten(F.relu(net.a(x)))), a=conv(), b=nn.Linear(4 * 25, 3)))
    result, _ = check(model, images(2, 4, 5, 5))
    assert outline(result) == ["conv relu flatten linear"] and len(islands(result)[0].graph.outputs) == 1
    assert len(result.graph.nodes) == 4  # nobody asks for a size any more


def test_batch_size_of_an_earlier_value_and_of_another():
    def forward(net, x):
        n = x.size(0)
        return net.b(net.a(x).view(n, -1))

    model = pruned(Net(forward, a=conv(), b=nn.Linear(100, 3)))
    assert outline(check(model, images(2, 4, 5, 5))[0]) == ["conv flatten linear"]
    for other in (lambda x: x.size(-1), lambda x: x.flatten(0, 1).size(0)):
        rows = other(images(2, 4, 5, 5))
        model = pruned(
            Net(
                lambda net, x, other=other: net.b(net.a(x).view(other(x), -1)),
                a=conv(),
                b=nn.Linear(200 // rows, 3),
            )
        )
        assert outline(check(model, images(2, 4, 5, 5))[0]) == ["conv", "linear"]


@pytest.mark.parametrize("mean", [lambda x: x.mean((2, 3)), lambda x: torch.mean(x, [-2, -1])])
def test_mean_without_its_dimensions(mean):
    model = pruned(Net(lambda net, x: net.b(mean(net.a(x))), a=conv(), b=nn.Linear(4, 3)))
    assert outline(check(model, images(2, 4, 5, 5))[0]) == ["conv mean flatten linear"]


@pytest.mark.parametrize("cat", [torch.cat, torch.concat, torch.concatenate])
@pytest.mark.parametrize("options", [{"dim": 1}, {"dim": -3}])
def test_concatenation_in_other_words(cat, options):
    model = pruned(Net(lambda net, x: net.b(cat((net.a(x), x), **options)), a=conv(), b=conv(8, 4)))
    assert outline(check(model, images(2, 4, 5, 5))[0]) == ["conv cat conv"]


def test_squeeze_and_excitation_in_both_orders():
    for swap in (False, True):

        def forward(net, x, swap=swap):
            x = net.a(x)
            scale = torch.sigmoid(net.d(F.relu(net.c(x.mean((2, 3), keepdim=True)))))
            return net.b(scale * x if swap else x * scale)

        model = pruned(Net(forward, a=conv(), b=conv(), c=conv(4, 2, 1), d=conv(2, 4, 1)))
        result, _ = check(model, images(2, 4, 5, 5))
        assert outline(result) == ["conv mean conv relu conv sigmoid product conv"]
        assert islands(result)[0].graph.operations[6].source == 1


@pytest.mark.parametrize(
    "part",
    [
        nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2, dilation=2), nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(3, padding=1, count_include_pad=False), nn.AvgPool2d(2, divisor_override=3),
        nn.AdaptiveAvgPool2d(3), nn.Hardtanh(),
        nn.LeakyReLU(0.1), nn.LeakyReLU(0.1, inplace=True), nn.BatchNorm2d(4, track_running_stats=False), nn.GELU(),
        nn.PixelShuffle(1), conv(padding_mode="circular"), conv(4, 4, 2, padding="same"), nn.InstanceNorm2d(4),
        nn.ConvTranspose2d(4, 4, 3, padding=1), nn.Upsample(scale_factor=2), nn.GroupNorm(2, 4), nn.Softmax(1),
        lambda x: x + 1, lambda x: x * 2, lambda x: torch.add(x, x, alpha=2), lambda x: x.add(x, alpha=2),
        lambda x: torch.cat([x, x], 2), lambda x: x.mean((1, 3), keepdim=True) + x, lambda x: x.permute(0, 1, 3, 2),
        lambda x: x.mean(1, keepdim=True) * x, lambda x: x * x.mean((2, 3), keepdim=True) + x.mean((2, 3), True),
        lambda x: x.flatten(2).unsqueeze(2), lambda x: x.view(x.size(0), 4, -1, 3), lambda x: 1 - x,
        lambda x: x - x / 2, lambda x: F.relu(x[:, :1]) + x, lambda x: torch.tanh(x) * torch.tanh(x),
        lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), lambda x: x[:, [1, 0, 3, 2]], lambda x: x.clamp_(0), lambda x: -x,
        lambda x: F.interpolate(x, scale_factor=2), lambda x: F.pad(x, (1, 0, 1, 0)), lambda x: x.mul_(0.5).relu_(),
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0], lambda x: F.dropout(x, 0.0, True), lambda x: x.detach(),
    ],
)  # fmt: skip
def test_the_rest_is_a_seam(part):
    result, reasons = check(between(function(part)), images(2, 4, 6, 6))
    assert len(islands(result)) == 2
    if isinstance(part, nn.Conv2d):
        assert reasons["part"] in (
            "padding_mode 'circular' is not supported",
            "its padding is not the same on both sides",
        )


def test_batch_norm_in_the_words_of_a_function():
    def forward(net, x):
        n = net.norm
        y = F.batch_norm(net.a(x), n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps)
        return net.b(F.relu(y))

    model = pruned(Net(forward, a=conv(), b=conv(), norm=nn.BatchNorm2d(4)))
    assert outline(check(model, images(2, 4, 5, 5))[0]) == ["conv relu conv"]


def test_batch_norm_that_is_not_alone_behind_a_layer_is_a_convolution():
    model = between(lambda net, x: net.norm(x) + x, norm=nn.BatchNorm2d(4))
    assert outline(check(model, images(2, 4, 5, 5))[0]) == ["conv conv sum conv"]
    model = pruned(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU(), conv()))
    assert outline(check(model, images(2, 4, 5, 5))[0]) == ["conv relu conv"]
    model = between(lambda net, x: net.norm(F.relu(net.norm(x))), norm=nn.BatchNorm2d(4))
    assert outline(check(model, images(2, 4, 5, 5))[0]) == ["conv relu conv conv"]


def test_batch_norm_is_folded_in_float64_and_zeros_stay():
    model = pruned(nn.Sequential(conv(), nn.BatchNorm2d(4, eps=1e-12))).half()
    model[1].running_var.zero_()[1] = 1e-7
    result, _ = capture(model, Island)
    weight, bias = islands(result)[0].weights["0"]
    assert weight.dtype == bias.dtype == torch.float32
    assert weight.isfinite().all() and ((weight == 0) >= (model[0].weight == 0)).all()


@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_behind_a_linear_layer_is_for_rows_of_two_dimensions(affine):
    model = pruned(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=affine), nn.ReLU(), nn.Linear(4, 2)))
    result, _ = check(model, images(5, 3))
    assert outline(result) == ["linear relu linear"]
    assert model(images(2, 4, 3)).shape == (2, 4, 2)  # its norm is along another dimension here
    with pytest.raises(ValueError, match=r"input of shape \(2, 4, 3\) is not \[N, features\]"):
        result(images(2, 4, 3))
    model = pruned(nn.Sequential(conv(), nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4)))
    result, _ = check(model, images(2, 4, 4, 4))
    assert outline(result) == ["conv flatten linear"]
    assert not [node for node in result.graph.nodes if node.target is two_dimensional]


# --- Code that looks at its parts -------------------------------------------------------------------------------------


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - 1, bias)


class Doubled(nn.ReLU):
    def forward(self, x):
        return 2 * super().forward(x)


class Silent(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)

    def eval(self):
        super().eval()


class Reader(nn.Module):
    """Reads what its parts are."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(OrderedDict(a=conv(3, 4), r=nn.ReLU(), b=conv(4, 4), c=conv(4, 6)))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = x.to(next(self.parameters()).dtype).to(self.features.b.weight.dtype)
        y = self.features[0](x)
        for module in self.features[1:3]:
            y = module(y) * module.out_channels if isinstance(module, nn.Conv2d) else module(y)
        y = self.features.c(input=y).mean(dim=(2, 3))
        return self.head(y[:, : self.head.in_features]) * len(self.features)


def test_parents_that_look_into_their_parts():
    result, reasons = check(pruned(Reader()), images(2, 3, 5, 5))
    assert reasons == {} and len(islands(result)) == 3


@pytest.mark.parametrize("make", [Scaled, Standardised], ids=["forward", "_conv_forward"])
def test_subclass_of_a_layer_does_what_it_does(make):
    check(pruned(nn.Sequential(conv(), make(4, 4, 3), conv())), images(2, 4, 6, 6))
    check(pruned(make(4, 4, 3)), images(2, 4, 6, 6))
    check(between(lambda net, x: net.relu(x), relu=Doubled()), images(2, 4, 6, 6))


def test_subclass_is_traced_into():
    result, reasons = check(pruned(nn.Sequential(Scaled(4, 4, 3))), images(2, 4, 6, 6))
    assert outline(result) == ["conv"] and list(islands(result)[0].weights) == ["0"] and reasons == {}
    result, reasons = check(pruned(nn.Sequential(conv(), Standardised(4, 4, 3))), images(2, 4, 6, 6))
    assert reasons == {"1": "its weight is read by sub"}


@pytest.mark.parametrize("part", range(5))
def test_forward_replaced_on_an_instance(part):
    model = pruned(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), conv()))
    original = model[part].forward
    model[part].forward = lambda x: 2 * original(x)
    check(model, images(2, 4, 6, 6))
    model = pruned(nn.Sequential(conv(), nn.ReLU(), conv()))
    model[0].forward = types.MethodType(lambda self, x: 3 * F.conv2d(x, self.weight, padding=1), model[0])
    result, _ = check(model, images(2, 4, 6, 6))
    assert len(islands(result)) == 2


def test_forward_replaced_on_the_network():
    model = pruned(nn.Sequential(conv(), nn.ReLU()))
    model.forward = lambda x: x
    assert check(model, images(2, 4, 6, 6))[1] == {"0": "its forward was replaced"}


@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("before", [True, False])
def test_hooks_are_called(part, before):
    model = pruned(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), conv()))
    if before:
        model[part].register_forward_pre_hook(lambda module, args: (2 * args[0] - 1,))
    else:
        model[part].register_forward_hook(lambda module, args, y: 2 * y - 1)
    _, reasons = check(model, images(2, 4, 6, 6))
    assert reasons == ({str(part): "its hooks would not be called"} if part in (0, 4) else {})


def test_hooks_of_a_container_and_of_the_network():
    model = pruned(nn.Sequential(conv(), nn.Sequential(conv(), nn.ReLU()), conv()))
    model[1].register_forward_hook(lambda module, args, y: 2 * y)
    result, reasons = check(model, images(2, 4, 6, 6))
    assert reasons == {"1.0": "it is in 1: its hooks would not be called"} and len(islands(result)) == 2
    model.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    result, reasons = check(model, images(2, 4, 6, 6))
    assert set(reasons) == {"0", "1.0", "2"} and not islands(result)


def test_a_hook_that_changes_what_it_gets():
    """What reads the value before the call reads it as it was, and what reads it after it reads it changed."""

    def forward(net, x):
        x = net.a(x)
        before = net.b(x)
        y = net.part(x)
        return before + net.b(x) + y

    model = pruned(Net(forward, a=conv(), b=conv(), part=nn.Tanh()))
    model.part.register_forward_pre_hook(
        lambda module, args: args[0].mul_(3) and None if False else args[0].mul_(3) * 0
    )
    check(model, images(2, 4, 5, 5))
    hooked = pruned(nn.Sequential(conv(), nn.Identity(), conv()))
    hooked[1].register_forward_hook(lambda module, args, y: y.add_(1))
    check(hooked, images(2, 4, 5, 5))


def test_what_a_hook_kept_from_an_earlier_call_is_not_taken_for_a_constant():
    kept = {}
    model = pruned(Net(lambda net, x: net.b(net.a(x)) + kept["a"], a=conv(), b=conv()))
    model.a.register_forward_hook(lambda module, args, y: kept.update(a=y))
    model(images(2, 4, 5, 5))
    result, reasons = check(model, images(2, 4, 5, 5, seed=1))
    assert not islands(result) and "no parameter or buffer" in reasons["b"]


def test_layers_in_modules_of_torch_that_run_as_a_whole():
    model = pruned(
        nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3))
    )
    result, reasons = check(model, images(2, 5, 8))
    assert len(islands(result)) == 2
    assert reasons["1.linear1"] == "it is in 1, a TransformerEncoderLayer, which torch runs as a whole"
    model = pruned(
        Net(lambda net, x: net.a(net.attention(x, x, x)[0]), attention=nn.MultiheadAttention(8, 2), a=nn.Linear(8, 8))
    )
    result, reasons = check(model, images(2, 5, 8))
    assert list(reasons) == ["attention.out_proj"] and outline(result) == ["linear"]


def test_layers_that_nobody_calls():
    model = pruned(Net(lambda net, x: net.a(x), a=conv(), spare=conv()))
    assert check(model, images(2, 4, 5, 5))[1] == {"spare": "the network does not call it"}


def test_where_torch_raises_so_do_we():
    model = pruned(nn.Sequential(conv(), nn.Flatten(), conv(100, 4, 1)))
    result, reasons = capture(model, Island)
    assert reasons == {"2": "it reads rows, not maps"}
    for network in (model, result):
        with pytest.raises(RuntimeError):
            network(images(2, 4, 5, 5))
    model = pruned(nn.Sequential(conv(4, 5), nn.Linear(5, 3)))
    assert check(model, images(2, 4, 5, 5))[1] == {"1": "it reads maps, not rows"}


def test_silent_train_and_eval():
    check(pruned(Silent(conv(), nn.ReLU())), images(2, 4, 5, 5))


# --- Code that can't be traced ----------------------------------------------------------------------------------------


def by_value(net, x):
    return net.b(x) if x.sum() > 0 else net.b(-x)


def by_type(net, x):
    return net.b(x) if isinstance(x, torch.Tensor) else x


def by_class(net, x):
    match x:
        case torch.Tensor():
            return net.b(x)
        case _:
            return x


def by_attribute(net, x):
    return net.b(x) if not hasattr(x, "tensors") else x


def by_mistake(net, x):
    try:
        return net.b(x) * len(x)
    except RuntimeError:
        return x


def by_loop(net, x):
    return torch.cat([net.b(image[None]) for image in x])


def by_autocast(net, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return net.b(x)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (by_value, "control flow depends on values"),
        (by_type, "asks for the type of a value"),
        (by_class, "asks for the type of a value"),
        (by_attribute, "its attribute tensors"),
        (by_mistake, "length of a value"),
        (by_loop, "iterates over a value"),
        (by_autocast, "switches autocast"),
    ],
)
def test_a_module_that_cant_be_traced_stays_whole(function, reason):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = conv()

        def forward(self, x):
            return function(self, x)

    model = pruned(nn.Sequential(conv(), Inner(), conv()))
    result, reasons = check(model, images(2, 4, 5, 5))
    assert len(islands(result)) == 2 and list(reasons) == ["1.b"]
    assert reasons["1.b"].startswith("it is in 1: it can't be traced: ") and reason in reasons["1.b"]
    result, reasons = check(pruned(Inner()), images(2, 4, 5, 5))
    assert not islands(result) and reason in reasons["b"]


@pytest.mark.parametrize("draw", [torch.rand, np.random.rand, lambda n: random.random()])
def test_random_numbers_are_not_taken_for_constants(draw):
    model = pruned(Net(lambda net, x: net.b(x) + 0 * float(np.sum(np.asarray(draw(1)))), b=conv()))
    state = torch.get_rng_state(), random.getstate()
    assert check(model, images(2, 4, 5, 5))[1] == {"b": "its forward draws random numbers or changes its buffers"}
    torch.set_rng_state(state[0]), random.setstate(state[1])


def test_state_that_changes_is_not_taken_for_a_constant():
    def forward(net, x):
        net.calls = getattr(net, "calls", 0) + 1
        return net.b(x) * net.calls

    model = pruned(Net(forward, b=conv()))
    _, reasons = capture(model, Island)
    assert reasons == {"b": "it does something else each time"} and not hasattr(model, "calls")


def test_constants_are_kept():
    model = pruned(Net(lambda net, x: net.b(net.a(x) + torch.arange(4.0).double()[:, None, None]), a=conv(), b=conv()))
    assert len(islands(check(model, images(2, 4, 5, 5))[0])) == 2


ASSERTING = """
def forward(net, x):
    assert x.shape[1] == 4, f"not {x.shape}"
    assert x.is_contiguous()
    return net.b(net.a(x))
"""


def test_assertions_are_kept():
    space = {}
    exec(ASSERTING, space)  # pytest rewrites those that it sees
    result, _ = check(pruned(Net(space["forward"], a=conv(), b=conv())), images(2, 4, 5, 5))
    assert len(islands(result)) == 1
    with pytest.raises(AssertionError):
        result(images(2, 5, 5, 5))


def test_a_call_of_its_own_is_part_of_what_a_module_does():
    class Twice(nn.Conv2d):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model = pruned(nn.Sequential(conv(), Twice(4, 4, 3), conv()))
    check(model, images(2, 4, 6, 6))
    model[1].register_forward_hook(lambda module, args, y: y + 1)
    check(model, images(2, 4, 6, 6))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: prune.l1_unstructured(model[0], "weight", 0.5), r"prune\.remove"),
        (lambda model: parametrizations.weight_norm(model[0]), r"parametrize\.remove_parametrizations"),
        (lambda model: torch.nn.utils.weight_norm(model[0]), r"remove_weight_norm"),
        (lambda model: model.to("meta"), "0.weight is on the meta device"),
        (lambda model: model.append(nn.LazyLinear(3)), "2.weight has no shape yet"),
    ],
)
def test_weights_that_are_not_there_are_refused(change, message):
    model = nn.Sequential(conv(), nn.ReLU()).eval()
    change(model)
    with pytest.raises(ValueError, match=message):
        capture(model, Island)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_networks_and_scripts():
    model = pruned(nn.Sequential(conv(), nn.ReLU()))
    result, _ = capture(torch.compile(model), Island)
    torch.testing.assert_close(result(images(2, 4, 5, 5)), model(images(2, 4, 5, 5)))
    script = torch.jit.script(model)
    with pytest.raises(ValueError, match="ScriptModule"):
        capture(script, Island)
    result, _ = check(pruned(nn.Sequential(conv(), nn.ReLU())).append(script), images(2, 4, 5, 5))
    assert len(islands(result)) == 1


def test_activations_that_were_kept_do_not_stop_the_copy():
    model = pruned(nn.Sequential(conv(), nn.ReLU()))
    model.kept = model(images(2, 4, 5, 5))
    assert model.kept.grad_fn is not None
    check(model, images(2, 4, 5, 5))


# --- Arguments and outputs --------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "first second")


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x, y, mask=None, scale=2.0, *, negative=False, mode="plain"):
        y = self.b(y) if mode == "plain" else y
        if mask is not None:
            y = y * mask
        y = -y if negative else y
        return Pair({"x": self.a(x), "y": [y * scale, None]}, (3, mask))


def test_several_arguments_and_outputs():
    model = pruned(Several())
    result, _ = check(model, images(2, 4, 5, 5), images(2, 4, 5, 5, seed=1), scale=3.0)
    assert len(islands(result)) == 2
    check(model, images(2, 4, 5, 5), y=images(2, 4, 5, 5, seed=1), negative=False)
    x = images(2, 4, 5, 5)
    for other in ({"mask": x}, {"negative": True}, {"mode": "other"}):
        with pytest.raises(ValueError, match=f"{next(iter(other))} has a value, and the network was traced with"):
            result(x, x, **other)
    with pytest.raises(ValueError, match="y is None"):
        result(x, None)


def test_any_number_of_arguments():
    class Any(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv()

        def forward(self, *inputs):
            return self.a(inputs[0]) + inputs[1]

    check(pruned(Any()), images(2, 4, 5, 5), images(2, 4, 5, 5))


def test_dictionaries_keep_their_type():
    def forward(net, batch):
        y = net.a(batch["x"])
        return OrderedDict(y=y, more={"z": net.b(F.relu(y))})

    result, _ = check(pruned(Net(forward, a=conv(), b=conv())), {"x": images(2, 4, 5, 5)})
    assert outline(result) == ["conv relu conv"]


def test_an_output_of_nothing():
    check(pruned(Net(lambda net, x: (None, net.a(x)), a=conv())), images(2, 4, 5, 5))


# --- In place ---------------------------------------------------------------------------------------------------------


def test_the_old_name_of_a_changed_value():
    def forward(net, x):
        y = net.a(x)
        z = y
        y += net.b(x)
        return net.c(z) + y

    result, _ = check(pruned(Net(forward, a=conv(), b=conv(), c=conv())), images(2, 4, 5, 5))
    assert outline(result) == ["conv conv sum conv sum"]


def test_a_view_of_a_changed_value():
    def forward(net, x):
        y = net.a(x)
        view = y.view(2, 4, 25)
        y.relu_()
        return net.b(y) + view.view(2, 4, 5, 5)

    check(pruned(Net(forward, a=conv(), b=conv())), images(2, 4, 5, 5))


def test_the_value_of_a_changed_view():
    def forward(net, x):
        y = net.a(x)
        before = net.b(y)
        part = y[:, :2]
        part.zero_()
        y[:, 3] = 1
        torch.add(before, 1, out=before)
        return net.c(y) + before

    check(pruned(Net(forward, a=conv(), b=conv(), c=conv())), images(2, 4, 5, 5))


def test_the_same_number_before_and_after():
    def forward(net, x):
        n = m = x.shape[2]
        m += 1
        return net.a(x) * n + m

    check(pruned(Net(forward, a=conv())), images(2, 4, 5, 5))


def test_an_argument_changed_in_place():
    check(pruned(nn.Sequential(nn.ReLU(inplace=True), conv(), nn.ReLU(inplace=True))), images(2, 4, 5, 5))


def test_a_view_that_is_read_after_a_change_stays_a_view():
    def forward(net, x):
        y = net.a(x)
        rows = y.flatten(1)
        before = net.b(rows)
        y[:, 0] += 1
        return net.c(rows) + before

    model = pruned(Net(forward, a=conv(), b=nn.Linear(100, 3), c=nn.Linear(100, 3)))
    assert outline(check(model, images(2, 4, 5, 5))[0]) == ["conv", "linear", "linear sum"]


def test_a_change_in_an_island_is_none_outside():
    def forward(net, x):
        y = net.a(x)
        before = torch.tanh(y)
        return net.b(y.relu_()), before

    assert outline(check(pruned(Net(forward, a=conv(), b=conv())), images(2, 4, 5, 5))[0]) == ["conv relu conv"]


def test_two_arguments_that_are_one_tensor():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(), conv()

        def forward(self, x, y):
            before = self.b(y)
            x.relu_()
            return self.a(x) + before

    x = images(2, 4, 5, 5)
    check(pruned(Two()), x, x)


def test_lists_that_are_changed_in_place():
    def forward(net, x):
        y = net.a(x)
        before = net.b(y)
        torch._foreach_add_([y], 1)
        return net.c(y) + before

    check(pruned(Net(forward, a=conv(), b=conv(), c=conv())), images(2, 4, 5, 5))


def test_buffers_that_are_changed_in_place_keep_their_changes():
    def forward(net, x):
        net.memory.add_(net.a(net.memory))
        return net.b(net.memory) + x

    model = pruned(Net(forward, a=conv(), b=conv()))
    model.register_buffer("memory", images(2, 4, 5, 5))
    result, x = capture(model, Island)[0], images(2, 4, 5, 5)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(result(x), model(x))


def test_random_numbers_are_drawn_in_the_order_of_the_code():
    def forward(net, x):
        y = net.a(x)
        late = F.dropout(torch.tanh(y), 0.5, True)
        return net.b(late) + F.dropout(x, 0.5, True)

    model = pruned(Net(forward, a=conv(), b=conv()))
    result, _ = capture(model, Island)
    values = []
    for network in (model, result):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            values.append(network(images(2, 4, 5, 5)))
    torch.testing.assert_close(*values)


STEPS = {
    "conv": lambda net, a, b: net.a(a),
    "norm": lambda net, a, b: net.norm(a),
    "relu": lambda net, a, b: F.relu(a),
    "relu_": lambda net, a, b: a.relu_(),
    "module_": lambda net, a, b: net.relu(a),
    "leaky_": lambda net, a, b: net.leaky(a),
    "add": lambda net, a, b: a + b,
    "add_": lambda net, a, b: a.add_(b),
    "iadd": lambda net, a, b: a.__iadd__(b),
    "imul": lambda net, a, b: a.__imul__(0.5),
    "view": lambda net, a, b: a.view(a.shape),
    "slice": lambda net, a, b: a[:, :],
    "drop": lambda net, a, b: net.drop(a),
    "identity": lambda net, a, b: net.identity(a),
    "hooked": lambda net, a, b: net.hooked(a),
    "flip": lambda net, a, b: a.flip(1),
    "clone": lambda net, a, b: a.clone(),
    "set": lambda net, a, b: a.__setitem__((slice(None), 0), 1) or a,
    "out": lambda net, a, b: torch.mul(a, 0.5, out=b),
    "fill": lambda net, a, b: a[:, 1:2].fill_(2) * 0 + a,
    "item": lambda net, a, b: a.__setitem__((slice(None), 1), a[:, 1].__iadd__(b[:, 0])) or a,
    "cat": lambda net, a, b: net.narrow(torch.cat([a, b], 1)),
}


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from(list(STEPS)), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=9),
    st.sets(st.integers(0, 9), min_size=1, max_size=4),
)
def test_operations_in_place_and_others_in_any_order(steps, outputs):
    def forward(net, x):
        values = [x, net.a(x)]
        for name, a, b in steps:
            values.append(STEPS[name](net, values[-1 - a % len(values)], values[-1 - b % len(values)]))
        return [values[-1 - number % len(values)] for number in sorted(outputs)]

    modules = {"drop": nn.Dropout(inplace=True), "identity": nn.Identity(), "hooked": nn.Identity()}
    modules |= {"relu": nn.ReLU(inplace=True), "leaky": nn.LeakyReLU(0.1, inplace=True)}
    modules |= {"a": conv(4, 4, 1), "narrow": conv(8, 4, 1), "norm": nn.BatchNorm2d(4)}
    model = pruned(Net(forward, **modules))
    model.hooked.register_forward_hook(lambda module, args, y: y.sub_(0.25))
    check(model, images(2, 4, 3, 3))


# --- Any network ------------------------------------------------------------------------------------------------------


class Drawn(nn.Module):
    """A network of drawn steps: each reads values that are there, of the sizes that it takes."""

    def __init__(self, steps, seed):
        super().__init__()
        self.steps, self.layers = [], nn.ModuleList()
        shapes = [(4, 8)]  # channels and pixels of each value
        chance = random.Random(seed)
        for name in steps:
            a = chance.randrange(len(shapes))
            channels, size = shapes[a]
            same = [b for b, shape in enumerate(shapes) if shape == shapes[a]]
            wide = [b for b, shape in enumerate(shapes) if shape[1] == size]
            layer, b = None, None
            if name == "conv":
                groups = chance.choice([1, 2, channels])
                stride = 2 if size > 2 and chance.random() < 0.3 else 1
                out, kernel = chance.choice([4, 8, channels]) // groups * groups or groups, chance.choice([1, 3])
                layer = conv(channels, out, kernel, stride=stride, groups=groups, bias=chance.random() < 0.5)
                shapes.append((out, (size - 1) // stride + 1))
            elif name == "pool":
                layer = chance.choice([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(2, 1, 0)])
                layer = layer if size > 1 else nn.Identity()
                shapes.append((channels, size - (getattr(layer, "kernel_size", 1) == 2)))
            elif name == "cat":
                b = chance.choice(wide)
                shapes.append((channels + shapes[b][0], size))
            else:
                kinds = {"norm": nn.BatchNorm2d(channels), "seam": nn.Tanh(), "drop": nn.Dropout()}
                kinds["relu"] = chance.choice([nn.ReLU(True), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.Sigmoid()])
                layer = kinds.get(name)
                b = None if layer else chance.choice(same)
                shapes.append((channels, size))
            self.layers.append(layer or nn.Identity())
            self.steps.append((name, a, b))
        self.outputs = sorted({len(shapes) - 1, chance.randrange(len(shapes))})

    def forward(self, x):
        values = [x]
        for layer, (name, a, b) in zip(self.layers, self.steps, strict=True):
            if name in ("add", "product", "cat"):
                one, other = values[a], values[b]
                y = torch.cat([one, other], 1) if name == "cat" else one + other if name == "add" else one * other
            elif name == "scale":
                y = values[a] * torch.sigmoid(values[b].mean((2, 3), keepdim=True))
            else:
                y = layer(values[a].clone() if name == "relu" else values[a])
            values.append(y)
        return [values[number] for number in self.outputs]


NAMES = ("conv", "conv", "conv", "norm", "relu", "pool", "add", "product", "scale", "cat", "drop", "seam")


@settings(max_examples=100)
@given(st.lists(st.sampled_from(NAMES), min_size=2, max_size=14), st.integers(0, 999), st.sampled_from([0.3, 2]))
def test_any_network(steps, seed, density):
    check(pruned(Drawn(steps, seed), density, seed), images(2, 4, 8, 8, seed=seed), dense=seed % 3 == 0)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: models.MobileNetV2(num_classes=7, width_mult=0.1), 32),
        (lambda: models.DenseNet(4, (2, 2), 8, num_classes=7), 32),
        (lambda: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=7), 32),
    ],
    ids=["mobilenet", "densenet", "resnet"],
)
def test_networks_of_torchvision_are_one_island(make, size):
    result, reasons = check(pruned(make()), images(2, 3, size, size))
    assert reasons == {} and len(islands(result)) == 1
    assert isinstance(islands(result)[0].graph.operations[-1], Linear)


def test_networks_of_torchvision_with_seams():
    make = models.SwinTransformer
    model = pruned(make([2, 2], 8, [2, 2], [2, 2], [2, 2], num_classes=7, stochastic_depth_prob=0.2))
    result, reasons = check(model, images(1, 3, 16, 16))
    assert isinstance(result, fx.GraphModule)
    assert any(name.endswith("mlp.0") for island in islands(result) for name in island.weights)
    model = pruned(models.ShuffleNetV2([1, 1, 1], [8, 8, 16, 16, 32], num_classes=7))
    result, reasons = check(model, images(1, 3, 32, 32))
    assert reasons == {} and len(islands(result)) > 1


def test_a_captured_network_can_be_captured_again():
    result, _ = check(pruned(residual()), images(2, 3, 20, 20))
    check(result, images(2, 3, 20, 20))
    check(copy.deepcopy(result), images(2, 3, 20, 20))
