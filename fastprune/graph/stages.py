"""Stages: the parts of a network between points that all data passes, cut where the resolution changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, takewhile

from torch import Tensor
from torch.fx import GraphModule, Node

from fastprune.graph.export.nodes import concrete, module_of
from fastprune.graph.structure import GraphStructure, Layer
from fastprune.host.spelling import did_you_mean

STEM = 1  # layers at most in front of the first change of resolution that are no stage of their own
HEAD = 1  # layers at most behind the last one that belong to the classifier


@dataclass(frozen=True)
class Stage:
    """One part of a network.

    Args:
        name: the module at its end.
        start: name of the node of the evaluation graph whose value it reads.
        end: name of the node whose value it passes on.
        size: size of its features, (height, width) for images.
        channels: number of channels of its features in the full network.
        layers: its convolutions and linear layers.
        groups: indices of the groups whose channels it alone makes, those of its features included. Groups that several
            stages make (a residual stream that keeps its channels where the resolution changes) belong to no stage.
    """

    name: str
    start: str
    end: str
    size: tuple[int, ...]
    channels: int
    layers: tuple[Layer, ...]
    groups: tuple[int, ...]


def find_stages(graph: GraphStructure, ends: Sequence[str] = ()) -> tuple[Stage, ...]:
    """Return the stages of a network in order. The classifier, behind the last stage, belongs to none.

    A stage ends where all data passes one tensor, the last one of a resolution in front of the block that changes it. A
    stem of one layer belongs to the first stage.

    Args:
        graph: the network.
        ends: names of modules whose outputs are the ends instead.

    Raises:
        ValueError: if the network has no stages, or all data passes no point in a named module.

    Source: Zhang and Ou, SP (by resolution: 4 in ResNets, 5 in MobileNets). The paper does not say where exactly they
    end.
    """
    traced = graph.traced.evaluation
    points = shared_points(traced)
    chosen = named_points(points, ends) if ends else last_points(graph, points)
    begin = next(node for node in traced.graph.nodes if node.op == "placeholder")
    stages = split_stages(graph, [begin, *chosen])
    if not stages:
        raise ValueError("stages: this network has no point between its layers that all data passes")
    return stages


def shared_points(traced: GraphModule) -> list[Node]:
    """Return the nodes that all data passes: no later node reads a value from before them.

    Only nodes with [N, C, …] features like the input's count.
    """
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


def last_points(graph: GraphStructure, points: list[Node]) -> list[Node]:
    """Return the last point of each resolution in front of the block that changes it."""
    runs = [list(run) for _, run in groupby(points, size_of)]
    following = [run[0] for run in runs[1:]]
    chosen = [point_before_block(run, after, points) for run, after in zip(runs, following, strict=False)]
    chosen += [run[-1] for run in runs[-1:]]
    counts = count_layers(graph, chosen)
    while len(chosen) > 1 and counts[0] <= STEM:
        chosen.pop(0)
        counts[:2] = [sum(counts[:2])]
    while len(chosen) > 1 and counts[-1] <= HEAD:
        chosen.pop()
        counts.pop()
    return [node for node, count in zip(chosen, counts, strict=True) if count > 0]


def point_before_block(run: list[Node], after: Node, points: list[Node]) -> Node:
    """Return the last point of one resolution, or the last one in front of the block that holds it and the next point.

    Args:
        run: the points of one resolution.
        after: the next point, of another resolution.
        points: all points.
    """
    last = run[-1]
    while block := common_module(last, after):
        inside = [node for node in points if f"{module_of(node)}.".startswith(f"{block}.")]
        if len({size_of(node) for node in inside}) > 2 or inside[0] not in run or inside[0] is run[0]:
            break  # a module of more than one block, or one without a point at its beginning
        last = run[run.index(inside[0]) - 1]
    return last


def named_points(points: list[Node], ends: Sequence[str]) -> list[Node]:
    """Return the points at the ends of the named modules."""
    last: dict[str, Node] = {}
    for node in points:
        path = module_of(node).split(".")
        last |= {".".join(path[:depth]): node for depth in range(1, len(path) + 1)}
    chosen = []
    for name in ends:
        if name not in last:
            hint = did_you_mean(name, last, "; {}")
            raise ValueError(f"stages {name!r}: no point that all data passes lies in a module of this name{hint}")
        chosen.append(last[name])
    if sorted(chosen) != chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"stages {list(ends)}: give them in the order of the network, each with an end of its own")
    return chosen


def split_stages(graph: GraphStructure, points: list[Node]) -> tuple[Stage, ...]:
    """Return the stages between points."""
    places = {node.name: number for number, node in enumerate(graph.traced.evaluation.graph.nodes)}
    ends = [places[node.name] for node in points]
    # len(points) - 1 for layers behind the last point
    stage_of = {layer.node: sum(end < places[layer.node] for end in ends) - 1 for layer in graph.layers}
    makers = [{stage_of[layer.node] for layer in graph.layers if layer.makes(group)} for group in graph.groups]
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


def count_layers(graph: GraphStructure, points: list[Node]) -> list[int]:
    """Count the layers between each point and the one before it."""
    places = {node.name: number for number, node in enumerate(graph.traced.evaluation.graph.nodes)}
    before = [sum(places[layer.node] <= places[node.name] for layer in graph.layers) for node in points]
    return [after - first for first, after in pairwise([0, *before])]


def size_of(node: Node) -> tuple[int, ...]:
    """Return height and width of a node's features."""
    return tuple(concrete(size) for size in node.meta["val"].shape[2:])


def common_module(node: Node, other: Node) -> str:
    """Return the innermost module that holds both nodes, "" for the network itself."""
    path = zip(module_of(node).split("."), module_of(other).split("."), strict=False)
    return ".".join(name for name, _ in takewhile(lambda names: names[0] == names[1], path))
