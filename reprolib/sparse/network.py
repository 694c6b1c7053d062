"""A part of a network whose kept weights are stored without zeros, as one module that is called as a whole."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from reprolib.sparse import compilation, cpu, cuda, operations, portable
from reprolib.sparse.capture.islands import LINEAR_DENSITY, SMALL_CONVOLUTION
from reprolib.sparse.formats import Bitmap, Format, pack
from reprolib.sparse.operations import Convolution, Flatten, Graph, Linear, Operation, Weights


class _Prepared(dict):
    """What kernels made of weights: made again where it is missing, so neither copied nor saved with them."""

    def __deepcopy__(self, memo: dict) -> _Prepared:
        return _Prepared()

    def __reduce__(self):
        return _Prepared, ()


class KeptWeights(nn.Module):
    """The weight and bias of a layer: ``values [kept]`` in the order of the weight, and ``bits``, eight in a byte, that
    say where they are.

    All three are buffers: `state_dict` has them, and what is loaded or written into them counts from the next call on.
    """

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype | None = None):
        super().__init__()
        with torch.inference_mode(False):  # a tensor made in that mode does not say when it was changed
            kept = Bitmap.pack(weight.detach().cpu())
            self.shape = kept.shape
            self.register_buffer("bits", kept.bits.clone().to(weight.device))
            self.register_buffer("values", kept.values.to(weight.device, dtype or weight.dtype, copy=True))
            self.register_buffer("bias", bias.detach().clone())
        self._prepared = _Prepared()

    @property
    def version(self) -> tuple:
        """Differs where weights or bias have been changed or moved."""
        bits, values, bias = (self._buffers[name] for name in ("bits", "values", "bias"))
        try:  # asked at each call of the network, so it has to be quick
            return (
                bits.data_ptr(), bits._version, values.data_ptr(), values._version, bias.data_ptr(), bias._version
            )  # fmt: skip
        except RuntimeError:  # of a model that was copied or moved in inference mode: tensors do not count changes
            with torch.inference_mode(False):
                self._buffers.update({name: tensor.clone() for name, tensor in self._buffers.items()})
            return self.version

    @property
    def sparsity(self) -> float:
        return 1 - len(self.values) / self.shape.numel()

    @property
    def format(self) -> Format:
        """The weight in the format of its structure. Finding that takes a while: it waits until somebody asks."""
        return self.once("format", lambda: pack(self.weight().cpu()))

    def weight(self) -> Tensor:
        """The weight with its zeros."""
        return Bitmap(self.shape, self.bits.cpu(), self.values.cpu()).unpack().to(self.values.device)

    def once(self, what: object, make):
        """`make()`, kept until the weights change."""
        version, made = self._prepared.get(what, (None, None))
        if version != self.version:
            version, made = self.version, make()
            self._prepared[what] = version, made
        return made

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest) -> None:
        """Other zeros may come with another number of values."""
        bits, values = (state_dict.get(prefix + name, getattr(self, name)) for name in ("bits", "values"))
        if bits.shape == self.bits.shape:
            kept = int(np.unpackbits(bits.cpu().numpy(), count=self.shape.numel()).sum())
            if values.shape != (kept,):
                rest[-1].append(f"{prefix}bits keep {kept} weights, and {prefix}values are {tuple(values.shape)}")
                return
            if len(self.values) != kept:
                self.values = self.values.new_empty(kept)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{'×'.join(map(str, self.shape))}, sparsity={self.sparsity:.4f}"


class SparseNetwork(nn.Module):
    """Operations that run as one: activations stay in the kernels' layout from first to last. For inference only.

    Takes the inputs of `graph` one by one and returns a tuple of its outputs. Where shapes are none of the kernels',
    such as those of sums that broadcast, torch calculates, with the zeros.
    """

    def __init__(self, graph: Graph, weights: Weights, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.graph = operations.fused(graph)
        self.dtype = dtype  # of what is multiplied; sums are float32 always
        low = dtype if dtype == torch.bfloat16 else None
        self._rows = _rows(self.graph)
        self.names = tuple(weights)  # of the layers, as in the network that they come from
        self.layers = nn.ModuleDict({_key(name): KeptWeights(*pair, low) for name, pair in weights.items()})
        self._prepared = _Prepared()
        self._handle = _handle(self)
        self.eval()

    def __setstate__(self, state: dict) -> None:  # of a copy
        super().__setstate__(state)
        self._handle = _handle(self)

    def layer(self, name: str) -> KeptWeights:
        return self.layers[_key(name)]

    def train(self, mode: bool = True) -> SparseNetwork:
        if mode:
            raise RuntimeError("a sparse network is for inference only: train the dense one, then call sparsify again")
        return super().train(False)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Raises RuntimeError where a gradient is asked for, or where the device has no kernels."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            raise RuntimeError("sparse layers have no gradient: call them under torch.inference_mode()")
        if torch.compiler.is_compiling():
            return tuple(torch.ops.reprolib.sparse_network(list(inputs), self._handle))
        with torch.no_grad():
            return self.run(inputs)

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`forward`, without a look at gradients."""
        device, own = inputs[0].device, self.layers[_key(self.names[0])].bias.device
        backend = backend_of(device, self.dtype)
        if device != own:
            raise RuntimeError(
                f"the input is on device {device}, the sparse model on {own}: move one of them with .to()"
            )
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else inputs[0].dtype
        batches = _batches(self.graph, inputs)
        if batches is None:
            return self._in_torch(inputs, dtype)
        try:
            outputs = self._whole(batches) if backend is cpu else self._one_by_one(batches, backend)
        except ValueError:  # shapes that torch may know to handle, or it has the better message
            return self._in_torch(inputs, dtype)
        leading = inputs[0].shape[:-3] if self.graph.inputs[0] else inputs[0].shape[:-1]
        shaped = (
            y.reshape(*leading, -1) if self._rows[output] else y.reshape(*leading, *y.shape[1:])
            for output, y in zip(self.graph.outputs, outputs, strict=True)
        )
        return tuple(y.to(dtype) for y in shaped)

    def _in_torch(self, inputs: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """As the network was before: torch says what does not fit."""
        outputs = operations.interpret(self.graph, inputs, self._dense(inputs[0]))
        return tuple(y.to(dtype) for y in outputs)

    def _dense(self, like: Tensor) -> Weights:
        def pair(layer: KeptWeights):
            return lambda: tuple(part.to(like.device, like.dtype) for part in (layer.weight(), layer.bias))

        if not like.is_floating_point():  # torch says so
            like = self.layers[next(iter(self.layers))].bias
        about = "dense", like.device, like.dtype
        return {name: self.layer(name).once(about, pair(self.layer(name))) for name in self.names}

    def _whole(self, batches: list[Tensor]) -> list[Tensor]:
        """All in one call of the engine that makes code for the weights."""
        maps = [x if x.dim() == 4 else x[:, :, None, None] for x in batches]
        arrays = [x.detach().to(torch.float32).contiguous().numpy() for x in maps]
        return [torch.from_numpy(y) for y in self.engine()(arrays, torch.get_num_threads())]

    def engine(self) -> cpu.Network:
        """The engine with code for these weights, as they are now."""
        version = tuple(layer.version for layer in self.layers.values())
        known, engine = self._prepared.get("engine", (None, None))
        if known != version:
            engine = cpu.Network(self.graph, self.arrays(), cpu.instruction_sets(self.dtype == torch.bfloat16)[0])
            self._prepared["engine"] = version, engine
        return engine

    def arrays(self) -> dict:
        """Weights and biases with their zeros, as float32 arrays, by layer."""
        pairs = {name: (self.layer(name).weight(), self.layer(name).bias) for name in self.names}
        return {name: tuple(part.float().contiguous().numpy() for part in pair) for name, pair in pairs.items()}

    # --- Kernels for one layer at a time ------------------------------------------------------------------------------

    def _one_by_one(self, batches: list[Tensor], backend: ModuleType) -> list[Tensor]:
        """Layers that `backend` has kernels for run there, torch has the others.

        Between two layers with kernels, where one reads the other and nobody else does, activations stay in its layout.
        """
        values: list[Tensor | None] = list(batches)
        packed: dict[int, Tensor] = {}
        for i, (value, operation) in enumerate(self.graph.numbered()):
            source = operations.sources(operation)[0]
            if isinstance(operation, Flatten) and source in packed:
                y = packed.pop(source)
                packed[value] = y.reshape(y.shape[0], -1, 1, 1, y.shape[4])
                values.append(None)
            elif problem(operation, self.layers):
                values.append(operations.calculate(operation, values, self._dense(batches[0])))
            else:
                first, rest = _in_parts(operation)
                follower = None if rest else self._follower(i, value)
                x = packed.pop(source, None)
                if x is None:
                    maps = values[source]
                    x = backend.to_layout(maps if maps.dim() == 4 else maps[:, :, None, None], self._halo(operation))
                y = backend.conv(x, self.plan(first, backend, batches[0].device, self._halo(follower)))
                if follower:
                    packed[value] = y
                    values.append(None)
                    continue
                y = backend.from_layout(y, len(batches[0])).to(batches[0].dtype)  # the type that torch goes on with
                y = y.flatten(1) if isinstance(operation, Linear) else y
                values.append(operations.finish(rest, y, values) if rest else y)
        return [values[output] for output in self.graph.outputs]

    def _follower(self, i: int, value: int) -> Operation | None:
        """The operation behind operation i, if it alone reads its value and has a kernel."""
        readers = [o for o in self.graph.operations if value in operations.sources(o)]
        behind = self.graph.operations[i + 1 : i + 2]
        if value in self.graph.outputs or readers != list(behind):
            return None
        if isinstance(behind[0], Flatten):
            return behind[0] if self._follower(i + 1, value + 1) else None
        return None if problem(behind[0], self.layers) or behind[0].source != value else behind[0]

    def _halo(self, operation: Operation | None) -> int:
        """Pixels of zeros that kernels expect around the input."""
        return operation.padding[0] if isinstance(operation, Convolution) else 0

    def plan(self, operation: Convolution | Linear, backend: ModuleType, device: torch.device, halo_out: int):
        """What `backend` works from, prepared once."""
        layer = self.layer(operation.weight)
        options = {"relu": operation.activation == "relu", "pool": getattr(operation, "pool", False)}
        options |= {"halo_out": halo_out} if backend is portable else {"halo_out": halo_out, "device": device}
        return layer.once(
            (backend.__name__, device, *options.items()),
            lambda: backend.plan(layer.weight().cpu(), layer.bias.cpu(), **options),
        )


def _rows(graph: Graph) -> list[bool]:
    """Which values are rows."""
    rows = [not maps for maps in graph.inputs]
    for operation in graph.operations:
        rows.append(isinstance(operation, (Linear, Flatten)) or rows[operations.sources(operation)[0]])
    return rows


def _batches(graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor] | None:
    """Inputs as maps ``[N, C, H, W]`` and rows ``[N, features]``, or None where there are no such."""
    first = inputs[0]
    if any((x.device, x.dtype) != (first.device, first.dtype) for x in inputs) or not first.is_floating_point():
        return None
    leading = {x.shape[:-3] if maps else x.shape[:-1] for x, maps in zip(inputs, graph.inputs, strict=True)}
    if any(x.dim() < (3 if maps else 1) for x, maps in zip(inputs, graph.inputs, strict=True)) or len(leading) != 1:
        return None
    [shape] = leading
    flattens = any(isinstance(operation, (Linear, Flatten)) for operation in graph.operations)
    if any(graph.inputs) and len(shape) != 1 and (shape or flattens):  # no batch: fine for a map that stays one
        return None
    if any(not x.numel() for x in inputs):
        return None
    return [
        x.reshape(-1, *x.shape[-3:]) if maps else x.reshape(-1, x.shape[-1])
        for x, maps in zip(inputs, graph.inputs, strict=True)
    ]


# --- What kernels for one layer at a time can do ----------------------------------------------------------------------


def problem(operation: Operation, layers: nn.ModuleDict) -> str | None:
    """What keeps an operation from such kernels, if anything does."""
    if isinstance(operation, Linear):
        layer = layers[_key(operation.weight)]
        few = layer.shape.numel() > SMALL_CONVOLUTION and 1 - layer.sparsity > LINEAR_DENSITY
        return f"{layer.sparsity:.0%} of its weights are zero, dense is faster" if few else None
    if not isinstance(operation, Convolution):
        return "no layer"
    kernel = tuple(layers[_key(operation.weight)].shape[2:])
    if kernel not in ((3, 3), (1, 1)):
        return f"its kernel is {kernel[0]}x{kernel[1]}, 3x3 and 1x1 are supported"
    if (operation.stride, operation.dilation, operation.groups) != ((1, 1), (1, 1), 1):
        return "stride, dilation and groups must be 1"
    if operation.padding != (kernel[0] // 2, kernel[1] // 2):
        return "its padding must keep the size of the map"
    return None


def _in_parts(operation: Convolution | Linear) -> tuple[Convolution | Linear, Convolution | Linear | None]:
    """What kernels do of an operation, and what is left to do."""
    if operation.addend is None and operation.activation in (None, "relu"):
        return operation, None
    bare = replace(operation, addend=None, activation=None)
    return (replace(bare, pool=False) if isinstance(bare, Convolution) else bare), operation


def backend_of(device: torch.device, dtype: torch.dtype = torch.float32) -> ModuleType:
    """The kernels for a device. Raises RuntimeError, with the remedy, where there are none."""
    if dtype == torch.bfloat16 and not (device.type == "cpu" and cpu.instruction_sets(pairs=True)):
        needed = "a CPU with the instructions avx512_bf16, on Linux"
        raise RuntimeError(f"bfloat16 needs {needed}; device {device} of this machine is none: leave dtype out")
    if device.type == "cpu":
        compilation.require()
        return cpu if cpu.instruction_sets() else portable
    if device.type == "cuda":
        cuda.require()
        return cuda
    raise RuntimeError(f"no sparse kernels for device {device}: use cpu or cuda")


def _key(name: str) -> str:
    """A name for `nn.ModuleDict`: without dots, not empty, and none of its attributes."""
    key = name.replace("/", "//").replace(".", "/")
    return f"/{key}" if not key or hasattr(nn.ModuleDict, key) else key


# --- For torch.compile: one operator that it does not look into -------------------------------------------------------

_networks: weakref.WeakValueDictionary[str, SparseNetwork] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def _handle(network: SparseNetwork) -> str:
    """What the operator finds a network by: a text, because numbers may become variables."""
    handle = str(next(_numbers))
    _networks[handle] = network
    return handle


@torch.library.custom_op("reprolib::sparse_network", mutates_args=())
def _sparse_network(inputs: list[Tensor], network: str) -> list[Tensor]:
    return list(_networks[network].run(inputs))


@_sparse_network.register_fake
def _(inputs: list[Tensor], network: str) -> list[Tensor]:
    found = _networks[network]
    weights = {
        name: tuple(inputs[0].new_empty(shape) for shape in (found.layer(name).shape, found.layer(name).shape[:1]))
        for name in found.names
    }
    return list(operations.interpret(found.graph, inputs, weights))
