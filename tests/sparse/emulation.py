"""Runs the source of a CUDA kernel on the CPU, to prove it right where there is no GPU.

    launch(kernel, grid, threads, *arguments)      tensors among the arguments are the global memory

Every thread becomes a Python generator: wherever the kernel calls something that a warp does together (a barrier, a
tensor-core instruction), its thread yields, and goes on with its part of the result once all 32 have come there. One
thread runs at a time, in order, so a run can be repeated.

What a GPU leaves undefined is made to fail: shared memory begins as NaN; an asynchronous copy is done at once or as
late as the kernel allows, by lot; every access must be aligned and inside its array; and a warp must not diverge where
it has to act together. The instructions are written down from NVIDIA's PTX manual, not from the code that uses them.
"""

import ast
import bisect
import inspect
import itertools
import math
import random
import struct
import textwrap
from types import SimpleNamespace

import numpy as np
import torch

WARP = 32
SHARED_BASE = 4096  # not 0: an address that forgets its base must be caught
LANES = np.arange(WARP)
G, T = LANES // 4, LANES % 4


def launch(kernel, grid, threads, *arguments, seed=0):
    """Run a kernel function over its grid. Tensors are passed by address and are all the memory there is."""
    memory = Memory([a for a in arguments if isinstance(a, torch.Tensor)])
    addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    program = _as_generator(kernel, memory)
    lots = random.Random(seed)
    for z, y, x in itertools.product(*(range(n) for n in (*grid, 1, 1)[2::-1])):
        _Block(program, memory, SimpleNamespace(x=x, y=y, z=z), grid, threads, lots).run(addresses)


# --- Memory ----------------------------------------------------------------------------------------------------------


class Memory:
    """Global memory: the given tensors, and nothing between them."""

    def __init__(self, tensors):
        arrays = {t.data_ptr(): t.detach().numpy().reshape(-1).view(np.uint8) for t in tensors if t.numel()}
        self.bases = sorted(arrays)
        self.arrays = [memoryview(arrays[base]) for base in self.bases]

    def at(self, address, count):
        i = bisect.bisect_right(self.bases, address) - 1
        inside = i >= 0 and address + count <= self.bases[i] + len(self.arrays[i])
        assert inside, f"global access out of bounds: {count} bytes at {address}"
        assert address % count == 0, f"global access not aligned: {count} bytes at {address}"
        return self.arrays[i][address - self.bases[i] : address - self.bases[i] + count]


class Shared:
    """Shared memory of one block: NaN at first."""

    def __init__(self, size):
        self.data = memoryview(bytearray(b"\xff" * size))

    def at(self, address, count):
        start = address - SHARED_BASE
        assert start >= 0 and start + count <= len(self.data), f"shared access out of bounds: {count} bytes at {start}"
        assert start % count == 0, f"shared access not aligned: {count} bytes at {start}"
        return self.data[start : start + count]


# --- Threads ---------------------------------------------------------------------------------------------------------


class _Thread:
    """What differs from thread to thread: its index, its copies under way, `cuda`."""

    def __init__(self, block, index):
        self.block, self.copies, self.groups = block, [], []
        shared = SimpleNamespace(array=self.shared_array)
        local = SimpleNamespace(array=lambda size, dtype: [math.nan] * size)
        self.cuda = SimpleNamespace(
            threadIdx=SimpleNamespace(x=index),
            blockIdx=block.index,
            gridDim=SimpleNamespace(**dict(zip("xyz", (*block.grid, 1, 1), strict=False))),
            grid=lambda dimensions: block.index.x * block.threads + index,
            shared=shared,
            local=local,
        )

    def shared_array(self, size, dtype, alignment):
        if self.block.shared is None:
            self.block.shared = Shared(size)
        return self.block.shared

    def copy_async(self, target, source):
        into, data = self.block.shared.at(target, 16), self.block.memory.at(source, 16)
        if self.block.lots.random() < 0.5:
            into[:] = data
        else:
            self.copies.append((into, data))

    def commit_copies(self):
        self.groups.append(self.copies)
        self.copies = []

    def wait_all_but_newest(self):
        while len(self.groups) > 1:
            for into, data in self.groups.pop(0):
                into[:] = data

    def store_shared(self, address, word):
        self.block.shared.at(address, 4)[:] = struct.pack("<I", word)

    def load_shared_x4(self, address):
        return struct.unpack("<4I", self.block.shared.at(address, 16))

    def store_shared_f32_x4(self, address, *values):
        self.block.shared.at(address, 16)[:] = struct.pack("<4f", *values)

    def load_shared_f32_x4(self, address):
        return struct.unpack("<4f", self.block.shared.at(address, 16))


# What the kernel calls and each thread answers for itself.
OWN = ("cuda", "copy_async", "commit_copies", "wait_all_but_newest", "store_shared", "load_shared_x4")
OWN += ("store_shared_f32_x4", "load_shared_f32_x4")


class _Block:
    def __init__(self, program, memory, index, grid, threads, lots):
        self.program, self.memory, self.index, self.grid, self.threads = program, memory, index, grid, threads
        self.shared, self.lots = None, lots

    def run(self, arguments):
        threads = [_Thread(self, i) for i in range(self.threads)]
        generators = [self.program(*(getattr(thread, name) for name in OWN), *arguments) for thread in threads]
        warps = [generators[i : i + WARP] for i in range(0, self.threads, WARP)]
        arrived = [self.to_barrier(warp) for warp in warps]
        while any(arrived):
            assert all(arrived), "some threads ended before a barrier of the block"
            arrived = [self.to_barrier(warp) for warp in warps]

    def to_barrier(self, warp):
        """Run a warp up to the next barrier of the block (True) or to its end (False)."""
        results = [None] * len(warp)
        while True:
            calls = [_step(thread, result) for thread, result in zip(warp, results, strict=True)]
            names = {call and call[0] for call in calls}
            assert len(names) == 1, f"a warp diverged: {names}"
            name = names.pop()
            if name in (None, "syncthreads"):
                return name is not None
            results = COLLECTIVE[name](self, [call[1:] for call in calls])


def _step(thread, result):
    try:
        return thread.send(result)
    except StopIteration:
        return None


# --- What a warp does together ---------------------------------------------------------------------------------------


def _sync(block, calls):
    return [None] * len(calls)


def _load_matrices_transposed(block, calls):
    rows = np.stack([np.frombuffer(block.shared.at(address, 16), np.uint16) for (address,) in calls])
    matrices = rows.reshape(4, 8, 8).astype(np.uint32)
    return (matrices[:, 2 * T, G] | matrices[:, 2 * T + 1, G] << 16).T.tolist()


def _halves(words):
    """[lanes, registers] -> [lanes, registers, 2] fp32."""
    return np.array(words, np.uint32).view(np.float16).astype(np.float32).reshape(len(words), -1, 2)


def _scattered(a, b, c):
    """The matrices that the lanes of a warp hold: A [16, 16], B [16 or 32, 8], C [16, 8]."""
    matrix_a, matrix_b = np.zeros((16, 16), np.float32), np.zeros((8 * b.shape[1], 8), np.float32)
    for register, e in itertools.product(range(4), range(2)):
        matrix_a[G + 8 * (register % 2), 2 * T + e + 8 * (register // 2)] = a[:, register, e]
    for register, e in itertools.product(range(b.shape[1]), range(2)):
        matrix_b[2 * T + e + 8 * register, G] = b[:, register, e]
    matrix_c = np.zeros((16, 8), np.float32)
    for i in range(4):
        matrix_c[G + 8 * (i // 2), 2 * T + i % 2] = c[:, i]
    return matrix_a, matrix_b, matrix_c


def _gathered(d):
    return np.stack([d[G + 8 * (i // 2), 2 * T + i % 2] for i in range(4)], axis=1).tolist()


def _mma(block, calls):
    c = np.array([call[6:] for call in calls], np.float32)
    a, b, c = _scattered(_halves([call[:4] for call in calls]), _halves([call[4:6] for call in calls]), c)
    return _gathered(a @ b + c)


def _mma_sparse(selector):
    def multiply(block, calls):
        c = np.array([call[8:12] for call in calls], np.float32)
        a, b, c = _scattered(_halves([call[:4] for call in calls]), _halves([call[4:8] for call in calls]), c)
        d = c.copy()
        for row, stored in np.ndindex(16, 16):
            word = calls[4 * (row % 8) + 2 * selector + stored // 8][12] >> 16 * (row // 8)
            place, other = (word >> 2 * (s % 8) & 3 for s in (stored, stored ^ 1))
            assert (place < other) == (stored % 2 == 0), "metadata of a pair must ascend"
            # The hardware does not touch the rows of B that are not selected.
            d[row] += a[row, stored] * b[stored // 2 * 4 + place]
        return _gathered(d)

    return multiply


COLLECTIVE = {
    "syncthreads": _sync,
    "syncwarp": _sync,
    "load_matrices_transposed": _load_matrices_transposed,
    "mma": _mma,
    "mma_sparse_low": _mma_sparse(0),
    "mma_sparse_high": _mma_sparse(1),
}


# --- What a thread does alone ----------------------------------------------------------------------------------------


def _relu(halves):
    return np.maximum(halves, np.float16(0)).tobytes()


def _alone(memory):
    def load(layout):
        size = struct.calcsize(layout)

        def read(address):
            values = struct.unpack(layout, memory.at(address, size))
            return values if len(values) > 1 else values[0]

        return read

    def store(layout):
        def write(address, *values):
            memory.at(address, struct.calcsize(layout))[:] = struct.pack(layout, *values)

        return write

    return {
        "load_u16": load("<H"),
        "load_u32": load("<I"),
        "load_i32": load("<i"),
        "load_f32": load("<f"),
        "load_f32_x2": load("<2f"),
        "load_x4": load("<4I"),
        "store_x4": store("<4I"),
        "store_f32_x4": store("<4f"),
        "maximum": lambda a, b: a if a != a or a > b else b,
        "pack_halves": lambda low, high: struct.unpack("<I", np.array([low, high], np.float16).tobytes())[0],
        "pack_halves_relu": lambda low, high: struct.unpack("<I", _relu(np.array([low, high], np.float16)))[0],
        "unpack_halves": lambda pair: struct.unpack("<2e", struct.pack("<I", pair)),
        "successor": lambda i: i + 1,
    }


class _Yielding(ast.NodeTransformer):
    """Turns ``mma(a, b)`` into ``(yield ("mma", a, b))``, and ``cuda.syncthreads()`` likewise."""

    def visit_Call(self, node):
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)
        if name not in COLLECTIVE:
            return node
        return ast.Yield(ast.Tuple([ast.Constant(name), *node.args], ast.Load()))


def _as_generator(kernel, memory):
    tree = ast.parse(textwrap.dedent(inspect.getsource(kernel)))
    function = _Yielding().visit(tree).body[0]
    function.args.args[:0] = [ast.arg(name) for name in OWN]
    function.body.insert(0, ast.parse("if False: yield").body[0])  # a generator even if nothing is done together
    closure = inspect.getclosurevars(kernel)
    names = {**closure.globals, **closure.nonlocals, **_alone(memory), "float32": float, "uint32": int}
    names["shared_address"] = lambda array: SHARED_BASE
    exec(compile(ast.fix_missing_locations(tree), kernel.__name__, "exec"), names)
    return names[kernel.__name__]
