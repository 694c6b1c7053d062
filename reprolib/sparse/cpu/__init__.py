"""Pruned convolutions and linear layers on a CPU with AVX-512: machine code made for the weights, for any mask.

`encoder` knows instructions, `generator` makes the code of a layer, `planner` says where activations lie and in which
order the work is done, `driver` does it, and `network` holds code and threads. `reprolib.sparse.portable` has kernels
for other CPUs.
"""

from __future__ import annotations

import platform
from functools import cache

import llvmlite.binding
import numba
import numpy as np

from reprolib.sparse.cpu import encoder
from reprolib.sparse.cpu.network import Network, Program, executable
from reprolib.sparse.cpu.planner import LANES, Layer

__all__ = ["LANES", "Layer", "Network", "Program", "available"]


@cache
def available() -> bool:
    """Whether this machine runs the code, and its system lets a program make some."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux" or numba.config.DISABLE_JIT:
        return False
    features = llvmlite.binding.get_host_cpu_features()
    if not (features.get("avx512f") and features.get("avx512vl")):
        return False
    try:
        executable(np.frombuffer(encoder.LEAVE, np.uint8))
    except OSError:
        return False
    return True
