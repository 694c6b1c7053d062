"""`make doctor`: what this machine can do with the project, and what each thing that is missing would give."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from typing import NamedTuple

import torch

from reprolib.experiments import records
from reprolib.files import paths
from reprolib.sparse import cpu, cuda
from reprolib.training import precision

DATA = {"CIFAR-10": "cifar-10-batches-py", "CIFAR-100": "cifar-100-python"}
NETWORK_GB = 1.5  # of memory, for a network of quarter width in training; the full one takes about twice that
ENVIRONMENT_GB = 6.0  # on disk


class Finding(NamedTuple):
    """A thing, what is there of it, and what is missing: with a remedy or what it would give, or nothing."""

    thing: str
    found: str
    missing: str = ""


def findings() -> list[Finding]:
    """All of them, in the order of a screen."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free_gb = shutil.disk_usage(paths.home()).free / 1e9
    return [
        Finding(
            "code",
            f"commit {records.commit()}",
            _if(records.commit().endswith("+"), "not committed: results say so with a +"),
        ),
        Finding("Python", f"{platform.python_version()}, torch {torch.__version__}"),
        Finding("processor", f"{records.hardware('cpu')}; {cores} cores to use"),
        _memory(cores),
        Finding(
            "disk",
            f"{free_gb:.0f} GB free in {paths.home()}",
            _if(free_gb < ENVIRONMENT_GB, f"{ENVIRONMENT_GB:g} GB are needed"),
        ),
        _engine(),
        Finding(
            "training in bf16",
            "yes" if precision.usable("bf16", "cpu") == "bf16" else "no, in fp32",
            _if(
                precision.usable("bf16", "cpu") != "bf16",
                "a processor with AMX, which multiplies bf16, trains faster",
            ),
        ),
        _gpu(),
        *(_data(name, folder) for name, folder in DATA.items()),
    ]


def _if(condition: bool, text: str) -> str:
    return text if condition else ""


def _memory(cores: int) -> Finding:
    total_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    side_by_side = max(1, min(cores, int(total_gb / NETWORK_GB)))
    too_few = (
        f"{cores} networks side by side take about {cores * NETWORK_GB:.0f} GB: make reproduce CORES={side_by_side}"
    )
    return Finding("memory", f"{total_gb:.0f} GB", _if(total_gb < cores * NETWORK_GB, too_few))


def _engine() -> Finding:
    names = [isa.__name__.rpartition(".")[2] for isa in (*cpu.instruction_sets(pairs=True), *cpu.instruction_sets())]
    if not names:
        return Finding("sparse networks", "Numba's code", "on x86 with AVX2 or AVX-512, and Linux, they are faster")
    without = "with AVX-512 BF16, dtype=bfloat16 is faster, too" if "avx512bf16" not in names else ""
    return Finding("sparse networks", f"code for {', '.join(names)}", without)


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", "none", "an NVIDIA GPU trains the profile paper: full width, long training")
    name = torch.cuda.get_device_name()
    try:
        cuda.require()
    except RuntimeError as problem:
        return Finding("GPU", name, str(problem))
    return Finding("GPU", f"{torch.cuda.device_count()} × {name}, with sparse kernels")


def _data(name: str, folder: str) -> Finding:
    place = paths.data() / folder
    return Finding(name, f"in {place}" if place.exists() else "none", _if(not place.exists(), "make data gets it"))


def screen(found: list[Finding]) -> str:
    """One line each, and below it what is missing."""
    width = max(len(finding.thing) for finding in found)
    lines = []
    for finding in found:
        lines.append(f"{finding.thing:{width}}  {finding.found}")
        lines += [f"{'':{width}}  → {finding.missing}"] * bool(finding.missing)
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) > 1:
        sys.exit(f"error: this takes no arguments, not {sys.argv[1:]}")
    print(screen(findings()))


if __name__ == "__main__":
    main()
