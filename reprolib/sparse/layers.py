"""From a pruned network to one that is faster: `sparsify`, and the modules that it puts in place of dense layers."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import ModuleType

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils import fusion

from reprolib.models import weight_in_place
from reprolib.sparse import compilation, cpu, cuda, portable
from reprolib.sparse.formats import Bitmap, Format, pack

# Two kinds of layers cost little, zeros or not, and are packed beside pruned ones, because leaving the kernels' layout
# for them would cost more: a convolution with fewer columns than this before one (the first of a network has 27), and a
# small linear layer behind one. (Torch's threads also stay awake for a while after a layer, on cores that ours need.)
FEW_COLUMNS = 64
# A linear layer multiplies each weight once an image: at small batches it waits for its bytes, 11 per kept weight in
# the kernels and 4 per weight in torch. With more kept weights than this it stays in torch, unless it is small.
LINEAR_DENSITY = 0.35
SMALL_WEIGHT = 1 << 16


class _Prepared(dict):
    """What kernels made of a layer: made again where it is missing, so neither copied nor saved with it."""

    def __deepcopy__(self, memo: dict) -> _Prepared:
        return _Prepared()

    def __reduce__(self):
        return _Prepared, ()


class SparseLayer(nn.Module):
    """A pruned convolution or linear layer with its bias and, if asked, ReLU and 2x2 max-pool, for inference.

    `kept` holds its weights. The arrays that a kernel works from are prepared at the first call on each device.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, relu: bool = False, pool: bool = False):
        super().__init__()
        weight = weight.detach().cpu()
        self.kept = Bitmap.pack(weight)
        self.sparsity = 1 - weight.count_nonzero().item() / weight.numel()
        self.bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().cpu().clone()
        self.relu, self.pool = relu, pool
        self.dtype = torch.float32  # of what is multiplied; sums are float32 always
        self._plans, self._network, self._formats = _Prepared(), _Prepared(), _Prepared()

    @property
    def weight(self) -> Format:
        """The weight in the format of its structure; finding that takes a while, so it waits until somebody asks."""
        if self.dtype not in self._formats:
            self._formats[self.dtype] = pack(self.kept.unpack())
        return self._formats[self.dtype]

    @property
    def shape(self) -> torch.Size:
        """``[C_out, C_in, K, K]`` or ``[out, in]``."""
        return self.kept.shape

    @property
    def halo(self) -> int:
        """Pixels of zeros that the kernels expect around the input: 1 for a 3x3 convolution, else 0."""
        return 1 if self.shape[2:] == (3, 3) else 0

    def plan(self, backend: ModuleType, device: torch.device, halo_out: int):
        """What `backend` works from, on `device`; prepared once."""
        key = (device, halo_out)
        if key not in self._plans:
            arguments = {} if backend is portable else {"device": device}
            self._plans[key] = backend.plan(
                self.kept.unpack(), self.bias, relu=self.relu, pool=self.pool, halo_out=halo_out, **arguments
            )
        return self._plans[key]

    def forward(self, x: Tensor) -> Tensor:
        return run([self], x, self._network)

    def round_to_bfloat16(self) -> None:
        """Keep weights as bfloat16, and multiply activations rounded to it."""
        self.kept, self.dtype = replace(self.kept, values=self.kept.values.bfloat16()), torch.bfloat16

    def for_engine(self) -> cpu.Layer:
        """Weight and bias as float32 arrays, and what follows."""
        weight, bias = (array.float().contiguous().numpy() for array in (self.kept.unpack(), self.bias))
        return cpu.Layer(weight, bias, self.relu, self.pool, self.halo)

    def extra_repr(self) -> str:
        shape = self.shape
        parts = [f"{shape[1]}, {shape[0]}", "×".join(map(str, shape[2:])), "ReLU" * self.relu, "max-pool" * self.pool]
        parts += ["bfloat16" * (self.dtype == torch.bfloat16), str(self.weight), f"sparsity={self.sparsity:.4f}"]
        parts += [f"storage_bytes={self.weight.storage_bytes}"]
        return ", ".join(part for part in parts if part)


class SparseConv2d(SparseLayer):
    """3x3 convolution with stride 1 and padding 1, or 1x1 convolution: ``[N, C_in, H, W]`` to ``[N, C_out, H, W]``."""

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, relu: bool = False, pool: bool = False) -> SparseConv2d:
        """The same layer from its zeros, followed by ReLU and a 2x2 max-pool if asked. Raises ValueError."""
        problem = _unsupported(conv)
        if problem:
            raise ValueError(f"SparseConv2d can't take {conv}: {problem}")
        return cls(conv.weight, conv.bias, relu, pool)


class SparseLinear(SparseLayer):
    """Linear layer: ``[.., in]`` to ``[.., out]``."""

    def forward(self, x: Tensor) -> Tensor:
        rows = super().forward(x.reshape(-1, x.shape[-1]))
        return rows.reshape(*x.shape[:-1], len(self.bias))

    @classmethod
    def from_dense(cls, linear: nn.Linear, relu: bool = False) -> SparseLinear:
        """The same layer from its zeros, followed by ReLU if asked."""
        return cls(linear.weight, linear.bias, relu)


class SparseSequential(nn.Sequential):
    """Sparse layers (and `nn.Flatten`) in a row: activations stay in the kernels' layout from the first to the last."""

    def __init__(self, *layers: nn.Module):
        super().__init__(*layers)
        self._network = _Prepared()

    def forward(self, x: Tensor) -> Tensor:
        return run(list(self), x, self._network)


def run(layers: list[nn.Module], x: Tensor, prepared: dict | None = None) -> Tensor:
    """Run sparse layers one after the other on ``[N, C, H, W]`` or ``[N, features]``; same type and device.

    `prepared` keeps what is made for the layers together from call to call. Raises ValueError for input of another
    shape or of whole numbers, and RuntimeError where a gradient is asked for or the device has no kernels.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("sparse layers have no gradient: call them under torch.inference_mode()")
    first = layers[0]
    if x.dim() != (2 if isinstance(first, SparseLinear) else 4) or x.shape[1] != first.shape[1]:
        raise ValueError(f"input of shape {tuple(x.shape)} does not fit {first}")
    if not x.is_floating_point():
        raise ValueError(f"input is {x.dtype}, sparse layers take floating-point numbers")
    backend = _backend(x.device, first.dtype)
    if not len(x):  # a detector on an empty picture: the shape is that of one image's result
        return run(layers, x.new_zeros(1, *x.shape[1:]), prepared)[:0]
    maps = x if x.dim() == 4 else x[:, :, None, None]
    _check_maps(layers, maps)
    with torch.no_grad():
        y = _whole(layers, maps, prepared) if backend is cpu else _layer_by_layer(layers, maps, backend)
    flat = any(isinstance(layer, (nn.Flatten, SparseLinear)) for layer in layers)
    return (y.flatten(1) if flat else y).to(x.dtype)


def _check_maps(layers: list[nn.Module], maps: Tensor) -> None:
    """Raises ValueError where the maps that reach a layer do not fit it."""
    channels, height, width = maps.shape[1:]
    for layer in layers:
        if isinstance(layer, nn.Flatten):
            channels, height, width = channels * height * width, 1, 1
            continue
        if channels != layer.shape[1]:
            expected = layer.shape[1]
            raise ValueError(f"activations of {channels} channels do not fit a layer of {expected} input channels")
        if layer.pool and min(height, width) < 2:
            raise ValueError(f"maps of {height}x{width} pixels are too small for the max-pool of {layer}")
        channels, height, width = layer.shape[0], height // (1 + layer.pool), width // (1 + layer.pool)


def _whole(layers: list[nn.Module], maps: Tensor, prepared: dict | None) -> Tensor:
    """All layers in one call of the engine that makes code for their weights."""
    prepared = {} if prepared is None else prepared
    network = prepared.get("network")
    if network is None:
        engine_layers = [layer.for_engine() for layer in layers if hasattr(layer, "pool")]
        pairs = layers[0].dtype == torch.bfloat16
        network = prepared["network"] = cpu.Network(engine_layers, cpu.instruction_sets(pairs)[0])
    images = maps.detach().to(torch.float32).contiguous().numpy()
    return torch.from_numpy(network(images, torch.get_num_threads()))


def _layer_by_layer(layers: list[nn.Module], maps: Tensor, backend: ModuleType) -> Tensor:
    y = backend.to_layout(maps, layers[0].halo)
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Flatten):
            y = y.reshape(y.shape[0], -1, 1, 1, y.shape[4])
            continue
        follower = layers[i + 1] if i + 1 < len(layers) else None
        halo_out = follower.halo if isinstance(follower, SparseLayer) else 0
        y = backend.conv(y, layer.plan(backend, maps.device, halo_out))
    return backend.from_layout(y, len(maps))


def _backend(device: torch.device, dtype: torch.dtype = torch.float32) -> ModuleType:
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


# --- The one door ---------------------------------------------------------------------------------------------------


def sparsify(
    model: nn.Module,
    device: str | torch.device | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    dense: bool = False,
) -> nn.Module:
    """A copy of a pruned network, for inference only, whose pruned layers run in kernels that skip their zeros.

    In every `nn.Sequential` batch norm is folded, and bias, ReLU and 2x2 max-pools are fused; layers in a row become a
    `SparseSequential`. Pruned convolutions elsewhere become `SparseConv2d`. What has no zeros, or no kernel (strides,
    groups, other kernel sizes), stays as it is; `dense` packs layers without zeros too, to see what fusion alone gives.
    So does what has hooks, or is a subclass of what is fused. The outputs are those of `model` up to rounding; on a GPU
    the kernels calculate in fp16 with fp32 sums.

    `device` moves the copy; by default it stays where the model is. With the `dtype` bfloat16, weights and activations
    of packed layers are rounded to it (8 bits of a fraction), and sums stay float32: half the instructions where kept
    weights are neighbours (docs/speed.md: what it costs). It needs a CPU that has instructions for it.

    Raises ValueError for a model in training mode, for weights that are computed anew at each forward pass and for
    another `dtype`, and RuntimeError where the device's kernels can't run.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype {dtype} is not supported: torch.float32 or torch.bfloat16")
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode: call model.eval() first, batch norm is folded as it is then")
    if device is not None or dtype == torch.bfloat16:
        _backend(torch.device(device or "cpu"), dtype)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight_in_place(module, name)
    model = _sparsified(copy.deepcopy(model), dense).eval().requires_grad_(False)
    if dtype == torch.bfloat16:
        for layer in model.modules():
            if isinstance(layer, SparseLayer):
                layer.round_to_bfloat16()
    return model if device is None else model.to(device)


KERNELS = {portable: "Numba", cuda: "CUDA"}


def describe(sparse_model: nn.Module) -> pd.DataFrame:
    """One row per sparse layer: format, sparsity, bytes of the format beside those of the dense weight, what runs it.

    Also one per layer with zeros that torch runs, with the reason.
    """
    rows = {}
    for name, layer in sparse_model.named_modules():
        if isinstance(layer, SparseLayer):
            rows[name] = {
                "layer": "×".join(map(str, layer.shape)),
                "format": str(layer.weight),
                "sparsity_pct": 100 * layer.sparsity,
                "storage_bytes": layer.weight.storage_bytes,
                "dense_bytes": layer.shape.numel() * layer.kept.values.element_size(),
                "runs_in": _kernels(_backend(layer.bias.device, layer.dtype), layer.dtype),
            }
        elif isinstance(layer, (nn.Conv2d, nn.Linear)) and not bool(layer.weight.all()):
            rows[name] = {
                "layer": "×".join(map(str, layer.weight.shape)),
                "format": "dense",
                "sparsity_pct": 100 * (1 - layer.weight.count_nonzero().item() / layer.weight.numel()),
                "storage_bytes": layer.weight.nbytes,
                "dense_bytes": layer.weight.nbytes,
                "runs_in": f"torch: {_unsupported(layer) or 'a dense layer between them is not packed'}",
            }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("module")


def _kernels(backend: ModuleType, dtype: torch.dtype) -> str:
    if backend is not cpu:
        return KERNELS[backend]
    return f"code made for the weights ({cpu.instruction_sets(dtype == torch.bfloat16)[0].NAME})"


def _sparsified(module: nn.Module, dense: bool) -> nn.Module:
    if _is_plain(module, nn.Sequential):
        layers = _fused(_flattened(module), dense)
        if not any(isinstance(layer, SparseSequential) for layer in layers):
            return module
        return layers[0] if len(layers) == 1 else nn.Sequential(*layers)
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        return _sparse_layer(module) if _packable(module, dense) else module
    for name, child in module.named_children():
        setattr(module, name, _sparsified(child, dense))
    return module


def _flattened(sequential: nn.Sequential) -> list[nn.Module]:
    """Nested `nn.Sequential` written out, without what does nothing in eval mode."""
    layers = []
    for module in sequential:
        if _is_plain(module, nn.Sequential):
            layers += _flattened(module)
        elif not _is_plain(module, nn.Dropout, nn.Identity):
            layers.append(module)
    return layers


def _fused(layers: list[nn.Module], dense: bool) -> list[nn.Module]:
    """Fuse what follows into each packed layer, and packed layers in a row into a `SparseSequential`."""
    result, chain = [], []
    while layers:
        layer, layers = layers[0], layers[1:]
        if _packable(layer, dense) or _joins(layer, chain, layers, dense):
            layer, layers = _with_batch_norm(layer, layers)
            relu = bool(layers) and _is_plain(layers[0], nn.ReLU)
            layers = layers[relu:]
            pool = isinstance(layer, nn.Conv2d) and bool(layers) and _is_small_max_pool(layers[0])
            layers = layers[pool:]
            if isinstance(layer, nn.Linear) and chain and isinstance(chain[-1], SparseConv2d):
                result += _closed(chain)  # not one of its followers: without Flatten it sees the last dimension only
                chain = []
            chain.append(_sparse_layer(layer, relu, pool))
        elif chain and _is_plain(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1):
            chain.append(layer)
        else:
            result += [*_closed(chain), _sparsified(layer, dense)]
            chain = []
    return result + _closed(chain)


def _is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether a module does just what its kind does: it is no subclass, and nobody listens to it."""
    return type(module) in kinds and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _closed(chain: list[nn.Module]) -> list[nn.Module]:
    return [SparseSequential(*chain)] if chain else []


def _packable(module: nn.Module | None, dense: bool) -> bool:
    """Whether the kernels can run a layer and skip something in it (`dense`: or need not)."""
    return isinstance(module, (nn.Conv2d, nn.Linear)) and not _unsupported(module) and _has_zeros(module, dense)


def _joins(module: nn.Module, before: list[nn.Module], behind: list[nn.Module], dense: bool) -> bool:
    """Whether a layer without zeros is small enough to be packed for the sake of those before or behind it."""
    if not isinstance(module, (nn.Conv2d, nn.Linear)) or _unsupported(module):
        return False
    if isinstance(module, nn.Linear):
        return bool(before) and not isinstance(before[-1], SparseConv2d) and module.weight.numel() <= SMALL_WEIGHT
    return module.weight[0].numel() < FEW_COLUMNS and _packable(_next_weighted(behind), dense)


def _next_weighted(layers: list[nn.Module]) -> nn.Module | None:
    return next((layer for layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear))), None)


def _has_zeros(module: nn.Module, dense: bool) -> bool:
    return dense or not bool(module.weight.all())


def _unsupported(module: nn.Conv2d | nn.Linear) -> str | None:
    """What keeps a layer from the kernels, if anything does."""
    if type(module).forward not in (nn.Conv2d.forward, nn.Linear.forward):
        return f"{type(module).__name__} has a forward of its own"
    if _has_hooks(module):
        return "its hooks would not be called"
    if isinstance(module, nn.Linear):
        density = module.weight.count_nonzero().item() / module.weight.numel()
        slow = density > LINEAR_DENSITY and module.weight.numel() > SMALL_WEIGHT
        return f"{density:.0%} of its weights are kept, dense is faster" if slow else None
    if module.kernel_size not in ((3, 3), (1, 1)):
        return f"its kernel is {module.kernel_size}, 3x3 and 1x1 are supported"
    if module.stride != (1, 1) or module.dilation != (1, 1) or module.groups != 1:
        return "stride, dilation and groups must be 1"
    if module.padding not in ("same", tuple(size // 2 for size in module.kernel_size)):
        return "its padding must keep the size of the map"
    return None if module.padding_mode == "zeros" else f"padding_mode {module.padding_mode!r} is not supported"


def _with_batch_norm(layer: nn.Module, rest: list[nn.Module]) -> tuple[nn.Module, list[nn.Module]]:
    """Fold a batch norm that follows into the layer. Pruned weights stay zero: each output channel is only scaled."""
    if not rest or getattr(rest[0], "running_mean", None) is None:  # without statistics it would take the batch's own
        return layer, rest
    if isinstance(layer, nn.Conv2d) and _is_plain(rest[0], nn.BatchNorm2d):
        fold = fusion.fuse_conv_bn_eval
    elif isinstance(layer, nn.Linear) and _is_plain(rest[0], nn.BatchNorm1d):
        fold = fusion.fuse_linear_bn_eval
    else:
        return layer, rest
    # In float64: in half precision a small variance or eps is zero, and the quotient is NaN.
    folded = fold(copy.deepcopy(layer).double(), copy.deepcopy(rest[0]).double())
    return folded.to(torch.promote_types(layer.weight.dtype, torch.float32)), rest[1:]


def _sparse_layer(layer: nn.Module, relu: bool = False, pool: bool = False) -> SparseLayer:
    if isinstance(layer, nn.Conv2d):
        return SparseConv2d.from_dense(layer, relu, pool)
    return SparseLinear.from_dense(layer, relu)


def _is_small_max_pool(module: nn.Module) -> bool:
    """Whether this is the 2x2 max-pool that the kernels fuse."""
    if not _is_plain(module, nn.MaxPool2d) or module.return_indices or module.ceil_mode:
        return False
    pairs = [value if isinstance(value, tuple) else (value, value) for value in (module.kernel_size, module.stride)]
    return pairs == [(2, 2), (2, 2)] and module.padding in (0, (0, 0)) and module.dilation in (1, (1, 1))
