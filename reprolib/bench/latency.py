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
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from reprolib.bench.peers import Peers
from reprolib.bench.rivals import SPARSE, Specs, ceilings, kernel_type, layer_contenders, network_contenders
from reprolib.bench.timing import Contender, measure
from reprolib.experiments import records
from reprolib.experiments.profiles import Profile
from reprolib.files import paths
from reprolib.files.deadline import OutOfTime
from reprolib.sparse import cuda

BATCHES = {"cpu": (1, 16, 64), "cuda": (1, 128, 1024)}
SEEDS = 5  # networks per pattern and sparsity: the intervals of claim 4 are over them
CONTEST = ["scope", "name", "batch", "seed"]  # what is measured together

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
SURVEY_SEEDS = 3
SHORT_SPARSITY = 0.9
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


def benchmark(
    profile: Profile,
    device: str,
    extent: str,
    output: Path,
    deadline: float = math.inf,
    peers: Peers | None = None,
) -> None:
    """Latencies as a CSV table: of the networks of the `extent`, and of `peers` that run whole networks, too.

    ``own``: the profile's networks; ``all``: also full-width VGG-16 and its layers; ``short``: of those only full-width
    VGG-16, one seed and sparsity.

    The table appears in `output` when all of it is measured. Until then a file beside it, ending in ``.partial``, holds
    what is: asking for the same again, with the same code on the same machine, goes on from there.

    One row per implementation, seed, batch and network or layer. Columns: scope (network, layer; ceiling: what bounds
    the layers), name, width, batch, device, dtype, pattern, spec, target_sparsity, sparsity (of the pruned layers),
    implementation, seed, rounds, latency_us (median) with latency_q1_us and latency_q3_us, speedup (over the fastest
    dense one, by whichever engine, of the same name, batch, seed and of the type of the kernels: fp32 on a CPU, fp16 on
    a GPU), kind (measured), commit, hardware, threads, torch.

    Raises OutOfTime when `time.time()` passes `deadline`, RuntimeError where the device's kernels can't run.
    """
    if device == "cuda":
        cuda.require()
    where = {"commit": records.commit(), "hardware": records.hardware(device), "threads": torch.get_num_threads()}
    where |= {"torch": torch.__version__}
    asked = {"device": device, "extent": extent, "specs": profile_specs(profile), "peers": str(peers)}
    asked = records.fingerprint(asked)  # other peers are other contests: who is timed together stands in one table
    partial_path = output.with_name(f"{output.name}.{asked}.partial")
    table = _continued(partial_path, where)
    plan = list(_contests(profile, device, extent, peers))
    if not table.empty:
        measured = set(table[CONTEST].itertuples(index=False, name=None))
        plan = [(name, prepare) for name, prepare in plan if tuple(name[key] for key in CONTEST) not in measured]
    for name, prepare in tqdm(plan, desc=f"latency on {device}", unit="contest"):
        if time.time() > deadline:
            raise OutOfTime(f"out of time: what is measured is kept in {partial_path}; ask again to go on")
        with torch.inference_mode():
            rows = pd.DataFrame([name | row for row in measure(prepare(), device)])
        if peers:
            peers.release()
        rows["speedup"] = _best_dense_us(rows, device) / rows["latency_us"]
        rows = rows.assign(kind="measured", **where)
        table = pd.concat([table, rows], ignore_index=True) if len(table) else rows
        records.write_csv(partial_path, table)
    records.write_csv(output, table)
    partial_path.unlink(missing_ok=True)


def _continued(partial_path: Path, where: dict) -> pd.DataFrame:
    """What was measured before by the same code on the same machine; else nothing."""
    if not partial_path.exists():
        return pd.DataFrame()
    table = records.read_csv(partial_path)
    same = all((table[key] == value).all() for key, value in where.items())
    return table if same and not where["commit"].endswith("+") else pd.DataFrame()


def _best_dense_us(rows: pd.DataFrame, device: str) -> float:
    """Latency of the fastest dense rival in the type of the kernels; NaN in a contest without one."""
    dense = (rows["pattern"] == "dense") & (rows["dtype"] == kernel_type(device))
    return rows.loc[dense & (rows["implementation"] != SPARSE), "latency_us"].min()


def _contests(
    profile: Profile, device: str, extent: str, peers: Peers | None = None
) -> Iterator[tuple[dict, Callable[[], list[Contender]]]]:
    """Every network or layer, batch and seed, with a function that prepares its contenders."""

    def network(width: float, seed: int, batch: int, specs: Specs):
        name = {"scope": "network", "name": f"VGG-16 ×{width:g}", "width": width, "batch": batch, "seed": seed}
        return name | {"device": device}, partial(network_contenders, width, seed, batch, device, specs, others=peers)

    if extent == "short":
        specs = tuple(spec for spec in SURVEY if spec[-1] == SHORT_SPARSITY)
        yield from (network(1.0, 0, batch, specs) for batch in BATCHES[device])
        return
    survey = extent == "all"
    own = profile_specs(profile)
    if survey and profile.width == 1:  # one network, one list: what the profile times already is not timed again
        timed = {(pattern, sparsity) for pattern, _, sparsity in own}
        own += tuple(
            (pattern, spec, sparsity) for pattern, spec, sparsity in SURVEY if (pattern, sparsity) not in timed
        )
    for seed, batch in itertools.product(range(SEEDS), BATCHES[device]):
        yield network(profile.width, seed, batch, own)
    if not survey:
        return
    if profile.width != 1:
        for seed, batch in itertools.product(range(SURVEY_SEEDS), BATCHES[device]):
            yield network(1.0, seed, batch, SURVEY)
    for (c_in, c_out, size), batch in itertools.product(LAYERS, BATCHES[device]):
        name = {"scope": "layer", "name": f"{c_in}→{c_out}, {size}×{size}", "width": 1.0, "batch": batch, "seed": 0}
        yield name | {"device": device}, partial(layer_contenders, c_in, c_out, size, batch, device, SURVEY)
    name = {"scope": "ceiling", "name": "arithmetic and memory", "width": 1.0, "batch": 1, "seed": 0, "device": device}
    yield name, partial(ceilings, device)


def profile_specs(profile: Profile) -> Specs:
    """Method, pattern and target sparsity of the profile's methods.

    Left out is what shares the masks of another, and what is not pruned as the timed networks are: equally in all
    layers but the first and the last.
    """
    timed = (
        (e.method, e.pattern, e.sparsity)
        for e in profile.asked("methods")
        if (e.score, e.ratios, e.prune_ends, e.group_lasso) == ("magnitude", "uniform", False, 0)
    )
    return tuple(dict.fromkeys(timed))


def folder(profile: Profile, device: str) -> Path:
    """``results/<profile>`` for the CPU; for a GPU ``results/<model>``, such as ``results/h100``."""
    if device == "cpu":
        return paths.results(profile.name)
    words = records.hardware(device).split()
    model = next((word for word in words if re.search(r"\d", word)), words[-1])
    return paths.results(model.lower())
