"""The operators of a network as calls that can be made again, alone and with fewer channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from fastprune.graph.export.nodes import argument_of, module_of, operator_name
from fastprune.graph.export.regions import CALLS, MODES, Autocast, enter_modes, restore_modes
from fastprune.graph.labels.interpret import run_on_labels
from fastprune.graph.labels.labels import KEPT, core, varying_dims
from fastprune.graph.labels.propagate import Computed, Propagation, Weight
from fastprune.graph.latency.axes import Axis, block_of
from fastprune.graph.model_state import attribute_of
from fastprune.graph.structure import GraphStructure, Layer, index_slices


@dataclass(frozen=True)
class Operand:
    """A tensor that an operator reads.

    Args:
        shape: in the full network.
        strides: likewise.
        dtype: its type.
        scaled: (dimension, number of the operation's axis) for those that shrink.
        source: the node that makes it; None for a parameter, a buffer or an input.
        value: where it holds no real numbers (indices, say): these.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    scaled: tuple[tuple[int, int], ...] = ()
    source: str | None = None
    value: Tensor | None = None

    def at(self, axes: Sequence[Axis], widths: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides where the axes have ``widths``: the same order of dimensions in memory, without gaps."""
        shape = list(self.shape)
        for dim, axis in self.scaled:
            shape[dim] = max(1, round(shape[dim] * widths[axis] / axes[axis].size))
        strides = [0] * len(shape)
        elements = 1
        for dim in sorted(range(len(shape)), key=lambda d: (self.strides[d], self.shape[d], -d)):
            if self.strides[dim] or self.shape[dim] == 1:  # else expanded
                strides[dim] = elements
                elements *= shape[dim]
        return tuple(shape), tuple(strides)


@dataclass(frozen=True)
class Groups:
    """The number of groups of a depthwise convolution, which is its number of channels."""

    size: int

    def at(self, axes: Sequence[Axis], widths: Sequence[int]) -> int:
        """Their number where the first axis has a width."""
        return self.size * widths[0] // axes[0].size


@dataclass(frozen=True)
class Operation:
    """One call of an operator.

    Args:
        node: its node in the exported graph.
        module: the module in whose code it arose; of a layer, that which owns the weight.
        operator: its name.
        target: what is called.
        arguments: (args, kwargs), with an ``Operand`` in place of each tensor.
        axes: the widths that its time depends on: in and out of a layer, one or none of another operator.
        layer: whether it is a convolution or linear layer.
        in_place: whether it writes into its first operand.
        modules: names of the modules, from the outside, in whose code it arose.
        modes: of the regions under ``torch.autocast`` that it lies in, the outermost first.
    """

    node: str
    module: str
    operator: str
    target: Any
    arguments: tuple[Any, Any]
    axes: tuple[Axis, ...]
    layer: bool
    in_place: bool
    modules: tuple[str, ...]
    modes: tuple[Autocast, ...] = ()

    @property
    def operands(self) -> list[Operand]:
        """What it reads."""
        return [leaf for leaf in pytree.tree_leaves(self.arguments) if isinstance(leaf, Operand)]


@dataclass(frozen=True)
class Recording:
    """All operations of one pass.

    Args:
        operations: in the order of execution.
        footprint: bytes that the pass reads for the first time or makes.
    """

    operations: tuple[Operation, ...]
    footprint: int


def record(
    graph: GraphStructure, device: torch.device, batch: int, dtype: torch.dtype, *, channels_last: bool
) -> Recording:
    """Run the full network once and write down its operations.

    Raises:
        ValueError: for a batch that the exported graph does not hold for, or a type in which the network cannot run.
    """
    inputs = graph.traced.inputs
    recorder = _Recorder(graph, device, dtype, channels_last=channels_last)
    rows = torch.arange(batch) % inputs.batch
    with torch.inference_mode(), restore_modes():
        try:
            recorder.run(*(recorder.placed(x[rows.to(x.device)]) for x in inputs.tensors))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(_refusal(graph, device, batch, dtype, error)) from error
    return Recording(tuple(recorder.operations), recorder.footprint)


def _refusal(graph: GraphStructure, device: torch.device, batch: int, dtype: torch.dtype, error: RuntimeError) -> str:
    """Why the network could not be run once, and what to do."""
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
        self.extra_traceback = False  # errors are in the operators' own words
        self.device, self.dtype, self.channels_last = device, dtype, channels_last
        self.traced_device = graph.traced.inputs.tensors[0].device.type
        self.traced_dtype = next((x.dtype for x in graph.traced.inputs.tensors if x.is_floating_point()), None)
        self.group_of_unit = graph.group_of_unit.numpy()
        self.sizes = graph.offsets.diff().tolist()
        self.layers = {layer.node: layer for layer in graph.layers}
        self.slices = index_slices(graph.slices)
        # Labels end at nothing that mixes channels: which of them are prunable is what the graph says.
        state = Propagation(exact=False, rewrites=graph.rewrites)
        self.labels = run_on_labels(graph.traced.evaluation, graph.traced.inputs, state, record=True)
        self.unit_of_label = np.full(state.space.count, -1)
        for key, labelled in state.dims.items():
            if key in self.slices:
                self.unit_of_label[labelled.labels.numpy()] = self.slices[key].units.numpy()
        self.unit_of_label[KEPT] = -1
        self.operations: list[Operation] = []
        self.modes: list[Autocast] = []
        self.footprint = 0

    def placed(self, value: Tensor) -> Tensor:
        """A tensor of the network where and as it is to be measured."""
        kind = self.dtype if value.is_floating_point() else value.dtype
        if self.channels_last and value.dim() == 4:
            return value.detach().to(self.device, kind, memory_format=torch.channels_last)
        return value.detach().to(self.device, kind)

    def run_node(self, n: Node) -> Any:
        """Execute a node, and describe it where it is a call of an operator."""
        if n.op == "call_module":
            return None  # the exporter's guard
        if n.op == "get_attr":
            value = attribute_of(self.module, str(n.target))
            if isinstance(value, Tensor):
                value = self.placed(value)
                self.footprint += value.numel() * value.element_size()
            return value
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target in MODES:
            return self.switch_mode(n, args)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": self.device}
        # The network's own type is written in what converts to it ("x.to(y.dtype)") and in what makes tensors.
        args, kwargs = pytree.tree_map(lambda x: self.dtype if x is self.traced_dtype else x, (args, kwargs))
        # In-place operators change the shape or the strides of what they read in rare cases: described before the call.
        described = self.described(n, args, kwargs)
        with enter_modes(self.modes):
            result = n.target(*args, **kwargs)  # type: ignore[operator]
        made = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        if made and isinstance(n.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
            read = {x.untyped_storage().data_ptr() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            new = [x for x in made if x.untyped_storage().data_ptr() not in read]
            self.footprint += sum(x.numel() * x.element_size() for x in new)
            self.operations.append(self.operation(n, described, works=bool(new)))
        return result

    def switch_mode(self, node: Node, args: Any) -> None:
        """Enter or leave a region; gradients are off in all of them."""
        enter, leave, _ = CALLS["wrap_with_autocast"]
        if node.target is enter:
            device, dtype, enabled, _ = args
            if device == self.traced_device:  # "x.device.type", say, where the region's code was traced
                device = self.device.type
            self.modes.append(Autocast(device, dtype, enabled))
        elif node.target is leave:
            self.modes.pop()

    def described(self, node: Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments with an ``Operand``, not yet scaled, in place of each tensor."""

        def describe(argument: Any, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            source = argument.name if isinstance(argument, Node) and argument.op == "call_function" else None
            kept = None if value.is_floating_point() else value.clone()
            return Operand(tuple(value.shape), tuple(value.stride()), value.dtype, (), source, kept)

        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        sources = pytree.tree_leaves((tuple(node.args), dict(node.kwargs)))
        if len(sources) != len(leaves):  # an argument that is a list of values goes by one node
            sources = [None] * len(leaves)
        found: tuple[Any, Any] = pytree.tree_unflatten([*map(describe, sources, leaves)], spec)
        return found

    def operation(self, node: Node, described: tuple[Any, Any], *, works: bool) -> Operation:
        """A call with its axes."""
        schema = getattr(node.target, "_schema", None)
        in_place = bool(schema is not None and schema.is_mutable)
        layer = self.layers.get(node.name)
        axes: tuple[Axis, ...] = ()
        if layer is not None:
            axes, described = self.layer_axes(node, layer, described)
        elif works or in_place:
            axes, described = self.axis(node, described)
        stack = tuple(str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values())
        module = layer.name if layer is not None else module_of(node)
        return Operation(
            node.name,
            module,
            operator_name(node),
            node.target,
            described,
            axes,
            layer is not None,
            in_place,
            stack,
            tuple(self.modes),
        )

    # --- axes ---------------------------------------------------------------------------------------------------

    def axis_of(self, units: Any, step: int = 1) -> Axis:
        """The width of a vector of channels, given the unit of each."""
        prunable = units[units >= 0]
        groups, channels = np.unique(self.group_of_unit[prunable], return_counts=True)
        counts = tuple((int(g), int(n) // self.sizes[g]) for g, n in zip(groups, channels, strict=True))
        return Axis(len(units), int((units < 0).sum()), counts, step, block_of(self.device))

    def layer_axes(
        self, node: Node, layer: Layer, described: tuple[Any, Any]
    ) -> tuple[tuple[Axis, ...], tuple[Any, Any]]:
        """The widths in and out of a convolution or linear layer (one, if it is depthwise)."""
        groups = int(argument_of(node, "groups") or 1) if layer.depthwise or layer.kind.startswith("conv") else 1
        step = 1 if layer.depthwise else groups
        axes = [self.axis_of(layer.in_units.numpy(), step)]
        if not layer.depthwise:
            axes.append(self.axis_of(layer.out_units.numpy(), step))
        leaves, spec = pytree.tree_flatten(described)
        sources = self.sources(node, len(leaves))
        for place, (leaf, source) in enumerate(zip(leaves, sources, strict=True)):
            if isinstance(leaf, Operand):
                dims = [(layer.channel_dim, 0)] if place == 0 else self.layer_dims(layer, source)
                leaves[place] = scaled(leaf, dims, axes)
        (args, kwargs) = pytree.tree_unflatten(leaves, spec)
        if layer.depthwise:
            names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
            place = names.index("groups")
            if place < len(args):
                args = (*args[:place], Groups(groups), *args[place + 1 :])
            else:
                kwargs["groups"] = Groups(groups)
        return tuple(axes), (args, kwargs)

    def layer_dims(self, layer: Layer, source: Any) -> list[tuple[int, int]]:
        """The dimensions of what a layer reads, besides its input, along which channels lie; the axis of each."""
        labels = self.labels.get(source)
        makes = 0 if layer.depthwise else 1
        found = []
        if isinstance(labels, (Weight, Computed)):
            for dim in range(len(labels.shape)):
                piece = self.slices.get((labels.name, dim))
                if piece is not None:
                    reads = piece.role == "in" or (piece.role == "channel" and self.is_read(layer, piece.units))
                    found.append((dim, 0 if reads else makes))
        elif isinstance(labels, Tensor):
            for dim in self.prunable_dims(labels):
                units = torch.from_numpy(self.unit_of_label[core(labels).flatten().numpy()])
                found.append((dim, 0 if self.is_read(layer, units) else makes))
        return found

    def is_read(self, layer: Layer, units: Tensor) -> bool:
        """Whether channels are those that a layer reads, not those that it makes."""
        return torch.equal(units, layer.in_units) and not torch.equal(units, layer.out_units)

    def sources(self, node: Node, leaves: int) -> list[Node | None]:
        """The node of each argument; of none where one node stands for several."""
        found = pytree.tree_leaves((tuple(node.args), dict(node.kwargs)))
        return [x if isinstance(x, Node) else None for x in found] if len(found) == leaves else [None] * leaves

    def axis(self, node: Node, described: tuple[Any, Any]) -> tuple[tuple[Axis, ...], tuple[Any, Any]]:
        """The width of the widest tensor that an operator reads or makes; the others shrink in proportion."""
        leaves, spec = pytree.tree_flatten(described)
        sources = pytree.tree_leaves((tuple(node.args), dict(node.kwargs)))
        labels = [self.labels.get(s) if isinstance(s, Node) else None for s in sources]
        found = [x for x in (*labels, *pytree.tree_leaves(self.labels.get(node))) if isinstance(x, Tensor)]
        vectors = [self.unit_of_label[core(x).flatten().numpy()] for x in found]
        widest = max((v for v in vectors if (v >= 0).any()), key=len, default=None)
        if widest is None:
            return (), described
        axes = (self.axis_of(widest),)
        if len(labels) == len(leaves):
            dims = [self.prunable_dims(x) for x in labels]
            leaves = [
                scaled(leaf, tuple((d, 0) for d in where), axes) if isinstance(leaf, Operand) else leaf
                for leaf, where in zip(leaves, dims, strict=True)
            ]
        return axes, pytree.tree_unflatten(leaves, spec)

    def prunable_dims(self, labels: Any) -> list[int]:
        """The dimensions of a value along which channels leave; none where they lie along several."""
        if isinstance(labels, Weight):
            names = [(labels.name, dim) for dim in range(len(labels.shape))]
            return [dim for name, dim in names if (name, dim) in self.slices]
        if not isinstance(labels, Tensor) or not (self.unit_of_label[core(labels).numpy()] >= 0).any():
            return []
        ways = varying_dims(labels)
        return ways if len(ways) == 1 else []


def scaled(operand: Operand, dims: Sequence[tuple[int, int]], axes: Sequence[Axis]) -> Operand:
    """An operand whose dimensions shrink with those axes that can."""
    shrinking = tuple((dim, axis) for dim, axis in dims if axes[axis].counts)
    return replace(operand, scaled=shrinking)
