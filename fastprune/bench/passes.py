"""How often a search passes over activations on CUDA, counted on tensors without memory: no GPU is needed.

One pass reads and writes every convolution's result once. Counted are the bytes that all kernels but convolutions (with
their bias) read and write; views move none. A step is the masked network's forward pass on images in float32 under
autocast to bfloat16, the cross-entropy, and the gradient of the gates, which sit inside of blocks. The generator of the
gates, the cost term and the optimiser work on vectors and are left out. ``fastprune`` is the graph that a search runs
while weights are frozen, ``torch`` the same network with torch's operators and products with gates between them.

Kernels that compute a convolution together with what follows have to be tried on a device and are not counted; there
they take passes away. Weights are folded before the count, as they are from the second step of a search on.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastprune.bench.case import BenchmarkError
from fastprune.bench.settings import check_folder
from fastprune.bench.shapes import NETWORKS, network_of
from fastprune.graph import trace
from fastprune.graph.export.regions import restore_modes
from fastprune.graph.interior import interior_units
from fastprune.host import atomic
from fastprune.networks.masked import MaskedNetwork
from fastprune.options import SEVERAL, check, option

aten = torch.ops.aten

CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}
UNWRITTEN = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}
OVERWRITING = {aten.copy_, aten.fill_, aten.zero_}


@dataclass
class PassesBenchSettings:
    """Count the passes over activations of a search step on CUDA."""

    only: tuple[str, ...] = option((), "networks to count; default: all", choices=tuple(NETWORKS), flag=SEVERAL)
    batch: int = option(256, "images per step", minimum=2)
    json: str | None = option(None, "file for the numbers")

    def __post_init__(self) -> None:
        check(self)
        check_folder("json", self.json)


@dataclass(frozen=True)
class Passes:
    """What a step was counted to do.

    Args:
        name: the network.
        variant: "fastprune" or "torch".
        forward: passes over activations outside of convolutions, forward.
        backward: the same, backward.
        launches: operators that launch a kernel, convolutions included.
        syncs: copies to the host. A step that reads a number from the device cannot be counted at all.
        odd_layouts: gradients of convolutions that get or give images that are not dense in channels_last. cuDNN then
            computes in another layout, and torch copies the images into it and back.
    """

    name: str
    variant: str
    forward: float
    backward: float
    launches: int
    syncs: int
    odd_layouts: int


def bench_passes(settings: PassesBenchSettings) -> dict[str, Any]:
    """Count, print a table, and write the document to ``settings.json``."""
    document: dict[str, Any] = {"batch": settings.batch, "torch": torch.__version__, "networks": []}
    for name in settings.only or NETWORKS:
        side = NETWORKS[name]
        for passes in count_passes(name, network_of(name), side, settings.batch):
            document["networks"].append(asdict(passes))
        if settings.json is not None:
            atomic.write_text(Path(settings.json), json.dumps(document, indent=2) + "\n")
    show(document)
    return document


def show(document: Mapping[str, Any]) -> None:
    """Print the table."""
    table = Table("network", "graph", box=box.SIMPLE_HEAD)
    for title in ("forward", "backward", "launches", "syncs", "copied layouts"):
        table.add_column(title, justify="right")
    for row in document["networks"]:
        counts = [str(row[name]) for name in ("launches", "syncs", "odd_layouts")]
        table.add_row(row["name"], row["variant"], f"{row['forward']:.2f}", f"{row['backward']:.2f}", *counts)
    Console().print(table)


def count_passes(name: str, model: nn.Module, side: int, batch: int) -> list[Passes]:
    """Count both variants of a network.

    Args:
        name: title of the network.
        model: the network, which reads images [N, 3, side, side]. It has no memory afterwards.
        side: the side of its images.
        batch: N.

    Raises:
        BenchmarkError: if a step reads a number from the device, for which the host would wait.
    """
    found = []
    model = model.eval().requires_grad_(requires_grad=False)
    graph = trace(model, torch.zeros(2, 3, side, side))
    masked, units = MaskedNetwork(graph, model, interior_units(graph)), graph.num_units
    with FakeTensorMode(allow_non_fake_inputs=True), cuda_autocast(), warnings.catch_warnings():
        # Folded weights are made anew when their memory changes; here they have none.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        masked.to("cuda")
        images = torch.empty(batch, 3, side, side, device="cuda").to(memory_format=torch.channels_last)
        labels = torch.zeros(batch, dtype=torch.int64, device="cuda")
        for variant, network in (("fastprune", masked.fused), ("torch", masked.network)):
            step = Step(network, images, labels, units)
            step.run()
            forward, backward = step.run()
            unit = 2 * forward.convolved
            passes = Passes(
                name,
                variant,
                forward.moved / unit,
                backward.moved / unit,
                forward.launches + backward.launches,
                forward.syncs + backward.syncs,
                forward.odd_layouts + backward.odd_layouts,
            )
            found.append(passes)
    return found


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Autocast to bfloat16 as on CUDA; ``torch.autocast`` refuses to without a GPU."""
    was = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", was[0])
        torch.set_autocast_dtype("cuda", was[1])
        torch.clear_autocast_cache()


@dataclass(frozen=True)
class Step:
    """A step of a search on a masked network's graph.

    Args:
        network: the graph.
        images: what it reads.
        labels: their classes.
        units: the number of gates.
    """

    network: GraphModule
    images: Tensor
    labels: Tensor
    units: int

    def run(self) -> tuple[Traffic, Traffic]:
        """Return what the forward and the backward pass move."""
        gates = torch.ones(self.units, device="cuda", requires_grad=True)
        forward, backward = Traffic(), Traffic()
        with restore_modes(), forward:
            (scores,) = self.network(self.images, gates)
            loss = F.cross_entropy(scores.float(), self.labels)
        with torch.no_grad(), backward:
            run_backward(loss)
        return forward, backward


class Traffic(TorchDispatchMode):
    """Counts what operators move.

    Attributes:
        moved: bytes that others than convolutions read and write.
        convolved: bytes of convolutions' results.
        launches: operators that launch a kernel.
        syncs: copies to the host.
        odd_layouts: see :class:`Passes`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moved = self.convolved = self.launches = self.syncs = self.odd_layouts = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        try:
            result = func(*args, **(kwargs or {}))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise BenchmarkError(f"{func}: the step reads a number from the device; the host would wait") from error
        if func in CONVOLUTIONS:
            result = lay_out(result, args)
        if func.namespace == "prim" or is_view(func):
            return result
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if func.overloadpacket in UNWRITTEN:
            return result
        if func.overloadpacket in OVERWRITING:  # reads none of what it writes into
            inputs = inputs[1:]
        self.launches += 1
        self.syncs += any(x.is_cuda for x in inputs) and any(x.device.type == "cpu" for x in results)
        if func is aten.convolution.default:
            self.convolved += size_of(results[0])
        if func is aten.convolution_backward.default:
            gradient, x, _weight = inputs[:3]
            images = [gradient, x, *results[:1]]
            self.odd_layouts += not all(map(is_dense_rows, images))
        if func not in CONVOLUTIONS:
            written = written_by(func, args)
            results = [x for x in results if not any(x is y for y in written)]
            self.moved += sum(map(size_of, [*inputs, *results, *written]))
        return result


def lay_out(result: Any, args: Sequence[Any]) -> Any:
    """Return a convolution's results as cuDNN lays them out: all in channels_last if one argument is."""
    if not any(isinstance(x, Tensor) and x.dim() == 4 and is_dense_rows(x) for x in args):
        return result
    return tree_map_only(Tensor, to_rows, result)


def to_rows(x: Tensor) -> Tensor:
    """Return images or a weight in channels_last, other tensors as they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def is_view(func: Any) -> bool:
    """Return whether an operator's results are views of what it reads."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def written_by(func: Any, args: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among an operator's arguments that it writes into."""
    arguments = zip(func._schema.arguments, args, strict=False)
    return [x for argument, x in arguments if argument.alias_info is not None and argument.alias_info.is_write]


def size_of(x: Tensor) -> int:
    """Return the bytes of a tensor's memory; expanded dimensions have none."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * x.element_size()


def is_dense_rows(x: Tensor) -> bool:
    """Return whether a tensor is dense in channels_last."""
    return x.is_contiguous(memory_format=torch.channels_last)


def run_backward(loss: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Call every node of the gradient's graph once, as torch's engine does, which needs a device.

    Returns:
        The leaves that require gradients, each with its gradient.
    """
    assert loss.grad_fn is not None
    leaves = []
    gradients: dict[Any, list[Tensor | None]] = {loss.grad_fn: [torch.ones_like(loss)]}
    for node in in_order(loss.grad_fn):
        given = gradients.pop(node, None)
        if given is None:  # no gradient reaches it
            continue
        if hasattr(node, "variable"):
            assert given[0] is not None
            leaves.append((node.variable, given[0]))
            continue
        for (target, number), gradient in zip(*call(node, given), strict=True):
            if target is not None and gradient is not None:
                add_gradient(gradients, target, number, gradient)
    return leaves


def call(node: Any, gradients: Sequence[Tensor | None]) -> tuple[Sequence[tuple[Any, int]], Sequence[Tensor | None]]:
    """Return the places that a node hands gradients to, and these."""
    places = node.next_functions
    if not hasattr(node, "apply"):
        found = node(*gradients)
        return places, found if isinstance(found, tuple) else (found,)
    # An autograd.Function returns one for each argument, but has places for tensors alone.
    results = zip(gradients, node._input_metadata, strict=True)
    found = node.apply(*(torch.zeros(r.shape, dtype=r.dtype, device=r.device) if g is None else g for g, r in results))
    found = found if isinstance(found, tuple) else (found,)
    wanted = [gradient for gradient, wants in zip(found, node.needs_input_grad, strict=True) if wants]
    return [place for place in places if place[0] is not None], wanted


def in_order(root: Any) -> Sequence[Any]:
    """Return the nodes of a gradient's graph, each before those that it hands gradients to."""
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(target, False) for target, _ in node.next_functions if target is not None]
    return order[::-1]


def add_gradient(gradients: dict[Any, list[Tensor | None]], node: Any, number: int, gradient: Tensor) -> None:
    """Add a gradient to those of a node's results, in the shape and dtype of that result."""
    results = node._input_metadata
    own = gradients.setdefault(node, [None] * len(results))
    gradient = gradient.sum_to_size(results[number].shape).to(results[number].dtype)
    before = own[number]
    own[number] = gradient if before is None else before + gradient
