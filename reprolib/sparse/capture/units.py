"""Operations that are found in a traced network, and what is known of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from reprolib.sparse import operations
from reprolib.sparse.capture.effects import Effects

Node = fx.Node


@dataclass(frozen=True)
class Norm:
    """A batch norm in eval mode: tensors ``[C]``, of which weight and bias may be missing."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class Layer:
    """A weight with its bias, and the batch norms behind it. `is_own`: the network has it; else it is made here."""

    name: str
    weight: Tensor
    bias: Tensor | None
    norms: tuple[Norm, ...] = ()
    is_own: bool = True

    def identity(self) -> tuple:
        """Equal for equal tensors: a layer that is called twice is kept once."""
        tensors = [self.weight if self.is_own else None, self.bias]
        for norm in self.norms:
            tensors += [norm.mean, norm.variance, norm.weight, norm.bias, norm.eps]
        return (self.is_own or self.name, *(id(tensor) if isinstance(tensor, Tensor) else tensor for tensor in tensors))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias with the batch norms in them. Zeros stay zero: each output channel is only scaled.

        The type is that of the weight, with norms at least float32; it is calculated in float64, because in half
        precision a small variance or eps is zero, and the quotient is NaN.
        """
        weight = self.weight.detach()
        bias = weight.new_zeros(len(weight)) if self.bias is None else self.bias.detach()
        if not self.norms:
            return weight, bias
        dtype = torch.promote_types(weight.dtype, torch.float32)
        weight, bias = weight.double(), bias.double()
        for norm in self.norms:
            scale = (norm.variance.double() + norm.eps).rsqrt()
            scale = scale if norm.weight is None else scale * norm.weight.detach().double()
            weight = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
            bias = (bias - norm.mean.double()) * scale
            bias = bias if norm.bias is None else bias + norm.bias.detach().double()
        return weight.to(dtype), bias.to(dtype)


@dataclass(frozen=True)
class Kind:
    """What is known of a value: maps or rows; of maps their channels, whether each is one number; of rows, if there
    are two dimensions; and a weight whose type and device it shares."""

    maps: bool
    channels: int | None = None
    single: bool = False
    flat: bool = False
    like: Tensor | None = None


@dataclass(frozen=True)
class Unit:
    """Operations that calculate the value of `node` from values of other nodes: their sources are nodes here.

    The second of two reads the first. Without operations the value is that of `source`. `nodes` are all that it stands
    for; `needs_flat`: it is right only for rows of two dimensions.
    """

    node: Node
    kind: Kind
    operations: tuple[operations.Operation, ...] = ()
    source: Node | None = None
    nodes: tuple[Node, ...] = ()
    layer: Layer | None = None
    needs_flat: bool = False

    def reads(self) -> tuple[Node, ...]:
        return operations.sources(self.operations[0]) if self.operations else (self.source,)


class Unsupported(Exception):
    """Why a convolution or linear layer stays in torch."""


@dataclass
class Reading:
    """What is found so far, going through the nodes in order."""

    modules: Mapping[str, nn.Module]
    effects: Effects
    attribute: Callable[[str], Any]
    names: Mapping[int, str]  # of parameters by their id: the module's, where that is a layer
    units: dict[Node, Unit] = field(default_factory=dict)
    kinds: dict[Node, Kind] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def tensor(self, value: Any) -> Tensor | None:
        """A parameter or buffer that a node names."""
        if isinstance(value, Node):
            value = self.attribute(value.target) if value.op == "get_attr" else None
        return value if isinstance(value, Tensor) else None

    def as_maps(self, value: Any) -> Kind | None:
        """The kind of a value that an operation for maps reads: if nothing was known of it, this is."""
        return self._as(value, Kind(maps=True))

    def as_rows(self, value: Any) -> Kind | None:
        return self._as(value, Kind(maps=False))

    def _as(self, value: Any, kind: Kind) -> Kind | None:
        if not isinstance(value, Node):
            return None
        found = self.kinds.setdefault(value, kind)
        return found if found.maps == kind.maps else None
