"""Machine code as bytes: what instruction sets of x86 share. `avx512` and `avx2` have the instructions of vectors.

Both offer the same functions. An instruction comes as an array ``[count, bytes]`` uint8: many of one form at a time,
with different registers and displacements. What does not fit is refused with ValueError, never cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BYTES = {16: 64, 8: 32, 4: 16}  # of a vector, by its lanes of 32 bits

# Registers of addresses, as the calling convention of x86-64 (System V) hands them over.
RDX, RCX, RSI, RDI, R8, R9 = 2, 1, 6, 7, 8, 9

# Masks of an output vector: the first says which lanes are written, others which ones a tap may read.
WRITTEN, MOST_MASKS = 1, 7

LEAVE = bytes((0xC5, 0xF8, 0x77, 0xC3))  # vzeroupper; ret


@dataclass(frozen=True)
class Operation:
    """Where an instruction stands in the tables of the manual: opcode map, implied prefix, opcode."""

    map: int
    prefix: int
    opcode: int


LOAD, STORE = Operation(1, 0, 0x10), Operation(1, 0, 0x11)  # vmovups
BROADCAST = Operation(2, 1, 0x18)  # vbroadcastss
MULTIPLY_ADD = Operation(2, 1, 0xB8)  # vfmadd231ps
MAXIMUM = Operation(1, 0, 0x5F)  # vmaxps
ADD = Operation(1, 0, 0x58)  # vaddps


def add(register: int, amount: int) -> bytes:
    """register += amount, of 64 bits and 32 bits."""
    return bytes((0x48, 0x81, 0xC0 | checked(register, 0, 7, "register"))) + _signed(amount)


def repeat(times: int, body: bytes) -> bytes:
    """Do `body`, which leaves EAX alone, so many times (mov; body; dec; jnz)."""
    count = bytes((0xB8,)) + _signed(checked(times, 1, 2**31 - 1, "number of times"))
    back = bytes((0xFF, 0xC8, 0x0F, 0x85))
    return count + body + back + _signed(-len(body) - len(back) - 4)


def prefetch_code(ahead: int) -> bytes:
    """Bring the line of memory `ahead` bytes behind this instruction into the second-level cache (prefetcht1)."""
    return bytes((0x0F, 0x18, 0x15)) + _signed(ahead)


def words(weight: np.ndarray) -> np.ndarray:
    """Float32 weights ``[C_out, C_in, ..]`` as code reads them, uint32: 0 where there is none (a zero may be -0.0)."""
    return (weight + np.float32(0)).view(np.uint32)


def joined(*parts) -> bytes:
    """Instructions one after the other: bytes, or arrays of equal instructions."""
    return b"".join(part if isinstance(part, bytes) else part.tobytes() for part in parts)


def checked(values, lowest: int, highest: int, what: str):
    array = np.asarray(values)
    if array.size and (array.min() < lowest or array.max() > highest):
        worst = array.min() if array.min() < lowest else array.max()
        raise ValueError(f"{what} {worst} does not fit: {lowest} to {highest}")
    return values


def base_checked(base: int) -> int:
    """A register that a displacement can be counted from."""
    checked(base, 0, 15, "register")
    if base & 7 == 4:
        raise ValueError(f"register {base} can't be a base: its form takes another byte")
    return base


def tails(disp: np.ndarray, unit: int) -> tuple[np.ndarray, bool]:
    """Displacements as they end an instruction, and whether one byte, that counts units, is enough for all of them."""
    steps = disp // unit
    if ((disp % unit == 0) & (steps >= -128) & (steps < 128)).all():
        return steps.astype(np.int8).view(np.uint8)[:, None], True
    checked(disp, -(2**31), 2**31 - 1, "displacement")
    return disp.astype("<i4").view(np.uint8).reshape(-1, 4), False


def _signed(number: int) -> bytes:
    return int(checked(number, -(2**31), 2**31 - 1, "displacement")).to_bytes(4, "little", signed=True)
