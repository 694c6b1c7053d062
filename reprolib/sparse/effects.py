"""Operations that write into a tensor in place: what may move across them, and what they let be one with others.

In torch ``y = x.relu_()`` makes y the tensor x itself: who reads x later may as well read y. Where no other name of the
same memory (a view, say) is read later, y is a value like any other, and x is not needed any more. Everywhere else the
operation stays in torch, behind those who read the memory before it, and before those who read it after it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from reprolib.sparse.tracing import IN_PLACE_OPERATORS, Untraceable, has_hooks

Modules = Mapping[str, nn.Module]
OPERATORS = {getattr(operator, name) for name in IN_PLACE_OPERATORS}
METADATA = {"size", "dim", "numel", "stride", "shape", "dtype", "device", "ndim", "is_floating_point", "element_size"}
IDENTITIES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
VIEWS = (*IDENTITIES, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
# Functions and methods that always give a tensor of its own memory.
NEW = {
    torch.conv2d,
    F.linear,
    F.relu,
    F.relu6,
    F.silu,
    F.sigmoid,
    torch.sigmoid,
    F.hardswish,
    F.hardsigmoid,
    F.hardtanh,
}
NEW |= {torch.relu, F.batch_norm, torch.cat, torch.concat, torch.concatenate, torch.mean, torch.matmul, torch.add}
NEW |= {torch.mul, torch.max_pool2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.gelu, F.layer_norm}
NEW |= {
    torch.conv1d,
    torch.conv3d,
    F.conv_transpose2d,
    F.softmax,
    torch.softmax,
    torch.layer_norm,
    torch.bmm,
    torch.tanh,
}
ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul, operator.neg, operator.pow}
NEW_METHODS = {
    "add",
    "sub",
    "mul",
    "div",
    "matmul",
    "relu",
    "sigmoid",
    "tanh",
    "mean",
    "sum",
    "clone",
    "softmax",
    "exp",
}


@dataclass
class Effects:
    """What the operations of a graph write: `writers` in order with the values of the memory each may write into.

    `values` are those that are right as values only: results of operations in place that nobody else sees. `held`
    are views that must stay views, because somebody writes into their memory later.
    """

    writers: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    values: set[fx.Node] = field(default_factory=set)
    held: set[fx.Node] = field(default_factory=set)
    ordered: list[fx.Node] = field(default_factory=list)  # modules that may do anything: in the order of their calls


def effects(graph: fx.Graph, modules: Modules) -> Effects:
    """Let those who read a value after an operation in place read the result, and find what else writes.

    Raises Untraceable for ``x += y`` where x is a number or a tensor, nobody knows, and is read later.
    """
    position = {node: number for number, node in enumerate(graph.nodes)}
    family: dict[fx.Node, list[fx.Node]] = {}  # of a value: all that may share its memory
    found = Effects()
    inputs: list[fx.Node] = []

    def later(value: fx.Node, than: fx.Node) -> list[fx.Node]:
        return [user for user in value.users if position[user] > position[than] and not is_metadata(user)]

    def join(node: fx.Node, others: list[fx.Node]) -> None:
        members = family.setdefault(node, [node])
        for other in others:
            if family[other] is not members:
                members += family[other]
                for member in family[other]:
                    family[member] = members

    for node in list(graph.nodes):
        target = written_in_place(node, modules)
        if target is not None and node.target is not operator.setitem:
            if is_tensor(target, modules) or node.target not in OPERATORS:
                for user in [user for user in target.users if position[user] > position[node]]:
                    user.replace_input_with(target, node)
            elif later(target, node):
                raise Untraceable("it changes in place what may be a number or a tensor")
            seen = any(later(member, node) for member in family[target] if member is not target)
            if not seen and not any(member.op == "get_attr" for member in family[target]):
                found.values.add(node)
        if node.op == "placeholder":  # two arguments may be one tensor
            inputs.append(node)
            join(node, inputs)
        elif node in found.values or is_new(node, modules) or is_metadata(node):
            family[node] = [node]
        else:
            join(node, node.all_input_nodes)
        if may_write(node, modules):
            found.writers[node] = [] if target is None else [target]
        if may_do_anything(node, modules):
            found.ordered.append(node)
    for writer, target in found.writers.items():
        members = [member for value in target or writer.all_input_nodes for member in family[value]]
        found.writers[writer] = members
        if writer not in found.values:
            found.held.update(
                member for member in members if not is_new(member, modules) and member not in found.values
            )
    return found


def order(found: Effects, position: Mapping[fx.Node, int], moved: set[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs of operations of which the first must stay before the second; `moved` ones do not write any more."""
    pairs = list(zip(found.ordered, found.ordered[1:], strict=False))
    for writer, values in found.writers.items():
        if writer in moved and writer in found.values:
            continue
        for reader in {
            user for value in values for user in value.users if user is not writer and not is_metadata(user)
        }:
            pairs.append((reader, writer) if position[reader] < position[writer] else (writer, reader))
    return pairs


# --- What torch does --------------------------------------------------------------------------------------------------


def written_in_place(node: fx.Node, modules: Modules) -> fx.Node | None:
    """The value that an operation changes and gives back (`operator.setitem`: only changes), if it is one of those."""
    first = next(iter([*node.args, *node.kwargs.values()]), None)
    if not isinstance(first, fx.Node):
        return None
    if node.op == "call_module":
        module = modules[node.target]
        writes = not has_hooks(module) and getattr(module, "inplace", False) and not isinstance(module, IDENTITIES)
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        writes = node.target in OPERATORS or node.target is operator.setitem or node.kwargs.get("inplace") is True
        writes = writes or (is_of_torch(node.target) and name.endswith("_") and not name.endswith("__"))
    else:
        writes = node.op == "call_method" and is_in_place_method(node.target)
    return first if writes else None


def may_write(node: fx.Node, modules: Modules) -> bool:
    """Whether an operation may change a tensor that it is given."""
    if node.op == "call_method":
        return is_in_place_method(node.target) or not hasattr(Tensor, node.target) or "out" in node.kwargs
    if node.op == "call_function":
        return written_in_place(node, modules) is not None or not is_of_torch(node.target) or "out" in node.kwargs
    if node.op == "call_module":
        return written_in_place(node, modules) is not None or may_do_anything(node, modules)
    return False


def may_do_anything(node: fx.Node, modules: Modules) -> bool:
    """Whether this is a module with code that is not torch's, or with hooks."""
    return node.op == "call_module" and any(
        has_hooks(module)
        or "forward" in vars(module)
        or not type(module).__module__.startswith("torch.nn")
        or (getattr(module, "inplace", False) and module is not modules[node.target])
        for module in modules[node.target].modules()
    )


def is_new(node: fx.Node, modules: Modules) -> bool:
    """Whether the result has memory of its own for sure."""
    if node.op == "call_module":
        module = modules[node.target]
        in_place = written_in_place(node, modules) is not None or isinstance(module, VIEWS)
        return not in_place and not may_do_anything(node, modules)
    if node.op == "call_method":
        return node.target in NEW_METHODS
    if node.op == "call_function":
        return node.target in ARITHMETIC or (node.target in NEW and written_in_place(node, modules) is None)
    return node.op == "get_attr"


def is_tensor(node: fx.Node, modules: Modules) -> bool:
    """Whether the result is a tensor for sure: no number, and no tuple."""
    if node.op == "call_module":
        module = modules[node.target]
        several = isinstance(module, (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase))
        return not several and not getattr(module, "return_indices", False) and not may_do_anything(node, modules)
    if node.op == "call_method":
        return node.target in NEW_METHODS or is_in_place_method(node.target)
    if node.op == "call_function":
        arithmetic = node.target in ARITHMETIC or node.target in OPERATORS
        return node.target in NEW or (arithmetic and any(is_tensor(value, modules) for value in node.all_input_nodes))
    return False


def is_metadata(node: fx.Node) -> bool:
    """Whether an operation only asks for the shape or the type of a tensor."""
    if node.op == "call_method":
        return node.target in METADATA
    return node.op == "call_function" and node.target is getattr and node.args[1] in METADATA


def is_in_place_method(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def is_of_torch(function: object) -> bool:
    """Whether a function is known to write nowhere but where its name or ``out`` says."""
    module = getattr(function, "__module__", None) or ""
    return module.partition(".")[0] in ("torch", "torchvision", "_operator", "builtins", "math")
