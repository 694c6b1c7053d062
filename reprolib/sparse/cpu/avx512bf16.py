"""AVX-512 with bfloat16: like `avx512`, but one instruction multiplies two input channels and adds both products.

Weights and activations are bfloat16 (the upper half of a float32), those of two neighbouring input channels in 32 bits.
Sums are float32. A pair of weights costs one instruction, whether one of them is kept or both.
"""

from __future__ import annotations

import numpy as np
import torch

from reprolib.sparse.cpu import encoder
from reprolib.sparse.cpu.avx512 import (
    CHUNK,
    CHUNK_OF_FEW,
    LANES,
    REACH,
    REGISTERS,
    TEMPORARIES,
    add,
    bits_or,
    broadcast,
    load,
    load_masks,
    mask_table,
    maximum,
    of_memory,
    of_registers,
    store,
    zero,
)
from reprolib.sparse.cpu.encoder import Operation

__all__ = [
    "CHUNK", "CHUNK_OF_FEW", "LANES", "REACH", "REGISTERS", "TEMPORARIES", "add", "bits_or",
    "broadcast", "load", "load_masks", "mask_table", "maximum", "store", "zero",
]  # fmt: skip

NAME, FEATURES = "AVX-512 with bfloat16", ("avx512f", "avx512vl", "avx512bf16")
PAIRS = True
GROUP_ROWS = (30, 28, 24, 16)  # output channels of a group: whole pairs

_MULTIPLY_ADD = Operation(2, 2, 0x52)  # vdpbf16ps
_NARROW = Operation(2, 2, 0x72)  # vcvtneps2bf16
_WIDEN = Operation(2, 1, 0x33)  # vpmovzxwd
_SHIFT = Operation(1, 1, 0x72)
_LEFT, _RIGHT = 6, 2  # what the shift does, in place of a register


def words(weight: np.ndarray) -> np.ndarray:
    """Float32 weights ``[C_out, C_in, ..]``, C_in even, as code reads them: ``[C_out, C_in / 2, ..]`` uint32.

    The lower half of a word is the nearest bfloat16 of an even input channel, the upper half that of the next one.
    """
    halves = torch.from_numpy(weight + np.float32(0)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return halves[:, ::2] | halves[:, 1::2].astype(np.uint32) << 16


def multiply_add(total, x, base, disp, lanes=LANES):
    """total += x * the pair at memory[base + disp]: both products."""
    return of_memory(_MULTIPLY_ADD, total, x, base, disp, lanes, 4, broadcast=True)


def pair(low, high, lanes=LANES):
    """low = pairs of the float32 numbers of low and high, rounded; high is lost."""
    return np.concatenate(
        [
            *(
                of_registers(form, register, 0, register, lanes)
                for register in (low, high)
                for form in (_NARROW, _WIDEN)
            ),
            _shifted(_LEFT, high, lanes),
            bits_or(low, low, high, lanes),
        ],
        axis=1,
    )


def half(register, upper, lanes=LANES):
    """register = one half of its pairs, the upper or the lower one, as float32."""
    left = _shifted(_LEFT, register, lanes)
    return np.concatenate([_shifted(_RIGHT, register, lanes), left], axis=1) if upper else left


def plus(register, a, b, lanes=LANES):
    """register = a + b."""
    return of_registers(encoder.ADD, register, a, b, lanes)


def _shifted(way, register, lanes):
    """register = itself, shifted by 16 bits."""
    code = of_registers(_SHIFT, way, register, register, lanes)
    return np.pad(code, ((0, 0), (0, 1)), constant_values=16)
