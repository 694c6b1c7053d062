"""Channels in another order: the same function, and more of the magnitude in the blocks that stay."""

import copy

import pytest
import torch
from torch import nn

from reprolib import models
from reprolib.patterns import parse
from reprolib.pruning import is_permutable, permute_channels, prunable
from reprolib.pruning.permutation import Units, units_of

HYBRID = "Balanced(4) & Block(4, 4)"


def network(name, seed=0):
    """Untrained, with statistics and biases that tell channels apart."""
    torch.manual_seed(seed)
    model = models.build(name, 10, {"vgg16": 1 / 8, "resnet20": 1.0}[name]).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 2)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_()
    return model


def kept(model, pattern, sparsity):
    """Share of the magnitude that masks leave, mean over layers."""
    weights = [weight.detach().abs() for weight in prunable(model).values()]
    return sum(float((w * parse(pattern).mask(w, sparsity)).sum() / w.sum()) for w in weights) / len(weights)


@pytest.mark.parametrize("name", ["vgg16", "resnet20"])
@pytest.mark.parametrize("pattern", [HYBRID, "Block(4, 4)", "NM(2, 4) & Block(4, 8)"])
def test_the_function_stays_and_blocks_hold_more(name, pattern):
    model = network(name)
    before, images = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    permute_channels(model, parse(pattern), 0.9)
    with torch.no_grad():
        expected, found = before(images), model(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert kept(model, pattern, 0.9) > kept(before, pattern, 0.9)
    again = copy.deepcopy(before)
    permute_channels(again, parse(pattern), 0.9)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_strong_rows_and_columns_meet_by_hand():
    """Outputs 0 and 2 of "1" are strong, and so are inputs 1 and 3 of "2": with 2 x 2 blocks, pairs share a group."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    weak = torch.full((4, 4), 0.01)
    rows, columns = weak.clone(), weak.clone()
    rows[[0, 2]] = 1
    columns[:, [1, 3]] = 3
    model[1].weight.data, model[2].weight.data = rows[..., None, None], columns[..., None, None]
    with torch.no_grad():
        permute_channels(model, parse("Block(2, 2)"), 0.5)
        strong_rows = (model[1].weight[:, 0, 0, 0] == 1).tolist()
        strong_columns = (model[2].weight[0, :, 0, 0] == 3).tolist()
    assert strong_rows in ([True, True, False, False], [False, False, True, True])
    assert strong_columns == [not strong for strong in strong_rows]


class Residual(nn.Module):
    """The outputs of `b` meet those of `a`, and one batch norm is called twice: nothing of this can move."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.last = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8, 8))
        self.norm, self.linear = nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.norm(self.a(self.first(x)))
        x = x + self.norm(self.b(x))
        return self.linear(self.last(x).mean((2, 3)))


def test_channels_that_others_see_stay_where_they_are():
    torch.manual_seed(0)
    model = Residual().eval()
    before = copy.deepcopy(model.state_dict())
    permute_channels(model, parse("Block(4, 4)"), 0.8)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"first.weight", "first.bias", "a.weight"}  # what `a` alone reads


class Branching(nn.Module):
    """What `b` gives is read twice, and nothing lies between: it stays in its order, whatever came before it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(c, 32, 3, padding=1) for c in (3, 32, 32))
        self.linear = nn.Linear(32, 2)

    def forward(self, x):
        x = self.b(self.a(x))
        return self.linear((x + self.c(x)).mean((2, 3)))


def test_outputs_that_are_read_twice_at_once_stay_where_they_are():
    torch.manual_seed(0)
    model, images = Branching().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(images)
        permute_channels(model, parse("Block(4, 4)"), 0.8)
        torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize(
    "between", [[nn.Linear(8, 8), nn.Flatten()], [nn.Flatten(2), nn.Linear(64, 8), nn.Flatten()]], ids=["row", "pixels"]
)
def test_linear_layers_that_read_no_channels_are_no_readers(between):
    """A map of 8 channels and 8 columns, and one of 64 channels and 64 pixels: sizes that fit by chance."""
    torch.manual_seed(0)
    channels = 8 if len(between) == 2 else 64
    convolutions = [nn.Conv2d(3, channels, 1), nn.Conv2d(channels, channels, 1)]
    model = nn.Sequential(*convolutions, *between, nn.LazyLinear(2)).eval()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(images)
        permute_channels(model, parse("Block(4, 4)"), 0.8)
        torch.testing.assert_close(model(images), expected)


def test_what_patterns_keep_by_hand():
    assert units_of(parse("Block(8, 4)"), 0.9) == pytest.approx(Units(8, 4, 4, 4, 0.1))
    # density 0.05: banks keep 1 - sqrt(0.05) = 77.6 % less, 2 of 8; a fifth of the blocks stays.
    assert units_of(parse("Balanced(8) & Block(8, 8)"), 0.95) == pytest.approx(Units(8, 8, 8, 2, 0.2))
    assert units_of(parse("NM(2, 4) & Block(8, 8)"), 0.95) == pytest.approx(Units(8, 8, 4, 2, 0.1))


@pytest.mark.parametrize(
    "pattern",
    [
        "Unstructured()",
        "Balanced(8)",
        "Block(4, 4, norm='max')",
        "Vector(4) & Block(8, 8)",
        "Balanced(8) & Block(4, 4)",
    ],
)
def test_patterns_for_which_order_means_something_else_are_refused(pattern):
    assert not is_permutable(parse(pattern))
    with pytest.raises(ValueError, match=r"channels can be ordered for blocks with the norm l1.*leave permuted out"):
        permute_channels(network("vgg16"), parse(pattern), 0.9)


def test_network_that_cannot_be_followed_is_refused():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3)))

        def forward(self, x):
            return self.layers(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"can't be ordered, torch\.fx can't follow the network"):
        permute_channels(Branch(), parse("Block(1, 1)"), 0.5)
