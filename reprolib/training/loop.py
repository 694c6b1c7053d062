"""The training loop, for dense and pruned networks alike."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from reprolib.files.deadline import OutOfTime
from reprolib.models import is_finite, mode
from reprolib.pruning import Pruner
from reprolib.training import checkpoints
from reprolib.training.checkpoints import Position, State
from reprolib.training.data import Dataset, augmented, draw_augmentations, normalised
from reprolib.training.evaluation import accuracy_pct
from reprolib.training.precision import autocast, exact_convolutions
from reprolib.training.recipes import Recipe, dense_lr

CHECKPOINT_EVERY_S = 120
TEMPERATURE = 4.0  # of distillation: how much a teacher's small probabilities count
RENEWING_STEPS = 20  # batches that statistics are taken from
EAGER_STEPS = 3  # before a step is captured: lazy initialisation must be over by then


def device() -> torch.device:
    """The GPU if one is usable, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def total_steps(dataset: Dataset, recipe: Recipe) -> int:
    """How many steps `fit` takes. Raises ValueError where the batch is larger than the training split."""
    steps = len(dataset.train) // recipe.batch_size  # the last partial batch is dropped: batch norm dislikes small ones
    if steps == 0:
        raise ValueError(f"a batch of {recipe.batch_size} is larger than the {len(dataset.train)} training images")
    return recipe.epochs * steps


def fit(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    lr_at: Callable[[float], float] = dense_lr,
    pruner: Pruner | None = None,
    penalty: Callable[[], Tensor] | None = None,
    penalty_until: float = 1.0,
    teacher: nn.Module | None = None,
    distillation: float = 0.0,
    label: str = "training",
    checkpoint: Path | None = None,
    deadline: float = math.inf,
) -> list[dict]:
    """Train `model` in place on the device it is on.

    `lr_at(progress)` is the share of the peak learning rate at a progress in [0, 1). What the masks of `pruner`, a
    pruner of `model`, prune is zero in each forward pass and behind each step. `penalty()` is added to the loss before
    the progress `penalty_until`. The share `distillation` of the loss asks for the answers of `teacher`, in eval mode,
    on the same augmented images (`distilled`). The order of the images and their augmentation follow from `seed` alone.

    With a `checkpoint`, training goes on from that file if it is there (on a CPU to the same bits as without the
    stop). The file is written every two minutes, and when `time.time()` passes `deadline`. That of another recipe,
    seed or pruner is refused.

    Frozen parameters stay as they are. A model that is in training mode keeps the modes of its modules, so that a batch
    norm in eval mode is frozen too; one in eval mode trains as a whole, and is in eval mode again behind it.

    Returns a row per epoch: epoch, lr, loss_train (mean, without penalty), accuracy_validation_pct. Raises OutOfTime at
    the deadline, and ValueError where the loss is no longer finite or the batch larger than the training split.
    """
    steps = total_steps(dataset, recipe) // recipe.epochs
    where = next(model.parameters()).device
    state = _begin(model, recipe, seed, where, pruner)
    step = _step_of(state, dataset, recipe, penalty, teacher, distillation)
    take = _captured(step) if where.type == "cuda" else step
    of = {"recipe": asdict(recipe), "seed": seed}
    start = checkpoints.restore(checkpoint, state, of)
    curve, resumed = list(start.curve), time.monotonic()
    saved = resumed
    modes = nullcontext() if model.training else mode(model, training=True)
    with _bar(label, recipe, steps, start) as bar, modes, exact_convolutions():
        for epoch in range(start.epoch, recipe.epochs):
            drawn_from = state.generator.get_state()  # resumed within this epoch, its draws are made again
            draws = _draw_epoch(dataset, steps, recipe.batch_size, state.generator).to(where)
            for index in range(start.step if epoch == start.epoch else 0, steps):
                progress = (epoch * steps + index) / (recipe.epochs * steps)
                state.lr.fill_(recipe.lr * lr_at(progress))
                if pruner and (epoch or index):  # not sooner: an epoch's accuracy is that of the masks it trained with
                    pruner.advance()
                take(draws[index], penalty is not None and progress < penalty_until)
                bar.update(recipe.batch_size)
                late = time.time() > deadline
                if checkpoint and (late or time.monotonic() > saved + CHECKPOINT_EVERY_S):
                    saved = time.monotonic()
                    share = (epoch * steps + index + 1) / (recipe.epochs * steps)
                    here = Position(epoch, index + 1, share, start.wall_time_s + saved - resumed, tuple(curve))
                    checkpoints.save(checkpoint, state, drawn_from, here, of)
                if late:
                    raise OutOfTime(f"{label}: out of time in epoch {epoch + 1} of {recipe.epochs}")
            if pruner and epoch + 1 == recipe.epochs:  # of few steps, the last may come before the last masks are due
                pruner.advance()
            loss = _mean_loss_of_epoch(state, steps)
            if not math.isfinite(loss):
                what = f"{label}: training diverged in epoch {epoch + 1} (loss {loss:.3g})"
                raise ValueError(f"{what}; try lr below {recipe.lr}")
            accuracy = accuracy_pct(model, dataset, dataset.validation, recipe.precision)
            rate = recipe.lr * lr_at(((epoch + 1) * steps - 1) / (recipe.epochs * steps))  # of the last step
            row = {"epoch": epoch + 1, "lr": rate, "loss_train": loss, "accuracy_validation_pct": accuracy}
            curve.append(row)
            bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss:.3f}, validation {accuracy:.2f} %", refresh=False)
    return curve


@torch.no_grad()
def with_renewed_statistics(model: nn.Module, dataset: Dataset, recipe: Recipe, seed: int) -> nn.Module:
    """A copy, in eval mode, whose batch norms have the statistics of augmented training images; weights as they are.

    Those of a dense network no longer fit when weights are gone: most images then get the same answer.
    """
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # the plain mean over batches
            module.train()
    where, steps = next(model.parameters()).device, total_steps(dataset, recipe) // recipe.epochs
    draws = _draw_epoch(dataset, min(steps, RENEWING_STEPS), recipe.batch_size, torch.Generator().manual_seed(seed))
    for row in draws.to(where):
        with autocast(recipe.precision, where.type):
            model(normalised(augmented(dataset.train.images[row[:, 0]], row[:, 1:], dataset), dataset))
    return model.eval()


def _begin(model: nn.Module, recipe: Recipe, seed: int, where: torch.device, pruner: Pruner | None) -> State:
    """The state before the first step. What changes from step to step lives in tensors: a captured step sees it."""
    lr, total = torch.zeros((), device=where), torch.zeros((), device=where)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay, fused=True
    )
    return State(model, optimizer, torch.Generator().manual_seed(seed), lr, total, pruner)


def distilled(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Knowledge distillation (Hinton et al., 2015): T² KL(teacher ∥ student) at temperature T, mean over the images.

    Both float32 ``[N, classes]``.
    """
    student, teacher = ((each / TEMPERATURE).log_softmax(dim=1) for each in (logits, teacher_logits))
    return TEMPERATURE**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _step_of(
    state: State,
    dataset: Dataset,
    recipe: Recipe,
    penalty: Callable[[], Tensor] | None,
    teacher: nn.Module | None,
    distillation: float,
) -> Callable[[Tensor, bool], None]:
    """One step on the images that a row of `_draw_epoch` names; its flag says whether the penalty counts."""
    train = dataset.train

    def step(draws: Tensor, penalised: bool) -> None:
        chosen = draws[:, 0]
        images = normalised(augmented(train.images[chosen], draws[:, 1:], dataset), dataset)
        with autocast(recipe.precision, images.device.type):
            logits = state.model(images)
        loss = F.cross_entropy(logits.float(), train.labels[chosen], label_smoothing=recipe.label_smoothing)
        if teacher is not None and distillation:
            with torch.no_grad(), autocast(recipe.precision, images.device.type):
                answers = teacher(images)
            loss = (1 - distillation) * loss + distillation * distilled(logits.float(), answers.float())
        state.total.add_(loss.detach())
        (loss + penalty() if penalised else loss).backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        if state.pruner:
            state.pruner.hold()

    return step


def _mean_loss_of_epoch(state: State, steps: int) -> float:
    """Mean loss since the last call; NaN where a parameter or a statistic is no longer finite."""
    loss = state.total.item() / steps
    state.total.zero_()
    return loss if is_finite(state.model) else math.nan


def _bar(label: str, recipe: Recipe, steps: int, start: Position) -> tqdm:
    return tqdm(
        total=recipe.epochs * steps * recipe.batch_size,
        initial=(start.epoch * steps + start.step) * recipe.batch_size,
        desc=label,
        unit=" images",
        unit_scale=True,
        mininterval=1,
        dynamic_ncols=True,
    )


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
