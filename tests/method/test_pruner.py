"""A pruner in a loop of anyone: masks that hold, in time, of the right layers, and the same ones behind a stop."""

import io
import math
import multiprocessing
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, nn
from torch.nn.utils import parametrizations

from reprolib.patterns import Block, parse
from reprolib.pruning import SCHEDULES, Pruner, apply_masks, global_ratios, make_masks, prunable, sparsity_at
from reprolib.pruning import pruner as module

HYBRID = "Balanced(4) & Block(8, 8)"


def net(seed=0):
    """Two layers to prune, "2" and "5", between the ends "0" and "7"."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 4),
    )


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def train(model, optimizer, pruner, steps):
    """Train at the steps of these numbers, each on images of its own; yield behind each."""
    for step in steps:
        chance = torch.Generator().manual_seed(step)
        images, labels = torch.randn(4, 3, 8, 8, generator=chance), torch.randint(4, (4,), generator=chance)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        pruner.step()
        yield step


def pruned(model, names=("2", "5")):
    return {name: model.get_submodule(name).weight == 0 for name in names}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# --- In the loop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", ["nested", "refitted"])
@pytest.mark.parametrize("score", ["magnitude", "random"])
@settings(max_examples=12)
@given(
    pattern=st.sampled_from([HYBRID, "Unstructured()", "Block(8, 8)", "NM(2, 4)", "Vector(4)"]),
    schedule=st.sampled_from(SCHEDULES),
    target=st.floats(0.3, 0.95),
    steps=st.integers(1, 40),
)
def test_masks_are_those_of_the_schedule_made_by_hand(pattern, schedule, score, masks, target, steps):
    """Beside it, the same numbers are added to weights whose masks are made step by step, without a pruner."""
    model = net()
    named = {name: weight.detach().clone() for name, weight in prunable(model).items()}
    pruner = Pruner(model, pattern, target, steps, schedule=schedule, score=score, masks=masks, seed=7)
    ratios, due, by_hand = dict.fromkeys(named, target), None, {}
    for step in range(steps + 3):  # more than were told: the masks hold
        due_before, due = due, sparsity_at(schedule, target, min(step / steps, 1.0))
        if due != due_before:
            nesting = {"alive": by_hand, "targets": ratios} if masks == "nested" else {}
            by_hand = make_masks(named, parse(pattern), dict.fromkeys(named, due), score, 7, **nesting)
        apply_masks(named, by_hand)
        assert_same(pruner.masks, by_hand)
        assert_same(dict(prunable(model)), named)
        kept = sum(int(mask.sum()) for mask in by_hand.values())
        assert pruner.sparsity == pytest.approx(1 - kept / (16 * 72 + 32 * 64))
        chance = torch.Generator().manual_seed(step)
        for name, weight in prunable(model).items():  # as a step of an optimizer with momentum: pruned weights move
            moved = torch.randn(weight.shape, generator=chance)
            with torch.no_grad():
                weight += moved
            named[name] += moved
        apply_masks(named, by_hand)
        pruner.step()


def test_sparsity_rises_while_it_trains_and_ends_at_the_target():
    model = net()
    pruner = Pruner(model, "Unstructured()", sparsity=0.75, steps=30)
    assert pruner.sparsity == 0
    reached = []
    for _ in train(model, sgd(model), pruner, range(35)):
        reached.append(pruner.sparsity)
        assert_same(pruned(model), {name: ~mask for name, mask in pruner.masks.items()})
    assert 0 < reached[0] < reached[9] < reached[14] < 0.75 and reached == sorted(reached)
    assert set(reached[19:]) == {0.75}


def test_momentum_alone_would_bring_pruned_weights_back():
    model = net()
    pruner = Pruner(model, "Unstructured()", 0.75, 1, schedule="one-shot")
    optimizer = sgd(model)
    gone = ~pruner.masks["5"]
    for _ in train(model, optimizer, pruner, range(2)):
        assert not model[5].weight[gone].any()
    optimizer.step()
    assert model[5].weight[gone].any()


def test_phase_is_the_share_of_the_steps_in_which_masks_change():
    pruner = Pruner(net(), "Unstructured()", 0.75, 40, phase=0.25)
    sparsities = []
    for _ in range(40):
        pruner.step()
        sparsities.append(pruner.sparsity)
    assert sparsities[8] < 0.75 and sparsities[9:] == [0.75] * 31


def test_one_shot_prunes_at_once():
    model = net()
    dense = {name: weight.detach().clone() for name, weight in prunable(model).items()}
    pruner = Pruner(model, Block(8, 8), 0.75, 10, schedule="one-shot")
    assert_same(pruner.masks, make_masks(dense, Block(8, 8), dict.fromkeys(dense, 0.75)))
    assert_same(pruned(model), {name: ~mask for name, mask in pruner.masks.items()})


def test_masks_are_made_only_where_something_else_is_due(monkeypatch):
    made = []

    def watched(named, pattern, due, *args, **nesting):
        made.append(due["2"])
        return make_masks(named, pattern, due, *args, **nesting)

    monkeypatch.setattr(module, "make_masks", watched)
    pruner = Pruner(net(), "Unstructured()", 0.75, 300, schedule="iterative")
    for _ in range(310):
        pruner.step()
    ahead, *made = made
    assert ahead == 0.75, "a look at the masks of the end, for the warning"
    assert made == pytest.approx([1 - 0.25 ** (1 / 3), 1 - 0.25 ** (2 / 3), 0.75])


def test_the_halves_of_a_step_do_what_it_does():
    (whole, halves) = (Pruner(net(), "Unstructured()", 0.75, 10) for _ in range(2))
    for _ in range(10):
        whole.step()
        halves.hold()
        halves.advance()
        assert_same(whole.masks, halves.masks)


def test_masks_that_are_given_out_are_copies():
    pruner = Pruner(net(), "Unstructured()", 0.75, 1, schedule="one-shot")
    pruner.masks["2"].fill_(True)
    pruner.state_dict()["masks"]["2"].fill_(True)
    assert pruner.masks["2"].sum() == 288


# --- Which layers, and how much of each -------------------------------------------------------------------------------


def test_table_of_the_layers_tells_what_is_taken_and_why_others_are_left():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv1d(8, 8, 2), nn.Linear(8, 6), nn.Linear(6, 4))
    pruner = Pruner(model, "Unstructured()", 0.75, 10, schedule="iterative")
    end = "layer, dense unless layers='all'"
    conv1d = "a Conv1d, which patterns can't prune: they take Conv2d and Linear layers"
    columns = ["layer", "shape", "weights", "taken", "target_sparsity", "sparsity", "reason"]
    rows = [
        ("0", "8×3×3×3", 216, False, 0.0, 0.0, f"the first {end}"),
        ("1", "8×8×2", 128, False, 0.0, 0.0, conv1d),
        ("2", "6×8", 48, True, 0.75, pytest.approx(18 / 48), ""),  # 1 - 0.25 ** (1 / 3) is 0.37: of 48, 17.8
        ("3", "4×6", 24, False, 0.0, 0.0, f"the last {end}"),
    ]
    table = pruner.describe()
    assert table.reset_index().to_dict("records") == [dict(zip(columns, row, strict=True)) for row in rows]
    assert table.loc[table["taken"], "weights"].sum() == 48


@pytest.mark.parametrize(
    ("layers", "taken"),
    [("inner", ["2", "5"]), ("all", ["0", "2", "5", "7"]), (["5"], ["5"]), (iter(["7", "0"]), ["0", "7"])],
)
def test_layers_are_taken_as_asked_in_the_order_of_the_network(layers, taken):
    model = net()
    pruner = Pruner(model, "Unstructured()", 0.5, 1, layers=layers, schedule="one-shot")
    assert list(pruner.masks) == list(pruner.targets) == taken
    ends = pruned(model, ["0", "2", "5", "7"])
    assert [name for name, gone in ends.items() if gone.any()] == taken


def test_layers_inside_attention_are_left_with_it():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    table = Pruner(model, "Unstructured()", 0.5, 1, layers="all").describe()
    assert table["taken"].to_dict() == {
        f"layers.{i}.{name}": name != "self_attn" for i in (0, 1) for name in ("self_attn", "linear1", "linear2")
    }
    assert table.loc["layers.0.self_attn", ["shape", "weights"]].tolist() == ["24×8, 8×8", 256]


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 0, 1, 0)))


def test_layer_with_a_forward_of_its_own_is_taken_when_it_is_named():
    model = nn.Sequential(Padded(3, 4, 3), nn.Conv2d(4, 4, 3))
    table = Pruner(model, "Unstructured()", 0.5, 1, layers="all").describe()
    assert table["taken"].tolist() == [False, True] and "Padded with a forward of its own" in table["reason"]["0"]
    assert Pruner(model, "Unstructured()", 0.5, 1, layers=["0"], schedule="one-shot").masks["0"].sum() == 54


def tied():
    model = net()
    model.append(nn.Linear(32, 4))
    model[8].weight = model[7].weight
    return model


def normed():
    model = net()
    parametrizations.weight_norm(model[5])
    return model


@pytest.mark.parametrize(
    ("model", "layers", "message"),
    [
        (tied, "all", r"layer 7 shares its memory \(7.weight, 8.weight\).*nn.Parameter\(layer.weight"),
        (normed, "inner", "layer 5 is computed anew .*remove_parametrizations"),
    ],
)
def test_weight_for_which_a_mask_would_not_hold_is_refused_if_it_is_taken(model, layers, message):
    with pytest.raises(ValueError, match=message):
        Pruner(model(), "Unstructured()", 0.5, 1, layers=layers)
    assert list(Pruner(model(), "Unstructured()", 0.5, 1, layers=["2"]).masks) == ["2"]


def test_weight_that_is_computed_anew_later_is_refused_then():
    model = net()
    pruner = Pruner(model, "Unstructured()", 0.5, 1)
    parametrizations.spectral_norm(model[5])
    with pytest.raises(ValueError, match="layer 5 is computed anew"):
        pruner.step()


def test_global_ratios_are_those_of_the_network_at_the_start():
    model = net()
    expected = global_ratios(prunable(model), parse(HYBRID), 0.75)
    assert Pruner(model, HYBRID, 0.75, 10, ratios="global").targets == expected
    assert expected["2"] != expected["5"]


def test_each_layer_may_have_its_own_ratio():
    ratios = {"5": 0.75, "2": 0.5}
    mean = (0.75 * 2048 + 0.5 * 1152) / 3200
    pruner = Pruner(net(), "Unstructured()", mean, 1, ratios=ratios, schedule="one-shot")
    assert [int(mask.sum()) for mask in pruner.masks.values()] == [576, 512]
    assert pruner.sparsity == pytest.approx(mean)
    ends = Pruner(net(), "Unstructured()", 0.5, 1, layers={"0": 0.5}, ratios={"0": 0.5})
    assert ends.targets == {"0": 0.5}


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "net"}, "the model must be a torch.nn.Module, not 'net'"),
        ({"model": nn.Flatten()}, "nothing to prune: of 0 layers"),
        ({"model": nn.Linear(2, 2)}, "nothing to prune: of 1 layers .* is the last layer, dense unless layers='all'"),
        ({"pattern": 4}, "pattern must be one, or its text form .*, not 4"),
        ({"pattern": "Blok(4, 4)"}, "unknown pattern 'Blok'"),
        ({"sparsity": 1.0}, r"sparsity must lie in \[0, 1\), not 1.0"),
        ({"sparsity": -0.5}, "sparsity must be a number of at least 0, not -0.5"),
        ({"sparsity": math.nan}, "sparsity must be a number"),
        ({"sparsity": "0.9"}, "sparsity must be a number of at least 0, not '0.9'"),
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"steps": 1.5}, "steps must be a whole number of at least 1, not 1.5"),
        ({"layers": "most"}, "layers 'most' is unknown: use inner, all"),
        ({"layers": ["2", "3"]}, r"or names of layers \(0, 2, 5, 7\); no such layer: '3'"),
        ({"layers": None}, "layers must be 'inner' or 'all', or names .*; no such layer: None"),
        ({"layers": []}, "nothing to prune: .*0 is not named in layers"),
        ({"schedule": "linear"}, "schedule 'linear' is unknown: use one-shot, gradual, iterative"),
        ({"phase": 1.5}, r"phase must lie in \(0, 1\], not 1\.5"),
        ({"score": "size"}, "score 'size' is unknown: use magnitude, random"),
        ({"masks": "free"}, "masks 'free' is unknown: use nested, refitted"),
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"ratios": "sensitivity"}, "ratios 'sensitivity' is unknown: use uniform, global"),
        ({"ratios": "global", "sparsity": 0.999}, "is more than ratios that differ by layer can give"),
        ({"ratios": {"2": 0.5, "7": 0.5}}, r"ratios must name the layers that are taken.*: they differ in '5', '7'"),
        ({"ratios": {"2": 0.5, "5": 1}}, r"ratio of layer 5 must lie in \[0, 1\), not 1"),
        ({"ratios": {"2": 0.5, "5": None}}, "ratio of layer 5 must be a number of at least 0, not None"),
        ({"ratios": {"2": 0.5, "5": 0.75}}, "prune 0.6600 of all weights, not sparsity=0.5: give 0.6600"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changes, message):
    arguments = {"model": net(), "pattern": HYBRID, "sparsity": 0.5, "steps": 10} | changes
    with pytest.raises(ValueError, match=message):
        Pruner(**arguments)


def test_layers_that_will_lose_most_of_their_outputs_are_named():
    """A depthwise layer of 16 x 9 has four blocks of 4 x 9: at 90 % one is left, so that 4 outputs keep weights."""
    depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), depthwise, nn.Conv2d(16, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    message = r"Block\(4, 9\) will leave weights to few outputs of 1 \(4 of 16\); .* layers="
    with pytest.warns(UserWarning, match=message) as warned:
        Pruner(model, Block(4, 9), 0.8, 10, layers=["1"])
    assert warned[0].filename == __file__, "the warning points at the line that built the pruner"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pruner(model, Block(4, 9), 0.5, 10, layers=["1"])
        Pruner(model, "Unstructured()", 0.8, 10, layers=["1"])


def test_layer_that_patterns_cannot_prune_is_refused_when_it_is_named():
    model = nn.Sequential(nn.Conv1d(2, 2, 2), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"layer 0 is a Conv1d, which patterns can't prune.*; leave it out of layers"):
        Pruner(model, "Unstructured()", 0.5, 1, layers=["0", "1"])


# --- Types, layouts, wrappers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_masks_are_the_same_in_every_type_and_layout(dtype):
    plain, other = net().to(dtype).float(), net().to(dtype, memory_format=torch.channels_last)
    masks = [Pruner(model, HYBRID, 0.75, 9, schedule="iterative").masks for model in (plain, other)]
    assert_same(*masks)
    assert other[2].weight.dtype == dtype and other[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert_same(pruned(other), {name: ~mask for name, mask in masks[0].items()})


def test_under_autocast_with_scaled_losses():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    pruner, optimizer = Pruner(model, "Unstructured()", 0.75, 10), sgd(model)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(4, 8)).square().mean()
            if step == 3:
                loss = loss * math.inf  # a step that the scaler leaves out
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        pruner.step()
        assert_same(pruned(model, ["1"]), {name: ~mask for name, mask in pruner.masks.items()})
    assert pruner.sparsity == 0.75


def test_network_that_is_moved_or_gets_other_parameters_stays_pruned():
    model = net()
    pruner = Pruner(model, "Unstructured()", 0.75, 1, schedule="one-shot")
    model.load_state_dict({name: tensor.clone().fill_(1) for name, tensor in model.state_dict().items()}, assign=True)
    pruner.step()
    assert_same(pruned(model), {name: ~mask for name, mask in pruner.masks.items()})
    model.half()
    pruner.step()
    model.to("meta")  # the one other device that every machine has
    pruner.step()
    assert pruner.masks["2"].is_meta


def test_names_and_masks_are_those_of_the_network_without_wrappers():
    expected = Pruner(net(), HYBRID, 0.75, 9, schedule="iterative").masks
    nested, data_parallel = net(), nn.DataParallel(net())
    nested[5] = torch.compile(nested[5], backend="eager")
    for model in (torch.compile(net(), backend="eager"), data_parallel, torch.compile(data_parallel), nested):
        assert_same(Pruner(model, HYBRID, 0.75, 9, schedule="iterative").masks, expected)


def test_compiled_before_or_after_it_trains_to_the_same_bits():
    networks = []
    for compiled_first in (True, False):
        model = net()
        if compiled_first:
            compiled = torch.compile(model, backend="eager")
            pruner = Pruner(compiled, HYBRID, 0.75, 4)
        else:
            pruner = Pruner(model, HYBRID, 0.75, 4)
            compiled = torch.compile(model, backend="eager")
        list(train(compiled, sgd(model), pruner, range(5)))
        assert_same(pruned(model), {name: ~mask for name, mask in pruner.masks.items()})
        networks.append(model.state_dict())
    assert_same(*networks)


def as_rank(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = net(seed=rank)  # other weights: the masks and ratios of rank 0 hold all the same
    apart = Pruner(model, HYBRID, 0.75, 9, schedule="iterative", ratios="global")
    model = nn.parallel.DistributedDataParallel(net())
    pruner = Pruner(model, HYBRID, 0.75, 4)
    chance = torch.Generator().manual_seed(rank)
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():  # not synchronised: what is between the ranks is the pruner alone
                parameter += torch.randn(parameter.shape, generator=chance)
        pruner.step()
    torch.save([apart.state_dict(), pruner.state_dict(), model.module.state_dict()], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_masks_of_rank_0_hold_on_all_ranks(tmp_path):
    context = multiprocessing.get_context("fork")  # torch is loaded already
    ranks = [context.Process(target=as_rank, args=(rank, tmp_path), daemon=True) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = Pruner(net(), HYBRID, 0.75, 9, schedule="iterative", ratios="global").state_dict()
    for state in (one[0], other[0]):
        assert_same(state["masks"], alone["masks"])
        assert state["targets"] == alone["targets"]
    assert_same(one[1]["masks"], other[1]["masks"])
    assert not torch.equal(one[2]["5.weight"], other[2]["5.weight"])
    for state in (one[2], other[2]):
        assert torch.equal(state["5.weight"] == 0, ~one[1]["masks"]["5"])


# --- Stopping and going on --------------------------------------------------------------------------------------------


def saved(state):
    """What a file gives back that holds this state."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", [0, 1, 5, 11, 13])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "one-shot"},
        {"schedule": "iterative", "score": "random"},
        {"masks": "refitted"},
        {"ratios": "global"},
    ],
    ids=str,
)
def test_stopped_training_goes_on_to_the_same_bits(stop, options):
    def begin():
        model = net()
        return model, sgd(model), Pruner(model, HYBRID, 0.75, 12, **options)

    whole, pieces = begin(), begin()
    list(train(*whole, range(15)))
    list(train(*pieces, range(stop)))
    states = saved([part.state_dict() for part in pieces])
    again = begin()
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    assert_same(again[2].masks, pieces[2].masks)
    list(train(*again, range(stop, 15)))
    assert_same(again[0].state_dict(), whole[0].state_dict())
    assert_same(again[2].masks, whole[2].masks)


def test_masks_of_a_state_hold_until_others_are_due(monkeypatch):
    """Masks that are made again from weights that went on would be others."""
    pruner, again = (Pruner(net(), HYBRID, 0.75, 12, schedule="iterative", masks="refitted") for _ in range(2))
    for _ in range(4):
        pruner.step()
    again.load_state_dict(pruner.state_dict())
    monkeypatch.setattr(module, "make_masks", lambda *args: pytest.fail("masks are made anew"))
    for _ in range(3):
        again.step()


def test_masks_of_a_state_are_applied_to_the_network():
    pruner = Pruner(net(), "Unstructured()", 0.75, 1, schedule="one-shot")
    other = net(seed=1)
    Pruner(other, "Unstructured()", 0.75, 1, schedule="one-shot").load_state_dict(pruner.state_dict())
    assert all(pruned(other)[name][~mask].all() for name, mask in pruner.masks.items())


OTHERS = {
    "pattern": {"pattern": "Block(8, 8)"},
    "sparsity": {"sparsity": 0.5},
    "steps": {"steps": 13},
    "layers": {"layers": ["2"]},
    "schedule": {"schedule": "iterative"},
    "phase": {"phase": 0.5},
    "ratios": {"ratios": {"2": 0.75, "5": 0.75}},
    "score": {"score": "random"},
    "masks": {"masks": "refitted"},
    "seed": {"seed": 1},
}


@pytest.mark.parametrize("key", OTHERS)
def test_state_of_another_pruner_is_refused(key):
    arguments = {"pattern": HYBRID, "sparsity": 0.75, "steps": 12}
    pruner, other = Pruner(net(), **arguments), Pruner(net(seed=1), **arguments | OTHERS[key])
    for _ in range(6):
        other.step()
    before = pruner.masks
    with pytest.raises(ValueError, match=f"of a pruner with {key}=.*, and this one has {key}=.*: build it with"):
        pruner.load_state_dict(other.state_dict())
    assert_same(pruner.masks, before)


def test_state_of_a_version_without_phases_goes_on():
    pruner = Pruner(net(), HYBRID, 0.75, 12)
    state = pruner.state_dict()
    del state["of"]["phase"]
    pruner.load_state_dict(state)
    with pytest.raises(ValueError, match=r"of a pruner with phase=0\.666.*, and this one has phase=0\.5"):
        Pruner(net(), HYBRID, 0.75, 12, phase=0.5).load_state_dict(state)


def test_state_of_another_network_is_refused():
    narrow = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 4))
    wide = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 16), nn.Linear(16, 4))
    state = Pruner(wide, "Unstructured()", 0.5, 1).state_dict()
    with pytest.raises(ValueError, match="holds no mask for layer 1, whose weight is 8×4"):
        Pruner(narrow, "Unstructured()", 0.5, 1).load_state_dict(state)


@pytest.mark.parametrize("state", [{}, None, {"state": {}, "param_groups": []}], ids=str)
def test_what_is_no_state_of_a_pruner_is_refused(state):
    with pytest.raises(ValueError, match="this is not the state of a Pruner"):
        Pruner(net(), HYBRID, 0.5, 1).load_state_dict(state)
