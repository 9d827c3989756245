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
from dataclasses import asdict, dataclass, replace
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

from fastprune.bench.backward import run_backward
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
    bandwidth: float | None = option(None, "TB/s of a GPU's memory; with tflops, adds a step's milliseconds", above=0.0)
    tflops: float | None = option(None, "TFLOP/s of a GPU's products in bfloat16", above=0.0)
    json: str | None = option(None, "file for the numbers")

    def __post_init__(self) -> None:
        check(self)
        check_folder("json", self.json)
        if (self.bandwidth is None) is not (self.tflops is None):
            raise ValueError("bandwidth and tflops: got one of them; needs both or neither")

    @property
    def rates(self) -> tuple[float, float] | None:
        """Bytes and operations per second of the GPU; None: unknown."""
        if self.bandwidth is None or self.tflops is None:
            return None
        return self.bandwidth * 1e12, self.tflops * 1e12


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
        convolutions_ms: least milliseconds of the convolutions on a GPU of the given rates: each takes the time of its
            products or that of its reads and writes, whichever is longer. None: no rates were given.
        forward_ms: milliseconds of all else at the full bandwidth, forward.
        backward_ms: the same, backward.
    """

    name: str
    variant: str
    forward: float
    backward: float
    launches: int
    syncs: int
    odd_layouts: int
    convolutions_ms: float | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None


def bench_passes(settings: PassesBenchSettings) -> dict[str, Any]:
    """Count, print a table, and write the document to ``settings.json``."""
    document: dict[str, Any] = {"batch": settings.batch, "torch": torch.__version__, "networks": []}
    if settings.rates is not None:
        document.update(bandwidth=settings.bandwidth, tflops=settings.tflops)
    for name in settings.only or NETWORKS:
        side = NETWORKS[name]
        for passes in count_passes(name, network_of(name), side, settings.batch, settings.rates):
            document["networks"].append(asdict(passes))
        if settings.json is not None:
            atomic.write_text(Path(settings.json), json.dumps(document, indent=2) + "\n")
    show(document)
    return document


def show(document: Mapping[str, Any]) -> None:
    """Print the table, and one of milliseconds where there are rates."""
    table = Table("network", "graph", box=box.SIMPLE_HEAD)
    for title in ("forward", "backward", "launches", "syncs", "copied layouts"):
        table.add_column(title, justify="right")
    for row in document["networks"]:
        counts = [str(row[name]) for name in ("launches", "syncs", "odd_layouts")]
        table.add_row(row["name"], row["variant"], f"{row['forward']:.2f}", f"{row['backward']:.2f}", *counts)
    console = Console()
    console.print(table)
    if "bandwidth" not in document:
        return
    title = (
        f"least milliseconds at {document['bandwidth']:g} TB/s and {document['tflops']:g} TFLOP/s: a model, not timed"
    )
    table = Table("network", "graph", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("convolutions", "forward", "backward", "total"):
        table.add_column(column, justify="right")
    for row in document["networks"]:
        times = [row[f"{part}_ms"] for part in ("convolutions", "forward", "backward")]
        table.add_row(row["name"], row["variant"], *(f"{time:.1f}" for time in [*times, sum(times)]))
    console.print(table)


def count_passes(
    name: str, model: nn.Module, side: int, batch: int, rates: tuple[float, float] | None = None
) -> list[Passes]:
    """Count both variants of a network.

    Args:
        name: title of the network.
        model: the network, which reads images [N, 3, side, side]. It has no memory afterwards.
        side: the side of its images.
        batch: N.
        rates: bytes and operations per second of a GPU, for milliseconds.

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
            found.append(passes if rates is None else add_milliseconds(passes, forward, backward, *rates))
    return found


def add_milliseconds(
    passes: Passes, forward: Traffic, backward: Traffic, bandwidth: float, flops_per_second: float
) -> Passes:
    """Add the milliseconds of a step on a GPU of these rates."""
    convolutions = [max(nbytes / bandwidth, flops / flops_per_second) for nbytes, flops in forward.work + backward.work]
    return replace(
        passes,
        convolutions_ms=1e3 * sum(convolutions),
        forward_ms=1e3 * forward.moved / bandwidth,
        backward_ms=1e3 * backward.moved / bandwidth,
    )


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
        work: bytes and operations of each convolution and each convolution's gradient.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moved = self.convolved = self.launches = self.syncs = self.odd_layouts = 0
        self.work: list[tuple[int, int]] = []

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
            self.work.append((sum(map(size_of, [*inputs, *results])), operations(results[0], inputs[1])))
        if func is aten.convolution_backward.default:
            gradient, x, weight = inputs[:3]
            images = [gradient, x, *results[:1]]
            self.odd_layouts += not all(map(is_dense_rows, images))
            for wanted, read, written in zip(args[-1][:2], (weight, x), result, strict=False):
                if wanted:
                    moved = size_of(gradient) + size_of(read) + size_of(written)
                    self.work.append((moved, operations(gradient, weight)))
        if func not in CONVOLUTIONS:
            written = written_by(func, args)
            results = [x for x in results if not any(x is y for y in written)]
            self.moved += sum(map(size_of, [*inputs, *results, *written]))
        return result


def operations(y: Tensor, weight: Tensor) -> int:
    """Return the operations of a convolution that computes ``y``, or of one gradient from ``y``'s."""
    return 2 * y.numel() * weight[0].numel()


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
