"""The encoder's bytes are those of an independent assembler (LLVM), on random instructions of every form."""

import platform
import struct

import llvmlite.binding as llvm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reprolib.sparse.cpu import avx2, avx512, avx512bf16, encoder

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="LLVM's assembler is that of this machine")

NAMES = {16: "zmm", 8: "ymm", 4: "xmm"}
BASES = {2: "rdx", 1: "rcx", 6: "rsi", 7: "rdi", 8: "r8", 9: "r9", 13: "r13"}
SETS = {isa.NAME: isa for isa in (avx512, avx2, avx512bf16)}

bases = st.sampled_from(list(BASES))
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
    features = "+avx512f,+avx512vl,+avx512bf16,+avx2,+fma"
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


def evex(form, r, a, b, base, d, n, k):
    """An instruction of AVX-512 in Intel's notation."""
    x, y, z, at = vector(r, n), vector(a, n), vector(b, n), memory(base, d)
    masked = f" {{k{k}}}" * (k > 0)
    return {
        "load": [f"{{evex}} vmovups {x}{masked}{' {z}' * (k > 0)}, {SIZES[n]}{at}"],
        "store": [f"{{evex}} vmovups {SIZES[n]}{at}{masked}, {x}"],
        "broadcast": [f"{{evex}} vbroadcastss {x}, dword ptr {at}"],
        "multiply_add": [f"{{evex}} vfmadd231ps {x}, {y}, dword ptr {at}{{1to{n}}}"],
        "add": [f"{{evex}} vaddps {x}, {y}, {SIZES[n]}{at}"],
        "maximum": [f"{{evex}} vmaxps {x}, {y}, {z}"],
        "bits_or": [f"vpord {x}, {y}, {z}"],
        "zero": [f"vpxord {x}, {x}, {x}"],
    }[form]


def bfloat16(form, r, a, b, base, d, n, k):
    """The instructions that only AVX-512 with bfloat16 has."""
    x, y, z, at = vector(r, n), vector(a, n), vector(b, n), memory(base, d)
    half_x, half_y = vector(r, max(n // 2, 4)), vector(a, max(n // 2, 4))
    left = [f"{{evex}} vpslld {x}, {x}, 16"]
    narrow = [
        line
        for whole, part in ((x, half_x), (y, half_y))
        for line in (f"{{evex}} vcvtneps2bf16 {part}, {whole}", f"{{evex}} vpmovzxwd {whole}, {part}")
    ]
    return {
        "multiply_add": [f"vdpbf16ps {x}, {y}, dword ptr {at}{{1to{n}}}"],
        "pair": [*narrow, f"{{evex}} vpslld {y}, {y}, 16", f"vpord {x}, {x}, {y}"],
        "plus": [f"{{evex}} vaddps {x}, {y}, {z}"],
        "half": [f"{{evex}} vpsrld {x}, {x}, 16"] * (k % 2) + left,
    }[form]


def vex(form, r, a, b, base, d, n, k):
    """The instructions of AVX2 that do the same, with three bytes of prefix."""
    x, y, z, last, at = vector(r, n), vector(a, n), vector(b, n), vector(15, n), memory(base, d)
    mask = f"{SIZES[n]}[r8 + {32 * (k - 1)}]"
    short = "{disp8} " * (k == 1)  # ours has room for a distance of zero
    return {
        "load": [f"{{vex3}} vmovups {x}, {SIZES[n]}{at}", *[f"{{vex3}} {short}vandps {x}, {x}, {mask}"] * (k > 0)],
        "store": [f"{{vex3}} {short}vmovups {last}, {mask}", f"vmaskmovps {SIZES[n]}{at}, {last}, {x}"]
        if k
        else [f"{{vex3}} vmovups {SIZES[n]}{at}, {x}"],
        "broadcast": [f"vbroadcastss {x}, dword ptr {at}"],
        "multiply_add": [f"vbroadcastss {last}, dword ptr {at}", f"vfmadd231ps {x}, {y}, {last}"],
        "add": [f"{{vex3}} vaddps {x}, {y}, {SIZES[n]}{at}"],
        "maximum": [f"{{vex3}} vmaxps {x}, {y}, {z}"],
        "bits_or": [f"{{vex3}} vorps {x}, {y}, {z}"],
        "zero": [f"{{vex3}} vxorps {x}, {x}, {x}"],
    }[form]


def ours(isa, form, r, a, b, base, d, n, k):
    arguments = {
        "load": (r, base, d, n, k),
        "store": (r, base, d, n, k),
        "broadcast": (r, base, d, n),
        "multiply_add": (r, a, base, d, n),
        "add": (r, a, base, d, n),
        "plus": (r, a, b, n),
        "maximum": (r, a, b, n),
        "bits_or": (r, a, b, n),
        "zero": (r, n),
        "pair": (r, a, n),
        "half": (r, k % 2, n),
    }
    return getattr(isa, form)(*arguments[form])


COMMON = ("load", "store", "broadcast", "multiply_add", "add", "maximum", "bits_or", "zero")
FORMS = {avx512.NAME: COMMON, avx2.NAME: COMMON, avx512bf16.NAME: ("multiply_add", "pair", "half", "plus")}
NOTATIONS = {avx512.NAME: evex, avx2.NAME: vex, avx512bf16.NAME: bfloat16}


@settings(max_examples=60)
@given(st.data())
@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name, forms in FORMS.items() for form in forms],
)
def test_bytes_are_those_of_llvm(name, form, data):
    isa, notation = SETS[name], NOTATIONS[name]
    register = st.integers(0, isa.REGISTERS - 1)
    lanes = st.sampled_from([lanes for lanes in NAMES if lanes <= isa.LANES])
    drawn = st.tuples(register, register, register, bases, distances, lanes, st.integers(0, encoder.MOST_MASKS))
    cases = data.draw(st.lists(drawn, min_size=1, max_size=20))
    theirs = [line for case in cases for line in notation(form, *case)]
    assert encoder.joined(*(ours(isa, form, *case) for case in cases)) == assemble(theirs), theirs


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15), distances), min_size=1, max_size=50))
def test_arrays_are_one_instruction_a_row(cases):
    total, x, disp = map(np.array, zip(*cases, strict=True))
    code = avx512.multiply_add(total, x, encoder.RSI, disp)
    long = "{disp32} " if code.shape[1] == 10 else ""
    lines = [f"{{evex}} {long}vfmadd231ps zmm{t}, zmm{i}, dword ptr {memory(6, d)}{{1to16}}" for t, i, d in cases]
    assert code.tobytes() == assemble(lines)
    code = avx2.multiply_add(total, x, encoder.RSI, disp)
    long = "{disp32} " if code.shape[1] == 14 else ""
    lines = [
        line
        for t, i, d in cases
        for line in (f"{long}vbroadcastss ymm15, dword ptr {memory(6, d)}", f"vfmadd231ps ymm{t}, ymm{i}, ymm15")
    ]
    assert code.tobytes() == assemble(lines)


@given(st.integers(-(2**31), 2**31 - 1), st.integers(0, encoder.MOST_MASKS))
def test_scalar_instructions(number, masks):
    code = encoder.joined(
        avx512.load_masks(masks), avx2.load_masks(masks), encoder.prefetch_code(number), encoder.LEAVE
    )
    lines = [
        *(f"{'{disp8} ' * (k == 1)}kmovw k{k}, word ptr [r8 + {2 * (k - 1)}]" for k in range(1, masks + 1)),
        f".byte 0x0f, 0x18, 0x15\\0A.long {number}",
        "vzeroupper",
        "ret",
    ]
    assert code == assemble(lines)
    if not -128 <= number < 128:
        assert encoder.add(encoder.RSI, number) == assemble([f"add rsi, {number}"])


@given(st.integers(1, 2**31 - 1), st.integers(0, 300))
def test_repeated_instructions(times, length):
    """The jump goes back to the first of them."""
    code = encoder.repeat(times, b"\x90" * length)
    head, tail = assemble([f"mov eax, {times}"]), assemble(["dec eax"])
    assert code == head + b"\x90" * length + tail + b"\x0f\x85" + (-length - 8).to_bytes(4, "little", signed=True)


WRONG = {
    "load": lambda isa: isa.load([3, isa.REGISTERS], encoder.RDI, 0),
    "sum": lambda isa: isa.multiply_add(-1, 0, encoder.RSI, 0),
    "factors": lambda isa: isa.multiply_add(0, [1, 2, 40], encoder.RSI, 0),
    "far": lambda isa: isa.load(0, encoder.RDI, [0, 2**31]),
    "far before": lambda isa: isa.store(0, encoder.RCX, -(2**31) - 64),
    "base": lambda isa: isa.load(0, 4, 0),
    "extended base": lambda isa: isa.load(0, 12, 0),
    "mask": lambda isa: isa.store(0, encoder.RCX, 0, mask=8),
    "third": lambda isa: isa.maximum(0, 0, isa.REGISTERS),
    "addend": lambda isa: isa.add(0, isa.REGISTERS, encoder.R9, 0),
    "times": lambda isa: encoder.repeat(0, b""),
    "amount": lambda isa: encoder.add(encoder.RSI, 2**31),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", SETS)
def test_what_does_not_fit_is_refused(name, wrong):
    with pytest.raises(ValueError, match=r"does not fit|can't be a base"):
        WRONG[wrong](SETS[name])


def test_more_masks_than_registers_are_refused():
    with pytest.raises(ValueError, match="mask register 8 does not fit: 0 to 7"):
        avx512.load_masks(8)


@pytest.mark.parametrize("count", range(1, encoder.MOST_MASKS + 1))
@pytest.mark.parametrize("name", SETS)
def test_masks_are_in_the_tables_as_code_reads_them(name, count):
    isa = SETS[name]
    lanes = np.random.default_rng(0).random((5, count, isa.LANES)) < 0.5
    table = isa.mask_table(lanes)
    assert len(table) == 5 and table.dtype == np.uint8 and table.shape[1] % 4 == 0
    if isa is avx2:
        assert np.array_equal(table.view(np.uint32).reshape(lanes.shape), np.where(lanes, 2**32 - 1, 0))
    else:
        bits = table.view("<u2")[:, :count, None] >> np.arange(16) & 1
        assert np.array_equal(bits.astype(bool), lanes)


@pytest.mark.parametrize("name", SETS)
def test_layers_without_masks_have_no_table(name):
    assert SETS[name].mask_table(np.zeros((0, 1, SETS[name].LANES), bool)).size == 0
