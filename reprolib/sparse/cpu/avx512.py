"""AVX-512: 32 registers of 16 lanes, masks in registers of their own, one number of memory as an operand for all lanes.

An instruction of the EVEX form is a prefix of four bytes, an opcode, a byte that names operands (ModRM) and, with an
operand in memory, how far it lies from a base register: one byte that counts whole operands where that is enough, else
four bytes (Intel SDM volume 2, sections 2.7.1 and 2.7.5).
"""

from __future__ import annotations

import numpy as np

from reprolib.sparse.cpu import encoder
from reprolib.sparse.cpu.encoder import BYTES, MOST_MASKS, R8, Operation, checked

NAME, FEATURES = "AVX-512", ("avx512f", "avx512vl")
PAIRS, words = False, encoder.words  # numbers are float32
LANES, REGISTERS = 16, 32
TEMPORARIES = 0  # registers that `multiply_add` needs
GROUP_ROWS = (31, 28, 24, 16)  # output channels of a group: the size that takes the fewest instructions is chosen
REACH = 128  # numbers before and behind a pointer that a displacement of one byte reaches
CHUNK, CHUNK_OF_FEW = 2000, 8000  # multiplications that stay in the instruction cache; where code streams anyway

_OR, _XOR = Operation(1, 1, 0xEB), Operation(1, 1, 0xEF)  # vpord, vpxord


def load(register, base, disp, lanes=LANES, mask=0):
    """register = memory[base + disp]; lanes outside of mask `mask` (0: all lanes) become zero."""
    return of_memory(encoder.LOAD, register, 0, base, disp, lanes, BYTES[lanes], mask=mask, zeroing=True)


def store(register, base, disp, lanes=LANES, mask=0):
    """memory[base + disp] = register; lanes outside of the mask stay as they are."""
    return of_memory(encoder.STORE, register, 0, base, disp, lanes, BYTES[lanes], mask=mask)


def broadcast(register, base, disp, lanes=LANES):
    """Every lane = the 32 bits at memory[base + disp]."""
    return of_memory(encoder.BROADCAST, register, 0, base, disp, lanes, 4)


def multiply_add(total, x, base, disp, lanes=LANES):
    """total += x * the float32 at memory[base + disp]."""
    return of_memory(encoder.MULTIPLY_ADD, total, x, base, disp, lanes, 4, broadcast=True)


def maximum(register, a, b, lanes=LANES):
    """register = the larger of a and b, lane by lane; b where one of them is NaN."""
    return of_registers(encoder.MAXIMUM, register, a, b, lanes)


def bits_or(register, a, b, lanes=LANES):
    return of_registers(_OR, register, a, b, lanes)


def add(register, a, base, disp, lanes=LANES):
    """register = a + memory[base + disp]."""
    return of_memory(encoder.ADD, register, a, base, disp, lanes, BYTES[lanes])


def zero(register, lanes=LANES):
    return of_registers(_XOR, register, register, register, lanes)


def load_masks(count: int) -> bytes:
    """Mask registers from 1 on = what `mask_table` has for the output vector at R8 (kmovw)."""
    opcode = (0xC4, 0xC1, 0x78, 0x90)
    numbers = range(1, checked(count, 0, MOST_MASKS, "mask register") + 1)
    return b"".join(bytes((*opcode, 0x40 | mask << 3 | R8 & 7, 2 * (mask - 1))) for mask in numbers)


def mask_table(lanes: np.ndarray) -> np.ndarray:
    """Masks ``[vectors, masks, LANES]``, bool, as code reads them: ``[vectors, bytes]`` uint8."""
    bits = (lanes << np.arange(LANES)).sum(axis=2)
    return np.pad(bits, ((0, 0), (0, bits.shape[1] % 2))).astype("<u2").view(np.uint8)


# --- The EVEX form ----------------------------------------------------------------------------------------------------


def of_memory(operation, register, second, base, disp, lanes, operand_bytes, broadcast=False, mask=0, zeroing=False):
    """An instruction with an operand in memory."""
    encoder.base_checked(base)
    disp = np.atleast_1d(np.asarray(disp, np.int64))
    register, second, disp = np.broadcast_arrays(register, second, disp)
    tail, short = encoder.tails(disp, operand_bytes)
    code = _prefix(operation, register, second, base, 0, lanes, broadcast, mask, zeroing)
    code[:, 5] = (0x40 if short else 0x80) | (register & 7) << 3 | base & 7
    return np.concatenate([code, tail], axis=1)


def of_registers(operation, register, second, third, lanes):
    """An instruction whose operands are all registers."""
    register, second, third = np.broadcast_arrays(*map(np.atleast_1d, (register, second, third)))
    checked(third, 0, REGISTERS - 1, "register")
    code = _prefix(operation, register, second, third, third >> 4, lanes)
    code[:, 5] = 0xC0 | (register & 7) << 3 | third & 7
    return code


def _prefix(operation, register, second, third, third_high, lanes, broadcast=False, mask=0, zeroing=False):
    """Prefix and opcode, ``[count, 6]``, the last byte still empty. Upper bits of registers are stored inverted."""
    checked(register, 0, REGISTERS - 1, "register")
    checked(second, 0, REGISTERS - 1, "register")
    checked(mask, 0, 7, "mask register")
    code = np.zeros((len(register), 6), np.uint8)
    code[:, 0] = 0x62
    upper = (~register >> 3 & 1) << 7 | (~third_high & 1) << 6 | (~third >> 3 & 1) << 5 | (~register >> 4 & 1) << 4
    code[:, 1] = upper | operation.map
    code[:, 2] = (~second & 15) << 3 | 4 | operation.prefix
    length = {16: 2, 8: 1, 4: 0}[lanes] << 5 | int(broadcast) << 4
    code[:, 3] = (0x80 if zeroing and mask else 0) | length | (~second >> 4 & 1) << 3 | mask
    code[:, 4] = operation.opcode
    return code
