"""The encoder's bytes are those of an independent assembler (LLVM), on random instructions of every form."""

import platform
import struct

import llvmlite.binding as llvm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reprolib.sparse.cpu import encoder

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="LLVM's assembler is that of this machine")

NAMES = {16: "zmm", 8: "ymm", 4: "xmm"}
BASES = {2: "rdx", 1: "rcx", 6: "rsi", 7: "rdi", 8: "r8", 13: "r13"}

registers = st.integers(0, 31)
bases = st.sampled_from(list(BASES))
lanes = st.sampled_from(list(NAMES))
masks = st.integers(0, 7)
distances = st.one_of(
    st.integers(-140, 140).map(lambda n: n * 64),
    st.integers(-140, 140).map(lambda n: n * 4),
    st.integers(-(2**31), 2**31 - 1),
).filter(bool)  # an assembler leaves a distance of zero out; ours has room for it


def assemble(lines: list[str]) -> bytes:
    """Machine code of instructions in Intel's notation: LLVM's, through the text section of an object file."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    triple = "x86_64-unknown-linux-gnu"
    text = "\\0A".join([".intel_syntax noprefix", *lines])
    module = llvm.parse_assembly(f'target triple = "{triple}"\nmodule asm "{text}"\n')
    features = "+avx512f,+avx512vl"
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu="x86-64", features=features, opt=0)
    return text_section(machine.emit_object(module))


def text_section(elf: bytes) -> bytes:
    start, size, count, names = struct.unpack_from("<Q10xHHH", elf, 40)
    sections = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(count)]
    strings = sections[names][4]
    [(at, length)] = [s[4:6] for s in sections if elf[strings + s[0] :].startswith(b".text\0")]
    return elf[at : at + length]


def memory(base: int, disp: int) -> str:
    return f"[{BASES[base]} {'-' if disp < 0 else '+'} {abs(disp)}]"


def vector(register: int, lanes: int) -> str:
    return f"{NAMES[lanes]}{register}"


SIZES = {16: "zmmword ptr ", 8: "ymmword ptr ", 4: "xmmword ptr "}
FORMS = {
    "load": lambda r, a, b, base, d, n, k: (
        encoder.load(r, base, d, n, k),
        f"{{evex}} vmovups {vector(r, n)}{f' {{k{k}}} {{z}}' * (k > 0)}, {SIZES[n]}{memory(base, d)}",
    ),
    "store": lambda r, a, b, base, d, n, k: (
        encoder.store(r, base, d, n, k),
        f"{{evex}} vmovups {SIZES[n]}{memory(base, d)}{f' {{k{k}}}' * (k > 0)}, {vector(r, n)}",
    ),
    "broadcast": lambda r, a, b, base, d, n, k: (
        encoder.broadcast(r, base, d, n),
        f"{{evex}} vbroadcastss {vector(r, n)}, dword ptr {memory(base, d)}",
    ),
    "multiply_add": lambda r, a, b, base, d, n, k: (
        encoder.multiply_add(r, a, base, d, n),
        f"{{evex}} vfmadd231ps {vector(r, n)}, {vector(a, n)}, dword ptr {memory(base, d)}{{1to{n}}}",
    ),
    "maximum": lambda r, a, b, base, d, n, k: (
        encoder.maximum(r, a, b, n),
        f"{{evex}} vmaxps {vector(r, n)}, {vector(a, n)}, {vector(b, n)}",
    ),
    "or": lambda r, a, b, base, d, n, k: (
        encoder.bits_or(r, a, b, n),
        f"vpord {vector(r, n)}, {vector(a, n)}, {vector(b, n)}",
    ),
    "zero": lambda r, a, b, base, d, n, k: (
        encoder.zero(r, n),
        f"vpxord {vector(r, n)}, {vector(r, n)}, {vector(r, n)}",
    ),
}


@settings(max_examples=60)
@given(st.data())
@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_those_of_llvm(form, data):
    drawn = st.tuples(registers, registers, registers, bases, distances, lanes, masks)
    ours, theirs = zip(
        *(FORMS[form](*case) for case in data.draw(st.lists(drawn, min_size=1, max_size=20))), strict=True
    )
    assert encoder.joined(*ours) == assemble(theirs), theirs


@given(st.lists(st.tuples(registers, registers, distances), min_size=1, max_size=50))
def test_arrays_are_one_instruction_a_row(cases):
    total, x, disp = map(np.array, zip(*cases, strict=True))
    code = encoder.multiply_add(total, x, encoder.RSI, disp)
    long = "{disp32} " if code.shape[1] == 10 else ""
    lines = [f"{{evex}} {long}vfmadd231ps zmm{t}, zmm{i}, dword ptr {memory(6, d)}{{1to16}}" for t, i, d in cases]
    assert code.tobytes() == assemble(lines)


@given(st.integers(-(2**31), 2**31 - 1), st.integers(1, 7), st.integers(0, 127))
def test_scalar_instructions(number, mask, disp):
    code = encoder.joined(encoder.load_mask(mask, encoder.R8, disp), encoder.prefetch_code(number), encoder.LEAVE)
    wide = "{disp8} " if disp == 0 else ""
    lines = [
        f"{wide}kmovw k{mask}, word ptr [r8 + {disp}]",
        f".byte 0x0f, 0x18, 0x15\\0A.long {number}",
        "vzeroupper",
        "ret",
    ]
    assert code == assemble(lines)
    if not -128 <= number < 128:
        assert encoder.add(encoder.RSI, number) == assemble([f"add rsi, {number}"])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: encoder.load([3, 32], encoder.RDI, 0),
        lambda: encoder.multiply_add(-1, 0, encoder.RSI, 0),
        lambda: encoder.multiply_add(0, [1, 2, 40], encoder.RSI, 0),
        lambda: encoder.load(0, encoder.RDI, [0, 2**31]),
        lambda: encoder.store(0, encoder.RCX, -(2**31) - 64),
        lambda: encoder.load(0, 4, 0),
        lambda: encoder.load(0, 12, 0),
        lambda: encoder.store(0, encoder.RCX, 0, mask=8),
        lambda: encoder.maximum(0, 0, 32),
        lambda: encoder.add(encoder.RSI, 2**31),
    ],
)
def test_what_does_not_fit_is_refused(wrong):
    with pytest.raises(ValueError, match=r"does not fit|can't be a base"):
        wrong()
