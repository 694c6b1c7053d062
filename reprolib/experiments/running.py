"""`run` computes each experiment once: what has a record is read."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn

from reprolib import models, pruning, training
from reprolib.experiments import records
from reprolib.experiments.definitions import Channels, Dense, Pruned
from reprolib.files import tensors
from reprolib.files.atomic import sound, write_atomically
from reprolib.patterns import Balanced, Pattern, fitting_bank, parse, sizes
from reprolib.training import data, precision

TOLERANCE = 0.005  # half a point: how far achieved sparsity may lie from its target
RETRAINING_SEED = 1_000_000  # added to the seed: retraining draws other images than training, the same for all patterns
RECORD, WEIGHTS, CHECKPOINT = "record.json", "weights.safetensors", "checkpoint.safetensors"
CHANNELS_BY = "Torch-Pruning"


def run(experiment: Dense | Pruned | Channels, folder: Path, deadline: float = math.inf) -> dict:
    """The experiment's record, from `folder` if it is there, else computed and written there.

    The folder of a run holds ``record.json`` and the network's ``weights.safetensors`` (`reprolib.files.tensors`);
    while it trains, and when it was stopped, ``checkpoint.safetensors``, from which it goes on. Two processes that ask
    for the same experiment compute it once: the second waits. A damaged file is set aside, and computed anew. Raises
    deadline.OutOfTime when `time.time()` passes `deadline`, ValueError for what can't be computed as asked, and OSError
    where the folder can't be written.
    """
    path = folder / experiment.run_id / RECORD
    if record := sound(path, records.read):
        return record
    if not isinstance(experiment, Dense):
        run(experiment.dense, folder, deadline)
        _set_aside_damaged_weights(experiment.dense, folder)
        run(experiment.dense, folder, deadline)  # once more, where they were damaged
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".lock"):
        if record := sound(path, records.read):
            return record
        checkpoint = path.parent / CHECKPOINT
        sound(checkpoint, tensors.read)
        for unfinished in path.parent.glob(".*.safetensors.*"):  # of a process that was ended while it wrote
            unfinished.unlink()
        started = time.perf_counter() - training.position(checkpoint).wall_time_s
        match experiment:
            case Dense():
                compute = _run_dense
            case Channels():
                compute = _run_channels
            case _:
                compute = _run_pruned
        row, curve, model = compute(experiment, folder, checkpoint=checkpoint, deadline=deadline)
        tensors.write(path.parent / WEIGHTS, model.state_dict())
        record = {
            "experiment": dataclasses.asdict(experiment),
            "row": {"run_id": experiment.run_id} | row,
            "curve": curve,
            "provenance": records.provenance() | {"wall_time_s": round(time.perf_counter() - started, 1)},
        }
        record["row"] |= {key: record["provenance"][key] for key in ("commit", "hardware", "threads", "wall_time_s")}
        records.write(path, record)
        checkpoint.unlink(missing_ok=True)
        return records.read(path)


def _set_aside_damaged_weights(dense: Dense, folder: Path) -> None:
    """Set aside damaged weights of a dense network, and its record with them: it is done no more."""
    place = folder / dense.run_id
    with FileLock(place / ".lock"):
        if (place / WEIGHTS).exists() and sound(place / WEIGHTS, tensors.read) is None:
            (place / RECORD).replace(place / f"{RECORD}.damaged")


def is_done(experiment: Dense | Pruned | Channels, folder: Path) -> bool:
    return (folder / experiment.run_id / RECORD).exists()


def set_aside_damaged(plan: Iterable[Dense | Pruned | Channels], folder: Path) -> None:
    """Set aside the damaged records of a plan's experiments, which are then done no more; a line says so of each."""
    for experiment in plan:
        sound(folder / experiment.run_id / RECORD, records.read)


def take_over(experiment: Dense | Pruned | Channels, folder: Path, others: Iterable[Path]) -> bool:
    """Copy the experiment's finished network into `folder` from the first of the `others` that has it, if one has."""
    source = next((other for other in others if is_done(experiment, other)), None)
    if source is None:
        return False
    unpack(experiment.run_id, folder, packed(experiment.run_id, source))
    return True


def packed(run_id: str, folder: Path) -> dict[str, bytes]:
    """The content of the files that the run has, by name."""
    found = [folder / run_id / name for name in (CHECKPOINT, WEIGHTS, RECORD)]
    return {path.name: path.read_bytes() for path in found if path.exists()}


def unpack(run_id: str, folder: Path, files: dict[str, bytes]) -> None:
    """Write the `packed` files of a run, its record last: with it, the network is done."""
    for name in (CHECKPOINT, WEIGHTS, RECORD):
        if name in files:
            write_atomically(folder / run_id / name, files[name])


def epochs(experiment: Dense | Pruned | Channels) -> int:
    """How many epochs the experiment itself trains."""
    return experiment.recipe.epochs if isinstance(experiment, Dense) else experiment.epochs


def epochs_done(experiment: Dense | Pruned | Channels, folder: Path) -> float:
    """Epochs of an experiment that need not be computed any more, as its record or its checkpoint says."""
    if is_done(experiment, folder):
        return epochs(experiment)
    try:
        return epochs(experiment) * training.position(folder / experiment.run_id / CHECKPOINT).progress
    except ValueError:
        return 0.0  # damaged: whoever trains it says so


def load_model(experiment: Dense | Pruned | Channels, folder: Path) -> nn.Module:
    """The trained network of an experiment that has been run, in eval mode on the training device."""
    path = folder / experiment.run_id / WEIGHTS
    if not path.exists():
        raise FileNotFoundError(f"no weights {path}: delete {path.parent} and run the experiment again")
    dense = experiment if isinstance(experiment, Dense) else experiment.dense
    model = _without_channels(experiment, folder) if isinstance(experiment, Channels) else _new_model(dense)
    model.load_state_dict(tensors.read(path))
    return model.eval()


def untrained(dense: Dense) -> nn.Module:
    """The network of an experiment before it trains, on the CPU; the global random numbers stay as they are."""
    with torch.random.fork_rng():  # layers know no generator but the global one
        torch.manual_seed(dense.seed)
        classes, image_size = data.shape(dense.dataset)
        return models.build(dense.model, classes, dense.width, dense.hidden, image_size)


def _new_model(dense: Dense) -> nn.Module:
    return untrained(dense).to(training.device(), memory_format=torch.channels_last)


def _dataset(dense: Dense) -> data.Dataset:
    dataset = data.load(dense.dataset)
    return (dataset.first(dense.images) if dense.images else dataset).to(training.device())


def _run_dense(dense: Dense, folder: Path, **limits):
    dataset = _dataset(dense)
    model = _new_model(dense)
    curve = training.fit(model, dataset, dense.recipe, seed=dense.seed, label=dense.label, **limits)
    accuracy = training.accuracy_pct(model, dataset, dataset.test, dense.recipe.precision)
    row = _dense_columns(dense) | {
        "sparsity": 0.0,
        "sparsity_total": 0.0,
        "accuracy_dense_pct": accuracy,
        "accuracy_pct": accuracy,
        "accuracy_validation_pct": curve[-1]["accuracy_validation_pct"],
        "epochs": dense.recipe.epochs,
        "flops": sum(_flops(model, dataset).values()),
        "params_kept": _parameters(model),
    }
    return row, curve, model


def _run_pruned(experiment: Pruned, folder: Path, **limits):
    dense, pattern = experiment.dense, parse(experiment.pattern)
    dataset = _dataset(dense)
    model = load_model(dense, folder)
    if experiment.permuted:
        pruning.permute_channels(model, pattern, experiment.sparsity, dense.seed)
    start = copy.deepcopy(model)
    weights = pruning.prunable(model, experiment.prune_ends)
    recipe = replace(dense.recipe, epochs=experiment.epochs, lr=dense.recipe.lr * experiment.lr_factor)
    pruner = pruning.Pruner(
        model,
        pattern,
        experiment.sparsity,
        training.total_steps(dataset, recipe),
        layers=weights,
        schedule=experiment.schedule,
        phase=experiment.pruning_phase,
        ratios=_ratios(experiment, pattern, weights, model, dataset),
        score=experiment.score,
        masks=experiment.masks,
        seed=dense.seed,
    )

    def penalty() -> Tensor:
        return experiment.group_lasso * pruning.group_lasso(weights, pattern)

    right_after = _right_after(experiment, pattern, pruner.targets, dataset, start)
    curve = training.fit(
        model,
        dataset,
        recipe,
        seed=RETRAINING_SEED + dense.seed,
        lr_at=_lr_at(experiment),
        pruner=pruner,
        penalty=penalty if experiment.group_lasso else None,
        penalty_until=experiment.pruning_phase,
        teacher=load_model(dense, folder) if experiment.distillation else None,
        distillation=experiment.distillation,
        label=experiment.label,
        **limits,
    )
    masks = pruner.masks
    check_target(pattern, experiment.sparsity, masks)
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    row = _dense_columns(dense) | {
        "pattern": experiment.method,
        "spec": experiment.pattern,
        **sizes(pattern),
        "score": experiment.score,
        "schedule": experiment.schedule,
        "ratios": experiment.ratios,
        "retraining": experiment.retraining,
        "group_lasso": experiment.group_lasso,
        "prune_ends": experiment.prune_ends,
        "masks": experiment.masks,
        "distillation": experiment.distillation,
        "pruning_phase": experiment.pruning_phase,
        "lr_factor": experiment.lr_factor,
        "permuted": experiment.permuted,
        "target_sparsity": experiment.sparsity,
        "sparsity": pruning.achieved_sparsity(masks),
        "sparsity_total": pruned / _parameters(model),
        **_accuracies(experiment, folder, model, dataset, right_after, curve),
        "flops": pruning.remaining_flops(_flops(model, dataset), masks),
        "params_kept": _parameters(model) - pruned,
    }
    return row, curve, model


def _run_channels(experiment: Channels, folder: Path, **limits):
    dense = experiment.dense
    dataset = _dataset(dense)
    whole, model = load_model(dense, folder), _without_channels(experiment, folder)
    right_after = _unrepaired(experiment, model, dataset)
    curve = training.fit(
        model,
        dataset,
        replace(dense.recipe, epochs=experiment.epochs),
        seed=RETRAINING_SEED + dense.seed,
        lr_at=lambda progress: training.rewound_lr(progress, experiment.epochs, dense.recipe.epochs),
        label=experiment.label,
        **limits,
    )
    kept = sum(map(Tensor.numel, pruning.prunable(model).values()))
    row = _dense_columns(dense) | {
        "pattern": experiment.method,
        "spec": CHANNELS_BY,
        "target_sparsity": experiment.sparsity,
        "sparsity": 1 - kept / sum(map(Tensor.numel, pruning.prunable(whole).values())),
        "sparsity_total": 1 - _parameters(model) / _parameters(whole),
        **_accuracies(experiment, folder, model, dataset, right_after, curve),
        "flops": sum(_flops(model, dataset).values()),
        "params_kept": _parameters(model),
    }
    return row, curve, model


def _accuracies(experiment: Pruned | Channels, folder: Path, model, dataset, right_after: dict, curve) -> dict:
    return {
        "accuracy_dense_pct": run(experiment.dense, folder)["row"]["accuracy_pct"],
        **right_after,
        "accuracy_pct": training.accuracy_pct(model, dataset, dataset.test, experiment.dense.recipe.precision),
        "accuracy_validation_pct": curve[-1]["accuracy_validation_pct"],
        "epochs": experiment.epochs,
    }


def _without_channels(experiment: Channels, folder: Path) -> nn.Module:
    """The dense network, trained, without the channels that the experiment removes; not retrained."""
    size = data.shape(experiment.dense.dataset)[1]
    model = pruning.remove_channels(load_model(experiment.dense, folder), experiment.sparsity, (3, size, size))
    return model.to(memory_format=torch.channels_last)


def _right_after(experiment: Pruned, pattern: Pattern, ratios, dataset, model: nn.Module) -> dict:
    """`_unrepaired` of the dense `model` pruned at once; checks the target on the way."""
    weights = pruning.prunable(model, experiment.prune_ends)
    masks = pruning.make_masks(weights, pattern, ratios, experiment.score, experiment.dense.seed)
    check_target(pattern, experiment.sparsity, masks)
    pruning.apply_masks(weights, masks)
    return _unrepaired(experiment, model, dataset)


def _unrepaired(experiment: Pruned | Channels, model: nn.Module, dataset) -> dict:
    """Test accuracies before retraining: as the model is, and with statistics of batch norm that fit its weights."""
    recipe, seed = experiment.dense.recipe, RETRAINING_SEED + experiment.dense.seed
    renewed = training.with_renewed_statistics(model, dataset, recipe, seed)
    return {
        "accuracy_pruned_pct": training.accuracy_pct(model, dataset, dataset.test, recipe.precision),
        "accuracy_renewed_pct": training.accuracy_pct(renewed, dataset, dataset.test, recipe.precision),
    }


def check_target(pattern: Pattern, target: float, masks: dict[str, Tensor]) -> None:
    """Raise ValueError, with the bank that would do, where `masks` miss the target by more than half a point."""
    achieved = pruning.achieved_sparsity(masks)
    if abs(achieved - target) <= TOLERANCE:
        return
    remedy = "use smaller units or another sparsity"
    if isinstance(pattern, Balanced):
        columns = sorted({mask[0].numel() for mask in masks.values()})
        bank = fitting_bank(columns, target, TOLERANCE)
        if bank:
            remedy = f"Balanced({bank}) does: the smallest bank that divides rows of {columns} weights and fits"
    raise ValueError(f"{pattern} reaches {100 * achieved:.2f} % sparsity where {100 * target:g} % was asked: {remedy}")


def _ratios(experiment: Pruned, pattern: Pattern, weights, model, dataset) -> str | dict[str, float]:
    """How a pruner is told them; by sensitivity they are measured on the dense network.

    Its batch norms get new statistics for each loss: with the old ones most sensitive is what moves them most.
    """
    if experiment.ratios != "sensitivity":
        return experiment.ratios
    recipe, seed = experiment.dense.recipe, experiment.dense.seed

    def loss() -> float:
        renewed = training.with_renewed_statistics(model, dataset, recipe, seed)
        return training.mean_loss(renewed, dataset, dataset.validation, recipe.precision)

    return pruning.sensitivity_ratios(weights, pattern, experiment.sparsity, loss)


def _lr_at(experiment: Pruned) -> Callable[[float], float]:
    if experiment.retraining == "fine-tuning":
        return training.fine_tuning_lr
    rounds = pruning.ROUNDS if experiment.schedule == "iterative" else 1
    return lambda progress: training.rewound_lr(
        progress * rounds % 1, experiment.epochs / rounds, experiment.dense.recipe.epochs
    )


def _dense_columns(dense: Dense) -> dict:
    return {
        "dataset": dense.dataset,
        "model": dense.model,
        "width": dense.width,
        "precision": precision.usable(dense.recipe.precision, training.device().type),
        "pattern": "dense",
        "seed": dense.seed,
    }


def _flops(model: nn.Module, dataset: data.Dataset) -> dict[str, int]:
    return models.layer_flops(model, (3, dataset.image_size, dataset.image_size))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
