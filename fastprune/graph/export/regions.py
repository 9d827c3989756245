"""Regions of a graph that differ in their mode alone, inlined into the graph that holds them.

An exporter puts the code that runs under ``torch.no_grad`` or ``torch.autocast`` into a graph of its own. Channels flow
through such a region as through any other code, so its operators belong in the one graph that labels run through. The
exporter's assertions on dtypes are dropped: a network also runs with others, under autocast or in half precision.
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
    """Switch the recording of gradients on or off; return whether it was on."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(enabled)
    return before


def leave_gradients(before: bool) -> None:
    """Switch the recording of gradients back."""
    torch._C._set_grad_enabled(before)


# {kind of region: (call that enters its mode, call that leaves it, number of its settings)}
CALLS: dict[str, tuple[Any, Any, int]] = {
    "wrap_with_set_grad_enabled": (enter_gradients, leave_gradients, 1),
    "wrap_with_autocast": (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast, 4),
}
DEVICES = ("cpu", "cuda")  # the devices whose autocast settings a region may change
ASSERTED_TYPE = torch.ops.aten._assert_tensor_metadata.default
GRADIENTS = (enter_gradients, leave_gradients)
MODES = {call for enter, leave, _ in CALLS.values() for call in (enter, leave)}  # they compute nothing


@contextmanager
def restore_modes() -> Iterator[None]:
    """Restore the modes if the execution of a graph fails: it may fail in a region, before the call that leaves it."""
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
    """Return the number of autocast regions around the caller."""
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())


@dataclass(frozen=True)
class Autocast:
    """The mode of a region under ``torch.autocast``.

    Args:
        device: the kind of device whose operators it affects.
        dtype: the dtype in which they run; None = PyTorch's default for the device.
        enabled: False if it switches off a mode around it.
    """

    device: str
    dtype: torch.dtype | None
    enabled: bool


@contextmanager
def enter_modes(modes: Sequence[Autocast]) -> Iterator[None]:
    """Enter these modes, the outermost first."""
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(torch.autocast(mode.device, mode.dtype, mode.enabled))
        yield


def inline_regions(module: GraphModule) -> None:
    """Replace each region by its operators, between calls that enter and leave its mode; regions in regions, too.

    Assertions on dtypes are dropped.
    """
    graph = module.graph
    while found := [node for node in graph.nodes if kind_of(node) is not None]:
        for node in found:
            inline_region(module, node)
    for node in graph.find_nodes(op="call_function", target=ASSERTED_TYPE):
        graph.erase_node(node)
    graph.lint()
    module.recompile()


def kind_of(node: Node) -> str | None:
    """Return the kind of a region that is to be inlined, None for any other node."""
    name = node.target.name() if isinstance(node.target, torch._ops.HigherOrderOperator) else ""
    return name if name in CALLS else None


def inline_region(module: GraphModule, node: Node) -> None:
    """Replace one region by its operators."""
    graph, kind = module.graph, kind_of(node)
    assert kind is not None
    enter, leave, count = CALLS[kind]
    settings, inner, operands = node.args[:count], node.args[count], node.args[count + 1 :]
    assert isinstance(inner, Node)
    with graph.inserting_before(node):
        entered = graph.call_function(enter, settings)
        results = copy_nodes(module, str(inner.target), operands)
        graph.call_function(leave, (entered,))
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    if not inner.users:
        graph.erase_node(inner)


def copy_nodes(module: GraphModule, name: str, operands: Any) -> Any:
    """Copy the nodes of a region to the graph's insertion point; return the copies of its results."""
    region: Any = getattr(module, name)
    copies = dict(zip((n for n in region.graph.nodes if n.op == "placeholder"), operands, strict=True))
    for node in region.graph.nodes:
        if node.op == "output":
            return [copies[result] if isinstance(result, Node) else result for result in node.args[0]]
        if node.op == "get_attr":  # a region's own attribute: a graph within it
            held = f"{name}_{node.target}"
            setattr(module, held, getattr(region, str(node.target)))
            copies[node] = module.graph.get_attr(held)
        elif node.op != "placeholder":
            copies[node] = module.graph.node_copy(node, copies.__getitem__)
    raise AssertionError("a graph ends with its output")
