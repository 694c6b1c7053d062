"""Which layers are pruned, how much of each, and when."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reprolib.models import vgg16
from reprolib.patterns import Balanced, Block, Unstructured
from reprolib.pruning import (
    SCHEDULES,
    achieved_sparsity,
    apply_masks,
    global_ratios,
    group_lasso,
    make_masks,
    prunable,
    remaining_flops,
    sensitivity_ratios,
    sparsity_at,
    uniform_ratios,
)


@pytest.fixture(scope="module")
def layers():
    """The pruned layers of a narrow VGG-16, 36 to 288 columns wide."""
    torch.manual_seed(0)
    return {name: weight.detach() for name, weight in prunable(vgg16(10, 1 / 16)).items()}


def mean_ratio(ratios, named):
    return sum(ratios[name] * w.numel() for name, w in named.items()) / sum(w.numel() for w in named.values())


# --- Which layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "ends", "convolutions", "linear"), [((), False, 12, 0), ((), True, 13, 1), ((8, 8), False, 12, 2)]
)
def test_first_convolution_and_classifier_stay_dense_unless_asked_for(hidden, ends, convolutions, linear):
    model = vgg16(10, 1 / 16, hidden)
    named = prunable(model, ends)
    dimensions = [weight.dim() for weight in named.values()]
    assert (dimensions.count(4), dimensions.count(2)) == (convolutions, linear)
    assert any(weight.shape[1] == 3 for weight in named.values()) == ends
    assert any(weight is model[-1].weight for weight in named.values()) == ends


# --- Masks of a network -----------------------------------------------------------------------------------------------


def test_each_layer_gets_the_mask_of_its_own_sparsity():
    named = {"a": torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "b": torch.tensor([[4.0, 3.0, 2.0, 1.0]])}
    masks = make_masks(named, Unstructured(), {"a": 0.5, "b": 0.75})
    assert {name: mask.int().tolist() for name, mask in masks.items()} == {"a": [[0, 0, 1, 1]], "b": [[1, 0, 0, 0]]}
    assert achieved_sparsity(masks) == 5 / 8


def test_pruned_weights_become_exactly_zero_in_place():
    weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0, math.inf, -4.0]]))
    apply_masks({"a": weight}, {"a": torch.tensor([[True, False, False, True]])})
    assert weight.tolist() == [[1.0, 0.0, 0.0, -4.0]]
    assert math.copysign(1, weight[0, 1].item()) == 1


@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 4), Balanced(4) & Block(4, 4)], ids=str)
def test_random_scores_keep_the_structure_and_ignore_the_weights(pattern, layers):
    ratios = uniform_ratios(layers, 0.75)
    by_magnitude = make_masks(layers, pattern, ratios)
    drawn = make_masks(layers, pattern, ratios, "random", seed=1)
    of_other_weights = make_masks({n: w.flip(0) for n, w in layers.items()}, pattern, ratios, "random", seed=1)
    of_other_seed = make_masks(layers, pattern, ratios, "random", seed=2)
    for name, mask in drawn.items():
        assert mask.sum() == by_magnitude[name].sum()
        assert torch.equal(mask, of_other_weights[name])
        assert not torch.equal(mask, of_other_seed[name])
        assert not torch.equal(mask, by_magnitude[name])


def test_random_masks_are_nested_as_sparsity_grows(layers):
    """Otherwise a gradual schedule would bring pruned weights back."""
    sparser, denser = (make_masks(layers, Block(4, 4), uniform_ratios(layers, s), "random", seed=1) for s in (0.9, 0.5))
    assert all((denser[name] | ~sparser[name]).all() for name in layers)


def test_remaining_flops_shrink_with_the_density_of_pruned_layers():
    masks = {"b": torch.tensor([[True, False, False, False]])}
    assert remaining_flops({"a": 100, "b": 60}, masks) == 100 + 15


# --- How much of each layer -------------------------------------------------------------------------------------------


def test_uniform_ratios_are_equal(layers):
    assert set(uniform_ratios(layers, 0.8).values()) == {0.8}


def ratios_by_sensitivity(named, pattern, target):
    """Each layer hurts in proportion to the share of its magnitude that is gone."""
    whole = {name: weight.abs().sum() for name, weight in named.items()}

    def loss():
        return sum(float(1 - w.abs().sum() / whole[name]) * (1 + i) for i, (name, w) in enumerate(named.items()))

    return sensitivity_ratios(named, pattern, target, loss)


@pytest.mark.parametrize("ratios_of", [global_ratios, ratios_by_sensitivity])
@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 4), Balanced(4), Balanced(4) & Block(4, 4)], ids=str)
@pytest.mark.parametrize("target", [0.3, 0.8, 0.95, 0.98])
def test_ratios_that_differ_by_layer_hit_the_target_and_keep_every_layer_alive(ratios_of, pattern, target, layers):
    ratios = ratios_of(layers, pattern, target)
    assert ratios.keys() == layers.keys()
    assert mean_ratio(ratios, layers) == pytest.approx(target, abs=1e-6)
    assert all(0 <= ratio < 1 for ratio in ratios.values())
    assert all(mask.any() for mask in make_masks(layers, pattern, ratios).values())


def test_global_ranking_takes_more_from_the_layer_with_more_small_weights():
    even = torch.linspace(0.9, 1.1, 64).reshape(8, 8)
    uneven = torch.cat([torch.linspace(0.001, 0.002, 32), torch.linspace(1, 1.1, 32)]).reshape(8, 8)
    ratios = global_ratios({"even": even / 10_000, "uneven": uneven}, Unstructured(), 0.25)  # scale does not matter
    assert ratios["even"] == pytest.approx(0, abs=0.02)
    assert ratios["uneven"] == pytest.approx(0.5, abs=0.02)


def test_global_ranking_leaves_something_of_a_layer_that_is_small_throughout():
    """Half the units of one layer carry nearly all of it: a ranking without a guard would take the whole other half."""
    spiky = torch.cat([torch.full((63,), 1e-6), torch.tensor([1.0])]).reshape(8, 8) * torch.linspace(1, 2, 64).view(
        8, 8
    )
    named = {"spiky": spiky, "even": torch.linspace(0.9, 1.1, 64).reshape(8, 8)}
    ratios = global_ratios(named, Unstructured(), 0.95)
    assert mean_ratio(ratios, named) == pytest.approx(0.95)
    assert all(mask.any() for mask in make_masks(named, Unstructured(), ratios).values())


def test_sensitive_layers_are_pruned_less_and_get_their_weights_back():
    named = {
        "sensitive": torch.linspace(1, 2, 100).reshape(10, 10),
        "robust": torch.linspace(1, 2, 100).reshape(10, 10),
    }
    before = {name: weight.clone() for name, weight in named.items()}
    ratios = sensitivity_ratios(
        named,
        Unstructured(),
        0.5,
        lambda: 10.0 * float((named["sensitive"] == 0).sum()) + float((named["robust"] == 0).sum()),
    )
    assert mean_ratio(ratios, named) == pytest.approx(0.5)
    assert ratios["robust"] > 0.85 and ratios["sensitive"] < 0.15
    assert all(torch.equal(named[name], before[name]) for name in named)


# --- When -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "target", "progress", "expected"),
    [
        ("one-shot", 0.9, 0.0, 0.9),
        ("one-shot", 0.9, 0.7, 0.9),
        ("gradual", 0.9, 0.0, 0.0),
        ("gradual", 0.9, 0.033, 0.0),  # a twentieth of two thirds is 0.0333
        ("gradual", 0.9, 0.034, 0.1283625),  # 0.9 * (1 - 0.95 ** 3)
        ("gradual", 0.8, 1 / 3, 0.7),  # 0.8 * (1 - 0.5 ** 3)
        ("gradual", 0.8, 0.666, 0.7999),  # 0.8 * (1 - 0.05 ** 3)
        ("gradual", 0.8, 2 / 3, 0.8),
        ("gradual", 0.8, 1.0, 0.8),
        ("iterative", 0.992, 0.0, 0.8),  # densities 0.2, 0.04, 0.008
        ("iterative", 0.992, 0.33, 0.8),
        ("iterative", 0.992, 0.34, 0.96),
        ("iterative", 0.992, 0.67, 0.992),
        ("iterative", 0.992, 1.0, 0.992),
    ],
)
def test_sparsity_due(schedule, target, progress, expected):
    assert sparsity_at(schedule, target, progress) == pytest.approx(expected, rel=1e-9)


@given(st.sampled_from(SCHEDULES), st.floats(0, 0.999), st.floats(0, 1), st.floats(0, 1))
def test_sparsity_due_never_falls_and_ends_at_the_target(schedule, target, one, other):
    earlier, later = sorted([one, other])
    assert 0 <= sparsity_at(schedule, target, earlier) <= sparsity_at(schedule, target, later) <= target
    assert sparsity_at(schedule, target, 1.0) == target


def test_gradual_schedule_has_twenty_steps_before_the_masks_freeze():
    assert len({sparsity_at("gradual", 0.9, step / 3000) for step in range(2000)}) == 20


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule 'linear' is unknown: use one-shot, gradual, iterative"):
        sparsity_at("linear", 0.9, 0.5)


# --- The baseline with a regularizer ----------------------------------------------------------------------------------


def test_group_lasso_by_hand_and_its_gradient_at_a_zero_block():
    weight = torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, -4.0, 0.0, 0.0]], requires_grad=True)
    value = group_lasso({"a": weight}, Block(2, 2))
    assert value.item() == pytest.approx(2 * 5, abs=1e-4)  # sqrt(4 weights) times the norm of (3, 4)
    value.backward()
    expected = torch.tensor([[2 * 3 / 5, 0, 0, 0], [0, -2 * 4 / 5, 0, 0]])
    torch.testing.assert_close(weight.grad, expected)


def test_group_lasso_adds_up_layers_and_sees_convolutions_as_masks_do():
    conv = torch.zeros(1, 2, 1, 2)
    conv[0, :, 0, 0] = torch.tensor([3.0, 4.0])  # both channels of one tap: one block in channels-last order
    linear = torch.tensor([[6.0, 8.0]])
    value = group_lasso({"conv": conv, "linear": linear}, Block(1, 2))
    assert value.item() == pytest.approx(math.sqrt(2) * (5 + 10), abs=1e-4)
    apart = group_lasso({"conv": conv}, Block(1, 2, order="channels_first"))
    assert apart.item() == pytest.approx(math.sqrt(2) * (3 + 4), abs=1e-4)
