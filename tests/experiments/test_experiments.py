"""An experiment has one id, is computed once, and its row tells everything about the network it leaves."""

import copy
import json
import shutil
import threading
import time
from dataclasses import fields, replace

import pytest
import torch

from reprolib import models, pruning, training
from reprolib.experiments import Channels, Dense, Pruned, check_target, load_model, run, running, take_over
from reprolib.files import tensors
from reprolib.files.deadline import OutOfTime
from reprolib.patterns import Balanced, Block, parse
from reprolib.training import Recipe, data

DENSE = Dense("noisy-digits", Recipe(epochs=1, batch_size=32, lr=0.02), width=1 / 16)
HYBRID = Pruned(DENSE, "Balanced(4) & Block(4, 4)", 0.75, epochs=2)
CHANNELS = Channels(DENSE, 0.5, epochs=1)


@pytest.fixture(autouse=True)
def few_images(few_digits, monkeypatch):
    """Every data set is 96 digits: a network trains in well under a second."""
    monkeypatch.setattr(data, "load", lambda name: few_digits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run folders that the tests of this module share, as the methods of a sweep do."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def forbid_training(monkeypatch):
    """From its call on, training a network fails the test."""

    def fit(*args, label, **kwargs):
        pytest.fail(f"{label} is trained where nothing should be")

    return lambda: monkeypatch.setattr(training, "fit", fit)


def zeros(experiment, folder):
    """Count of zero weights in the stored network, over its convolutions and linear layers."""
    stored = tensors.read(folder / experiment.run_id / "weights.safetensors")
    return sum(int((tensor == 0).sum()) for tensor in stored.values() if tensor.dim() in (2, 4))


# --- Identity ---------------------------------------------------------------------------------------------------------


def test_ids_are_readable_and_do_not_change():
    """A changed id would orphan the results of everyone who has some."""
    assert DENSE.run_id == "noisy-digits-vgg16x0.0625-seed0-dense-91284e93"
    assert HYBRID.run_id == "noisy-digits-vgg16x0.0625-seed0-hybrid-75pct-f8d87c82"
    block = replace(HYBRID, pattern="Block(4, 4)")
    assert block.run_id == "noisy-digits-vgg16x0.0625-seed0-block-75pct-712f6eb8"
    one_shot = replace(HYBRID, schedule="one-shot")
    assert one_shot.run_id == "noisy-digits-vgg16x0.0625-seed0-hybrid-75pct-d4d2fdfa"


def test_ids_of_own_data_and_networks_are_readable_and_tell_them_apart():
    recipe = Recipe(epochs=1)
    own = [Dense(f"folder:{path}", recipe, model="nets:small") for path in ("a/pets@64", "b/pets@64", "a/pets@32")]
    assert own[0].run_id == "pets-64-nets-small-seed0-dense-4378f87f"
    assert own[0].label == "pets-64, seed 0, dense"
    assert len({e.run_id for e in own}) == 3 and len({e.origin for e in own}) == 2
    assert Dense("cifar10", recipe, 0.25, model="resnet18").origin == "cifar10-resnet18x0.25-seed0"
    named = Dense("mine:pets+flip", recipe)
    assert Pruned(named, "Block(4, 4)", 0.9, 1).run_id.startswith("mine-pets-flip-vgg16x1-seed0-block-90pct-")


def test_no_record_of_the_refitting_rule_stands_for_a_nested_one():
    """What version 0.1 called these hybrids, whose masks were refitted without a word in the record."""
    old = {"noisy-digits-vgg16x0.0625-seed0-hybrid-75pct-2defd085"}
    new = {HYBRID.run_id, replace(HYBRID, masks="refitted").run_id}
    assert len(old | new) == 3


def test_spelling_of_the_pattern_does_not_change_the_id():
    assert replace(HYBRID, pattern="Balanced(bank=4)&Block(4, cols=4)").run_id == HYBRID.run_id
    assert replace(HYBRID, pattern="Hybrid(Balanced(4), Block(4, 4), split=0.5)") == HYBRID
    spellings = (f"Hybrid(Balanced(4), Block(4, 4), split={split})" for split in ("1", "1.0"))
    assert len({replace(HYBRID, pattern=pattern).run_id for pattern in spellings}) == 1
    assert replace(DENSE, hidden=[]).run_id == DENSE.run_id
    assert replace(HYBRID, sparsity=0).run_id == replace(HYBRID, sparsity=0.0).run_id
    for name in ("lr", "weight_decay"):
        ids = {replace(DENSE, recipe=replace(DENSE.recipe, **{name: value})).run_id for value in (1, 1.0)}
        assert len(ids) == 1
    assert replace(DENSE, width=1).run_id == replace(DENSE, width=1.0).run_id
    assert replace(HYBRID, sparsity=-0.0).run_id == replace(HYBRID, sparsity=0.0).run_id
    at_once = replace(HYBRID, schedule="one-shot")
    assert replace(at_once, masks="refitted") == at_once  # no step in which they could differ


LIFTS = {"distillation": 0.9, "pruning_phase": 1 / 3, "lr_factor": 2.0}
CHANGES = {
    Recipe: {
        "epochs": 2,
        "batch_size": 16,
        "lr": 0.2,
        "weight_decay": 0.0,
        "precision": "bf16",
        "label_smoothing": 0.1,
    },
    Dense: {
        "dataset": "cifar10",
        "recipe": Recipe(epochs=9),
        "width": 0.125,
        "hidden": (8,),
        "seed": 1,
        "images": 9,
        "model": "resnet20",
    },
    Pruned: {
        "dense": replace(DENSE, seed=1),
        "pattern": "Balanced(4) & Block(4, 8)",
        "sparsity": 0.8,
        "epochs": 3,
        "score": "random",
        "schedule": "one-shot",
        "ratios": "global",
        "retraining": "fine-tuning",
        "group_lasso": 1e-4,
        "prune_ends": True,
        "masks": "refitted",
        "distillation": 0.9,
        "pruning_phase": 0.5,
        "lr_factor": 2.0,
        "permuted": True,
    },
    Channels: {"dense": replace(DENSE, seed=1), "sparsity": 0.8, "epochs": 3},
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, f.name) for kind in CHANGES for f in fields(kind)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_every_field_changes_the_id(kind, name):
    changed = {name: CHANGES[kind][name]}
    if kind is Recipe:
        before, after = DENSE, replace(DENSE, recipe=replace(DENSE.recipe, **changed))
    elif kind is Dense:
        before = replace(DENSE, width=1.0)  # narrow networks of other kinds are refused
        after = replace(before, **changed)
    elif kind is Channels:
        before = CHANNELS
        after = replace(before, **changed)
    else:
        before = replace(HYBRID, pattern="Block(4, 4)")  # group lasso takes blocks alone
        after = replace(before, **changed)
    assert after.run_id != before.run_id


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({}, "hybrid"),
        ({"score": "random"}, "random-hybrid"),
        ({"masks": "refitted"}, "refitted-hybrid"),
        ({"pattern": "Vector(4)"}, "vector"),
        ({"pattern": "Block(4, 4)", "group_lasso": 1e-4}, "block-group-lasso"),
        ({"distillation": 0.9}, "hybrid-distilled"),
        ({"pruning_phase": 0.3, "lr_factor": 2.0}, "hybrid-short-phase-high-lr"),
        ({"permuted": True, "pattern": "Block(4, 4)"}, "block-permuted"),
        (LIFTS | {"permuted": True}, "hybrid+"),
        (LIFTS, "hybrid-distilled-short-phase-high-lr"),
        (LIFTS | {"pattern": "Unstructured()"}, "unstructured+"),
        ({"pattern": "Block(4, 4, covered=True)"}, "block-covered"),
        (LIFTS | {"permuted": True, "pattern": "Block(4, 4, covered=True)"}, "block+"),
    ],
)
def test_method_names_the_pattern_and_what_sets_it_apart(changes, method):
    assert replace(HYBRID, **changes).method == method


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "Blok(4, 4)"}, "unknown pattern 'Blok'"),
        ({"sparsity": 1.0}, r"sparsity must lie in \[0, 1\), not 1\.0: 0\.9 prunes nine weights of ten"),
        ({"score": "gradient"}, "score 'gradient' is unknown: use magnitude, random"),
        ({"schedule": "slow"}, "schedule 'slow' is unknown: use one-shot, gradual, iterative"),
        ({"ratios": "global", "sparsity": 0.9999}, r"99\.99 % is more than ratios that differ by layer can give"),
        ({"ratios": "local"}, "ratios 'local' is unknown: use uniform, global, sensitivity"),
        ({"distillation": 1.5}, r"distillation must lie in \[0, 1\], not 1\.5"),
        ({"pruning_phase": 0.0}, r"phase must lie in \(0, 1\], not 0\.0"),
        (
            {"pruning_phase": 0.5, "schedule": "iterative"},
            "pruning_phase is for the gradual schedule, not for iterative",
        ),
        ({"lr_factor": 0.0}, "lr_factor must be more than 0"),
        (
            {"permuted": True, "pattern": "Vector(4)"},
            r"channels can be ordered for blocks .* Vector\(4\) is something else",
        ),
        ({"retraining": "none"}, "retraining 'none' is unknown: use lr-rewinding, fine-tuning"),
        ({"group_lasso": 1e-4}, r"group_lasso shrinks blocks, and Balanced\(4\) & Block\(4, 4\) has none: use .*Block"),
    ],
)
def test_bad_experiment_is_refused_before_it_runs(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(HYBRID, **changes)


WRONG = {"none": None, "text": "2", "flag": True, "list": [2], "nan": float("nan"), "negative": -1}


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, f.name) for kind in (DENSE.recipe, DENSE, HYBRID, CHANNELS) for f in fields(kind)],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else x,
)
def test_no_field_takes_a_value_of_another_kind(kind, name, value):
    """`prune_ends: "false"` must not prune the ends, nor `epochs: yes` train one epoch."""
    if (name, value) in [("prune_ends", True), ("permuted", True), ("hidden", [2])]:
        pytest.skip("the right kind")
    with pytest.raises(ValueError, match=name.replace("dataset", "data set")):
        replace(kind, **{name: value})


def test_unknown_data_set_is_refused_before_it_runs():
    with pytest.raises(ValueError, match="unknown data set 'mnist': known are noisy-digits, cifar10, cifar100"):
        replace(DENSE, dataset="mnist")


# --- Computed once ----------------------------------------------------------------------------------------------------


def test_second_request_reads_the_record(tmp_path, forbid_training):
    first = run(HYBRID, tmp_path)
    weights = tmp_path / HYBRID.run_id / "weights.safetensors"
    written = weights.stat().st_mtime_ns
    forbid_training()
    second = run(HYBRID, tmp_path)
    assert second == json.loads(json.dumps(first))
    assert weights.stat().st_mtime_ns == written


def test_two_that_ask_at_once_train_once(tmp_path, monkeypatch):
    fit, trained, together = training.fit, [], threading.Barrier(2)

    def slow_fit(*args, label, **kwargs):
        trained.append(label)
        time.sleep(0.3)  # the other one asks meanwhile
        return fit(*args, label=label, **kwargs)

    monkeypatch.setattr(training, "fit", slow_fit)
    found = []

    def ask():
        together.wait()
        found.append(run(DENSE, tmp_path))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert trained == [DENSE.label]
    assert found[0]["row"] == found[1]["row"]


def test_killed_training_leaves_no_record_and_is_taken_up_again(tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "fit", killed)
        run(DENSE, tmp_path)
    assert not list(tmp_path.rglob("record.json")) and not list(tmp_path.rglob("*.safetensors"))
    assert run(DENSE, tmp_path)["row"]["run_id"] == DENSE.run_id


def test_all_patterns_of_a_seed_start_from_one_dense_network(folder, monkeypatch):
    run(HYBRID, folder)
    fit, trained = training.fit, []

    def watched(*args, label, **kwargs):
        trained.append(label)
        return fit(*args, label=label, **kwargs)

    monkeypatch.setattr(training, "fit", watched)
    block = Pruned(DENSE, "Block(4, 4)", 0.75, epochs=1)
    run(block, folder)
    assert trained == [block.label]


def test_equal_experiments_give_bit_identical_networks(folder, tmp_path):
    first = run(HYBRID, folder)
    torch.manual_seed(99)  # the global generator plays no part
    second = run(HYBRID, tmp_path)
    assert first["curve"] == second["curve"]
    stored = [tensors.read(place / HYBRID.run_id / "weights.safetensors") for place in (folder, tmp_path)]
    assert all(torch.equal(tensor, stored[1][name]) for name, tensor in stored[0].items())


# --- What a record tells ----------------------------------------------------------------------------------------------


def test_row_has_every_column_of_the_results_table(folder):
    row = run(HYBRID, folder)["row"]
    expected = {
        "run_id": HYBRID.run_id,
        "dataset": "noisy-digits",
        "model": "vgg16",
        "width": 0.0625,
        "pattern": "hybrid",
        "bank": 4,
        "block_rows": 4,
        "block_cols": 4,
        "schedule": "gradual",
        "target_sparsity": 0.75,
        "seed": 0,
        "epochs": 2,
        "precision": "fp32",
    }
    assert row.items() >= expected.items()
    measured = {"sparsity", "sparsity_total", "accuracy_dense_pct", "accuracy_pct"}
    measured |= {"accuracy_pruned_pct", "accuracy_renewed_pct"}
    assert row.keys() >= measured | {"flops", "params_kept", "commit", "hardware"}
    assert all(0 <= row[name] <= (100 if name.endswith("pct") else 1) for name in measured)


def test_row_counts_the_weights_of_the_network_it_leaves(folder):
    row, dense_row = run(HYBRID, folder)["row"], run(DENSE, folder)["row"]
    # VGG-16 at a sixteenth of its width: 12 pruned layers, and what stays dense: first layer, batch norm, classifier.
    pruned_layers = 9 * (4 * 4 + 4 * 8 + 8 * 8 + 8 * 16 + 2 * 16 * 16 + 16 * 32 + 5 * 32 * 32)
    everything = pruned_layers + 9 * 3 * 4 + 2 * 264 + 330
    gone = zeros(HYBRID, folder)
    assert zeros(DENSE, folder) == 0
    assert (dense_row["params_kept"], dense_row["sparsity"]) == (everything, 0.0)
    assert row["params_kept"] == everything - gone
    assert row["sparsity"] == pytest.approx(gone / pruned_layers)
    assert row["sparsity_total"] == pytest.approx(gone / everything)
    assert row["sparsity"] == pytest.approx(0.75, abs=0.005)
    assert 0 < row["flops"] < 0.5 * dense_row["flops"]


def test_stored_network_has_the_accuracy_of_its_row(folder, few_digits):
    for experiment in (DENSE, HYBRID):
        row = run(experiment, folder)["row"]
        model = load_model(experiment, folder)
        assert not model.training
        dataset = few_digits.to(training.device())
        assert training.accuracy_pct(model, dataset, dataset.test) == pytest.approx(row["accuracy_pct"])
    assert row["accuracy_dense_pct"] == run(DENSE, folder)["row"]["accuracy_pct"]


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "one-shot"},
        {"schedule": "iterative", "epochs": 3},
        {"retraining": "fine-tuning"},
        {"ratios": "global"},
        {"ratios": "sensitivity"},
        {"score": "random"},
        {"prune_ends": True, "pattern": "Unstructured()"},
        {"pattern": "Block(4, 4)", "group_lasso": 1e-4},
        LIFTS | {"permuted": True},
        {"dense": replace(DENSE, hidden=(32,))},
        {"dense": replace(DENSE, recipe=replace(DENSE.recipe, precision="bf16"))},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_way_of_pruning_reaches_the_target(folder, changes):
    experiment = replace(HYBRID, **changes)
    row, gone = run(experiment, folder)["row"], zeros(experiment, folder)
    assert row["sparsity"] == pytest.approx(0.75, abs=0.005)
    assert row["sparsity_total"] == pytest.approx(gone / (row["params_kept"] + gone))


def test_one_shot_masks_rank_the_dense_weights_and_the_control_does_not(folder):
    dense = load_model(DENSE, folder)
    name, before = list(dense.named_parameters())[3]  # the second convolution
    assert before.shape == (4, 4, 3, 3)
    largest = sorted(before.detach().abs().flatten().topk(36).indices.tolist())
    for score in ("magnitude", "random"):
        experiment = replace(HYBRID, pattern="Unstructured()", schedule="one-shot", score=score)
        run(experiment, folder)
        after = dict(load_model(experiment, folder).named_parameters())[name]
        kept = after.flatten().nonzero().flatten().tolist()
        assert len(kept) == 36 and (kept == largest) == (score == "magnitude")


def test_gradual_masks_of_the_network_freeze_at_two_thirds(folder, monkeypatch):
    """From then on a weight that is zero stays zero, and none is added."""
    fit, snapshots = training.fit, []

    def watched(model, *args, pruner=None, **kwargs):
        if pruner:
            advance, weights = pruner.advance, pruning.prunable(model).values()

            def seen():  # what the step before has left
                snapshots.append(torch.cat([weight.detach().flatten() != 0 for weight in weights]))
                advance()

            pruner.advance = seen
        return fit(model, *args, pruner=pruner, **kwargs)

    monkeypatch.setattr(training, "fit", watched)
    fast = replace(DENSE, recipe=replace(DENSE.recipe, lr=0.3))  # steps so large that a new ranking would differ
    run(Pruned(fast, "Unstructured()", 0.1, epochs=4), folder)
    assert len(snapshots) == 12  # steps
    assert all(torch.equal(mask, snapshots[8]) for mask in snapshots[9:])
    kept = [int(mask.sum()) for mask in snapshots]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) > 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"epochs": 2}, lambda dense: dense[2:]),
        ({"epochs": 4}, lambda dense: dense),
        ({"epochs": 3, "schedule": "iterative"}, lambda dense: 3 * dense[3:]),  # each round rewinds one epoch
        ({"epochs": 2, "retraining": "fine-tuning"}, lambda dense: 2 * [0.01 * 0.02]),
    ],
    ids=["rewinding", "rewinding-to-the-start", "iterative-rewinding", "fine-tuning"],
)
def test_retraining_repeats_the_learning_rates_of_dense_training(folder, changes, expected):
    four_epochs = replace(DENSE, recipe=replace(DENSE.recipe, epochs=4))
    dense_rates = [epoch["lr"] for epoch in run(four_epochs, folder)["curve"]]
    curve = run(replace(HYBRID, dense=four_epochs, **changes), folder)["curve"]
    assert [epoch["lr"] for epoch in curve] == pytest.approx(expected(dense_rates))


def test_retraining_draws_the_same_images_for_all_patterns_and_others_than_dense_training(tmp_path, monkeypatch):
    fit, seeds = training.fit, []

    def watched(*args, seed, **kwargs):
        seeds.append(seed)
        return fit(*args, seed=seed, **kwargs)

    monkeypatch.setattr(training, "fit", watched)
    for experiment in (HYBRID, replace(HYBRID, pattern="Vector(4)"), replace(HYBRID, dense=replace(DENSE, seed=1))):
        run(experiment, tmp_path)
    dense, hybrid, vector, other_dense, other_hybrid = seeds
    assert hybrid == vector and len({dense, hybrid, other_dense, other_hybrid}) == 4


def test_group_lasso_shrinks_the_weights_while_masks_still_change(folder, monkeypatch):
    block, calls = replace(HYBRID, pattern="Block(4, 4)"), []
    penalised = replace(block, group_lasso=0.3)
    group_lasso = pruning.group_lasso

    def watched(*args):
        calls.append(args)
        return group_lasso(*args)

    monkeypatch.setattr(pruning, "group_lasso", watched)
    norms = {}
    for experiment in (block, penalised):
        run(experiment, folder)
        norms[experiment] = sum(w.norm() for w in pruning.prunable(load_model(experiment, folder)).values())
    assert len(calls) == 4  # of six steps: those before two thirds
    assert norms[penalised] < 0.9 * norms[block]


def test_lifts_do_what_they_say(tmp_path, monkeypatch):
    """The teacher is the dense network, as it was; rates are twice those of the recipe; channels are ordered first."""
    fit, seen = training.fit, {}

    def watched(model, *args, **kwargs):
        seen.update(kwargs, model=copy.deepcopy(model.state_dict()))
        return fit(model, *args, **kwargs)

    plain = run(HYBRID, tmp_path)
    monkeypatch.setattr(training, "fit", watched)
    lifted = run(replace(HYBRID, **LIFTS, permuted=True), tmp_path)
    rates = [[epoch["lr"] for epoch in record["curve"]] for record in (plain, lifted)]
    assert rates[1] == pytest.approx([2 * rate for rate in rates[0]])
    dense = load_model(DENSE, tmp_path)
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in seen["teacher"].state_dict().items())
    assert (seen["distillation"], seen["penalty_until"]) == (0.9, 1 / 3)
    pruning.permute_channels(dense, parse(HYBRID.pattern), HYBRID.sparsity, DENSE.seed)
    assert all(torch.equal(tensor, seen["model"][name]) for name, tensor in dense.state_dict().items())
    columns = ("distillation", "pruning_phase", "lr_factor", "permuted")
    assert [lifted["row"][key] for key in columns] == [0.9, 1 / 3, 2.0, True]


def test_a_network_that_another_folder_has_is_taken_over(tmp_path, monkeypatch):
    here, empty, there = (tmp_path / name for name in ("here", "empty", "there"))
    assert not take_over(DENSE, here, [empty, there])
    record = run(DENSE, there)
    assert take_over(DENSE, here, [empty, there])
    monkeypatch.setattr(running, "_run_dense", None)  # it is not trained again
    assert run(DENSE, here) == record
    weights = [load_model(DENSE, folder).state_dict() for folder in (here, there)]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


def test_sensitivities_do_not_hang_on_statistics_of_the_dense_network(few_digits):
    experiment, model = replace(HYBRID, ratios="sensitivity"), models.build("vgg16", 10, DENSE.width).eval()
    given = parse(HYBRID.pattern), pruning.prunable(model), model, few_digits
    ratios = running._ratios(experiment, *given)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(1e-6)
    assert running._ratios(experiment, *given) == ratios != dict.fromkeys(ratios, HYBRID.sparsity)


def test_networks_without_channels_are_narrower_and_load_again(tmp_path, few_digits):
    dense = replace(DENSE, width=0.5)
    experiment = replace(CHANNELS, dense=dense)
    row = run(experiment, tmp_path)["row"]
    model, whole = load_model(experiment, tmp_path), load_model(dense, tmp_path)
    counts = [sum(w.numel() for w in pruning.prunable(each).values()) for each in (model, whole)]
    assert row["sparsity"] == 1 - counts[0] / counts[1] and 0.5 <= row["sparsity"] < 0.65
    channels = [module.out_channels for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    before = [module.out_channels for module in whole.modules() if isinstance(module, torch.nn.Conv2d)]
    assert channels[0] == before[0] and all(c % 16 == 0 and c <= b for c, b in zip(channels, before, strict=True))
    assert row["params_kept"] == sum(parameter.numel() for parameter in model.parameters())
    assert training.accuracy_pct(model, few_digits, few_digits.test) == pytest.approx(row["accuracy_pct"])
    with pytest.raises(ValueError, match=r"no more than .* where 99.99 % was asked: ask for less"):
        run(Channels(dense, 0.9999, 1), tmp_path)


# --- What cannot be computed ------------------------------------------------------------------------------------------


def test_bank_that_misses_the_target_is_refused_with_the_bank_that_fits(folder, forbid_training):
    wide = replace(DENSE, width=0.25)  # rows of 144, 288, 576 and 1152 weights
    run(wide, folder)
    forbid_training()
    experiment = Pruned(wide, "Balanced(16)", 0.9, epochs=1)
    with pytest.raises(
        ValueError, match=r"Balanced\(16\) reaches 87\.50 % sparsity where 90 % .*: Balanced\(48\) does"
    ):
        run(experiment, folder)
    assert not (folder / experiment.run_id / "record.json").exists()


def test_target_missed_by_other_patterns_asks_for_smaller_units():
    pattern, weight = Block(4, 4), torch.rand(8, 8)
    with pytest.raises(ValueError, match=r"reaches 75\.00 % sparsity where 90 % was asked: use smaller units"):
        check_target(pattern, 0.9, {"a": pattern.mask(weight, 0.9)})


def test_half_a_point_off_the_target_is_accepted():
    masks = {"a": Balanced(48).mask(torch.rand(2, 96), 0.9)}  # 89.58 %
    check_target(Balanced(48), 0.9, masks)
    with pytest.raises(ValueError, match=r"89\.58 % sparsity where 90\.1 %"):
        check_target(Balanced(48), 0.901, masks)


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pair")


@pytest.fixture
def pair(pair_folder):
    """A folder with a dense network and one pruned from it, and nothing else."""
    run(HYBRID, pair_folder)
    return pair_folder


def flip_a_bit(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("experiment", [DENSE, HYBRID], ids=["dense", "hybrid"])
@pytest.mark.parametrize("place", [0.02, 0.33, 0.55, 0.99])
def test_a_bit_flipped_in_a_record_never_reaches_a_result(pair, tmp_path, place, experiment):
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    path, whole = tmp_path / experiment.run_id / "record.json", run(experiment, pair)
    flip_a_bit(path, place)
    again = run(experiment, tmp_path)
    assert again["row"] | {"wall_time_s": 0} == whole["row"] | {"wall_time_s": 0} and run(experiment, tmp_path) == again
    assert path.with_name("record.json.damaged").exists() or again == whole  # it was a blank between two numbers


@pytest.mark.parametrize("content", ['{"row": {"run_id": "?"}}', "{}", "[]", ""])
def test_a_gutted_record_is_computed_again(pair, tmp_path, content, capsys):
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    path = tmp_path / HYBRID.run_id / "record.json"
    path.write_text(content.replace("?", HYBRID.run_id))
    assert run(HYBRID, tmp_path)["row"]["accuracy_pct"] == run(HYBRID, pair)["row"]["accuracy_pct"]
    assert f"{path} is damaged: set aside as record.json.damaged, made anew" in capsys.readouterr().err


def test_damaged_weights_of_a_dense_network_are_trained_again_and_nothing_starts_from_them(pair, tmp_path, capsys):
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / HYBRID.run_id)
    weights = tmp_path / DENSE.run_id / "weights.safetensors"
    whole = tensors.read(weights)
    flip_a_bit(weights, 0.7)
    assert run(HYBRID, tmp_path)["row"]["accuracy_pct"] == run(HYBRID, pair)["row"]["accuracy_pct"]
    assert all(map(torch.equal, tensors.read(weights).values(), whole.values()))
    assert f"{weights} is damaged: set aside" in capsys.readouterr().err


@pytest.mark.parametrize("place", [0.3, 0.7, 0.99])
def test_a_bit_flipped_in_a_checkpoint_starts_the_training_anew(pair, tmp_path, place, capsys):
    with pytest.raises(OutOfTime):
        run(DENSE, tmp_path, deadline=0.0)
    flip_a_bit(tmp_path / DENSE.run_id / "checkpoint.safetensors", place)
    assert run(DENSE, tmp_path)["row"]["accuracy_pct"] == run(DENSE, pair)["row"]["accuracy_pct"]
    assert "checkpoint.safetensors is damaged: set aside" in capsys.readouterr().err


def test_folder_that_cannot_be_written_fails_before_training(tmp_path, forbid_training):
    forbid_training()
    (tmp_path / "file").write_text("a regular file")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        run(HYBRID, tmp_path / "file" / "runs")


def test_network_of_an_experiment_that_has_not_run_is_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no weights .*{HYBRID.run_id}.*run the experiment again"):
        load_model(HYBRID, tmp_path)


def test_diverging_training_names_the_experiment_and_the_remedy(tmp_path):
    diverging = replace(DENSE, recipe=replace(DENSE.recipe, lr=1e30))
    with pytest.raises(ValueError, match="noisy-digits, seed 0, dense: training diverged in epoch 1 "):
        run(diverging, tmp_path)
    assert not list(tmp_path.rglob("record.json"))
