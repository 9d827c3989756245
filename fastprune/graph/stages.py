"""Stages: the parts of a network between points that all data passes, cut where the resolution changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, takewhile

from torch import Tensor
from torch.fx import GraphModule, Node

from fastprune.graph.export.tracing import concrete
from fastprune.graph.labels.rules import module_of
from fastprune.graph.structure import GraphStructure, Group, Layer
from fastprune.host.spelling import did_you_mean

STEM = 1  # so many layers in front of the first change of resolution are no stage of their own
HEAD = 1  # so many behind the last one are a part of the classifier


@dataclass(frozen=True)
class Stage:
    """One part of a network.

    Args:
        name: the module at its end.
        start: the node of the evaluation graph whose value it reads, by name.
        end: the node whose value it gives on.
        size: of its features, (height, width) for images.
        channels: of its features in the full network.
        layers: its convolutions and linear layers.
        groups: the indices of the groups whose channels it alone makes, those of its features among them. Groups that
            several stages make (a residual stream that keeps its channels where the resolution changes) are no stage's.
    """

    name: str
    start: str
    end: str
    size: tuple[int, ...]
    channels: int
    layers: tuple[Layer, ...]
    groups: tuple[int, ...]


def find_stages(graph: GraphStructure, ends: Sequence[str] = ()) -> tuple[Stage, ...]:
    """The stages of a network, in its order. What follows the last one, the classifier, belongs to none.

    A stage ends where all data passes one tensor, the last one of a resolution in front of the block that changes it. A
    stem of one layer belongs to the first stage.

    Args:
        graph: the network.
        ends: names of modules whose outputs are to be the ends instead.

    Raises:
        ValueError: for a network without stages; for a name of no module, or of one that not all data passes.

    Source: Zhang and Ou, SP (by resolution: 4 in ResNets, 5 in MobileNets). Where exactly they end is not said.
    """
    traced = graph.traced.evaluation
    points = passes(traced)
    chosen = named_points(points, ends) if ends else points_of_resolutions(graph, points)
    begin = next(node for node in traced.graph.nodes if node.op == "placeholder")
    stages = parts(graph, [begin, *chosen])
    if not stages:
        raise ValueError("stages: this network has no point between its layers that all data passes")
    return stages


def passes(traced: GraphModule) -> list[Node]:
    """The nodes that all data passes: no value of an earlier node is read after them. Of [N, C, …] as the input."""
    nodes = list(traced.graph.nodes)
    place = {node: number for number, node in enumerate(nodes)}
    dims = next(node.meta["val"].dim() for node in nodes if node.op == "placeholder")
    data: set[Node] = set()
    found, needed = [], -1
    for node in nodes:
        value = node.meta.get("val")
        carries = isinstance(value, (Tensor, list, tuple))
        if node.op == "placeholder" or (carries and any(source in data for source in node.all_input_nodes)):
            data.add(node)
        if node not in data or node.op == "output":
            continue
        if needed <= place[node] and isinstance(value, Tensor) and value.dim() == dims and node.op == "call_function":
            found.append(node)
        needed = max([needed, *(place[user] for user in node.users)])
    return found


def points_of_resolutions(graph: GraphStructure, points: list[Node]) -> list[Node]:
    """The last point of each resolution that lies in front of the block that changes it."""
    runs = [list(run) for _, run in groupby(points, size_of)]
    following = [run[0] for run in runs[1:]]
    chosen = [before_block(run, after, points) for run, after in zip(runs, following, strict=False)]
    chosen += [run[-1] for run in runs[-1:]]
    counts = layers_between(graph, chosen)
    while len(chosen) > 1 and counts[0] <= STEM:
        chosen.pop(0)
        counts[:2] = [sum(counts[:2])]
    while len(chosen) > 1 and counts[-1] <= HEAD:
        chosen.pop()
        counts.pop()
    return [node for node, count in zip(chosen, counts, strict=True) if count > 0]


def before_block(run: list[Node], after: Node, points: list[Node]) -> Node:
    """The last of the points of one resolution; or where the next point, of another resolution, lies in one block with
    it, the last one in front of this block.
    """
    last = run[-1]
    while block := common_module(last, after):
        inside = [node for node in points if f"{module_of(node)}.".startswith(f"{block}.")]
        if len({size_of(node) for node in inside}) > 2 or inside[0] not in run or inside[0] is run[0]:
            break  # a module of more than one block, or one at whose beginning there is no point
        last = run[run.index(inside[0]) - 1]
    return last


def named_points(points: list[Node], ends: Sequence[str]) -> list[Node]:
    """The points at the ends of modules."""
    last: dict[str, Node] = {}
    for node in points:
        path = module_of(node).split(".")
        last |= {".".join(path[:depth]): node for depth in range(1, len(path) + 1)}
    chosen = []
    for name in ends:
        if name not in last:
            hint = did_you_mean(name, last, "; {}")
            raise ValueError(f"stages {name!r}: no point that all data passes lies in such a module{hint}")
        chosen.append(last[name])
    if sorted(chosen) != chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"stages {list(ends)}: they must be in the order of the network, each with an end of its own")
    return chosen


def parts(graph: GraphStructure, points: list[Node]) -> tuple[Stage, ...]:
    """The stages between points."""
    places = {node.name: number for number, node in enumerate(graph.traced.evaluation.graph.nodes)}
    ends = [places[node.name] for node in points]
    stage_of = {
        layer.node: sum(end < places[layer.node] for end in ends) - 1 for layer in graph.layers
    }  # len(points) - 1 for those behind the last point
    makers = [{stage_of[layer.node] for layer in graph.layers if makes(layer, group)} for group in graph.groups]
    return tuple(
        Stage(
            name=module_of(end) or end.name,
            start=start.name,
            end=end.name,
            size=size_of(end),
            channels=concrete(end.meta["val"].shape[1]),
            layers=tuple(layer for layer in graph.layers if stage_of[layer.node] == number),
            groups=tuple(g for g, stages in enumerate(makers) if stages == {number}),
        )
        for number, (start, end) in enumerate(pairwise(points))
    )


def makes(layer: Layer, group: Group) -> bool:
    """Whether a layer makes channels of a group."""
    return bool(((layer.out_units >= group.start) & (layer.out_units < group.start + group.size)).any())


def layers_between(graph: GraphStructure, points: list[Node]) -> list[int]:
    """How many layers lie before each point, and behind the one before it."""
    places = {node.name: number for number, node in enumerate(graph.traced.evaluation.graph.nodes)}
    before = [sum(places[layer.node] <= places[node.name] for layer in graph.layers) for node in points]
    return [after - first for first, after in pairwise([0, *before])]


def size_of(node: Node) -> tuple[int, ...]:
    """Height and width of a node's features."""
    return tuple(concrete(size) for size in node.meta["val"].shape[2:])


def common_module(node: Node, other: Node) -> str:
    """The innermost module that holds both nodes, "" for the network itself."""
    path = zip(module_of(node).split("."), module_of(other).split("."), strict=False)
    return ".".join(name for name, _ in takewhile(lambda names: names[0] == names[1], path))
