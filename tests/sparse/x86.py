"""A slow x86: runs the instructions that the engine's encoder makes, so that its code is tested on any machine."""

import ctypes
import sys

import numpy as np
import torch

AND, OR, XOR = np.bitwise_and, np.bitwise_or, np.bitwise_xor
BITS = {(1, 0, 0x54): AND, (1, 0, 0x56): OR, (1, 1, 0xEB): OR, (1, 0, 0x57): XOR, (1, 1, 0xEF): XOR}
BASES = {2: "rdx", 1: "rcx", 6: "rsi", 7: "rdi", 8: "r8", 9: "r9"}
SHIFTS = {6: np.left_shift, 2: np.right_shift}


def halves(numbers):
    """The bfloat16 numbers that share 32 bits, as float32: the lower and the upper ones."""
    bits = numbers.view(np.uint32)
    return (bits << 16).view(np.float32), (bits >> 16 << 16).view(np.float32)


class Everything:
    """The memory of this process: its indices are real addresses."""

    def __len__(self):
        return sys.maxsize

    def __getitem__(self, part):
        return np.ctypeslib.as_array((ctypes.c_uint8 * (part.stop - part.start)).from_address(part.start))


class Processor:
    """Registers of vectors and masks, and `memory`, a uint8 array whose indices are the addresses."""

    def __init__(self, memory, vectors=32):
        self.memory = memory
        self.vectors = np.zeros((vectors, 16), np.float32)
        self.masks = np.ones((8, 16), bool)

    def call(self, code, **addresses):
        """Run code from its first byte to its return; `addresses` are rdi, rsi, rdx, rcx, r8, r9."""
        self.addresses, self.count, at = addresses, 0, 0
        while at is not None:
            at = self._step(code, at)

    def _step(self, code, at):
        first = code[at]
        if first == 0x62:
            return self._evex(code, at)
        if first == 0xC4 and code[at + 1] & 0x1F == 1 and code[at + 3] == 0x90:  # kmovw
            mask, base = code[at + 4] >> 3 & 7, code[at + 4] & 7 | (~code[at + 1] >> 5 & 1) << 3
            start = self.addresses[BASES[base]] + int(code[at + 5])
            bits = self.memory[start : start + 2].view("<u2")[0]
            self.masks[mask] = bits >> np.arange(16) & 1
            return at + 6
        if first == 0xC4:
            return self._vex(code, at)
        if bytes(code[at : at + 2]) == b"\x48\x81":  # add
            base = BASES[code[at + 2] & 7]
            self.addresses[base] += int.from_bytes(bytes(code[at + 3 : at + 7]), "little", signed=True)
            return at + 7
        if first == 0xB8:  # mov eax
            self.count = int.from_bytes(bytes(code[at + 1 : at + 5]), "little")
            return at + 5
        if bytes(code[at : at + 4]) == b"\xff\xc8\x0f\x85":  # dec eax; jnz
            self.count -= 1
            return at + 8 + (int.from_bytes(bytes(code[at + 4 : at + 8]), "little", signed=True) if self.count else 0)
        if bytes(code[at : at + 3]) == b"\x0f\x18\x15":  # prefetch
            return at + 7
        assert bytes(code[at : at + 4]) == b"\xc5\xf8\x77\xc3", f"unknown instruction {bytes(code[at : at + 11]).hex()}"
        return None

    def _evex(self, code, at):
        p1, p2, p3, opcode, modrm = map(int, code[at + 1 : at + 6])
        lanes = {2: 16, 1: 8, 0: 4}[p3 >> 5 & 3]
        register = modrm >> 3 & 7 | (~p1 >> 7 & 1) << 3 | (~p1 >> 4 & 1) << 4
        second = ~p2 >> 3 & 15 | (~p3 >> 3 & 1) << 4
        everywhere = bool(p3 >> 4 & 1) or (p1 & 7, opcode) == (2, 0x18)
        base, unit = modrm & 7 | (~p1 >> 5 & 1) << 3, 4 if everywhere else 4 * lanes
        third, at, address = self._operand(code, at + 5, lanes, base, ~p1 >> 6 & 1, everywhere, unit)
        mask = self.masks[p3 & 7] if p3 & 7 else np.ones(16, bool)
        operation = p1 & 7, p2 & 3, opcode
        if operation == (1, 1, 0x72):  # a shift: its way stands for a register, and the second one is written
            third = SHIFTS[register](third.view(np.uint32), np.uint32(code[at])).view(np.float32)
            register, at = second, at + 1
        self._do(operation, register, second, third, lanes, mask[:lanes], address)
        return at

    def _vex(self, code, at):
        p1, p2, opcode, modrm = map(int, code[at + 1 : at + 5])
        lanes = 8 if p2 & 4 else 4
        register, second = modrm >> 3 & 7 | (~p1 >> 7 & 1) << 3, ~p2 >> 3 & 15
        everywhere = (p1 & 31, opcode) == (2, 0x18)
        third, at, address = self._operand(code, at + 4, lanes, modrm & 7 | (~p1 >> 5 & 1) << 3, 0, everywhere, 1)
        mask = np.ones(lanes, bool)
        if (p1 & 31, opcode) == (2, 0x2E):  # vmaskmovps: the mask is in the second operand
            mask, opcode, p1, p2 = self.vectors[second, :lanes].view(np.int32) < 0, 0x11, 1, p2 & ~3
        self._do((p1 & 31, p2 & 3, opcode), register, second, third, lanes, mask, address)
        return at

    def _operand(self, code, at, lanes, base, upper, everywhere, unit):
        """The third operand, of a register or of memory; where the next instruction begins; the operand's address."""
        mode = int(code[at]) >> 6
        if mode == 3:
            return self.vectors[base | upper << 4, :lanes].copy(), at + 1, None
        size = {1: 1, 2: 4}[mode]
        distance = int.from_bytes(bytes(code[at + 1 : at + 1 + size]), "little", signed=True)
        address = self.addresses[BASES[base]] + distance * (unit if size == 1 else 1)
        count = 1 if everywhere else lanes
        assert 0 <= address <= len(self.memory) - 4 * count, f"wild address {address}"
        values = self.memory[address : address + 4 * count].view(np.float32)
        return np.broadcast_to(values, lanes).copy(), at + 1 + size, address

    def _do(self, operation, register, second, third, lanes, mask, address):
        a, old = self.vectors[second, :lanes], self.vectors[register, :lanes]
        if operation == (1, 0, 0x11):
            self.memory[address : address + 4 * lanes].view(np.float32)[mask] = old[mask]
            return
        if operation == (2, 1, 0xB8):
            result = (a.astype(np.float64) * third + old).astype(np.float32)
        elif operation == (1, 0, 0x58):
            result = a + third
        elif operation == (1, 0, 0x5F):
            result = np.where(a > third, a, third)
        elif operation == (2, 2, 0x52):  # vdpbf16ps: the upper product first
            result = old
            for x, y in zip(halves(a)[::-1], halves(third)[::-1], strict=True):
                result = (x.astype(np.float64) * y + result).astype(np.float32)
        elif operation == (2, 2, 0x72):  # vcvtneps2bf16
            near = torch.from_numpy(third.copy()).bfloat16().view(torch.int16).numpy()
            result = np.concatenate([near.view(np.float32), np.zeros(lanes - lanes // 2, np.float32)])
        elif operation == (2, 1, 0x33):  # vpmovzxwd
            result = third.view(np.uint16)[:lanes].astype(np.uint32).view(np.float32)
        elif operation in BITS:
            result = BITS[operation](a.view(np.int32), third.view(np.int32)).view(np.float32)
        else:
            assert operation in ((1, 0, 0x10), (2, 1, 0x18), (1, 1, 0x72)), f"unknown operation {operation}"
            result = np.where(mask, third, np.float32(0))
        self.vectors[register] = 0
        self.vectors[register, :lanes] = result
