"""From a network to the same one with islands: the parts that have zeros, each a graph of operations.

The rest stays in torch as it was, a *seam* between islands.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import replace

from torch import Tensor, fx, nn

from reprolib.sparse import operations
from reprolib.sparse.effects import Effects, effects, is_metadata, order
from reprolib.sparse.operations import Graph
from reprolib.sparse.recognition import Layer, Node, Reading, Unit, recognised
from reprolib.sparse.tracing import Untraceable, check_arguments, copied, is_fixed, traced

# A linear layer multiplies each weight once an image: at small batches it waits for its bytes, 11 per kept weight in
# the kernels and 4 per weight in torch. With more kept weights than this it stays in torch, unless it is small.
LINEAR_DENSITY = 0.35
# A layer of at most this many weights costs little, zeros or not: it joins layers with zeros, because leaving the
# kernels' layout for it would cost more.
SMALL_WEIGHT = 1 << 16

Weights = dict[str, tuple[Tensor, Tensor]]
Units = Mapping[Node, Unit]


def capture(
    model: nn.Module, make: Callable[[Graph, Weights], nn.Module], dense: bool = False
) -> tuple[nn.Module, dict[str, str]]:
    """A copy of a network in eval mode whose islands are modules ``make(graph, weights)``; and why layers are in none.

    An island takes its inputs one by one and returns a tuple of its outputs. Its weights are those of the copy, with
    batch norms folded, by the names of the layers in `model`. An island has at least one layer with zeros (`dense`: or
    without). The second result has each convolution and linear layer that torch still runs, by its name, zeros or not.
    Where there is no island, or the network can't be traced, the copy is like the model, else a `torch.fx.GraphModule`.

    Raises ValueError as `reprolib.sparse.tracing.copied` does.
    """
    model = copied(model)
    try:
        graph, opaque = traced(model)
        modules = dict(model.named_modules(remove_duplicate=False))
        found = effects(graph, modules)
    except Untraceable as problem:
        return model, {name: str(problem) for name in _layers(model)}
    reading = recognised(graph, model, found)
    islands, levels = _islands(graph, reading.units, found, dense)
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
        return _dense_reason(layer.weight)
    if name in called:
        return f"{type(layer).__name__} is not supported, or is called with something else than maps or rows"
    for node in graph.nodes:
        if node.op == "get_attr" and node.target.startswith(f"{name}.") and node.users:
            user = next(iter(node.users)).target
            return f"its {node.target.rpartition('.')[2]} is read by {getattr(user, '__name__', user)}"
    return "the network does not call it"


def _dense_reason(weight: Tensor) -> str:
    if _has_zeros(weight):
        return f"{weight.count_nonzero().item() / weight.numel():.0%} of its weights are kept, dense is faster"
    size = f"it has no zeros and {weight.numel():,} weights"
    return size if weight.numel() > SMALL_WEIGHT else f"{size}, and no layer with zeros is beside it"


# --- Which layers are in islands --------------------------------------------------------------------------------------


def _has_zeros(weight: Tensor) -> bool:
    return weight.count_nonzero().item() < weight.numel()


def _wanted(layer: Layer, dense: bool) -> bool:
    weight = layer.weight
    if dense or weight.dim() == 4 or weight.numel() <= SMALL_WEIGHT:
        return dense or _has_zeros(weight)
    return weight.count_nonzero().item() <= LINEAR_DENSITY * weight.numel()


def _joined(units: Units, wanted: set[Node]) -> set[Node]:
    """Units that may be in islands: those without weights of the network, `wanted` ones, and small ones beside these.

    A small layer is beside another if only units without weights are between them, or if such layers lie before and
    behind it.
    """
    own = {node for node, unit in units.items() if _is_own(unit)}
    small = {node for node in own if units[node].layer.weight.numel() <= SMALL_WEIGHT}
    free = units.keys() - own
    near = wanted | (small & (_reached(_sources(units), wanted, free) | _reached(_readers(units), wanted, free)))
    through = free | small
    between = _reached(_sources(units), near, through) & _reached(_readers(units), near, through)
    return free | near | (small & between)


def _is_own(unit: Unit) -> bool:
    return unit.layer is not None and unit.layer.is_own


def _reached(edges: Mapping[Node, Iterable[Node]], starts: Set[Node], through: Set[Node]) -> set[Node]:
    """Nodes with an edge to a start, or to a reached node of `through`. Nodes come behind those they have edges to."""
    reached: set[Node] = set()
    for node, others in edges.items():
        if any(other in starts or (other in through and other in reached) for other in others):
            reached.add(node)
    return reached


def _sources(units: Units) -> dict[Node, Iterable[Node]]:
    return {node: unit.reads() for node, unit in units.items()}


def _readers(units: Units) -> dict[Node, Iterable[Node]]:
    """For each unit those that read it, the last first."""
    readers: dict[Node, list[Node]] = {node: [] for node in reversed(units)}
    for node, unit in units.items():
        for source in unit.reads():
            if source in readers:
                readers[source].append(node)
    return readers


# --- Islands ----------------------------------------------------------------------------------------------------------


def _islands(graph: fx.Graph, units: Units, found: Effects, dense: bool) -> tuple[list[list[Unit]], dict[Node, int]]:
    """Units in the order of the graph, by island; and the level of each node: what is of a lower one runs before.

    An island holds connected units of one level. Units that do nothing for it leave, until none does so.
    """
    wanted = {node for node, unit in units.items() if _is_own(unit) and _wanted(unit.layer, dense)}
    joined = _joined(units, wanted)
    inside = {node: unit for node, unit in units.items() if node in joined}
    while True:
        levels = _levels(graph, inside, found)
        islands = _connected(inside, levels)
        useful = {node for island in islands for node in _useful(island, wanted)}
        if len(useful) == len(inside):
            return islands, levels
        inside = {node: unit for node, unit in inside.items() if node in useful}


def _levels(graph: fx.Graph, inside: Units, found: Effects) -> dict[Node, int]:
    """Seams are of even levels and units of odd ones, and no node is of a lower one than what it needs.

    So units of one level never need each other through a seam.
    """
    holder = {node: unit.node for unit in inside.values() for node in unit.nodes}
    position = {node: number for number, node in enumerate(graph.nodes)}
    needs = {node: set(node.all_input_nodes) for node in graph.nodes}
    for unit in inside.values():  # of weights and shapes that its code asks for, an operation needs none
        for node in unit.nodes:
            needs[node] &= {*unit.reads(), *unit.nodes}
    for first, second in order(found, position, holder.keys()):
        needs[second].add(first)
    levels: dict[Node, int] = {}
    for node in graph.nodes:
        level = max((levels[need] for need in needs[node]), default=0)
        levels[node] = level + (level % 2 != (node in holder))
    return levels


def _connected(inside: Units, levels: Mapping[Node, int]) -> list[list[Unit]]:
    """Units of one level that read each other, in the order of the graph."""
    first = {node: node for node in inside}  # of those that are connected, one

    def root(node: Node) -> Node:
        while first[node] is not node:
            node = first[node]
        return node

    for node, unit in inside.items():
        for source in unit.reads():
            if source in inside and levels[source] == levels[node]:
                first[root(node)] = root(source)
    islands: dict[Node, list[Unit]] = {}
    for node, unit in inside.items():
        islands.setdefault(root(node), []).append(unit)
    return list(islands.values())


def _useful(island: list[Unit], wanted: Set[Node]) -> set[Node]:
    """Layers, units between them, and what becomes part of the last ones; nothing if no layer is wanted."""
    units = {unit.node: unit for unit in island}
    layers = {node for node, unit in units.items() if _is_own(unit)}
    if not layers & wanted:
        return set()
    between = _reached(_sources(units), layers, units.keys()) & _reached(_readers(units), layers, units.keys())
    place = {node: number for number, node in enumerate(units)}
    stages = dict.fromkeys(layers, 0)  # of what becomes part of a layer: 1 a sum, 2 an activation, 3 a pool
    for node, unit in units.items():
        last = max(unit.reads(), key=lambda source: place.get(source, -1))
        if node in layers or last not in stages or len(last.users) > 1:
            continue
        match unit.operations:
            case ():
                stages[node] = stages[last]
            case (operations.Sum(a, b),) if stages[last] == 0 and a is not b:
                stages[node] = 1
            case (operations.Activation(),) if stages[last] < 2:
                stages[node] = 2
            case (operations.MaxPool(_, (2, 2), (2, 2), (0, 0)),) if stages[last] < 3:
                stages[node] = 3
    return layers | between | stages.keys()


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
