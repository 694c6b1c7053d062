"""Training repeats bit for bit, keeps to its schedules, and never lets a pruned weight live."""

import copy
import json
import math
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from reprolib.files import tensors
from reprolib.files.atomic import write_atomically
from reprolib.files.deadline import OutOfTime
from reprolib.pruning import Pruner
from reprolib.pruning import pruner as pruner_module
from reprolib.training import (
    Recipe,
    accuracy_pct,
    dense_lr,
    fine_tuning_lr,
    fit,
    loop,
    mean_loss,
    position,
    precision,
    rewound_lr,
    with_renewed_statistics,
)
from reprolib.training.checkpoints import Position
from reprolib.training.data import Split

SHORT = Recipe(epochs=2, batch_size=32, lr=0.02)  # on 96 images: six steps


@pytest.fixture
def before_each_step():
    """Calls a function with the optimizer before, or after, each of its steps."""
    handles = []

    def add(function, after=False):
        register = register_optimizer_step_post_hook if after else register_optimizer_step_pre_hook
        handles.append(register(lambda optimizer, args, kwargs: function(optimizer)))

    yield add
    for handle in handles:
        handle.remove()


def trained(model, dataset, recipe=SHORT, seed=0, **options):
    """The network's weights behind training, and the curve."""
    curve = fit(model, dataset, recipe, seed=seed, **options)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), curve


def of_layer_2(model, **options):
    """A pruner of 288 single weights of 576."""
    return Pruner(model, "Unstructured()", 0.5, 6, layers=["2"], **options)


@pytest.fixture
def due(monkeypatch):
    """Schedules of every pruner follow a function of progress."""
    return lambda at: monkeypatch.setattr(
        pruner_module, "sparsity_at", lambda schedule, target, progress, phase: at(progress)
    )


# --- Repeatability ----------------------------------------------------------------------------------------------------


def test_equal_seeds_give_bit_identical_weights_and_curves(few_digits, small_net):
    first, curve = trained(small_net(), few_digits, seed=1)
    torch.manual_seed(123)  # the global generator plays no part
    second, same_curve = trained(small_net(), few_digits, seed=1)
    assert torch.equal(first, second) and curve == same_curve


def test_another_seed_gives_other_weights(few_digits, small_net):
    assert not torch.equal(trained(small_net(), few_digits, seed=1)[0], trained(small_net(), few_digits, seed=2)[0])


def test_network_learns_the_digits(digits, small_net):
    model = small_net()
    curve = fit(model, digits, Recipe(epochs=4, batch_size=32, lr=0.02), seed=0)
    assert curve[-1]["loss_train"] < curve[0]["loss_train"]
    assert accuracy_pct(model, digits, digits.test) > 80


def test_curve_has_a_row_per_epoch(few_digits, small_net):
    model = small_net()
    curve = fit(model, few_digits, replace(SHORT, lr=0.5), seed=0)
    assert [row["epoch"] for row in curve] == [1, 2]
    assert curve[-1]["lr"] == pytest.approx(0.5 * dense_lr(5 / 6))
    assert curve[-1]["accuracy_validation_pct"] == accuracy_pct(model, few_digits, few_digits.validation)


def test_each_epoch_shows_every_image_once_and_with_its_label(few_digits, monkeypatch):
    """Grey images of value 20 * label + 5: the value that reaches the loss tells the label."""
    labels = few_digits.train.labels
    images = (20 * labels + 5).to(torch.uint8)[:, None, None, None].expand(-1, 32, 32, 3)
    dataset = replace(few_digits, train=Split(images, labels), mean=(0.0,) * 3, std=(1.0,) * 3)
    seen, model = [], nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(3072, 10))
    model[0].register_forward_hook(lambda _, args, __: seen.append(args[0][:, 0, 16, 16]) if model.training else None)
    cross_entropy, told = F.cross_entropy, []

    def watched(logits, target, **options):
        told.append(target)
        return cross_entropy(logits, target, **options)

    monkeypatch.setattr(F, "cross_entropy", watched)
    fit(model, dataset, SHORT, seed=0)
    assert torch.equal(((torch.cat(seen) * 255 - 5) / 20).round().long(), torch.cat(told))
    first, second = torch.cat(told).split(96)
    assert torch.equal(first.bincount(), labels.bincount()) and torch.equal(second.bincount(), labels.bincount())
    assert not torch.equal(first, second)  # shuffled anew


# --- Pruning and penalties inside the loop ----------------------------------------------------------------------------


def test_pruned_weights_are_zero_at_every_forward_pass(few_digits, small_net):
    model = small_net()
    weight, before, passes = model[2].weight, model[2].weight.detach().clone(), []
    pruner = of_layer_2(model, schedule="one-shot")
    mask = pruner.masks["2"]
    model.register_forward_pre_hook(
        lambda module, _: passes.append((module.training, weight[~mask].abs().max().item()))
    )
    fit(model, few_digits, SHORT, seed=0, pruner=pruner)
    assert mask.sum() == 288 and torch.equal(pruner.masks["2"], mask)
    assert passes == 2 * [*3 * [(True, 0.0)], (False, 0.0)]  # three training batches and one of validation per epoch
    assert (weight[~mask] == 0).all()
    assert (weight[mask] != before[mask]).double().mean() > 0.98  # a small step may end where it began, by rounding


def test_new_masks_hold_from_the_forward_pass_of_their_progress_on(few_digits, small_net, due):
    """The masks prune one more weight at each step; the network shows how many are zero when it runs."""
    model, zeros = small_net(), []
    weight = model[2].weight
    model.register_forward_pre_hook(lambda module, _: zeros.append((module.training, int((weight == 0).sum()))))
    due(lambda progress: (1 + round(6 * progress)) / 576)
    fit(model, few_digits, SHORT, seed=0, pruner=of_layer_2(model))
    # The accuracy of the first epoch is that of the masks it trained with. Those of progress 1 end the last one.
    assert zeros[:4] == [(True, 1), (True, 2), (True, 3), (False, 3)]
    assert zeros[4:] == [(True, 4), (True, 5), (True, 6), (False, 7)]


def test_weight_that_a_later_mask_keeps_again_grows_back(few_digits, small_net, due):
    model = small_net()
    due(lambda progress: 0.5 if progress < 0.5 else 0.0)
    pruner = of_layer_2(model, masks="refitted")
    gone = ~pruner.masks["2"]
    fit(model, few_digits, SHORT, seed=0, pruner=pruner)
    assert gone.sum() == 288 and (model[2].weight[gone] != 0).any()


def test_penalty_pulls_on_the_weights_and_stays_out_of_the_reported_loss(few_digits, small_net):
    plain, curve = trained(small_net(), few_digits)
    constant, same_curve = trained(small_net(), few_digits, penalty=lambda: torch.tensor(1000.0))
    assert torch.equal(plain, constant) and curve == same_curve  # a constant has no gradient
    model = small_net()
    shrunk, _ = trained(model, few_digits, penalty=lambda: 2 * model[2].weight.square().sum())
    assert model[2].weight.norm() < 0.5 * small_net()[2].weight.norm()
    assert shrunk.isfinite().all()


def test_penalty_ends_when_it_is_told(few_digits, small_net):
    calls = []

    def penalty():
        calls.append(1)
        return torch.tensor(0.0)

    fit(small_net(), few_digits, SHORT, seed=0, penalty=penalty, penalty_until=0.5)
    assert len(calls) == 3  # of six steps


def test_renewed_statistics_are_those_of_training_images(few_digits, small_net):
    """A batch norm that knows nothing of its inputs gets their mean; images that are all alike give it by hand."""
    alike = torch.full_like(few_digits.train.images, 128)
    dataset = replace(few_digits, train=Split(alike, few_digits.train.labels), pad=0)
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.Dropout(0.5), nn.Flatten(), nn.Linear(3072, 10))
    norm.running_mean.fill_(7.0)
    renewed = with_renewed_statistics(model, dataset, SHORT, seed=0)
    expected = (128 / 255 - torch.tensor(dataset.mean)) / torch.tensor(dataset.std)
    torch.testing.assert_close(renewed[0].running_mean, expected, atol=1e-3, rtol=0)
    assert norm.running_mean.eq(7).all() and not any(module.training for module in renewed.modules())
    assert torch.equal(renewed[3].weight, model[3].weight)


def test_distillation_by_hand(few_digits, small_net):
    """Of two classes: T² Σ p log(p / q), where p and q are softmax of logits over T = 4, mean over images."""
    student, teacher = torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    p, q = 1 / (1 + math.e), math.e / (1 + math.e)
    by_hand = 16 * (p * math.log(p / q) + q * math.log(q / p)) / 2
    assert loop.distilled(student, teacher).item() == pytest.approx(by_hand)


def test_teacher_is_followed_and_stays_as_it_is(few_digits, small_net):
    torch.manual_seed(1)
    teacher, labels = small_net().eval(), few_digits.train.labels
    before = copy.deepcopy(teacher.state_dict())
    plain, _ = trained(small_net(), few_digits)
    unheard, _ = trained(small_net(), few_digits, teacher=teacher, distillation=0.0)
    assert torch.equal(plain, unheard)
    wrong = replace(few_digits, train=Split(few_digits.train.images, (labels + 1) % 10))
    alone = [trained(small_net(), data, teacher=teacher, distillation=1.0)[0] for data in (few_digits, wrong)]
    assert torch.equal(*alone), "labels do not count"
    assert not torch.equal(plain, alone[0])
    assert all(torch.equal(tensor, teacher.state_dict()[name]) for name, tensor in before.items())


def test_label_smoothing_gives_every_class_its_share(few_digits):
    """The mean loss of constant logits (2, 0, ..., 0), by hand: -log softmax, weighted by the smoothed targets."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([2.0] + 9 * [0.0]))
    labels = torch.zeros_like(few_digits.train.labels)
    dataset = replace(few_digits, train=Split(few_digits.train.images, labels))
    recipe = Recipe(epochs=1, batch_size=96, lr=0.0, label_smoothing=0.1)
    [row] = fit(model, dataset, recipe, seed=0)
    normaliser = math.log(math.exp(2) + 9)
    assert row["loss_train"] == pytest.approx(0.91 * (normaliser - 2) + 0.09 * normaliser)


def test_last_accuracy_is_that_of_the_last_masks(few_digits, small_net, due):
    """A training of one step ends before its masks are due: they still come before its accuracy."""
    model = small_net()
    due(lambda progress: 0.99 if progress == 1 else 0.0)
    pruner = Pruner(model, "Unstructured()", 0.99, 1, layers=["2"])
    [row] = fit(model, few_digits, replace(SHORT, epochs=1, batch_size=96), seed=0, pruner=pruner)
    assert (model[2].weight == 0).sum() == 570
    assert row["accuracy_validation_pct"] == accuracy_pct(model, few_digits, few_digits.validation)


# --- Frozen parts -----------------------------------------------------------------------------------------------------


def frozen_net():
    """Of seven layers, the first is frozen, and so are the statistics of the first batch norm; one is never used."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Flatten()
    )
    model.append(nn.Linear(512, 10))
    model.unused = nn.ParameterList([nn.Parameter(torch.ones(3))])
    model.forward = lambda x: model[5](model[4](model[3](model[2](model[1](model[0](x))))))
    model[0].requires_grad_(False)
    model[1].eval()
    return model


def test_frozen_parts_stay_and_the_rest_trains(few_digits):
    model, before = frozen_net(), frozen_net().state_dict()
    fit(model, few_digits, SHORT, seed=0)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not any(name.startswith(("0.", "1.running", "1.num", "unused")) for name in changed)
    assert changed >= {"1.weight", "2.weight", "3.running_mean", "5.weight"}
    assert model.training and not model[1].training


def test_model_in_eval_mode_trains_as_a_whole_and_is_in_eval_mode_again(few_digits):
    model = frozen_net().eval()
    fit(model, few_digits, SHORT, seed=0)
    assert model[1].num_batches_tracked == model[3].num_batches_tracked == 6
    assert not any(module.training for module in model.modules())


def test_stopped_training_with_frozen_parts_goes_on_to_the_same_bits(few_digits, tmp_path):
    whole, pieces = frozen_net(), frozen_net()
    curve = fit(whole, few_digits, SHORT, seed=0)
    frozen = {name: tensor.clone() for name, tensor in pieces.state_dict().items() if name.startswith("0.")}
    again, stops = interrupted(pieces, few_digits, tmp_path / "checkpoint.safetensors", 2)
    assert stops == 3 and again == curve
    assert all(torch.equal(tensor, pieces.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert all(torch.equal(tensor, pieces.state_dict()[name]) for name, tensor in frozen.items())


def test_tied_weights_can_be_stopped_too(few_digits, tmp_path):
    def net():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), nn.Linear(10, 10), nn.Linear(10, 10))
        model[3].weight = model[2].weight
        return model

    whole, pieces = net(), net()
    curve = fit(whole, few_digits, SHORT, seed=0)
    again, _ = interrupted(pieces, few_digits, tmp_path / "checkpoint.safetensors", 4)
    assert again == curve and torch.equal(whole[3].weight, pieces[3].weight)


# --- Stopping and going on --------------------------------------------------------------------------------------------


def interrupted(model, dataset, checkpoint, steps, new_pruner=lambda: None):
    """Train in pieces of so many steps, each with a new pruner; return the curve, and how often it stopped."""
    clock, stops = [0.0], 0

    def count(module, _):
        if module.training:
            clock[0] += 1

    handle = model.register_forward_pre_hook(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.time, "time", lambda: clock[0])
        while True:
            try:
                deadline = clock[0] + steps - 0.5
                options = {"pruner": new_pruner(), "checkpoint": checkpoint, "deadline": deadline}
                curve = fit(model, dataset, SHORT, seed=0, **options)
            except OutOfTime:
                stops += 1
                with torch.no_grad():  # what is in memory is lost
                    for tensor in model.state_dict().values():
                        tensor.zero_()
            else:
                handle.remove()
                return curve, stops


def pruned_net(pattern="Balanced(16) & Block(32, 5)"):  # banks that straddle blocks
    """A network, and what makes pruners of its last layer: their masks change at each of the first four steps."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    return model, lambda **options: Pruner(model, pattern, 0.8, 6, layers=["4"], **options)


def assert_same(one, other):
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("pattern", ["Balanced(16) & Block(32, 5)", "Unstructured()"])
@pytest.mark.parametrize(("steps", "stops"), [(1, 6), (2, 3), (4, 1)])
def test_stopped_training_goes_on_to_the_same_bits(few_digits, tmp_path, steps, stops, pattern):
    (whole, pruner_of_whole), (pieces, pruner_of_pieces), made = pruned_net(pattern), pruned_net(pattern), []

    def new_pruner():
        made.append(pruner_of_pieces())
        return made[-1]

    curve = fit(whole, few_digits, SHORT, seed=0, pruner=(pruner := pruner_of_whole()))
    again, stopped = interrupted(pieces, few_digits, tmp_path / "checkpoint.safetensors", steps, new_pruner)
    assert stopped == stops and again == curve
    assert torch.equal(made[-1].masks["4"], pruner.masks["4"])
    assert pruner.sparsity == pytest.approx(0.8, abs=0.01)
    assert_same(whole, pieces)


def stopped(model, dataset, checkpoint, pruner):
    """Train three steps, up to the end of an epoch, and leave a checkpoint."""
    clock = iter(range(99))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OutOfTime):
        patch.setattr(loop.time, "time", lambda: next(clock))
        fit(model, dataset, SHORT, seed=0, pruner=pruner, checkpoint=checkpoint, deadline=1.5)


def test_checkpoint_of_a_former_version_goes_on_to_the_same_bits(few_digits, tmp_path):
    """Its metadata told what was due when its masks were made, and nothing else of a pruner; it had no checksum."""
    (whole, pruner_of_whole), (pieces, pruner_of_pieces) = pruned_net(), pruned_net()
    fit(whole, few_digits, SHORT, seed=0, pruner=pruner_of_whole())
    checkpoint = tmp_path / "checkpoint.safetensors"
    stopped(pieces, few_digits, checkpoint, pruner_of_pieces())
    metadata, stored = tensors.notes(checkpoint), tensors.read(checkpoint)
    assert json.loads(metadata.pop("pruner"))["step"] == 2
    metadata["position"] = json.dumps(json.loads(metadata["position"]) | {"due": [0.5]})
    write_atomically(checkpoint, save(stored, metadata))
    fit(pieces, few_digits, SHORT, seed=0, pruner=pruner_of_pieces(), checkpoint=checkpoint)
    assert_same(whole, pieces)


def test_checkpoint_of_another_pruner_is_refused(few_digits, tmp_path):
    model, new_pruner = pruned_net()
    checkpoint = tmp_path / "checkpoint.safetensors"
    stopped(model, few_digits, checkpoint, new_pruner())
    with pytest.raises(ValueError, match=r"is of another training .*score='magnitude', .*: delete it"):
        fit(model, few_digits, SHORT, seed=0, pruner=new_pruner(score="random"), checkpoint=checkpoint)
    with pytest.raises(ValueError, match="is of a pruned training: delete it"):
        fit(model, few_digits, SHORT, seed=0, checkpoint=checkpoint)
    checkpoint.unlink()
    stopped(model, few_digits, checkpoint, None)
    with pytest.raises(ValueError, match=r"is of another training .*no mask for layer 4.*: delete it"):
        fit(model, few_digits, SHORT, seed=0, pruner=new_pruner(), checkpoint=checkpoint)


def test_checkpoint_says_where_training_stands(few_digits, small_net, tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    assert position(checkpoint) == Position()
    with pytest.raises(OutOfTime, match="run 7: out of time in epoch 1 of 2"):
        fit(small_net(), few_digits, SHORT, seed=0, checkpoint=checkpoint, deadline=0.0, label="run 7")
    stands = position(checkpoint)
    assert (stands.epoch, stands.step, stands.progress) == (0, 1, pytest.approx(1 / 6))
    assert 0 < stands.wall_time_s < 60


def test_position_can_be_read_while_the_checkpoint_is_replaced(tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    done = threading.Event()

    def replace_it():
        for epoch in range(200):
            here = json.dumps({"epoch": epoch, "curve": epoch % 7 * [1]})
            write_atomically(checkpoint, save({"x": torch.zeros(epoch)}, {"position": here}))
        checkpoint.unlink()
        done.set()

    writer = threading.Thread(target=replace_it)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(position(checkpoint).epoch)
    writer.join()
    assert len(seen) > 1 and position(checkpoint) == Position()


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      "], ids=["empty", "of something else"])
def test_damaged_checkpoint_is_named(few_digits, small_net, tmp_path, content):
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged: delete it"):
        fit(small_net(), few_digits, SHORT, seed=0, checkpoint=checkpoint)


@pytest.mark.parametrize("changes", [{"seed": 1}, {"recipe": replace(SHORT, lr=0.03)}], ids=["seed", "recipe"])
def test_checkpoint_of_another_training_is_refused(few_digits, small_net, tmp_path, changes):
    checkpoint, options = tmp_path / "checkpoint.safetensors", {"recipe": SHORT, "seed": 0}
    with pytest.raises(OutOfTime):
        fit(small_net(), few_digits, **options, checkpoint=checkpoint, deadline=0.0)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is of another training .*: delete it"):
        fit(small_net(), few_digits, **options | changes, checkpoint=checkpoint)


def test_checkpoint_that_is_cut_off_is_named(few_digits, small_net, tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(OutOfTime):
        fit(small_net(), few_digits, SHORT, seed=0, checkpoint=checkpoint, deadline=0.0)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged: delete it"):
        fit(small_net(), few_digits, SHORT, seed=0, checkpoint=checkpoint)


def test_checkpoint_is_written_while_it_trains(few_digits, small_net, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY_S", 0.0)
    checkpoint = tmp_path / "checkpoint.safetensors"
    fit(small_net(), few_digits, SHORT, seed=0, checkpoint=checkpoint)
    assert position(checkpoint).progress == 1.0  # the last step


# --- On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_steps_do_what_single_launches_do(few_digits, small_net, monkeypatch):
    """Twelve steps: eager, captured, replayed, with masks that change and a penalty that ends."""
    dataset, recipe = few_digits.to("cuda"), Recipe(epochs=4, batch_size=32, lr=0.02)

    def curve():
        model = small_net().cuda()
        weight, pruner = model[2].weight, of_layer_2(model, schedule="iterative")
        rows = fit(
            model,
            dataset,
            recipe,
            seed=0,
            pruner=pruner,
            penalty=lambda: 1e-3 * weight.square().sum(),
            penalty_until=0.6,
        )
        assert (weight == 0).sum() == 288 and (weight[~pruner.masks["2"]] == 0).all()
        return [row["loss_train"] for row in rows]

    captured = curve()
    monkeypatch.setattr(loop, "_captured", lambda step: step)
    assert captured == pytest.approx(curve(), rel=1e-3)


# --- Learning rates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "share"), [(0, 0), (0.05, 0.5), (0.1, 1), (0.325, 0.75), (0.55, 0.5), (0.775, 0.25), (1, 0)]
)
def test_dense_schedule_rises_for_a_tenth_then_falls(progress, share):
    assert dense_lr(progress) == pytest.approx(share)


def test_rewinding_repeats_the_tail_of_the_dense_schedule():
    dense = [dense_lr(step / 40) for step in range(40)]  # ten epochs of four steps
    assert [rewound_lr(step / 12, 3, 10) for step in range(12)] == pytest.approx(dense[-12:])
    assert [rewound_lr(step / 40, 10, 10) for step in range(40)] == pytest.approx(dense)


def test_rewinding_further_than_the_start_stretches_the_whole_schedule():
    assert [rewound_lr(p, 20, 10) for p in (0, 0.05, 0.1, 0.55)] == pytest.approx([0, 0.5, 1, 0.5])


def test_fine_tuning_is_constant_at_a_hundredth_of_the_peak():
    assert {fine_tuning_lr(progress) for progress in (0, 0.3, 0.99)} == {0.01}


def test_optimizer_gets_the_scheduled_rate_at_each_step(few_digits, small_net, before_each_step):
    rates = []
    before_each_step(lambda optimizer: rates.append(float(optimizer.param_groups[0]["lr"])))
    fit(small_net(), few_digits, replace(SHORT, lr=0.2), seed=0, lr_at=lambda progress: 1 - progress)
    assert rates == pytest.approx([0.2, 0.2 * 5 / 6, 0.2 * 4 / 6, 0.1, 0.2 * 2 / 6, 0.2 / 6])


# --- Precision and errors ---------------------------------------------------------------------------------------------


def test_bf16_trains_weights_that_stay_fp32(few_digits, small_net, monkeypatch):
    monkeypatch.setattr(precision, "_multiplies_bf16", lambda device_type: True)
    fp32, _ = trained(small_net(), few_digits)
    bf16, _ = trained(small_net(), few_digits, replace(SHORT, precision="bf16"))
    assert bf16.dtype == torch.float32 and bf16.isfinite().all()
    assert not torch.equal(bf16, fp32)
    torch.testing.assert_close(bf16, fp32, atol=0.05, rtol=0.05)


def test_bf16_that_would_be_emulated_trains_as_fp32(few_digits, small_net, monkeypatch):
    monkeypatch.setattr(precision, "_multiplies_bf16", lambda device_type: False)
    asked, _ = trained(small_net(), few_digits, replace(SHORT, precision="bf16"))
    fp32, _ = trained(small_net(), few_digits)
    assert torch.equal(asked, fp32)


def test_diverging_training_stops_with_a_lower_rate_as_advice(few_digits, small_net):
    with pytest.raises(ValueError, match=r"run 7: training diverged in epoch 1 \(loss .*\); try lr below 1e\+20"):
        fit(small_net(), few_digits, replace(SHORT, lr=1e20), seed=0, lr_at=lambda progress: 1.0, label="run 7")


def test_divergence_in_the_last_step_is_noticed(few_digits, small_net):
    one_step = Recipe(epochs=1, batch_size=96, lr=3e38, weight_decay=1e3)
    with pytest.raises(ValueError, match="diverged in epoch 1"):
        fit(small_net(), few_digits, one_step, seed=0, lr_at=lambda progress: 1.0)


@pytest.mark.parametrize(("name", "value"), [("weight_decay", "5e-4"), ("lr", -0.1)])
def test_rates_must_be_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number of at least 0, not {value!r}"):
        Recipe(1, **{name: value})


def test_batch_larger_than_the_training_split_is_refused(few_digits, small_net):
    with pytest.raises(ValueError, match="a batch of 128 is larger than the 96 training images"):
        fit(small_net(), few_digits, Recipe(epochs=1), seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1, not 0"),
        ({"epochs": 1, "batch_size": 12.5}, "batch_size must be a whole number of at least 1, not 12.5"),
        ({"epochs": 1, "label_smoothing": 1.5}, r"label_smoothing must lie in \[0, 1\), not 1.5"),
        ({"epochs": 1, "precision": "fp8"}, "precision 'fp8' is unknown: use fp32, bf16"),
    ],
)
def test_bad_recipe_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


# --- Evaluation -------------------------------------------------------------------------------------------------------


class Says(nn.Module):
    """A network that gives every image the same logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def test_accuracy_and_loss_of_known_logits(few_digits):
    labels = torch.zeros(501, dtype=torch.int64)  # more than one chunk of the evaluation
    labels[:3] = torch.tensor([1, 1, 2])
    split = Split(torch.zeros(501, 32, 32, 3, dtype=torch.uint8), labels)
    assert accuracy_pct(Says([5.0, 0.0, 0.0]), few_digits, split) == pytest.approx(100 * 498 / 501)
    assert mean_loss(Says([2.0, 2.0, 2.0]), few_digits, split) == pytest.approx(math.log(3))


def test_evaluation_does_not_train(few_digits):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3072, 10))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accuracy_pct(model, few_digits, few_digits.test)
    assert model.training
    assert accuracy_pct(model, few_digits, few_digits.test) == accuracy_pct(model.eval(), few_digits, few_digits.test)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("measure", [accuracy_pct, mean_loss])
def test_network_whose_logits_are_not_finite_has_no_accuracy(few_digits, measure, bad):
    with pytest.raises(ValueError, match="NaN or infinite numbers: did its training diverge"):
        measure(Says(9 * [0.0] + [bad]), few_digits, few_digits.test)


@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
def test_network_with_statistics_that_are_not_finite_has_no_accuracy(few_digits, statistic):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3072, 10))
    getattr(model[0], statistic)[1] = math.inf
    with pytest.raises(ValueError, match="holds or gives NaN or infinite numbers"):
        accuracy_pct(model, few_digits, few_digits.test)
