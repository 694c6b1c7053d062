"""Pruned convolutions and linear layers on a CPU of x86: machine code made for the weights, for any mask.

`avx512`, `avx512bf16` and `avx2` know instructions (`encoder`: what they share), `generator` makes the code of a layer.
`planner` says where values lie (`layout`), what layers read there (`geometry`) and what is to be done, `schedule` in
which order, and `driver` does it (`moves`: all but layers; `activations`). `network` holds code and threads.
`reprolib.sparse.portable` has kernels for other CPUs.
"""

from __future__ import annotations

import platform
from functools import cache
from types import ModuleType

import llvmlite.binding
import numba
import numpy as np

from reprolib.sparse.cpu import avx2, avx512, avx512bf16, encoder
from reprolib.sparse.cpu.network import Network, Program, executable

__all__ = ["Network", "Program", "instruction_sets"]


@cache
def instruction_sets(pairs: bool = False) -> tuple[ModuleType, ...]:
    """Those for float32, or for `pairs` of bfloat16 numbers, that this machine runs, the best first.

    None where its system lets no program make code.
    """
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux" or numba.config.DISABLE_JIT:
        return ()
    try:
        executable(np.frombuffer(encoder.LEAVE, np.uint8))
    except OSError:
        return ()
    here = llvmlite.binding.get_host_cpu_features()
    known = (avx512bf16,) if pairs else (avx512, avx2)
    return tuple(isa for isa in known if all(here.get(feature) for feature in isa.FEATURES))
