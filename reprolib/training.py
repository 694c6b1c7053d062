"""The training loop, for dense and pruned networks alike, and the evaluation."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from reprolib import checks, records
from reprolib.data import Dataset, Split, augmented, draw_augmentations, normalised
from reprolib.deadline import OutOfTime
from reprolib.models import mode
from reprolib.precision import PRECISIONS, autocast

WARM_UP = 0.1  # share of the dense schedule in which the learning rate rises
EVALUATION_BATCH = {"cpu": 500, "cuda": 2500}
CHECKPOINT_EVERY_S = 120
EAGER_STEPS = 3  # before a step is captured: lazy initialisation must be over by then
FINE_TUNING_LR = 0.01  # of the peak: where a schedule that ends at zero is "at its end"


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with Nesterov momentum 0.9. Weight decay is no sparsity-inducing penalty (see README).

    `lr` is the peak learning rate; `precision` is fp32, or bf16 by autocast where the device multiplies that (see
    `precision.usable`); `label_smoothing` is the share of each target that is spread evenly over all classes (Szegedy
    et al., 2016).
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    precision: str = "fp32"
    label_smoothing: float = 0.0

    def __post_init__(self):
        normal = {name: checks.whole(name, getattr(self, name)) for name in ("epochs", "batch_size")}
        for name in ("lr", "weight_decay", "label_smoothing"):
            normal[name] = checks.number(name, getattr(self, name))
        if normal["label_smoothing"] >= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), not {self.label_smoothing!r}")
        checks.choice("precision", self.precision, tuple(PRECISIONS))
        for name, value in normal.items():
            object.__setattr__(self, name, value)


def device() -> torch.device:
    """The GPU if one is usable, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- Learning-rate schedules: share of the peak at a progress in [0, 1) ---------------------------------------------


def dense_lr(progress: float) -> float:
    """Rise linearly during the warm-up, then fall linearly to zero."""
    return min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))


def rewound_lr(progress: float, epochs: int, dense_epochs: int) -> float:
    """LR rewinding (Renda et al., 2020): the last `epochs` of the dense schedule once more, or all of it."""
    share = min(1.0, epochs / dense_epochs)
    return dense_lr(1 - share * (1 - progress))


def fine_tuning_lr(progress: float) -> float:
    """Low constant learning rate, that of the end of dense training (Han et al., 2015)."""
    return FINE_TUNING_LR


# --- The loop -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Position:
    """Where a training stands: steps done of an epoch (the first is 0), the share of the whole training behind it,
    the seconds that took, one row per finished epoch, and the sparsities that were due when its masks were made.
    """

    epoch: int = 0
    step: int = 0
    progress: float = 0.0
    wall_time_s: float = 0.0
    curve: tuple[dict, ...] = ()
    due: tuple[float, ...] | None = None


@dataclass(frozen=True)
class MaskSchedule:
    """When masks change, and how new ones are made.

    `due_at(progress)` says what is due, for example the sparsity of each layer; where it differs from the step before,
    `masks_for(due, alive)` makes the masks that hold from then on, from the weights as they are and from the masks that
    held until then (none at first): by name of the module whose weight they prune, the same names each time.
    """

    due_at: Callable[[float], tuple[float, ...]]
    masks_for: Callable[[tuple[float, ...], dict[str, Tensor]], dict[str, Tensor]]


class Trained(NamedTuple):
    """One row per epoch, and the masks that held in the end, by module name."""

    curve: list[dict]
    masks: dict[str, Tensor]


def fit(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    lr_at: Callable[[float], float] = dense_lr,
    schedule: MaskSchedule | None = None,
    penalty: Callable[[], Tensor] | None = None,
    penalty_until: float = 1.0,
    label: str = "training",
    checkpoint: Path | None = None,
    deadline: float = math.inf,
) -> Trained:
    """Train `model` in place on the device it is on.

    `lr_at(progress)` is the share of the peak learning rate at a progress in [0, 1). What the masks of `schedule`
    prune is zero in each forward pass and behind each step. `penalty()` is added to the loss before the progress
    `penalty_until`. The order of the images and their augmentation follow from `seed` alone.

    With a `checkpoint`, training goes on from that file if it is there (on a CPU to the same bits as without the
    stop). The file is written every two minutes, and when `time.time()` passes `deadline`.

    Frozen parameters stay as they are. A model that is in training mode keeps the modes of its modules, so that a batch
    norm in eval mode is frozen too; one in eval mode trains as a whole, and is in eval mode again behind it.

    Rows: epoch, lr, loss_train (mean cross-entropy), accuracy_validation_pct. Raises OutOfTime at the deadline, and
    ValueError where the loss is no longer finite or where the batch is larger than the training split.
    """
    train, where = dataset.train, next(model.parameters()).device
    steps = len(train) // recipe.batch_size  # the last partial batch is dropped: batch norm dislikes small ones
    if steps == 0:
        raise ValueError(f"a batch of {recipe.batch_size} is larger than the {len(train)} training images")
    generator = torch.Generator().manual_seed(seed)
    # What changes from step to step lives in tensors, so that a captured step sees it change.
    lr, total = torch.zeros((), device=where), torch.zeros((), device=where)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay, fused=True
    )
    layers, pruned = dict(model.named_modules()), {}

    @torch.no_grad()
    def zero_pruned() -> None:
        for name, gone in pruned.items():
            layers[name].weight.masked_fill_(gone, 0.0)

    def renew_masks(due: tuple[float, ...]) -> None:
        alive = {name: ~gone for name, gone in pruned.items()}
        for name, mask in schedule.masks_for(due, alive).items():
            pruned.setdefault(name, torch.empty_like(mask)).copy_(~mask)
        zero_pruned()

    def step(draws: Tensor, penalised: bool) -> None:
        chosen = draws[:, 0]
        images = normalised(augmented(train.images[chosen], draws[:, 1:], dataset), dataset)
        with autocast(recipe.precision, where.type):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), train.labels[chosen], label_smoothing=recipe.label_smoothing)
        total.add_(loss.detach())
        (loss + penalty() if penalised else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        zero_pruned()

    take = _captured(step) if where.type == "cuda" else step
    start = _restored(checkpoint, model, optimizer, generator, total, pruned)
    curve, due, resumed = list(start.curve), start.due, time.monotonic()
    saved = resumed
    bar = tqdm(
        total=recipe.epochs * steps * recipe.batch_size,
        initial=(start.epoch * steps + start.step) * recipe.batch_size,
        desc=label,
        unit=" images",
        unit_scale=True,
        mininterval=1,
        dynamic_ncols=True,
    )
    modes = nullcontext() if model.training else mode(model, training=True)
    with bar, modes, torch.backends.cudnn.flags(enabled=True, benchmark=True):
        for epoch in range(start.epoch, recipe.epochs):
            state = generator.get_state()  # resumed within this epoch, its draws are made again
            draws = _draw_epoch(dataset, steps, recipe.batch_size, generator).to(where)
            for index in range(start.step if epoch == start.epoch else 0, steps):
                progress = (epoch * steps + index) / (recipe.epochs * steps)
                lr.fill_(recipe.lr * lr_at(progress))
                if schedule and (now_due := schedule.due_at(progress)) != due:
                    due = now_due
                    renew_masks(due)
                take(draws[index], penalty is not None and progress < penalty_until)
                bar.update(recipe.batch_size)
                late = time.time() > deadline
                if checkpoint and (late or time.monotonic() > saved + CHECKPOINT_EVERY_S):
                    saved = time.monotonic()
                    share = (epoch * steps + index + 1) / (recipe.epochs * steps)
                    here = Position(epoch, index + 1, share, start.wall_time_s + saved - resumed, tuple(curve), due)
                    _save(checkpoint, model, optimizer, state, total, pruned, here)
                if late:
                    raise OutOfTime(f"{label}: out of time in epoch {epoch + 1} of {recipe.epochs}")
            loss_train = total.item() / steps
            total.zero_()
            if not (math.isfinite(loss_train) and torch.stack([p.isfinite().all() for p in model.parameters()]).all()):
                what = f"{label}: training diverged in epoch {epoch + 1} (loss {loss_train:.3g})"
                raise ValueError(f"{what}; try lr below {recipe.lr}")
            if schedule and epoch + 1 == recipe.epochs and schedule.due_at(1.0) != due:
                renew_masks(schedule.due_at(1.0))  # of few steps the last one may come before the last masks are due
            accuracy = accuracy_pct(model, dataset, dataset.validation, recipe.precision)
            rate = recipe.lr * lr_at(((epoch + 1) * steps - 1) / (recipe.epochs * steps))  # of the last step
            row = {"epoch": epoch + 1, "lr": rate, "loss_train": loss_train, "accuracy_validation_pct": accuracy}
            curve.append(row)
            bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss_train:.3f}, validation {accuracy:.2f} %", refresh=False)
    return Trained(curve, {name: ~gone for name, gone in pruned.items()})


def _draw_epoch(dataset: Dataset, steps: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """All random numbers of an epoch, int64 ``[steps, batch_size, 4]``: image, then its draws of `augmented`.

    Drawn on the CPU, so that a seed means the same on every device.
    """
    order = torch.randperm(len(dataset.train), generator=generator)[: steps * batch_size]
    draws = [draw_augmentations(batch_size, dataset, generator) for _ in range(steps)]
    return torch.cat([order.view(steps, batch_size, 1), torch.stack(draws)], dim=2)


def _captured(step: Callable[[Tensor, bool], None]) -> Callable[[Tensor, bool], None]:
    """`step` as a CUDA graph, one for either value of its flag: a single launch instead of hundreds."""
    graphs, draws_in, eager_left = {}, {}, {True: EAGER_STEPS, False: EAGER_STEPS}
    side = torch.cuda.Stream()

    def take(draws: Tensor, penalised: bool) -> None:
        if eager_left[penalised]:
            eager_left[penalised] -= 1
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step(draws, penalised)
            torch.cuda.current_stream().wait_stream(side)
            return
        if penalised not in graphs:
            draws_in[penalised], graph = draws.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step(draws_in[penalised], penalised)
            graphs[penalised] = graph
        draws_in[penalised].copy_(draws)
        graphs[penalised].replay()

    return take


# --- Checkpoints ----------------------------------------------------------------------------------------------------


def position(checkpoint: Path) -> Position:
    """Where the training stood when it wrote `checkpoint`; at its start if there is none."""
    try:
        with checkpoint.open("rb") as file:  # one handle: the training may replace the file meanwhile
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        here = json.loads(header["__metadata__"]["position"])
    except FileNotFoundError:
        return Position()
    except (ValueError, KeyError):
        raise ValueError(f"the checkpoint {checkpoint} is damaged: delete it and ask again") from None
    due = here.get("due")
    return Position(**here | {"due": due if due is None else tuple(due)})


def _save(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.SGD,
    state: Tensor,
    total: Tensor,
    pruned: dict[str, Tensor],
    here: Position,
) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:  # not a frozen one
            tensors[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    tensors |= {"generator": state, "total": total} | {f"pruned.{name}": gone for name, gone in pruned.items()}
    # Copies, because safetensors takes no two tensors that share memory.
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    records.write_atomically(checkpoint, save(tensors, {"position": json.dumps(asdict(here))}))


def _restored(
    checkpoint: Path | None,
    model: nn.Module,
    optimizer: torch.optim.SGD,
    generator: torch.Generator,
    total: Tensor,
    pruned: dict[str, Tensor],
) -> Position:
    """Fill all arguments from the checkpoint and return its position; without a checkpoint leave them as they are."""
    if not (checkpoint and checkpoint.exists()):
        return Position()
    here = position(checkpoint)
    try:
        tensors = load_file(checkpoint)
    except SafetensorError:
        raise ValueError(f"the checkpoint {checkpoint} is damaged: delete it and ask again") from None
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    for name, parameter in model.named_parameters():
        if f"momentum.{name}" in tensors:
            # Laid out in memory like the parameter: the fused optimizer walks over both alike.
            momentum = torch.empty_like(parameter).copy_(tensors[f"momentum.{name}"])
            optimizer.state[parameter]["momentum_buffer"] = momentum
    generator.set_state(tensors["generator"])
    total.copy_(tensors["total"])
    for name, tensor in tensors.items():
        if name.startswith("pruned."):
            pruned[name.removeprefix("pruned.")] = tensor.to(total.device)
    return here


# --- Evaluation -----------------------------------------------------------------------------------------------------


def accuracy_pct(model: nn.Module, dataset: Dataset, split: Split, precision: str = "fp32") -> float:
    """Share of `split` that `model`, in eval mode meanwhile, classifies correctly, in percent.

    Raises ValueError for logits that are not finite, of which none is the largest.
    """
    return 100 * _mean_over(split, model, dataset, precision, lambda x, labels: (x.argmax(dim=1) == labels).sum())


def mean_loss(model: nn.Module, dataset: Dataset, split: Split, precision: str = "fp32") -> float:
    """Mean cross-entropy of `model`, in eval mode meanwhile, on `split`. Raises ValueError for logits not finite."""
    return _mean_over(split, model, dataset, precision, lambda x, labels: F.cross_entropy(x, labels, reduction="sum"))


@torch.no_grad()
def _mean_over(split: Split, model: nn.Module, dataset: Dataset, precision: str, total_of: Callable) -> float:
    where = split.labels.device
    total, finite = torch.zeros((), device=where), torch.ones((), dtype=torch.bool, device=where)
    batch = EVALUATION_BATCH[where.type]
    with mode(model, training=False):
        for images, labels in zip(split.images.split(batch), split.labels.split(batch), strict=True):
            with autocast(precision, where.type):
                logits = model(normalised(images, dataset)).float()
            finite &= logits.isfinite().all()
            total += total_of(logits, labels)
    if not finite:
        raise ValueError("the network gives NaN or infinite logits: did its training diverge?")
    return total.item() / len(split)
