"""Regions of a graph that differ in their mode alone: written out in the graph that holds them.

An exporter makes a graph of its own of what runs under ``torch.no_grad`` or ``torch.autocast``. Channels flow through
such a region as they do elsewhere, so its operators belong to the one graph that labels run through. What the exporter
asserts of the types that it saw is left out: a network also runs with others, under autocast or in half precision.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node


def enter_gradients(enabled: bool) -> bool:
    """Switch the recording of gradients on or off; returns whether it was on."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(enabled)
    return before


def leave_gradients(before: bool) -> None:
    """Switch it back."""
    torch._C._set_grad_enabled(before)


# {a kind of region: the calls that enter and leave its mode, and how many settings it has}
CALLS: dict[str, tuple[Any, Any, int]] = {
    "wrap_with_set_grad_enabled": (enter_gradients, leave_gradients, 1),
    "wrap_with_autocast": (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast, 4),
}
DEVICES = ("cpu", "cuda")  # those whose autocast settings a region may change
ASSERTED_TYPE = torch.ops.aten._assert_tensor_metadata.default
GRADIENTS = (enter_gradients, leave_gradients)
MODES = {call for enter, leave, _ in CALLS.values() for call in (enter, leave)}  # they compute nothing


@contextmanager
def modes_kept() -> Iterator[None]:
    """Leave the modes as they were where a graph is executed: one that fails in a region does not reach its end."""
    gradients, depth = torch.is_grad_enabled(), autocast_depth()
    cached = torch.is_autocast_cache_enabled()
    settings = [(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in DEVICES]
    try:
        yield
    except BaseException:
        torch._C._set_grad_enabled(gradients)
        torch.set_autocast_cache_enabled(cached)
        for device, enabled, dtype in settings:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        while autocast_depth() > depth:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()  # as torch does where the outermost autocast ends
        raise


def autocast_depth() -> int:
    """How many regions of autocast enclose the caller."""
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())


@dataclass(frozen=True)
class Autocast:
    """The mode of a region under ``torch.autocast``.

    Args:
        device: the kind of device whose operators it concerns.
        dtype: in which they run; None = PyTorch's default for the device.
        enabled: False where it switches a mode around it off.
    """

    device: str
    dtype: torch.dtype | None
    enabled: bool


@contextmanager
def under(modes: Sequence[Autocast]) -> Iterator[None]:
    """Run under these modes, the outermost first."""
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(torch.autocast(mode.device, mode.dtype, mode.enabled))
        yield


def write_out(module: GraphModule) -> None:
    """Replace each region by its operators, between calls that enter and leave its mode; regions in regions, too.

    Assertions of types are left out.
    """
    graph = module.graph
    while found := [node for node in graph.nodes if kind_of(node) is not None]:
        for node in found:
            replace(module, node)
    for node in graph.find_nodes(op="call_function", target=ASSERTED_TYPE):
        graph.erase_node(node)
    graph.lint()
    module.recompile()


def kind_of(node: Node) -> str | None:
    """The kind of a region that is written out, None for any other node."""
    name = node.target.name() if isinstance(node.target, torch._ops.HigherOrderOperator) else ""
    return name if name in CALLS else None


def replace(module: GraphModule, node: Node) -> None:
    """Replace one region."""
    graph, kind = module.graph, kind_of(node)
    assert kind is not None
    enter, leave, count = CALLS[kind]
    settings, inner, operands = node.args[:count], node.args[count], node.args[count + 1 :]
    assert isinstance(inner, Node)
    with graph.inserting_before(node):
        entered = graph.call_function(enter, settings)
        results = copied(module, str(inner.target), operands)
        graph.call_function(leave, (entered,))
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    if not inner.users:
        graph.erase_node(inner)


def copied(module: GraphModule, name: str, operands: Any) -> Any:
    """Copy the nodes of a region to where the graph is being written; returns what stands for its results."""
    region: Any = getattr(module, name)
    places = dict(zip((n for n in region.graph.nodes if n.op == "placeholder"), operands, strict=True))
    for node in region.graph.nodes:
        if node.op == "output":
            return [places[result] if isinstance(result, Node) else result for result in node.args[0]]
        if node.op == "get_attr":  # a region's own attribute: a graph within it
            held = f"{name}_{node.target}"
            setattr(module, held, getattr(region, str(node.target)))
            places[node] = module.graph.get_attr(held)
        elif node.op != "placeholder":
            places[node] = module.graph.node_copy(node, places.__getitem__)
    raise AssertionError("a graph ends with its output")
