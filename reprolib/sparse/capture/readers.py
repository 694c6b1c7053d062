"""One reader for each function of torch that is an operation here: what a call of it is, if it is one.

A reader takes what is found so far, the node, and then the arguments of the function by their names there; None says
that the call is no operation. Parameters of modules come as tensors, those of functions as nodes that name them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from reprolib.sparse import operations
from reprolib.sparse.capture.effects import IDENTITIES, is_tensor
from reprolib.sparse.capture.units import Kind, Layer, Node, Norm, Reading, Unit, Unsupported


def conv2d(found, node, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, name=None):
    kept, offset = found.tensor(weight), found.tensor(bias)
    if kept is None or (bias is not None and offset is None) or kept.dim() != 4:
        return None
    kind = found.as_maps(input)
    if kind is None:
        raise Unsupported("it reads rows, not maps")
    stride, dilation = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        total = [step * (size - 1) for step, size in zip(dilation, kept.shape[2:], strict=True)]
        if padding == "same" and (any(value % 2 for value in total) or stride != (1, 1)):
            raise Unsupported("its padding is not the same on both sides")
        padding = (total[0] // 2, total[1] // 2) if padding == "same" else (0, 0)
    padding = _pair(padding)
    if None in (stride, padding, dilation) or not isinstance(groups, int):
        return None
    if kind.channels not in (None, kept.shape[1] * groups):
        raise Unsupported("its input has another number of channels")
    single = kind.single and kept.shape[2:] == (1, 1) and padding == (0, 0)
    layer = Layer(found.names.get(id(kept), node.name) if name is None else name, kept, offset)
    operation = operations.Convolution(input, "", stride, padding, dilation, groups)
    return Unit(node, Kind(True, len(kept), single, like=kept), (operation,), layer=layer)


def linear(found, node, input, weight, bias=None, name=None):
    kept, offset = found.tensor(weight), found.tensor(bias)
    if kept is None or (bias is not None and offset is None) or kept.dim() != 2:
        return None
    kind = found.as_rows(input)
    if kind is None:
        raise Unsupported("it reads maps, not rows")
    layer = Layer(found.names.get(id(kept), node.name) if name is None else name, kept, offset)
    kind = Kind(False, flat=kind.flat, like=kept)
    return Unit(node, kind, (operations.Linear(input, ""),), layer=layer)


def batch_norm(
    found, node, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5,
    maps=None, name=None,
):  # fmt: skip
    if running_mean is None or running_var is None or training is not False or not isinstance(input, Node):
        return None
    tensors = [found.tensor(value) for value in (running_mean, running_var, weight, bias)]
    if any(tensor is None and value is not None for tensor, value in zip(tensors, (0, 0, weight, bias), strict=True)):
        return None
    norm, before = Norm(*tensors, eps), found.units.get(input)
    known = found.as_maps(input) if maps else found.kinds.get(input)
    if known is None or (maps is not None and known.maps != maps):
        return None
    if (
        before is not None
        and before.layer is not None
        and len(input.users) == 1
        and len(before.layer.weight) == len(norm.mean)
    ):
        layer = replace(before.layer, norms=(*before.layer.norms, norm))
        return replace(before, layer=layer, needs_flat=not known.maps and not known.flat)
    if not known.maps:
        return None
    layer = Layer(name or node.name, torch.ones_like(norm.mean)[:, None, None, None], None, (norm,), is_own=False)
    operation = operations.Convolution(input, "", groups=len(norm.mean))
    return Unit(node, replace(known, channels=len(norm.mean), like=norm.mean), (operation,), layer=layer)


def _activation(activation):
    def reader(found, node, input, inplace=False):
        kind = found.kinds.get(input)
        return kind and Unit(node, replace(kind), (operations.Activation(input, activation),))

    return reader


def _hardtanh(found, node, input, min_val=-1.0, max_val=1.0, inplace=False):
    return _activation("relu6")(found, node, input) if (min_val, max_val) == (0, 6) else None


def _max_pool(
    found, node, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):
    kernel, padding, dilation = _pair(kernel_size), _pair(padding), _pair(dilation)
    stride = kernel if stride in (None, (), []) else _pair(stride)
    if None in (kernel, stride, padding) or dilation != (1, 1) or ceil_mode or return_indices:
        return None
    kind = found.as_maps(input)
    return kind and Unit(node, replace(kind, single=False), (operations.MaxPool(input, kernel, stride, padding),))


def _average_pool(
    found, node, input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
    divisor_override=None,
):  # fmt: skip
    kernel, padding = _pair(kernel_size), _pair(padding)
    stride = kernel if stride in (None, (), []) else _pair(stride)
    if None in (kernel, stride, padding) or ceil_mode or divisor_override is not None:
        return None
    kind = found.as_maps(input)
    if kind is None or kind.channels is None or kind.like is None or not (padding == (0, 0) or count_include_pad):
        return None
    weight = kind.like.new_full((kind.channels, 1, *kernel), 1 / (kernel[0] * kernel[1])).detach()
    layer = Layer(node.name, weight, None, is_own=False)
    operation = operations.Convolution(input, "", stride, padding, groups=kind.channels)
    return Unit(node, replace(kind, single=False), (operation,), layer=layer)


def _adaptive_average_pool(found, node, input, output_size):
    if _pair(output_size) != (1, 1):
        return None
    kind = found.as_maps(input)
    return kind and Unit(node, replace(kind, single=True), (operations.Mean(input),))


def _mean(found, node, input, dim=None, keepdim=False):
    kind = found.kinds.get(input)
    dim = tuple(dim) if isinstance(dim, (tuple, list)) else ()
    if kind is None or not kind.maps or sorted(value % 4 for value in dim if isinstance(value, int)) != [2, 3]:
        return None
    if not isinstance(keepdim, bool) or len(dim) != 2 or not all(-4 <= value < 4 for value in dim):
        return None
    if keepdim:
        return Unit(node, replace(kind, single=True), (operations.Mean(input),))
    kind = Kind(False, flat=True, like=kind.like)
    return Unit(node, kind, (operations.Mean(input), operations.Flatten(node)))


def _flatten(found, node, input, start_dim=0, end_dim=-1):
    kind = found.kinds.get(input)
    if kind is None or not kind.maps or start_dim not in (1, -3) or end_dim not in (-1, 3):
        return None
    return Unit(node, Kind(False, flat=True, like=kind.like), (operations.Flatten(input),))


def _view(found, node, input, *shape):
    shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if len(shape) != 2 or shape[1] != -1 or not _is_batch_size(found, shape[0], input):
        return None
    return _flatten(found, node, input, 1)


def _reshape(found, node, input, shape):
    return _view(found, node, input, shape)


def identity(found, node, input, p=0.5, training=False, inplace=False):
    kind = found.kinds.get(input)
    return Unit(node, kind, source=input) if kind and training is False else None


def _dropout(found, node, input, p=0.5, training=True, inplace=False):
    return identity(found, node, input, p, training, inplace)


def stochastic_depth(found, node, input, p, mode, training=True):
    return identity(found, node, input, p, training)


def _add(found, node, input, other, *, alpha=1):
    kind = _common(found, input, other) if alpha == 1 else None
    if (
        kind is None
        or found.kinds[input].single != found.kinds[other].single
        or not _same_channels(found, input, other)
    ):
        return None
    return Unit(node, kind, (operations.Sum(input, other),))


def _multiply(found, node, input, other):
    kind = _common(found, input, other)
    if kind is None or not kind.maps or not _same_channels(found, input, other):
        return None
    single = [found.kinds[value].single for value in (input, other)]
    large, small = (other, input) if single == [True, False] else (input, other)
    return Unit(node, replace(kind, single=all(single)), (operations.Product(large, small),))


def _concatenate(found, node, tensors, dim=0):
    if not isinstance(tensors, (tuple, list)) or dim not in (1, -3) or not tensors:
        return None
    kind = _common(found, *tensors)
    if kind is None or not kind.maps:
        return None
    kinds = [found.kinds[value] for value in tensors]
    channels = [value.channels for value in kinds]
    channels = None if None in channels else sum(channels)
    single = all(value.single for value in kinds)
    return Unit(node, replace(kind, channels=channels, single=single), (operations.Concatenation(tuple(tensors)),))


def _common(found, *values) -> Kind | None:
    """The kind of values of which at least one is known: then the others, if they are tensors, are of the same kind."""
    if not all(isinstance(value, Node) for value in values):
        return None
    known = [found.kinds[value] for value in values if value in found.kinds]
    unknown = [value for value in values if value not in found.kinds]
    if not known or len({kind.maps for kind in known}) > 1:
        return None
    if not all(is_tensor(value, found.modules) for value in unknown):
        return None
    for value in unknown:
        found.kinds[value] = Kind(known[0].maps)
    return Kind(
        known[0].maps,
        next((kind.channels for kind in known if kind.channels is not None), None),
        all(kind.single for kind in known) and not unknown,
        any(kind.flat for kind in known),
        next((kind.like for kind in known if kind.like is not None), None),
    )


def _same_channels(found: Reading, *values: Node) -> bool:
    """Whether values may have the same number of channels."""
    return len({found.kinds[value].channels for value in values} - {None}) <= 1


def _is_batch_size(found: Reading, value: Any, of: Node) -> bool:
    """Whether this is the batch size of a value: it was asked of that value, or of one that this is made of."""
    if not isinstance(value, Node):
        return False
    shape, index = value, None
    if value.op == "call_function" and value.target is operator.getitem:
        shape, index = value.args
    if shape.op == "call_method" and shape.target == "size":
        asked, *rest = shape.args
        index = rest[0] if rest else shape.kwargs.get("dim", index)
    elif shape.op == "call_function" and shape.target is getattr and shape.args[1] == "shape":
        asked = shape.args[0]
    else:
        return False
    waiting, seen = [of], set()
    while waiting and type(index) is int and index == 0:
        here = waiting.pop()
        if here is asked:
            return True
        seen.add(here)
        unit = found.units.get(here)
        waiting += [source for source in (unit.nodes[:-1] + unit.reads() if unit else ()) if source not in seen]
    return False


def _pair(value: Any) -> tuple[int, int] | None:
    value = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    value = value * 2 if len(value) == 1 else value
    return value if len(value) == 2 and all(isinstance(number, int) for number in value) else None


# --- Tables -----------------------------------------------------------------------------------------------------------


def _convolution_options(module: nn.Conv2d) -> dict[str, Any]:
    if module.padding_mode != "zeros":
        raise Unsupported(f"padding_mode {module.padding_mode!r} is not supported")
    return {name: getattr(module, name) for name in ("weight", "bias", "stride", "padding", "dilation", "groups")}


def _options(*names: str, **fixed: Any) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda module: {name: getattr(module, name) for name in names} | fixed


def _norm_options(maps: bool) -> Callable[[nn.Module], dict[str, Any]]:
    return _options("running_mean", "running_var", "weight", "bias", "eps", maps=maps)


FUNCTIONS: dict[Any, Callable[..., Unit | None]] = {
    torch.conv2d: conv2d,
    F.linear: linear,
    F.batch_norm: batch_norm,
    F.hardtanh: _hardtanh,
    F.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
    F.avg_pool2d: _average_pool,
    F.adaptive_avg_pool2d: _adaptive_average_pool,
    torch.mean: _mean,
    torch.flatten: _flatten,
    torch.reshape: _reshape,
    torch.cat: _concatenate,
    torch.concat: _concatenate,
    torch.concatenate: _concatenate,
    F.dropout: _dropout,
    F.dropout1d: _dropout,
    F.dropout2d: _dropout,
    F.alpha_dropout: _dropout,
    F.feature_alpha_dropout: _dropout,
    operator.add: _add,
    operator.iadd: _add,
    torch.add: _add,
    operator.mul: _multiply,
    operator.imul: _multiply,
    torch.mul: _multiply,
    torch.multiply: _multiply,
}
METHODS: dict[str, Callable[..., Unit | None]] = {
    "mean": _mean,
    "flatten": _flatten,
    "view": _view,
    "reshape": _view,
    "add": _add,
    "add_": _add,
    "mul": _multiply,
    "mul_": _multiply,
}
MODULES: dict[type, tuple[Callable[..., Unit | None], Callable[[nn.Module], dict[str, Any]]]] = {
    nn.Conv2d: (conv2d, _convolution_options),
    nn.Linear: (linear, _options("weight", "bias")),
    nn.BatchNorm2d: (batch_norm, _norm_options(maps=True)),
    nn.BatchNorm1d: (batch_norm, _norm_options(maps=False)),
    nn.Hardtanh: (_hardtanh, _options("min_val", "max_val")),
    nn.MaxPool2d: (
        _max_pool,
        _options("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    ),
    nn.AvgPool2d: (
        _average_pool,
        _options("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    nn.AdaptiveAvgPool2d: (_adaptive_average_pool, _options("output_size")),
    nn.Flatten: (_flatten, _options("start_dim", "end_dim")),
    **{kind: (identity, _options()) for kind in IDENTITIES},
}
for _name, _functions, _module in (
    ("relu", (F.relu, torch.relu, torch.relu_), nn.ReLU),
    ("relu6", (F.relu6,), nn.ReLU6),
    ("silu", (F.silu,), nn.SiLU),
    ("sigmoid", (F.sigmoid, torch.sigmoid, torch.sigmoid_), nn.Sigmoid),
    ("hardswish", (F.hardswish,), nn.Hardswish),
    ("hardsigmoid", (F.hardsigmoid,), nn.Hardsigmoid),
):
    FUNCTIONS |= dict.fromkeys(_functions, _activation(_name))
    MODULES[_module] = (_activation(_name), _options())
for _name in ("relu", "sigmoid"):
    METHODS |= {_name: _activation(_name), f"{_name}_": _activation(_name)}
