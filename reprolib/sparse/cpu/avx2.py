"""AVX2 with FMA: 16 registers of 8 lanes, no masks.

A weight needs an instruction of its own to reach all lanes. Masks lie in memory, as lanes of ones or zeros. An
instruction of the VEX form is a prefix of three bytes, an opcode, a byte that names operands (ModRM) and, with an
operand in memory, how far it lies from a base register: in one byte where that is enough, else in four (Intel SDM
volume 2, section 2.3).
"""

from __future__ import annotations

import numpy as np

from reprolib.sparse.cpu import encoder
from reprolib.sparse.cpu.encoder import MOST_MASKS, R8, Operation, checked

NAME, FEATURES = "AVX2", ("avx2", "fma")
PAIRS, words = False, encoder.words  # numbers are float32
LANES, REGISTERS = 8, 16
TEMPORARIES = 1  # registers that `multiply_add` needs, the last ones
GROUP_ROWS = (14, 12, 8)  # output channels of a group: the size that takes the fewest instructions is chosen
REACH = 32  # numbers before and behind a pointer that a displacement of one byte reaches
CHUNK = CHUNK_OF_FEW = 1000  # multiplications that stay in the instruction cache

_AND, _OR, _XOR = Operation(1, 0, 0x54), Operation(1, 0, 0x56), Operation(1, 0, 0x57)  # vandps, vorps, vxorps
_STORE_MASKED = Operation(2, 1, 0x2E)  # vmaskmovps
_LAST = REGISTERS - 1


def load(register, base, disp, lanes=LANES, mask=0):
    """register = memory[base + disp]; lanes outside of mask `mask` (0: all lanes) become zero."""
    whole = of_memory(encoder.LOAD, register, 0, base, disp, lanes)
    if not mask:
        return whole
    register = np.broadcast_to(register, len(whole))
    return np.concatenate([whole, of_memory(_AND, register, register, R8, _mask_at(mask), lanes)], axis=1)


def store(register, base, disp, lanes=LANES, mask=0):
    """memory[base + disp] = register; lanes outside of the mask, which passes through the last register, stay."""
    if not mask:
        return of_memory(encoder.STORE, register, 0, base, disp, lanes)
    part = of_memory(_STORE_MASKED, register, _LAST, base, disp, lanes)
    through = np.full(len(part), _LAST)
    return np.concatenate([of_memory(encoder.LOAD, through, 0, R8, _mask_at(mask), lanes), part], axis=1)


def broadcast(register, base, disp, lanes=LANES):
    """Every lane = the 32 bits at memory[base + disp]."""
    return of_memory(encoder.BROADCAST, register, 0, base, disp, lanes)


def multiply_add(total, x, base, disp, lanes=LANES):
    """total += x * the float32 at memory[base + disp], which passes through the last register."""
    multiply = of_registers(encoder.MULTIPLY_ADD, total, x, _LAST, lanes)
    weight = broadcast(np.full(len(multiply), _LAST), base, disp, lanes)
    return np.concatenate([weight, multiply], axis=1)


def maximum(register, a, b, lanes=LANES):
    """register = the larger of a and b, lane by lane; b where one of them is NaN."""
    return of_registers(encoder.MAXIMUM, register, a, b, lanes)


def bits_or(register, a, b, lanes=LANES):
    return of_registers(_OR, register, a, b, lanes)


def add(register, a, base, disp, lanes=LANES):
    """register = a + memory[base + disp]."""
    return of_memory(encoder.ADD, register, a, base, disp, lanes)


def zero(register, lanes=LANES):
    return of_registers(_XOR, register, register, register, lanes)


def load_masks(count: int) -> bytes:
    """Nothing: masks stay where `mask_table` has them for the output vector at R8."""
    return b""


def mask_table(lanes: np.ndarray) -> np.ndarray:
    """Masks ``[vectors, masks, LANES]``, bool, as code reads them: ``[vectors, bytes]`` uint8."""
    return (-lanes.astype("<i4")).view(np.uint8).reshape(len(lanes), 4 * LANES * lanes.shape[1])


def _mask_at(mask: int) -> int:
    """Bytes from R8 to a mask."""
    return 4 * LANES * (checked(mask, 1, MOST_MASKS, "mask") - 1)


# --- The VEX form -----------------------------------------------------------------------------------------------------


def of_memory(operation, register, second, base, disp, lanes):
    """An instruction with an operand in memory."""
    encoder.base_checked(base)
    register, second, disp = np.broadcast_arrays(*map(np.atleast_1d, (register, second, np.asarray(disp, np.int64))))
    tail, short = encoder.tails(disp, 1)
    code = _prefix(operation, register, second, base, lanes)
    code[:, 4] = (0x40 if short else 0x80) | (register & 7) << 3 | base & 7
    return np.concatenate([code, tail], axis=1)


def of_registers(operation, register, second, third, lanes):
    """An instruction whose operands are all registers."""
    register, second, third = np.broadcast_arrays(*map(np.atleast_1d, (register, second, third)))
    checked(third, 0, _LAST, "register")
    code = _prefix(operation, register, second, third, lanes)
    code[:, 4] = 0xC0 | (register & 7) << 3 | third & 7
    return code


def _prefix(operation, register, second, third, lanes):
    """Prefix and opcode, ``[count, 5]``, the last byte still empty. Upper bits of registers are stored inverted."""
    checked(register, 0, _LAST, "register")
    checked(second, 0, _LAST, "register")
    code = np.zeros((len(register), 5), np.uint8)
    code[:, 0] = 0xC4
    code[:, 1] = (~register >> 3 & 1) << 7 | 0x40 | (~third >> 3 & 1) << 5 | operation.map
    code[:, 2] = (~second & 15) << 3 | (0 if lanes == 4 else 4) | operation.prefix
    code[:, 3] = operation.opcode
    return code
