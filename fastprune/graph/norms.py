"""Norms over channels that lose some exactly: their statistics count the removed channels as zeros.

A norm over C channels of which all but K are zero has the mean Σx / C over the K others, and the variance
(Σ(x - l)² + K (l - m)² + (C - K) m²) / C, where l is the mean of the K channels and m that of all. The last two terms
are C m (l - m), so that the number K does not appear. A root mean square is Σx² / C.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fastprune.graph.export.nodes import concrete, module_of, operator_name
from fastprune.graph.labels.labels import kept_labels, varying_dims, vector_along
from fastprune.graph.labels.propagate import Propagation
from fastprune.graph.structure import Norm, NormKind
from fastprune.graph.units import Units

# Operators that compute the statistics of norms.
STATISTICS = {
    *("layer_norm", "rms_norm", "group_norm", "mean", "sum", "var", "std", "var_mean", "std_mean"),
    *("linalg_vector_norm", "norm"),
}
FORMS: tuple[tuple[NormKind, int], ...] = (
    ("layer_norm", -1), ("layer_norm", 1), ("rms_norm", -1), ("rms_norm", 1), ("group_norm", 1),
)  # fmt: skip


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: NormKind, dim: int, count: int, eps: float | None
) -> Tensor:
    """Return a norm of ``count`` channels, of which those that ``x`` lacks are zero, where ``x`` has some.

    Half precision is computed in float32, as torch's norms do.

    Args:
        x: what is normalised; K channels along ``dim``.
        weight: the scale, [K]; None = 1.
        bias: the shift, [K]; None = 0.
        kind: "layer_norm" and "rms_norm" normalise over channels, "group_norm" over channels and positions.
        dim: the dimension that holds the channels.
        count: number of channels of the statistics, at least K.
        eps: added to the variance; None = the smallest difference of two numbers near 1.

    Returns:
        The normalised channels, in the shape of ``x``.
    """
    given = x.dtype
    if given in (torch.float16, torch.bfloat16):
        x = x.float()
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if kind == "rms_norm":
        x = x * torch.rsqrt(x.square().sum(dim, keepdim=True) / count + eps)
    else:
        positions = [d for d in range(1, x.dim()) if d != dim] if kind == "group_norm" else []
        local = x.mean([*positions, dim], keepdim=True)
        spread = (x - local).square()
        total = x
        if positions:
            total, spread = total.mean(positions, keepdim=True), spread.mean(positions, keepdim=True)
        mean = total.sum(dim, keepdim=True) / count
        variance = spread.sum(dim, keepdim=True) / count + mean * (local - mean)
        x = (x - mean) * torch.rsqrt(variance + eps)
    shape = [1] * x.dim()
    shape[dim] = -1
    if weight is not None:
        x = x * weight.reshape(shape)
    if bias is not None:
        x = x + bias.reshape(shape)
    return x if torch.is_autocast_enabled(x.device.type) else x.to(given)


class FullCount(nn.Module):
    """A norm whose statistics count removed channels as zeros; the class of a norm is changed to one of these.

    Attributes:
        full_count: number of channels of the statistics.
        channel_dim: the dimension of the input that holds the channels.
    """

    kind: NormKind
    full_count: int
    channel_dim: int
    eps: float | None
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised channels, in the shape of ``x``."""
        tensors = self._parameters.get("weight"), self._parameters.get("bias")
        return normalise(x, *tensors, self.kind, self.channel_dim, self.full_count, self.eps)

    def extra_repr(self) -> str:
        """Show the number of channels that the statistics count."""
        return f"full_count={self.full_count}, channel_dim={self.channel_dim}, eps={self.eps}"


class FullCountLayerNorm(FullCount, nn.LayerNorm):  # type: ignore[misc]
    """A layer norm whose statistics count removed channels as zeros."""

    kind = "layer_norm"


class FullCountRMSNorm(FullCount, nn.RMSNorm):  # type: ignore[misc]
    """An RMS norm whose statistics count removed channels as zeros."""

    kind = "rms_norm"


class FullCountGroupNorm(FullCount, nn.GroupNorm):  # type: ignore[misc]
    """A group norm of one group whose statistics count removed channels as zeros."""

    kind = "group_norm"


CLASSES: dict[NormKind, type[FullCount]] = {
    "layer_norm": FullCountLayerNorm, "rms_norm": FullCountRMSNorm, "group_norm": FullCountGroupNorm,
}  # fmt: skip


def count_fully(module: nn.Module, norm: Norm, channels: int) -> None:
    """Let a norm that has ``channels`` left count ``norm.count``, by a change of its class, in place."""
    module.__class__ = CLASSES[norm.kind]
    values = {"full_count": norm.count, "channel_dim": norm.dim, "eps": norm.eps}
    scales = module._parameters.get("weight") is not None
    sizes: dict[str, Any] = {"normalized_shape": (channels,), "elementwise_affine": scales}
    if norm.kind == "group_norm":
        sizes = {"num_groups": 1, "num_channels": channels, "affine": scales}
    vars(module).update(values | sizes)


# --- recognition ----------------------------------------------------------------------------------------------------


@dataclass
class Use:
    """One call of a module in a graph.

    Args:
        nodes: the nodes of its code.
        readers: (node, value from outside that it reads).
        results: the nodes that others read.
    """

    nodes: list[Node] = field(default_factory=list)
    readers: list[tuple[Node, Node]] = field(default_factory=list)
    results: list[Node] = field(default_factory=list)

    @property
    def source(self) -> Node | None:
        """The only value that it reads, if it makes a single one of the same shape; else None."""
        sources = {source for _, source in self.readers}
        if len(sources) != 1 or len(self.results) != 1:
            return None
        (source,) = sources
        return source if shape_of(source) == shape_of(self.results[0]) else None


def shape_of(node: Node) -> tuple[int, ...] | None:
    """Return the shape of a node's value on the example; None if it is no tensor."""
    value = node.meta.get("val")
    return tuple(map(concrete, value.shape)) if isinstance(value, Tensor) else None


def uses_of(graph: GraphModule, names: Iterable[str] | None = None) -> dict[str, list[Use]]:
    """Return the calls of modules in a graph; of those that compute statistics, or of the named ones."""
    found: dict[str, dict[str, Use]] = {}
    chosen = None if names is None else set(names)
    called = [node for node in graph.graph.nodes if node.op == "call_function"]
    if chosen is None:
        chosen = {module_of(node) for node in called if operator_name(node) in STATISTICS}
    for node in called:
        name = module_of(node)
        if name not in chosen:
            continue
        key = call_of(node)
        use = found.setdefault(name, {}).setdefault(key, Use())
        use.nodes.append(node)
        for source in node.all_input_nodes:
            if source.op != "get_attr" and call_of(source) != key and shape_of(source) is not None:
                use.readers.append((node, source))
        if any(call_of(user) != key for user in node.users):
            use.results.append(node)
    return {name: list(uses.values()) for name, uses in found.items()}


def call_of(node: Node) -> str:
    """Return the key of the call of the module whose code made a node; it differs between calls of one module."""
    return next(reversed(node.meta.get("nn_module_stack") or {}), "")


def find_norms(model: nn.Module, graphs: Iterable[GraphModule]) -> dict[str, Norm]:
    """Return the modules that are norms over channels; their units are still unknown (-1).

    A module is one if its code computes what the definition computes, on random inputs and parameters, in both modes.

    Args:
        model: the model.
        graphs: its graphs.
    """
    modules = dict(model.named_modules())
    shapes: dict[str, set[tuple[int, ...] | None]] = {}
    for graph in graphs:
        for name, uses in uses_of(graph).items():
            for use in uses:
                shapes.setdefault(name, set()).add(None if use.source is None else shape_of(use.source))
    found = {}
    for name, given in shapes.items():
        module, shape = modules.get(name), next(iter(given))
        if module is not None and name and len({shape and len(shape) for shape in given}) == 1 and shape is not None:
            norm = recognise(name, module, shape)
            if norm is not None:
                found[name] = norm
    return found


def recognise(name: str, module: nn.Module, shape: tuple[int, ...]) -> Norm | None:
    """Return what a module normalises if it is a norm over channels, and nothing else.

    Args:
        name: its name.
        module: the module.
        shape: the shape of its input.
    """
    size = channels_of(module)
    if size is None or any(True for _ in module.children()):
        return None
    if isinstance(module, FullCount):
        return Norm(name, module.kind, module.channel_dim, module.full_count, module.eps, torch.full((size,), -1))
    for kind, dim in FORMS:
        if len(shape) < 2 or shape[dim] != size or (kind, dim, len(shape)) == ("layer_norm", 1, 2):
            continue
        for eps in eps_of(module, kind):
            norm = Norm(name, kind, dim, size, eps, torch.full((size,), -1))
            if computes(module, norm, shape):
                return norm
    return None


def channels_of(module: nn.Module) -> int | None:
    """Return how many channels a module scales or normalises; None if it holds anything but a scale and a shift."""
    if set(module._parameters) - {"weight", "bias"} or module._buffers:
        return None
    vectors = [p for p in module._parameters.values() if p is not None]
    sizes = {tuple(p.shape) for p in vectors}
    if not sizes:
        given = getattr(module, "normalized_shape", getattr(module, "num_channels", None))
        sizes = {(given,) if isinstance(given, int) else tuple(given) if isinstance(given, (list, tuple)) else ()}
    shape = sizes.pop()
    return int(shape[0]) if not sizes and len(shape) == 1 else None


def eps_of(module: nn.Module, kind: NormKind) -> Iterator[float | None]:
    """Yield what a norm may add to its variance: numbers that it holds, then torch's default, then nothing."""
    held = [value for value in vars(module).values() if type(value) is float and 0 < value < 1]
    yield from dict.fromkeys(held)
    if kind == "rms_norm":
        yield None
    yield 0.0


def computes(module: nn.Module, norm: Norm, shape: tuple[int, ...]) -> bool:
    """Return whether a module computes a norm, on random inputs and parameters."""
    generator = torch.Generator().manual_seed(0)
    try:
        probe = copy.deepcopy(module)
        probe = probe.to_empty(device="cpu") if any(p.is_meta for p in probe.parameters()) else probe.cpu()
        probe = probe.double()
        with torch.no_grad():
            for parameter in probe.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            tensors = probe._parameters.get("weight"), probe._parameters.get("bias")
            sizes = [min(n, 3) for n in shape]
            sizes[norm.dim] = norm.count
            for training, scale in ((False, 1.0), (True, 1.0), (False, 1e-3)):
                x = scale * (0.5 + torch.randn(sizes, generator=generator, dtype=torch.float64))
                got = probe.train(training)(x)
                expected = normalise(x, *tensors, norm.kind, norm.dim, norm.count, norm.eps)
                if not isinstance(got, Tensor) or got.shape != x.shape:
                    return False
                if not torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-5):
                    return False
    except Exception:  # the module's own code may raise anything
        return False
    return True


# --- units ----------------------------------------------------------------------------------------------------------


def label_norms(
    norms: Mapping[str, Norm], graphs: Iterable[GraphModule], labels: Mapping[Node, Any], state: Propagation
) -> dict[str, Tensor]:
    """Return the labels of the channels of each norm, [C]; unite those of several uses.

    Args:
        norms: the norms.
        graphs: the graphs that call them.
        labels: the labels of their values.
        state: the findings, which are added to.
    """
    found: dict[str, Tensor] = {}
    for graph in graphs:
        for name, uses in uses_of(graph, state.counted & set(norms)).items():
            size, reason = len(norms[name].units), f"the norm {name}"
            for use in uses:
                value = labels[use.source] if use.source is not None else kept_labels((size,))
                vector = None
                if set(varying_dims(value)) <= {norms[name].dim % value.dim()}:
                    vector = vector_along(value, norms[name].dim % value.dim())
                if vector is None:
                    state.space.pin(value, f"{reason} (reads channels along several dimensions)")
                    vector = kept_labels((size,))
                known = found.setdefault(name, vector)
                state.space.unite(known, vector, f"{reason} (is used more than once)")
    return found


def describe_norms(norms: Mapping[str, Norm], labels: Mapping[str, Tensor], units: Units) -> tuple[Norm, ...]:
    """Return the norms that may lose channels, with the units of their channels."""
    found = [replace(norms[name], units=torch.from_numpy(units.find(vector))) for name, vector in labels.items()]
    return tuple(norm for norm in found if bool((norm.units >= 0).any()))
