"""Which layers are pruned, how much of each, and when."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reprolib.models import vgg16
from reprolib.patterns import NM, VNM, Balanced, Block, Hybrid, Unstructured, Vector
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


@pytest.mark.parametrize("count", [0, 1, 2])
def test_network_with_nothing_to_prune_is_refused(count):
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(count)))
    with pytest.raises(ValueError, match=f"nothing to prune: of {count} convolutions and linear layers .* prune_ends"):
        prunable(model)


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


TILING = [Balanced(4) & Block(4, 4), Hybrid(Balanced(4), Block(4, 8), split=0.25), Balanced(8) & Block(8, 8)]
STEPPED = [
    Unstructured(),
    Block(4, 4),
    Block(3, 5, norm="mean"),
    Balanced(8),
    Balanced(5),
    NM(2, 4),
    VNM(4, 2, 8),
    VNM(3, 1, 5),
    Vector(4),
    *TILING,
    Hybrid(Balanced(8), Block(8, 8), split=0.75),
    Hybrid(Balanced(4), Block(8, 8), rescore=True),
    Balanced(16) & Block(4, 4),  # banks that straddle blocks
    Unstructured() & Block(4, 4),
    Vector(4) & Block(8, 8),
    NM(2, 4) & Block(4, 4),
    (Balanced(4) & Block(4, 4)) & Vector(8),
]


@pytest.mark.parametrize("pattern", STEPPED, ids=str)
@settings(max_examples=25)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3),
    ragged=st.booleans(),
    target=st.floats(0.3, 0.99),
    schedule=st.sampled_from(SCHEDULES),
    ratio=st.sampled_from(["uniform", "global", "sensitivity"]),
    score=st.sampled_from(["magnitude", "random"]),
    seed=st.integers(0, 99),
)
def test_masks_only_shrink_and_end_like_one_shot(pattern, shapes, ragged, target, schedule, ratio, score, seed):
    """What is pruned stays pruned, whatever the weights do in between; in the end no kept weight is zero."""
    chance = torch.Generator().manual_seed(seed)
    shapes = [(8 * rows + 3 * ragged, 16 * cols + 5 * ragged) for rows, cols in shapes]
    named = {str(i): torch.randn(shape, generator=chance) for i, shape in enumerate(shapes)}
    ratios = {"uniform": uniform_ratios, "global": global_ratios, "sensitivity": ratios_by_sensitivity}[ratio](
        *((named, target) if ratio == "uniform" else (named, pattern, target))
    )
    masks, due = {}, None
    for step in range(31):
        due_before, due = due, {name: sparsity_at(schedule, r, step / 30) for name, r in ratios.items()}
        if due == due_before:
            continue
        before, masks = masks, make_masks(named, pattern, due, score, seed, alive=masks, targets=ratios)
        assert all((masks[name] <= before[name]).all() for name in before)
        apply_masks(named, masks)
        for weight in named.values():  # what training does to the weights that are left
            weight.mul_(1 + torch.randn(weight.shape, generator=chance)).add_(weight.sign(), alpha=1e-3)
    assert all((named[name][mask] != 0).all() for name, mask in masks.items())
    others = {name: torch.randn(weight.shape, generator=chance) for name, weight in named.items()}
    for name, at_once in make_masks(others, pattern, ratios).items():
        if isinstance(pattern, VNM):  # units of two kinds
            assert masks[name].sum() == at_once.sum()
        elif not isinstance(pattern, Hybrid):
            units, expected = (pattern.unit_scores(others[name], m).isfinite().sum() for m in (masks[name], at_once))
            assert units == expected
        elif pattern in TILING and not ragged:
            assert masks[name].sum() == at_once.sum()
        else:  # where the halves don't tile, the count of weights is searched, to within a unit of the coarse half
            unit = pattern.coarse.units_with(torch.arange(at_once.numel()).view_as(at_once) == 0, others[name]).sum()
            assert abs(int(masks[name].sum()) - int(at_once.sum())) <= unit


@pytest.mark.parametrize("target", [0.9, 0.95, 0.98])
@pytest.mark.parametrize(
    "pattern",
    [Balanced(8) & Block(8, 8), Balanced(16) & Block(8, 8), Unstructured() & Block(8, 8), Vector(8) & Block(16, 16)],
    ids=str,
)
def test_in_steps_each_half_keeps_its_share(pattern, target):
    """Weights of blocks that are gone must not count as those that the fine half has pruned."""
    named = {"a": torch.randn(64, 576, generator=torch.Generator().manual_seed(0))}
    masks = {}
    for step in range(61):
        due = {"a": sparsity_at("gradual", target, step / 60)}
        masks = make_masks(named, pattern, due, alive=masks, targets={"a": target})
        apply_masks(named, masks)
    density_coarse = pattern.coarse.units_with(masks["a"], named["a"]).float().mean().item()
    assert density_coarse == pytest.approx((1 - target) ** 0.5, rel=0.3)


def test_masks_from_the_weights_alone_bring_blocks_back():
    """The rule of version 0.1, kept for comparison: where the fine half drops a step, pruned blocks return, as zeros"""
    named = {"a": torch.randn(64, 1152, generator=torch.Generator().manual_seed(0))}
    pattern, target = Balanced(8) & Block(8, 8), 0.98
    masks, back = {}, 0
    for step in range(301):
        due = {"a": sparsity_at("gradual", target, step / 300)}
        before, masks = masks, make_masks(named, pattern, due)
        back += int((masks["a"] & ~before["a"]).sum()) if before else 0
        apply_masks(named, masks)
    assert back > 0 and (named["a"][masks["a"]] == 0).any()


def test_masks_of_other_layers_cannot_be_the_step_before():
    named = {"a": torch.rand(4, 4)}
    with pytest.raises(ValueError, match=r"masks of \['b'\] can't be the step before masks of \['a'\]"):
        make_masks(named, Unstructured(), {"a": 0.5}, alive={"b": torch.ones(4, 4, dtype=torch.bool)})


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


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("when", "where"), [(0, "of the dense network"), (3, "with layer a at 70 %")])
def test_sensitivities_from_a_loss_that_is_not_finite_are_refused(loss, when, where):
    named, calls = {"a": torch.rand(4, 4), "b": torch.rand(4, 4)}, iter(range(99))
    with pytest.raises(ValueError, match=f"the loss {where} is {loss}"):
        sensitivity_ratios(named, Unstructured(), 0.5, lambda: loss if next(calls) == when else 1.0)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_layers_get_their_weights_back_where_measuring_is_stopped(stop):
    named, calls = {"a": torch.rand(4, 4), "b": torch.rand(4, 4)}, iter(range(99))
    before = {name: weight.clone() for name, weight in named.items()}

    def loss():
        if next(calls) == 13:
            raise stop
        return 1.0

    with pytest.raises(stop):
        sensitivity_ratios(named, Unstructured(), 0.5, loss)
    assert all(torch.equal(named[name], before[name]) for name in named)


@pytest.mark.parametrize("ratios_of", [global_ratios, ratios_by_sensitivity])
def test_target_beyond_the_bound_of_each_layer_is_refused(ratios_of, layers):
    with pytest.raises(ValueError, match=r"99\.99 % is more than .* stop at 99\.5 % in each layer: use uniform"):
        ratios_of(layers, Unstructured(), 0.9999)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_global_ranking_is_the_same_for_halves(scale, layers):
    halves = {name: (scale * weight).half() for name, weight in layers.items()}
    wide = {name: weight.double() for name, weight in halves.items()}
    assert global_ratios(halves, Block(4, 4), 0.9) == global_ratios(wide, Block(4, 4), 0.9)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_group_lasso_has_a_gradient_in_every_type(dtype):
    weight = torch.cat([torch.zeros(2, 2), torch.full((2, 2), 200.0)]).to(dtype).requires_grad_()
    value = group_lasso({"a": weight}, Block(2, 2))
    value.backward()
    assert value.item() == pytest.approx(2 * 400)  # fp16 would overflow at the squares
    assert weight.grad.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
