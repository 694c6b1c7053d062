"""Which nodes of a traced network are operations that `reprolib.sparse.operations` knows, in whatever words they come.

Modules count as themselves only where they are of that class exactly, without hooks and without a forward of their own.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import replace

from torch import fx, nn

from reprolib.sparse.capture import readers
from reprolib.sparse.capture.effects import Effects
from reprolib.sparse.capture.units import Node, Reading, Unit, Unsupported


def recognised(graph: fx.Graph, model: nn.Module, effects: Effects) -> Reading:
    """Units by the node whose value they give, kinds of values, and why layers could not be taken, by name."""
    names = {}
    for name, parameter in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        is_layer = attribute == "weight" and isinstance(model.get_submodule(owner), (nn.Conv2d, nn.Linear))
        names[id(parameter)] = owner if is_layer else name
    attribute = lambda target: operator.attrgetter(target)(model)  # noqa: E731
    found = Reading(dict(model.named_modules(remove_duplicate=False)), effects, attribute, names)
    for node in graph.nodes:
        unit = _unit(found, node)
        if unit is None:
            continue
        if unit.nodes:  # a batch norm became part of this one
            del found.units[unit.node]
        found.units[node] = replace(unit, node=node, nodes=(*unit.nodes, node))
        found.kinds[node] = unit.kind
    return found


def _unit(found: Reading, node: Node) -> Unit | None:
    if node in found.effects.held:  # so is what has hooks, or a forward of its own
        return None
    reader, options = None, {}
    if node.op == "call_function":
        reader = readers.FUNCTIONS.get(node.target)
        if getattr(node.target, "__module__", None) == "torchvision.ops.stochastic_depth":
            reader = readers.stochastic_depth
    elif node.op == "call_method":
        reader = readers.METHODS.get(node.target)
    elif node.op == "call_module":
        module = found.modules[node.target]
        reader, options_of = readers.MODULES.get(type(module), (None, None))
        if reader is None:
            return None
        try:
            options = options_of(module)
            if reader in (readers.conv2d, readers.linear, readers.batch_norm):
                options["name"] = node.target
            if module.training and reader in (readers.batch_norm, readers.identity):
                return None
        except Unsupported as problem:
            found.reasons[node.target] = str(problem)
            return None
    if reader is None:
        return None
    try:
        arguments = inspect.signature(reader).bind(found, node, *node.args, **node.kwargs, **options)
    except TypeError:  # an argument that the reader does not know
        return None
    try:
        return reader(*arguments.args, **arguments.kwargs)
    except Unsupported as problem:
        weight = found.tensor(arguments.arguments.get("weight"))
        found.reasons[options.get("name", found.names.get(id(weight), node.name))] = str(problem)
        return None
