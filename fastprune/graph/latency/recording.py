"""One pass of the full network, written down as operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from fastprune.graph.export.nodes import module_of, operator_name
from fastprune.graph.export.regions import CALLS, MODES, Autocast, enter_modes, restore_modes
from fastprune.graph.latency.axes import Axis
from fastprune.graph.latency.operations import Operand, Operation
from fastprune.graph.latency.widths import AxisFinder
from fastprune.graph.model_state import attribute_of
from fastprune.graph.structure import GraphStructure


@dataclass(frozen=True)
class Recording:
    """All operations of one pass.

    Args:
        operations: the operations in the order of execution.
        footprint: number of bytes that the pass reads for the first time or makes.
    """

    operations: tuple[Operation, ...]
    footprint: int


def record(
    graph: GraphStructure, device: torch.device, batch: int, dtype: torch.dtype, *, channels_last: bool
) -> Recording:
    """Run the full network once and record its operations.

    Raises:
        ValueError: if the exported graph does not hold for the batch, or the network cannot run in the dtype.
    """
    inputs = graph.traced.inputs
    recorder = _Recorder(graph, device, dtype, channels_last=channels_last)
    rows = torch.arange(batch) % inputs.batch
    with torch.inference_mode(), restore_modes():
        try:
            recorder.run(*(recorder.place(x[rows.to(x.device)]) for x in inputs.tensors))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(_explain_failure(graph, device, batch, dtype, error)) from error
    return Recording(tuple(recorder.operations), recorder.footprint)


def _explain_failure(
    graph: GraphStructure, device: torch.device, batch: int, dtype: torch.dtype, error: RuntimeError
) -> str:
    """Say why the network could not be run once, and what to do."""
    traced = graph.traced.inputs.batch
    if batch == traced or graph.traced.any_batch:
        return f"this network cannot run in {dtype} on {device.type!r} with a batch of {batch}: {error}"
    again = f"trace it with an example of {batch}, or " if batch > 1 else ""  # one sample is traced as two
    return (
        f"batch {batch}: the code of this network depends on the batch size, and it was traced with "
        f"{traced}; {again}give batch={traced}"
    )


class _Recorder(Interpreter):
    """Executes the exported graph and describes each call."""

    def __init__(self, graph: GraphStructure, device: torch.device, dtype: torch.dtype, *, channels_last: bool) -> None:
        super().__init__(graph.traced.evaluation)
        self.extra_traceback = False  # else errors would not end with the operators' own messages
        self.device, self.dtype, self.channels_last = device, dtype, channels_last
        self.traced_device = graph.traced.inputs.tensors[0].device.type
        self.traced_dtype = next((x.dtype for x in graph.traced.inputs.tensors if x.is_floating_point()), None)
        self.layers = {layer.node: layer for layer in graph.layers}
        self.finder = AxisFinder(graph, device)
        self.operations: list[Operation] = []
        self.modes: list[Autocast] = []
        self.footprint = 0

    def place(self, value: Tensor) -> Tensor:
        """Give a tensor of the network the device, the dtype and the layout of the measurement."""
        kind = self.dtype if value.is_floating_point() else value.dtype
        if self.channels_last and value.dim() == 4:
            return value.detach().to(self.device, kind, memory_format=torch.channels_last)
        return value.detach().to(self.device, kind)

    def run_node(self, n: Node) -> Any:
        """Execute a node, and record it if it calls an operator."""
        if n.op == "call_module":
            return None  # the exporter's guard
        if n.op == "get_attr":
            value = attribute_of(self.module, str(n.target))
            if isinstance(value, Tensor):
                value = self.place(value)
                self.footprint += value.numel() * value.element_size()
            return value
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target in MODES:
            return self.switch_mode(n, args)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": self.device}
        # The graph holds the network's own dtype where code converts ("x.to(y.dtype)") or makes tensors.
        args, kwargs = pytree.tree_map(lambda x: self.dtype if x is self.traced_dtype else x, (args, kwargs))
        # Described before the call: in-place operators may change the shape or the strides of their operands.
        arguments = describe_arguments(n, args, kwargs)
        with enter_modes(self.modes):
            result = n.target(*args, **kwargs)  # type: ignore[operator]
        made = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        if made and isinstance(n.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
            read = {x.untyped_storage().data_ptr() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            new = [x for x in made if x.untyped_storage().data_ptr() not in read]
            self.footprint += sum(x.numel() * x.element_size() for x in new)
            self.operations.append(self.operation(n, arguments, works=bool(new)))
        return result

    def switch_mode(self, node: Node, args: Any) -> None:
        """Enter or leave a region; gradients are off in all of them."""
        enter, leave, _ = CALLS["wrap_with_autocast"]
        if node.target is enter:
            device, dtype, enabled, _ = args
            if device == self.traced_device:  # "x.device.type", say, in the region's code
                device = self.device.type
            self.modes.append(Autocast(device, dtype, enabled))
        elif node.target is leave:
            self.modes.pop()

    def operation(self, node: Node, arguments: tuple[Any, Any], *, works: bool) -> Operation:
        """Return a call with its axes; ``works`` = it makes new tensors."""
        schema = getattr(node.target, "_schema", None)
        in_place = bool(schema is not None and schema.is_mutable)
        layer = self.layers.get(node.name)
        axes: tuple[Axis, ...] = ()
        if layer is not None:
            axes, arguments = self.finder.scale_layer(node, layer, arguments)
        elif works or in_place:
            axes, arguments = self.finder.scale_operator(node, arguments)
        stack = tuple(str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values())
        module = layer.name if layer is not None else module_of(node)
        return Operation(
            node.name,
            module,
            operator_name(node),
            node.target,
            arguments,
            axes,
            layer is not None,
            in_place,
            stack,
            tuple(self.modes),
        )


def describe_arguments(node: Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments with an ``Operand``, not yet scaled, in place of each tensor."""

    def describe(argument: Any, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        source = argument.name if isinstance(argument, Node) and argument.op == "call_function" else None
        held = None if value.is_floating_point() else value.clone()
        return Operand(tuple(value.shape), tuple(value.stride()), value.dtype, (), source, held)

    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    sources = pytree.tree_leaves((tuple(node.args), dict(node.kwargs)))
    if len(sources) != len(leaves):  # one node stands for an argument that is a list of values
        sources = [None] * len(leaves)
    found: tuple[Any, Any] = pytree.tree_unflatten([*map(describe, sources, leaves)], spec)
    return found
