"""AVX-512 instructions as bytes: whole arrays of one instruction at a time, ``[count, bytes]`` uint8.

An instruction of the EVEX form is a prefix of four bytes, an opcode, a byte that names operands (ModRM) and, with an
operand in memory, how far it lies from a base register: one byte that counts whole operands where that is enough, else
four bytes (Intel SDM volume 2, sections 2.7.1 and 2.7.5). What does not fit is refused with ValueError, never cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BYTES = {16: 64, 8: 32, 4: 16}  # of a vector, by its lanes of 32 bits

# Registers of addresses, as the calling convention of x86-64 (System V) hands them over.
RDX, RCX, RSI, RDI, R8 = 2, 1, 6, 7, 8


@dataclass(frozen=True)
class _Operation:
    """Where an instruction stands in the tables of the manual: opcode map, implied prefix, opcode."""

    map: int
    prefix: int
    opcode: int


_LOAD, _STORE = _Operation(1, 0, 0x10), _Operation(1, 0, 0x11)  # vmovups
_BROADCAST = _Operation(2, 1, 0x18)  # vbroadcastss
_MULTIPLY_ADD = _Operation(2, 1, 0xB8)  # vfmadd231ps
_MAXIMUM = _Operation(1, 0, 0x5F)  # vmaxps
_OR, _XOR = _Operation(1, 1, 0xEB), _Operation(1, 1, 0xEF)  # vpord, vpxord

LEAVE = bytes((0xC5, 0xF8, 0x77, 0xC3))  # vzeroupper; ret


def load(register, base, disp, lanes=16, mask=0):
    """register = memory[base + disp]; lanes outside of mask register `mask` (0: all lanes) become zero."""
    return _memory(_LOAD, register, 0, base, disp, lanes, BYTES[lanes], mask=mask, zeroing=True)


def store(register, base, disp, lanes=16, mask=0):
    """memory[base + disp] = register; lanes outside of the mask stay as they are."""
    return _memory(_STORE, register, 0, base, disp, lanes, BYTES[lanes], mask=mask)


def broadcast(register, base, disp, lanes=16):
    """Every lane = the 32 bits at memory[base + disp]."""
    return _memory(_BROADCAST, register, 0, base, disp, lanes, 4)


def multiply_add(total, x, base, disp, lanes=16):
    """total += x * the float32 at memory[base + disp]."""
    return _memory(_MULTIPLY_ADD, total, x, base, disp, lanes, 4, broadcast=True)


def maximum(register, a, b, lanes=16):
    """register = the larger of a and b, lane by lane; b where one of them is NaN."""
    return _registers(_MAXIMUM, register, a, b, lanes)


def bits_or(register, a, b, lanes=16):
    return _registers(_OR, register, a, b, lanes)


def zero(register, lanes=16):
    return _registers(_XOR, register, register, register, lanes)


def add(register: int, amount: int) -> bytes:
    """register += amount, of 64 bits and 32 bits."""
    return bytes((0x48, 0x81, 0xC0 | _checked(register, 0, 7, "register"))) + _signed(amount)


def load_mask(mask: int, base: int, disp: int) -> bytes:
    """Mask register = the 16 bits at memory[base + disp] (kmovw)."""
    _checked(base, 8, 15, "register")
    return bytes((0xC4, 0xC1, 0x78, 0x90, 0x40 | mask << 3 | base & 7, _checked(disp, 0, 127, "displacement")))


def prefetch_code(ahead: int) -> bytes:
    """Bring the line of memory `ahead` bytes behind this instruction into the second-level cache (prefetcht1)."""
    return bytes((0x0F, 0x18, 0x15)) + _signed(ahead)


def joined(*parts) -> bytes:
    """Instructions one after the other: bytes, or arrays of equal instructions."""
    return b"".join(part if isinstance(part, bytes) else part.tobytes() for part in parts)


# --- The EVEX form ----------------------------------------------------------------------------------------------------


def _memory(operation, register, second, base, disp, lanes, operand_bytes, broadcast=False, mask=0, zeroing=False):
    """An instruction with an operand in memory; the displacement takes one byte where it does for all of the array."""
    _checked(base, 0, 15, "register")
    if base & 7 == 4:
        raise ValueError(f"register {base} can't be a base: its form takes another byte")
    disp = np.atleast_1d(np.asarray(disp, np.int64))
    steps = disp // operand_bytes
    short = bool(((disp % operand_bytes == 0) & (steps >= -128) & (steps < 128)).all())
    register, second, disp, mask = np.broadcast_arrays(register, second, disp, mask)
    code = _prefix(operation, register, second, base, 0, lanes, broadcast, mask, zeroing)
    code[:, 5] = (0x40 if short else 0x80) | (register & 7) << 3 | base & 7
    if short:
        tail = steps.astype(np.int8).view(np.uint8)[:, None]
    else:
        _checked(disp, -(2**31), 2**31 - 1, "displacement")
        tail = disp.astype("<i4").view(np.uint8).reshape(-1, 4)
    return np.concatenate([code, tail], axis=1)


def _registers(operation, register, second, third, lanes):
    """An instruction whose operands are all registers."""
    register, second, third = np.broadcast_arrays(*map(np.atleast_1d, (register, second, third)))
    _checked(third, 0, 31, "register")
    code = _prefix(operation, register, second, third, third >> 4, lanes)
    code[:, 5] = 0xC0 | (register & 7) << 3 | third & 7
    return code


def _prefix(operation, register, second, third, third_high, lanes, broadcast=False, mask=0, zeroing=False):
    """Prefix and opcode, ``[count, 6]``, the last byte still empty. Upper bits of registers are stored inverted."""
    _checked(register, 0, 31, "register")
    _checked(second, 0, 31, "register")
    _checked(mask, 0, 7, "mask register")
    code = np.zeros((len(register), 6), np.uint8)
    code[:, 0] = 0x62
    upper = (~register >> 3 & 1) << 7 | (~third_high & 1) << 6 | (~third >> 3 & 1) << 5 | (~register >> 4 & 1) << 4
    code[:, 1] = upper | operation.map
    code[:, 2] = (~second & 15) << 3 | 4 | operation.prefix
    length = {16: 2, 8: 1, 4: 0}[lanes] << 5 | int(broadcast) << 4
    code[:, 3] = np.where(zeroing & (mask != 0), 0x80, 0) | length | (~second >> 4 & 1) << 3 | mask
    code[:, 4] = operation.opcode
    return code


def _checked(values, lowest: int, highest: int, what: str):
    array = np.asarray(values)
    if array.size and (array.min() < lowest or array.max() > highest):
        worst = array.min() if array.min() < lowest else array.max()
        raise ValueError(f"{what} {worst} does not fit: {lowest} to {highest}")
    return values


def _signed(number: int) -> bytes:
    return int(_checked(number, -(2**31), 2**31 - 1, "displacement")).to_bytes(4, "little", signed=True)
