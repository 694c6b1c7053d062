"""Number types of training: what a recipe may ask for, and what it comes to on a device."""

from contextlib import AbstractContextManager
from functools import cache

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def usable(precision: str, device_type: str) -> str:
    """What `precision` comes to on a ``cpu`` or ``cuda`` device: fp32 where bf16 would be emulated.

    A CPU without bf16 instructions trains more than ten times slower in bf16 than in fp32 (a one-off look, AMD Zen 3).
    """
    return precision if precision == "fp32" or _multiplies_bf16(device_type) else "fp32"


def autocast(precision: str, device_type: str) -> torch.autocast:
    """The autocast context of a recipe's `precision`."""
    return torch.autocast(device_type, torch.bfloat16, enabled=usable(precision, device_type) == "bf16")


def exact_convolutions() -> AbstractContextManager:
    """A context in which a GPU's convolutions of fp32 are fp32, not TF32, and the fastest algorithm is searched."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)


@cache
def _multiplies_bf16(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu.get_capabilities().get("avx512_bf16", False)
