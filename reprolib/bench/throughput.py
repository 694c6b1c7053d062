"""Training speed, measured: `training.fit` beside a loop of the usual kind, in images per second and share of the peak.

Every figure is the difference between a longer and a shorter run of the whole loop, so that its start (a capture,
worker processes) cancels out; the median of some rounds counts. Networks side by side start together, each in a process
of its own.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm.auto import tqdm

from reprolib import experiments, models, pruning
from reprolib.experiments import Dense, records
from reprolib.training import Recipe, data, fit
from reprolib.training.data import Dataset
from reprolib.training.precision import PRECISIONS, usable

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
STEPS = {"cpu": 32, "cuda": 350}  # per epoch
EPOCHS = {"cpu": (1, 2), "cuda": (1, 5)}  # of the shorter and the longer run
ROUNDS = 3
PATIENCE_S = 600  # of a network that waits for those beside it
SIDE_BY_SIDE = {"cpu": (1, CORES), "cuda": (1, 2, 4)}  # networks
PRUNED, SPARSITY = "hybrid", 0.95
PLAIN, OURS = "plain", "reprolib"
PEAK_SIDE = {"cpu": 2048, "cuda": 8192}
PEAK_ROUNDS = 9


@dataclass(frozen=True)
class Case:
    """One thing to time: a loop, what it trains, and how many networks of it side by side on how many threads each."""

    loop: str
    trains: str
    networks: int
    threads: int


def benchmark(dense: Dense, pattern: str, device: str) -> pd.DataFrame:
    """Training speed of a network, dense and pruned by a pattern, by both loops, alone and side by side.

    Columns: name, width, dataset, device, loop (plain or reprolib), pattern, precision, batch, networks (side by side),
    threads (of each), images_per_s (of all networks together), tflop_per_s (of dense training: 2 per multiply-add,
    forward and backward), peak_tflop_per_s (of a large matrix product in the same precision on all cores),
    share_of_peak, convolutions_share (of the time of a step; reprolib, one network), kind (measured), commit, hardware,
    torch.
    """
    cases = [Case(PLAIN, trains, 1, CORES) for trains in ("dense", PRUNED)]
    for trains, networks in itertools.product(("dense", PRUNED), sorted(set(SIDE_BY_SIDE[device]))):
        cases.append(Case(OURS, trains, networks, max(1, CORES // networks)))
    flops = training_flops(experiments.untrained(dense))
    ours, plain = usable(dense.recipe.precision, device), "fp32" if device == "cpu" else "tf32"  # torch's defaults
    peaks = {precision: peak_flop_per_s(device, precision) for precision in {plain, ours}}
    rows = []
    for case in tqdm(cases, desc=f"training on {device}", unit="case"):
        precision = plain if case.loop == PLAIN else ours
        speed = images_per_s(dense, pattern, device, case)
        rows.append(
            {
                "name": models.title(dense.model, dense.width),
                "width": dense.width,
                "dataset": dense.dataset,
                "device": device,
                "loop": case.loop,
                "pattern": case.trains,
                "precision": precision,
                "batch": dense.recipe.batch_size,
                "networks": case.networks,
                "threads": case.threads,
                "images_per_s": speed,
                "tflop_per_s": speed * flops / 1e12,
                "peak_tflop_per_s": peaks[precision] / 1e12,
                "share_of_peak": speed * flops / peaks[precision],
                "convolutions_share": convolutions_share(dense, pattern, case)
                if _has_share(case, device)
                else math.nan,
            }
        )
    where = {
        "kind": "measured",
        "commit": records.commit(),
        "hardware": records.hardware(device),
        "torch": torch.__version__,
    }
    return pd.DataFrame(rows).assign(**where)


def speed_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The benchmark's rows as people read them."""
    return pd.DataFrame(
        {
            "loop": rows["loop"] + ", " + rows["precision"],
            "trains": rows["pattern"],
            "networks × threads": [f"{n} × {t}" for n, t in zip(rows["networks"], rows["threads"], strict=True)],
            "images/s": rows["images_per_s"].map("{:,.0f}".format),
            "of the peak": rows["share_of_peak"].map("{:.0%}".format),
            "in convolutions": rows["convolutions_share"]
            .map("{:.0%}".format)
            .where(rows["convolutions_share"].notna(), "–"),
        }
    )


def _has_share(case: Case, device: str) -> bool:
    """A replayed graph shows the profiler kernels, not operators."""
    return device == "cpu" and case.loop == OURS and case.networks == 1


def training_flops(model: nn.Module) -> int:
    """FLOPs of one image in training: forward, gradient of the input (not of the image) and gradient of the weight."""
    flops = list(models.layer_flops(model).values())
    return 3 * sum(flops) - flops[0]


@torch.no_grad()
def peak_flop_per_s(device: str, precision: str) -> float:
    """FLOP/s of a large matrix product on all cores, asked for as a 1x1 convolution: best of some rounds."""
    side, dtype = PEAK_SIDE[device], PRECISIONS.get(precision, torch.float32)
    weight = torch.randn(side, side, 1, 1).to(device, dtype)
    pixels = torch.randn(1, side, 32, side // 32).to(device, dtype, memory_format=torch.channels_last)
    times = []
    for _ in range(PEAK_ROUNDS):
        _synchronize(device)
        started = time.perf_counter()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=precision == "tf32"):
            F.conv2d(pixels, weight)
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * side**3 / min(times)


# --- Timing ---------------------------------------------------------------------------------------------------------


def images_per_s(dense: Dense, pattern: str, device: str, case: Case) -> float:
    """Images per second of all networks of a case together: the slowest of them counts."""
    context = multiprocessing.get_context("spawn")
    barrier, times = context.Barrier(case.networks), context.SimpleQueue()
    processes = [
        context.Process(target=_timed, args=(dense, pattern, device, case, barrier, times))
        for _ in range(case.networks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"timing of {case} failed: see the error above")
    slowest_s = max(times.get() for _ in processes)
    fewer, more = EPOCHS[device]
    return case.networks * (more - fewer) * STEPS[device] * dense.recipe.batch_size / slowest_s


def _timed(dense: Dense, pattern: str, device: str, case: Case, barrier, times) -> None:
    """Put the seconds that the longer run takes more than the shorter one into `times`, the median of some rounds."""
    try:
        torch.set_num_threads(case.threads)
        train = _loop(dense, pattern, device, case)
        train(1)  # whatever happens once in a process
        more = []
        for _ in range(ROUNDS):
            seconds = []
            for epochs in EPOCHS[device]:
                barrier.wait(PATIENCE_S)
                started = time.perf_counter()
                train(epochs)
                _synchronize(device)
                seconds.append(time.perf_counter() - started)
            more.append(seconds[1] - seconds[0])
        times.put(statistics.median(more))
    except BaseException:
        barrier.abort()  # those beside it need not wait
        raise


def convolutions_share(dense: Dense, pattern: str, case: Case) -> float:
    """Share of the time of training on a CPU that convolutions take, forward and backward, as torch's profiler says."""
    train = _loop(dense, pattern, "cpu", case)
    train(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        train(1)
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    return sum(time for key, time in times.items() if "conv" in key) / sum(times.values())


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- The loops ------------------------------------------------------------------------------------------------------


def _loop(dense: Dense, pattern: str, device: str, case: Case) -> Callable[[int], object]:
    """A function that trains a new network for so many epochs by the loop of the case."""
    recipe = dense.recipe
    dataset = random_images(dense.dataset, STEPS[device] * recipe.batch_size)
    model = experiments.untrained(dense)
    if case.loop != PLAIN:
        model, dataset = model.to(device, memory_format=torch.channels_last), dataset.to(device)
    pruner = None
    if case.trains != "dense":
        pruner = pruning.Pruner(model, pattern, SPARSITY, steps=1, schedule="one-shot")
    if case.loop == PLAIN:
        masks = {name: mask.to(device) for name, mask in pruner.masks.items()} if pruner else {}
        return lambda epochs: plain_fit(model.to(device), dataset, replace(recipe, epochs=epochs), masks)

    def ours(epochs: int) -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            fit(model, dataset, replace(recipe, epochs=epochs), seed=0, pruner=pruner)

    return ours


def random_images(name: str, count: int) -> Dataset:
    """So many images of the size, and labels of the classes, of a data set: time does not depend on what they show."""
    classes, side = data.shape(name)
    chance = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, side, side, 3), generator=chance, dtype=torch.uint8)
    train = data.Split(images, torch.randint(classes, (count,), generator=chance))
    names, middle, one = tuple(map(str, range(classes))), (0.5,) * 3, train.first(1)
    return Dataset(name, names, train, one, one, middle, middle, flip=True, pad=side // 8)


def plain_fit(model: nn.Module, dataset: Dataset, recipe: Recipe, masks: dict[str, Tensor]) -> None:
    """The loop of many a training script: a DataLoader over transforms, fp32, masks multiplied in by name.

    On a GPU, convolutions of fp32 are then TF32: that is torch's default.
    """
    where = next(model.parameters()).device
    steps = [v2.ToImage(), v2.RandomCrop(32, padding=dataset.pad), v2.RandomHorizontalFlip()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(dataset.mean, dataset.std)]
    transform = v2.Compose(steps)
    pairs = _Pairs(dataset.train.images.numpy(), dataset.train.labels.tolist(), transform)
    loader = torch.utils.data.DataLoader(
        pairs,
        recipe.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=min(8, CORES),
        persistent_workers=True,
        pin_memory=where.type == "cuda",
    )
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    weights = pruning.prunable(model)
    for _ in range(recipe.epochs):
        model.train()
        running_loss = 0.0
        for images, labels in loader:
            images, labels = images.to(where), labels.to(where)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for name, mask in masks.items():
                    weights[name].mul_(mask)
            running_loss += loss.item()


class _Pairs(torch.utils.data.Dataset):
    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(self.images[index]), self.labels[index]
