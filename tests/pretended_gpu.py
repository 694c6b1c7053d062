"""A GPU that is not there: whatever is asked of it happens on the CPU, so that all lines meant for one are run.

    with pretend_gpu(monkeypatch): ...

Tensors that are moved to ``cuda`` stay where they are and say that they are there, and so does all that comes of them;
streams are one; a graph does again, when it is replayed, what was done while it was captured, except for steps of
training; `torch.compile` compiles nothing. A launch of a CUDA kernel computes what the specification in NumPy says.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from reprolib.experiments import records
from reprolib.sparse.cuda import backend, packing
from reprolib.training import precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NAME = "NVIDIA Pretended 1"


def _each(value, function):
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        found = [_each(one, function) for one in value]
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    if isinstance(value, dict):
        return {key: _each(one, function) for key, one in value.items()}
    return function(value)


def _is_gpu(value) -> bool:
    return (isinstance(value, str) and value.split(":")[0] == "cuda") or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


def _is_cpu(value) -> bool:
    return isinstance(value, (str, torch.device)) and value in ("cpu", CPU)


class _Pretending(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.graph = None  # that is being captured

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if function == torch.Tensor.device.__get__:
            return GPU if hasattr(args[0], "_on_gpu") else CPU
        if function == torch.Tensor.is_cuda.__get__:
            return hasattr(args[0], "_on_gpu")
        if function is torch.device or name == "_parse_to":  # the name of a place, and nothing at it
            return function(*args, **kwargs)
        given, moved = [], name == "cuda"

        def here(value):
            nonlocal moved
            given.append(value)
            moved |= _is_gpu(value)
            return CPU if _is_gpu(value) else value

        args, kwargs = _each(args, here), _each(kwargs, here)
        there = any(isinstance(value, torch.Tensor) and hasattr(value, "_on_gpu") for value in given)
        back = name in ("cpu", "numpy", "tolist", "item") or (any(_is_cpu(value) for value in given) and not moved)
        if name == "cuda":
            result = args[0].clone()
        else:
            result = function(*args, **kwargs)
            if (moved or (back and there)) and any(result is value for value in given):
                result = result.clone()  # as on a GPU, where moving is copying
        if function == torch.Tensor.data.__set__ and there:
            args[0]._on_gpu = True
        if (moved or there) and not back:
            _each(result, _mark)
        if self.graph:
            self.graph.calls.append((function if name != "cuda" else torch.Tensor.clone, args, kwargs, result))
        return result


def _mark(value):
    if isinstance(value, torch.Tensor):
        value._on_gpu = True


class _Kernels:
    """Stands for `backend.launch`: the sums of slices stay here until they are added up."""

    def __init__(self, mode):
        self.mode, self.sums = mode, {}

    def launch(self, name, sizes, grid, threads, *arguments):
        assert min(grid) > 0 and max(grid[1:], default=0) <= backend.LARGEST_GRID and 32 <= threads <= 1024
        graph, self.mode.graph = self.mode.graph, None
        getattr(self, name)(*sizes, *arguments)
        self.mode.graph = graph
        if graph:
            graph.calls.append((getattr(self, name), (*sizes, *arguments), {}, None))

    def tensor_core(self, tile, x, y, weights, metadata, columns, schedule, bias, c_in, h, w, c_out, groups, halo, n):
        packed = packing.Packed(weights.numpy(), metadata.numpy().view(np.uint32), columns.numpy(), schedule.numpy())
        parts = (
            packing.tensor_core_spec(x.numpy(), packed, tile.taps, c_out, tile.warps, piece, n, tile.splits)
            for piece in range(n)
        )
        self.sums[y.data_ptr()] = sum(parts)
        if n == 1:
            self._finish(y, y, bias, tile, halo)

    def reduce(self, tile, sums, y, bias, n, blocks, row_blocks, groups, c_out, h, w, halo):
        self._finish(sums, y, bias, tile, halo)

    def scalar(self, taps, pool, relu, x, y, weights, columns, starts, bias, c_in, h, w, c_out, groups, halo):
        self.sums[y.data_ptr()] = packing.scalar_spec(x.numpy(), weights.numpy(), columns.numpy(), starts.numpy(), taps)
        self._finish(y, y, bias, SimpleNamespace(pool=pool, relu=relu), halo)

    def _finish(self, partial, y, bias, tile, halo):
        sums = self.sums.pop(partial.data_ptr())
        y.copy_(torch.from_numpy(packing.epilogue_spec(sums, bias.numpy(), tile.relu, tile.pool, halo)))


class _Graph:
    def __init__(self):
        self.calls = []

    def replay(self):
        if any(getattr(function, "__name__", "") == "backward" for function, *_ in self.calls):
            return
        with torch.no_grad():
            for function, args, kwargs, result in self.calls:
                again = function(*args, **kwargs)
                if isinstance(result, torch.Tensor) and again is not result and again.shape == result.shape:
                    result.copy_(again)


class _Event:
    def __init__(self, enable_timing=False):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return 0.125


class _Stream:
    cuda_stream = 0

    def synchronize(self):
        pass

    def wait_stream(self, other):
        pass


@contextmanager
def pretend_gpu(monkeypatch, folder):
    """Runs what is inside as on a machine with a GPU; what is kept for that GPU goes to `folder`."""
    mode, stream = _Pretending(), _Stream()

    @contextmanager
    def capture(graph, pool=None):
        mode.graph = graph
        try:
            yield
        finally:
            mode.graph = None

    properties = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=228 * 1024)
    for name, replacement in {
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "is_current_stream_capturing": lambda: mode.graph is not None,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: stream,
        "stream": lambda which: nullcontext(),
        "device": lambda which: nullcontext(),
        "graph_pool_handle": lambda: (0, 1),
        "graph": capture,
        "device_count": lambda: 1,
        "get_rng_state": lambda device=None: torch.zeros(1),
        "set_rng_state": lambda state, device=None: None,
        "_sleep": lambda cycles: None,
        "Stream": _Stream,
        "Event": _Event,
        "CUDAGraph": _Graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    monkeypatch.setattr(backend, "_finds_compiler", lambda: True)
    monkeypatch.setattr(backend, "launch", _Kernels(mode).launch)
    operator, on_gpu = torch.ops.reprolib.sparse_conv, backend._sparse_conv._init_fn
    monkeypatch.setattr(torch.ops.reprolib, "sparse_conv", lambda x, *a: (on_gpu if x.is_cuda else operator)(x, *a))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    for once in (remembered := (backend._gpu, records.hardware, precision._multiplies_bf16)):
        once.cache_clear()
    with mode:
        yield
    for once in remembered:
        once.cache_clear()
