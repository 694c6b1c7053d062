"""From a network to the same one with islands: the parts that have zeros, each a graph of operations.

The rest stays in torch as it was, a *seam* between islands.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Set
from dataclasses import replace

from torch import Tensor, fx, nn

from reprolib.sparse import operations
from reprolib.sparse.capture.effects import effects, is_metadata
from reprolib.sparse.capture.islands import Units, islands_of, why_dense
from reprolib.sparse.capture.recognition import recognised
from reprolib.sparse.capture.tracing import Untraceable, check_arguments, copied, is_fixed, traced
from reprolib.sparse.capture.units import Layer, Node, Reading, Unit
from reprolib.sparse.operations import Graph

Weights = dict[str, tuple[Tensor, Tensor]]


def capture(
    model: nn.Module, make: Callable[[Graph, Weights], nn.Module], dense: bool = False
) -> tuple[nn.Module, dict[str, str]]:
    """A copy of a network in eval mode whose islands are modules ``make(graph, weights)``; and why layers are in none.

    An island takes its inputs one by one and returns a tuple of its outputs. Its weights are those of the copy, with
    batch norms folded, by the names of the layers in `model`. An island has at least one layer with zeros (`dense`: or
    without). The second result has each convolution and linear layer that torch still runs, by its name, zeros or not.
    Where there is no island, or the network can't be traced, the copy is like the model, else a `torch.fx.GraphModule`.

    Raises ValueError as `reprolib.sparse.capture.tracing.copied` does.
    """
    model = copied(model)
    try:
        graph, opaque = traced(model)
        modules = dict(model.named_modules(remove_duplicate=False))
        found = effects(graph, modules)
    except Untraceable as problem:
        return model, {name: str(problem) for name in _layers(model)}
    reading = recognised(graph, model, found)
    islands, levels = islands_of(graph, reading.units, found, dense)
    taken = {id(unit.layer.weight) for island in islands for unit in island if unit.layer}
    reasons = {
        name: reading.reasons.get(name) or _reason(name, layer, graph, modules, opaque, reading.units)
        for name, layer in _layers(model).items()
        if id(layer.weight) not in taken
    }
    return _assembled(model, graph, reading, islands, levels, make) if islands else model, reasons


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}


def _reason(
    name: str, layer: nn.Module, graph: fx.Graph, modules: Mapping[str, nn.Module], opaque: dict[str, str], units: Units
) -> str:
    """Why a layer is in no island, where nothing was said while reading its node."""
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    for target in called:
        if name == target or name.startswith(f"{target}."):
            if target in opaque:
                return opaque[target] if target == name else f"it is in {target}: {opaque[target]}"
            if target != name:
                return f"it is in {target}, a {type(modules[target]).__name__}, which torch runs as a whole"
    if any(unit.layer and unit.layer.weight is layer.weight for unit in units.values()):
        return why_dense(layer.weight)
    if name in called:
        return f"{type(layer).__name__} is not supported, or is called with something else than maps or rows"
    for node in graph.nodes:
        if node.op == "get_attr" and node.target.startswith(f"{name}.") and node.users:
            user = next(iter(node.users)).target
            return f"its {node.target.rpartition('.')[2]} is read by {getattr(user, '__name__', user)}"
    return "the network does not call it"


# --- The network with islands -----------------------------------------------------------------------------------------


def _assembled(
    model: nn.Module,
    graph: fx.Graph,
    reading: Reading,
    islands: list[list[Unit]],
    levels: Mapping[Node, int],
    make: Callable[[Graph, Weights], nn.Module],
) -> fx.GraphModule:
    """Seams as they are, in the order of their levels, and a call of each island."""
    island_of = {node: number for number, island in enumerate(islands) for unit in island for node in unit.nodes}
    unused = _unused(graph, islands)
    result, copies, names, calls = fx.Graph(tracer_cls=Again), {}, {}, set()
    for node in graph.nodes:
        if node.op == "placeholder":
            copies[node] = result.node_copy(node)
    _check(graph, result, copies)
    nodes = [node for node in graph.nodes if node not in copies and node not in unused]
    for node in sorted(nodes, key=lambda node: (node.op == "output", levels[node])):
        number = island_of.get(node)
        if number is None:
            copies[node] = result.node_copy(node, copies.__getitem__)
        elif number not in calls:
            calls.add(number)
            name = f"island{number}"
            while hasattr(model, name):
                name += "_"
            lowered, inputs, outputs, weights = _lowered(islands[number], reading, unused, names)
            model.add_module(name, make(lowered, weights))
            flat = _flat(islands[number])
            arguments = [copies[value] for value in inputs]
            for place, value in enumerate(inputs):
                if value in flat:
                    arguments[place] = result.call_function(two_dimensional, (copies[value],))
            call = result.call_module(name, tuple(arguments))
            for place, value in enumerate(outputs):
                copies[value] = result.call_function(operator.getitem, (call, place))
    result.lint()
    return fx.GraphModule(model, result, type(model).__name__).eval()


def _unused(graph: fx.Graph, islands: list[list[Unit]]) -> set[Node]:
    """Attributes and shapes that nothing asks for any more, where islands are called."""
    inside = {node for island in islands for unit in island for node in unit.nodes}
    read = {source for island in islands for unit in island for source in unit.reads()}
    cheap: set[Node] = set()
    for node in graph.nodes:
        item = node.op == "call_function" and node.target is operator.getitem and node.args[0] in cheap
        if node.op == "get_attr" or is_metadata(node) or (item and node.args[0].op != "get_attr"):
            cheap.add(node)
    unused: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in cheap and node not in read and all(user in unused or user in inside for user in node.users):
            unused.add(node)
    return unused


def _check(graph: fx.Graph, result: fx.Graph, copies: Mapping[Node, Node]) -> None:
    """Write a check of the arguments into a graph, where there are several."""
    arguments = [node for node in graph.nodes if node.op == "placeholder" and not node.target.startswith("*")]
    fixed = {node.target: node.args[0] for node in arguments if node.args and is_fixed(node.args[0])}
    if len(arguments) > 1:
        result.call_function(check_arguments, ({node.target: copies[node] for node in arguments}, fixed))


def _lowered(
    island: list[Unit], reading: Reading, unused: Set[Node], names: dict[tuple, str]
) -> tuple[Graph, list[Node], list[Node], Weights]:
    """The graph of an island, the nodes that are its inputs and outputs, and its weights.

    `names` are those of weights so far: a layer's name, and another one where it comes with other batch norms again.
    """
    members = {node for unit in island for node in unit.nodes}
    inputs = list(dict.fromkeys(source for unit in island for source in unit.reads() if source not in members))
    numbers = {node: number for number, node in enumerate(inputs)}
    found: list[operations.Operation] = []
    weights: Weights = {}
    for unit in island:
        if not unit.operations:
            numbers[unit.node] = numbers[unit.source]
        for operation in unit.operations:
            if unit.layer is not None:
                name = _name(unit.layer, names)
                weights[name] = unit.layer.folded()
                operation = replace(operation, weight=name)
            found.append(operations.renamed(operation, numbers.__getitem__))
            numbers[unit.node] = len(inputs) + len(found) - 1
    outputs = [
        unit.node for unit in island if any(user not in members and user not in unused for user in unit.node.users)
    ]
    maps = tuple(reading.kinds[node].maps for node in inputs)
    return Graph(maps, tuple(found), tuple(numbers[node] for node in outputs)), inputs, outputs, weights


def _name(layer: Layer, names: dict[tuple, str]) -> str:
    identity = layer.identity()
    if identity not in names:
        name, count = layer.name, 1
        while name in names.values():
            count += 1
            name = f"{layer.name}#{count}"
        names[identity] = name
    return names[identity]


def _flat(island: list[Unit]) -> set[Node]:
    """Values from which rows come that must have two dimensions."""
    units = {unit.node: unit for unit in island}
    found: set[Node] = set()
    waiting = [unit.node for unit in island if unit.needs_flat]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += units[node].reads() if node in units else ()
    return found


def two_dimensional(rows: Tensor) -> Tensor:
    """The rows. Raises ValueError if they are not ``[N, features]``."""
    if rows.dim() != 2:
        raise ValueError(
            f"input of shape {tuple(rows.shape)} is not [N, features]: a batch norm is folded into a linear layer here"
        )
    return rows


class Again(fx.Tracer):
    """Makes the graph again from its code, where a network with islands is unpickled."""

    def __init__(self):
        super().__init__(autowrap_functions=(check_arguments, two_dimensional))
