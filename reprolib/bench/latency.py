"""Latency, measured: sparse kernels against the best dense path of the same machine, and against a sparse engine.

All implementations of one network (or layer) and batch take turns, round by round in random order, on fresh random
inputs: whatever disturbs the machine disturbs all of them. Each has the cores for itself: a turn ends when the threads
of the one that had it are idle. On a GPU every implementation is captured in a CUDA graph.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
import torch

from reprolib import experiments, models
from reprolib.bench.peers import Peers
from reprolib.bench.rivals import (
    SPARSE,
    Specs,
    ceilings,
    condition_contenders,
    kernel_type,
    layer_contenders,
    network_contenders,
    torchvision_contenders,
    trained_contenders,
)
from reprolib.bench.timing import Contender, measure
from reprolib.experiments import Channels, Dense, records
from reprolib.files import paths
from reprolib.files.deadline import OutOfTime
from reprolib.sparse import cuda
from reprolib.training import Recipe, data

if TYPE_CHECKING:  # a GPU is timed without profiles, too, and so without what reads them
    from reprolib.experiments.profiles import Profile

BATCHES = {"cpu": (1, 16, 64), "cuda": (128, 1, 1024)}  # the most telling first
SEEDS = 5  # networks per pattern and sparsity: the intervals of claim 4 are over them
CIFAR_SIDE = 32  # pixels
CONTEST = ["scope", "name", "batch", "seed"]  # what is measured together

FULL = Dense("cifar10", Recipe(epochs=1, precision="bf16"))  # the network of the survey: VGG-16 of full width

# The survey, at full width. Balanced(64) is the shortest bank that expresses all sparsities.
PATTERNS = {
    "block": "Block(32, 32)",
    "vector": "Vector(32)",
    "hybrid": "Balanced(16) & Block(32, 32)",
    "two-four-block": "NM(2, 4) & Block(32, 32)",
    "balanced": "Balanced(64)",
    "unstructured": "Unstructured()",
}
SPARSITIES = (0.5, 0.75, 0.9, 0.95)
SHORT_SPARSITY = 0.9
CONDITIONED = ("block", "hybrid", "unstructured")  # of them: what threads and caches do to their latencies
# C_in, C_out, H = W: the distinct pruned convolutions of VGG-16
LAYERS = (
    (64, 64, 32),
    (64, 128, 16),
    (128, 128, 16),
    (128, 256, 8),
    (256, 256, 8),
    (256, 512, 4),
    (512, 512, 4),
    (512, 512, 2),
)
SURVEY: Specs = tuple((name, spec, sparsity) for name, spec in PATTERNS.items() for sparsity in SPARSITIES)


class Size(NamedTuple):
    """What a network costs: layers that hold weights, their weights, and multiply-adds for an image."""

    layers: int
    weights: float
    macs: float


# Networks of torchvision, for images of 224 x 224 pixels.
IMAGE_SIZE = 224
NETWORKS = {"resnet18": ("ResNet-18", Size(21, 11.7e6, 1.8e9)), "resnet50": ("ResNet-50", Size(54, 25.6e6, 4.1e9))}
NETWORK_BATCHES = (1, 16)
NETWORK_SPECS = tuple(spec for spec in SURVEY if spec[0] in CONDITIONED and spec[-1] == SHORT_SPARSITY)

# What a contest takes, in seconds on two idle cores with AVX2. The estimate begins with them, and then learns from the
# contests that are done: shares matter more than sizes. Those of a GPU are a guess.
LAYER_S, WEIGHTS_S = 0.04, 0.2  # to prepare a layer, and a million weights: masks, formats, code
AGAIN = 0.2  # the share of it for another batch
CALLS_S = {"cpu": 0.16, "cuda": 0.001}  # per billion multiply-adds of the dense network and contender, all rounds
CALL_IMAGES = 3  # that a call costs beside its own
CONTEST_S = 1.0
TRUST_S = 30.0  # of contests that are done: as much as the numbers above are trusted


@dataclass(frozen=True)
class Contest:
    """What is measured together: its columns in tables, what prepares its contenders, and seconds that it may take."""

    name: dict
    prepare: Callable[[], list[Contender]]
    effort_s: float = CONTEST_S

    @property
    def key(self) -> tuple:
        return tuple(self.name[key] for key in CONTEST)


def benchmark(
    profile: Profile | None,
    device: str,
    extent: str,
    output: Path,
    deadline: float = math.inf,
    peers: Peers | None = None,
) -> None:
    """Latencies as a CSV table: of the networks of the `extent`, and of `peers` that run whole networks, too. Without a
    profile they are those of the survey alone.

    ``own``: the profile's networks, untrained; ``all``: also full-width VGG-16, its layers, and other numbers of
    threads; ``short``: of those only full-width VGG-16, one sparsity; ``networks``: ResNets for larger images instead;
    ``trained``: the profile's trained networks of its first seed, at the sparsity nearest to 90 %, and those without
    channels. What tells most comes first; a line says of each contest what came out and what time is left.

    The table appears in `output` when all of it is measured. Until then a file beside it, ending in ``.partial``, holds
    what is: asking for the same again, with the same code on the same machine, goes on from there.

    One row per implementation, seed, batch and network or layer. Columns: scope (network, layer, larger network,
    trained network; ceiling: what bounds the layers; conditions: on fewer threads and with swept caches; first look:
    one network, before all others, that no figure shows), name, width, batch, device, dtype, pattern, spec,
    target_sparsity, sparsity (of the pruned layers), implementation, seed, rounds, latency_us (median) with
    latency_q1_us and latency_q3_us, file_bytes (of trained networks), speedup (over the fastest dense one, by whichever
    engine, of the same contest and of the type of the kernels: fp32 on a CPU, fp16 on a GPU), kind (measured), commit,
    hardware, threads, torch.

    Raises OutOfTime when `time.time()` passes `deadline`, RuntimeError where the device's kernels can't run.
    """
    if device == "cuda":
        cuda.require()
    where = {"commit": records.commit(), "hardware": records.hardware(device), "threads": torch.get_num_threads()}
    where |= {"torch": torch.__version__}
    asked = {
        "device": device,
        "extent": extent,
        "specs": profile_specs(profile) if profile else (),
        "peers": str(peers),
    }
    asked = records.fingerprint(asked)  # other peers are other contests: who is timed together stands in one table
    partial_path = output.with_name(f"{output.name}.{asked}.partial")
    table = _continued(partial_path, where)
    plan = list(_contests(profile, device, extent, peers))
    if not table.empty:
        measured = set(table[CONTEST].itertuples(index=False, name=None))
        plan = [contest for contest in plan if contest.key not in measured]
    started, efforts = time.perf_counter(), [contest.effort_s for contest in plan]
    print(f"latency on {device}: {len(plan)} contests, {left(efforts, 0, 0.0)}", flush=True)
    for number, contest in enumerate(plan, 1):
        if time.time() > deadline:
            raise OutOfTime(f"out of time: what is measured is kept in {partial_path}; ask again to go on")
        with torch.inference_mode():
            rows = pd.DataFrame([contest.name | row for row in measure(contest.prepare(), device)])
        if peers:
            peers.release()
        rows["speedup"] = _best_dense_us(rows, device) / rows["latency_us"]
        rows = rows.assign(kind="measured", **where)
        table = pd.concat([table, rows], ignore_index=True) if len(table) else rows
        records.write_csv(partial_path, table)
        print(f"{result(rows, device)}; {left(efforts, number, time.perf_counter() - started)}", flush=True)
    records.write_csv(output, table)
    partial_path.unlink(missing_ok=True)


def _continued(partial_path: Path, where: dict) -> pd.DataFrame:
    """What was measured before by the same code on the same machine; else nothing."""
    if not partial_path.exists():
        return pd.DataFrame()
    table = records.read_csv(partial_path)
    same = all((table[key] == value).all() for key, value in where.items())
    return table if same and not where["commit"].endswith("+") else pd.DataFrame()


def left(efforts: list[float], done: int, elapsed_s: float) -> str:
    """The time that contests still take, as a text, when the first `done` of them took `elapsed_s`.

    `efforts` are what all of them may take, in seconds on another machine.
    """
    pace = (elapsed_s + TRUST_S) / (sum(efforts[:done]) + TRUST_S)
    left_s = pace * sum(efforts[done:])
    return f"about {left_s / 60:.0f} min left" if left_s >= 90 else f"about {left_s:.0f} s left"


def result(rows: pd.DataFrame, device: str) -> str:
    """What a contest says first: the best dense latency in the type of the kernels, and that of hybrid nearest 90 %."""
    what = f"{rows['name'].iloc[0]}, batch {rows['batch'].iloc[0]}, seed {rows['seed'].iloc[0]}"
    hybrid = rows[(rows["pattern"] == "hybrid") & (rows["implementation"] == SPARSE)]
    if hybrid.empty:
        shown = rows[rows["pattern"] == ("hybrid" if (rows["pattern"] == "hybrid").any() else "dense")]
        parts = [f"{row.implementation} {row.latency_us / 1e3:.3g} ms" for row in shown.itertuples()]
        return f"{what}: {', '.join(parts)}"
    row = hybrid.loc[(hybrid["target_sparsity"] - SHORT_SPARSITY).abs().idxmin()]
    dense_us = _best_dense_us(rows, device)
    return (
        f"{what}: best dense {dense_us / 1e3:.3g} ms, "
        f"hybrid at {100 * row['target_sparsity']:g} % {row['latency_us'] / 1e3:.3g} ms ({row['speedup']:.2f}×)"
    )


def _best_dense_us(rows: pd.DataFrame, device: str) -> float:
    """Latency of the fastest dense rival in the type of the kernels; NaN in a contest without one."""
    dense = (rows["pattern"] == "dense") & (rows["dtype"] == kernel_type(device))
    return rows.loc[dense & (rows["implementation"] != SPARSE), "latency_us"].min()


def _contests(profile: Profile | None, device: str, extent: str, peers: Peers | None = None) -> Iterator[Contest]:
    """Every network or layer, batch and seed; what tells most first. The batches of a network follow one another."""
    batches = BATCHES[device]
    own_network, own = (profile.dense(profile.datasets[0], 0), profile_specs(profile)) if profile else (FULL, ())
    side = data.shape(own_network.dataset)[1]
    is_full = side == CIFAR_SIDE and replace(own_network, dataset=FULL.dataset, recipe=FULL.recipe) == FULL
    survey = extent == "all"

    def network(dense: Dense, seed: int, batch: int, specs: Specs, scope: str = "network") -> Contest:
        most = seed == 0 and (is_full or dense is FULL)
        others = {"others": peers, "pruned_peers": most} if scope == "network" else {}
        prepare = partial(network_contenders, replace(dense, seed=seed), batch, device, specs, **others)
        effort = effort_s(_size(dense), batch, device, len(specs), batch != batches[0])
        return Contest(_named(scope, dense, batch, seed, device), prepare, effort)

    if extent == "short":
        specs = tuple(spec for spec in SURVEY if spec[-1] == SHORT_SPARSITY)
        yield from (network(FULL, 0, batch, specs) for batch in batches)
        yield from _conditions(FULL, device)
        return
    if extent == "networks":
        yield from _larger_networks(device, peers)
        return
    if extent == "trained":
        yield from _trained(profile, peers)
        return
    if survey:
        yield network(own_network, 0, batches[0], first_look(own or SURVEY), "first look")
    if survey and is_full:  # one network, one list: what the profile times already is not timed again
        timed = {(pattern, sparsity) for pattern, _, sparsity in own}
        own += tuple(
            (pattern, spec, sparsity) for pattern, spec, sparsity in SURVEY if (pattern, sparsity) not in timed
        )
    yield from (network(own_network, 0, batch, own) for batch in batches)
    if survey and not is_full:
        yield from (network(FULL, 0, batch, SURVEY) for batch in batches)
    for seed, batch in itertools.product(range(1, SEEDS), batches):
        yield network(own_network, seed, batch, own)
    if not survey:
        return
    batch = batches[-1]  # the one that figures of layers show
    for c_in, c_out, size in LAYERS:
        name = {"scope": "layer", "name": f"{c_in}→{c_out}, {size}×{size}", "width": 1.0, "batch": batch, "seed": 0}
        weights = 9 * c_in * c_out
        effort = effort_s(Size(1, weights, weights * size**2), batch, device, len(SURVEY))
        yield Contest(
            name | {"device": device}, partial(layer_contenders, c_in, c_out, size, batch, device, SURVEY), effort
        )
    yield from _conditions(FULL, device)
    name = {"scope": "ceiling", "name": "arithmetic and memory", "width": 1.0, "batch": 1, "seed": 0, "device": device}
    yield Contest(name, partial(ceilings, device))


def _named(scope: str, dense: Dense, batch: int, seed: int, device: str) -> dict:
    """The columns of a contest with this network; its name says the size of the images where that is not CIFAR's."""
    side = data.shape(dense.dataset)[1]
    name = models.title(dense.model, dense.width) + (f", {side}×{side}" if side != CIFAR_SIDE else "")
    return {"scope": scope, "name": name, "width": dense.width, "batch": batch, "seed": seed, "device": device}


@cache
def _size(dense: Dense) -> Size:
    model, side = experiments.untrained(dense), data.shape(dense.dataset)[1]
    layers = models.weight_layers(model).values()
    weights = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    return Size(len(layers), weights, sum(models.layer_flops(model, (3, side, side)).values()) / 2)


def _conditions(dense: Dense, device: str) -> Iterator[Contest]:
    """On a CPU: how threads and caches matter."""
    specs = tuple(spec for spec in SURVEY if spec[0] in CONDITIONED and spec[-1] == SHORT_SPARSITY)
    for batch in BATCHES["cpu"] if device == "cpu" else ():
        effort = effort_s(_size(dense), batch, device, 3 * len(specs), batch > 1)
        name = _named("conditions", dense, batch, 0, device)
        yield Contest(name, partial(condition_contenders, dense, batch, specs), effort)


def _trained(profile: Profile, peers: Peers | None) -> Iterator[Contest]:
    """Raises FileNotFoundError where the networks are not trained here."""
    dense = profile.dense(profile.datasets[0], profile.seeds[0])
    sparsity = min(profile.sparsities, key=lambda each: abs(each - SHORT_SPARSITY))
    smaller = tuple(
        (name, e)
        for e, name in profile.reported().items()
        if not isinstance(e, Dense) and e.dense == dense and (isinstance(e, Channels) or e.sparsity == sparsity)
    )
    runs = paths.runs(profile.name)
    if not all(experiments.is_done(experiment, runs) for experiment in (dense, *(e for _, e in smaller))):
        raise FileNotFoundError(
            f"networks of {profile.name} are not trained here: make reproduce PROFILE={profile.name}"
        )
    for batch in BATCHES["cpu"]:
        effort = effort_s(_size(dense), batch, "cpu", len(smaller), batch > 1)
        name = _named("trained network", dense, batch, dense.seed, "cpu")
        yield Contest(name, partial(trained_contenders, dense, smaller, runs, batch, peers), effort)


def _larger_networks(device: str, peers: Peers | None) -> Iterator[Contest]:
    for name, (title, network) in NETWORKS.items():
        for batch in NETWORK_BATCHES:
            about = {"scope": "larger network", "name": f"{title}, {IMAGE_SIZE}×{IMAGE_SIZE}", "width": 1.0}
            prepare = partial(torchvision_contenders, name, IMAGE_SIZE, batch, NETWORK_SPECS, peers)
            effort = effort_s(network, batch, device, len(NETWORK_SPECS), batch > 1)
            yield Contest(about | {"batch": batch, "seed": 0, "device": device}, prepare, effort)


def effort_s(size: Size, batch: int, device: str, specs: int, again: bool = False) -> float:
    """Seconds that a contest may take with a network, dense and pruned in `specs` ways; `again` for another batch."""
    prepare_s = specs * (size.layers * LAYER_S + size.weights / 1e6 * WEIGHTS_S) * (AGAIN if again else 1)
    return CONTEST_S + prepare_s + CALLS_S[device] * (specs + 3) * (batch + CALL_IMAGES) * size.macs / 1e9


def first_look(specs: Specs) -> Specs:
    """The one of a profile's `specs` that is timed before all others: hybrid, or what there is, nearest to 90 %."""
    return tuple(sorted(specs, key=lambda spec: (spec[0] != "hybrid", abs(spec[-1] - SHORT_SPARSITY)))[:1])


def profile_specs(profile: Profile) -> Specs:
    """Method, pattern and target sparsity of the profile's methods.

    Left out is what shares the masks of another, and what is not pruned as the timed networks are: equally in all
    layers but the first and the last.
    """
    timed = (
        (name, e.pattern, e.sparsity)
        for e, name in profile.asked("methods").items()
        if (e.score, e.ratios, e.prune_ends, e.group_lasso) == ("magnitude", "uniform", False, 0)
    )
    return tuple(dict.fromkeys(timed))


def folder(profile_name: str, device: str) -> Path:
    """``results/<profile>`` for the CPU; for a GPU ``results/<model>``, such as ``results/h100``."""
    if device == "cpu":
        return paths.results(profile_name)
    words = records.hardware(device).split()
    model = next((word for word in words if re.search(r"\d", word)), words[-1])
    return paths.results(model.lower())
