"""How long it takes to make masks."""

from __future__ import annotations

import statistics
import time

from reprolib import pruning
from reprolib.experiments import records
from reprolib.models import vgg16
from reprolib.patterns import Pattern, parse

PATTERNS = ("Balanced(16) & Block(32, 32)", "Unstructured()", "Balanced(16)", "Block(32, 32)", "Vector(32)")


def mask_time_ms(pattern: Pattern, sparsity: float, repeats: int = 3) -> float:
    """Median time in ms to make the masks of all pruned layers of a full-width VGG-16, after one warm-up."""
    weights = pruning.prunable(vgg16(10))
    ratios = pruning.uniform_ratios(weights, sparsity)
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        pruning.make_masks(weights, pattern, ratios)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def print_times(threads: int) -> None:
    print(f"masks of all pruned layers of VGG-16 at 90 %, {records.hardware()}, {threads} threads, median")
    for text in PATTERNS:
        print(f"{text:30} {mask_time_ms(parse(text), 0.9):7.0f} ms", flush=True)
