"""Which operations go together: islands around layers with zeros."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from torch import Tensor, fx

from reprolib.sparse import operations
from reprolib.sparse.capture.effects import Effects, order
from reprolib.sparse.capture.units import Layer, Node, Unit

# A linear layer multiplies each weight once an image: at small batches it waits for its bytes, 11 per kept weight in
# the kernels and 4 per weight in torch. With more kept weights than this it gains nothing by itself.
LINEAR_DENSITY = 0.35
# A layer of at most this many weights costs little, zeros or not: it joins layers with zeros, because leaving the
# kernels' layout for it would cost more. So would threads of torch that spin on, where those of the kernels are to run.
SMALL_CONVOLUTION, SMALL_LINEAR = 1 << 16, 1 << 23

Units = Mapping[Node, Unit]

# --- Which layers are in islands --------------------------------------------------------------------------------------


def _has_zeros(weight: Tensor) -> bool:
    return weight.count_nonzero().item() < weight.numel()


def _wanted(layer: Layer, dense: bool) -> bool:
    weight = layer.weight
    if dense or weight.dim() == 4 or weight.numel() <= SMALL_CONVOLUTION:
        return dense or _has_zeros(weight)
    return weight.count_nonzero().item() <= LINEAR_DENSITY * weight.numel()


def _is_small(weight: Tensor) -> bool:
    return weight.numel() <= (SMALL_CONVOLUTION if weight.dim() == 4 else SMALL_LINEAR)


def _joined(units: Units, wanted: set[Node]) -> set[Node]:
    """Units that may be in islands: those without weights of the network, `wanted` ones, and small ones beside these.

    A small layer is beside another if only units without weights, or small linear layers, are between them, or if such
    layers lie before and behind it.
    """
    own = {node for node, unit in units.items() if _is_own(unit)}
    small = {node for node in own if _is_small(units[node].layer.weight)}
    free = units.keys() - own
    close = free | {node for node in small if units[node].layer.weight.dim() == 2}
    near = wanted | (small & (_reached(_sources(units), wanted, close) | _reached(_readers(units), wanted, close)))
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


def islands_of(graph: fx.Graph, units: Units, found: Effects, dense: bool) -> tuple[list[list[Unit]], dict[Node, int]]:
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


def why_dense(weight: Tensor) -> str:
    if _has_zeros(weight):
        return f"{weight.count_nonzero().item() / weight.numel():.0%} of its weights are kept, dense is faster"
    size = f"it has no zeros and {weight.numel():,} weights"
    return f"{size}, and no layer with zeros is beside it" if _is_small(weight) else size
