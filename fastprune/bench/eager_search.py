"""DMC and DDNP in torch alone: the peers of ``bench search``.

They use the network's own modules in eval mode, multiply gates in after each gated relu, compute masks and FLOPs layer
by layer in Python, and train with ``backward`` and Adam. They use none of fastprune's operators, masked networks,
graphs or costs, so that a mistake there is a disagreement here. The constants are the papers' for CIFAR-10.

Sources: Gao et al., CVPR 2020 (DMC); Gao et al., ECCV 2022 (DDNP).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune.bench.step import Network, Plain, sizes_of

LEARNING_RATE = 1e-3
DMC_REGULARISATION, DMC_DECAY = 4.0, 1e-4  # λ, β
DDNP_REGULARISATION, DDNP_COUPLING = 2.0, 2.0  # λ, ρ
TEMPERATURE, WINDOW, WIDTH_BIAS = 0.4, 0.1, 3.0  # t, γ as a part of a layer's channels
INPUT, HIDDEN = 64, 128  # of the GRU


class Flops:
    """The multiply-accumulates of the layers next to gates.

    Args:
        network: network with gates after every convolution inside a block.
        images: images of the size that counts; one is enough.
        keep: keep ratio of the whole network's multiply-accumulates.

    Attributes:
        total: T, the multiply-accumulates of the layers next to gates when all gates are open.
        target: p, the share of T that may stay to keep ``keep`` of the whole network.
    """

    def __init__(self, network: Network, images: Tensor, keep: float) -> None:
        sizes = sizes_of(network.model, images)
        macs = {conv: y[1:].numel() * conv.weight[0].numel() for conv, (_, y) in sizes.items()}  # type: ignore[index]
        self.layers: list[tuple[float, int | None, int | None]] = []  # MACs per pair of channels, gates in and out
        self.total = 0.0
        number = 0
        for block in network.blocks:
            gates_in = None
            for conv, _ in block.layers:
                gates_out = None if conv is block.layers[-1][0] else number
                channels = 1 if gates_in is None else conv.in_channels
                channels *= 1 if gates_out is None else conv.out_channels
                self.layers.append((macs[conv] / channels, gates_in, gates_out))
                self.total += macs[conv]
                number += gates_out is not None
                gates_in = gates_out
        classifier: Any = network.fc
        whole = sum(macs.values()) + classifier.weight.numel()
        self.target = 1 - (1 - keep) * whole / self.total

    def ratio(self, widths: Sequence[Tensor]) -> Tensor:
        """Return r = T(widths)/T for the number of open channels of each gated convolution."""
        left = widths[0].new_zeros(())
        for macs, gates_in, gates_out in self.layers:
            layer: Tensor | float = macs
            layer = layer if gates_in is None else layer * widths[gates_in]
            layer = layer if gates_out is None else layer * widths[gates_out]
            left = left + layer
        return left / self.total


class EagerDMC:
    """A step of DMC.

    Args:
        network: the frozen network.
        flops: costs of its layers next to gates.
        theta: first parameters of all gates [n].
        noise: uniform numbers [n] for the gates of the first step, which is compared with another implementation's.
            Later steps draw their own.
        autocast: makes the context of the network's pass; generators, masks and losses run outside it.
    """

    names = ("loss", "cross_entropy", "regulariser")

    def __init__(
        self,
        network: Plain,
        flops: Flops,
        theta: Tensor,
        noise: Tensor,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.network, self.flops = network, flops
        self.theta = nn.Parameter(theta.clone())
        self.noise: Tensor | None = noise
        self.autocast = autocast
        self.optimizer = torch.optim.Adam([self.theta], lr=LEARNING_RATE)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Do a step and return the losses in ``names`` and the gradient that it followed."""
        sizes = self.network.network.gates
        uniform = torch.rand_like(self.theta) if self.noise is None else self.noise
        self.noise = None
        gates = pass_gradient((uniform < self.theta).float(), self.theta)
        with self.autocast():
            scores = self.network.scores(images, iter(gates.split(sizes)))
        cross_entropy = F.cross_entropy(scores, labels)
        certain = pass_gradient((self.theta >= 0.5).float(), self.theta)
        ratio = self.flops.ratio([layer.sum() for layer in certain.split(sizes)])
        regulariser = torch.log((ratio - self.flops.target).abs() + 1)
        loss = cross_entropy + DMC_REGULARISATION * regulariser
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.theta.sub_(DMC_DECAY * torch.sign(self.theta - 0.5))
            self.theta.clamp_(0, 1)
        assert self.theta.grad is not None
        return loss.detach(), cross_entropy.detach(), regulariser.detach(), self.theta.grad


class EagerDDNP:
    """A step of DDNP.

    Args:
        network: the frozen network.
        flops: costs of its layers next to gates.
        scores: first parameters and input of the importance generator, by name.
        widths: first parameters and input of the width generator, by name.
        autocast: makes the context of the network's pass; generators, masks and losses run outside it.
    """

    names = ("loss", "cross_entropy", "regulariser", "coupling")

    def __init__(
        self,
        network: Plain,
        flops: Flops,
        scores: Mapping[str, Tensor],
        widths: Mapping[str, Tensor],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.network, self.flops = network, flops
        sizes = network.network.gates
        gates = len(sizes)
        self.scores_input, self.widths_input = scores["input"].clone(), widths["input"].clone()
        self.gru, self.norm = nn.GRU(INPUT, HIDDEN, bidirectional=True), nn.LayerNorm(2 * HIDDEN)
        self.heads = nn.ModuleList(nn.Linear(2 * HIDDEN, size, bias=False) for size in sizes)
        self.importance = nn.ModuleDict({"between": self.gru, "norm": self.norm, "heads": self.heads})
        self.importance.to(self.scores_input.device)
        self.width = nn.Linear(gates, gates, bias=False).to(self.scores_input.device)
        own = {name: tensor for name, tensor in scores.items() if name not in ("input", "heads")}
        heads = {f"heads.{gate}.weight": rows for gate, rows in enumerate(scores["heads"].split(sizes))}
        self.importance.load_state_dict({**own, **heads})
        self.width.load_state_dict({"weight": widths["linear.weight"]})
        self.autocast = autocast
        self.optimizer = torch.optim.Adam([*self.importance.parameters(), *self.width.parameters()], lr=LEARNING_RATE)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Do a step and return the losses in ``names`` and the gradients of both generators' parameters."""
        loss, *parts = self.losses(images, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return (
            loss.detach(),
            *(part.detach() for part in parts),
            *gradients_of(self.importance),
            *gradients_of(self.width),
        )

    def losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Return the losses in ``names``."""
        sizes = self.network.network.gates
        features, _ = self.gru(self.scores_input)
        features = F.relu(self.norm(features))[:, 0]
        raw = [head(row) / (2 * HIDDEN) ** 0.5 for head, row in zip(self.heads, features, strict=True)]
        keep = torch.sigmoid(self.width(self.widths_input) + WIDTH_BIAS)
        masks = [soft_top_k(torch.sigmoid(s), k) for s, k in zip(raw, keep.detach(), strict=True)]
        with self.autocast():
            outputs = self.network.scores(images, iter(masks))
        cross_entropy = F.cross_entropy(outputs, labels)
        ratio = self.flops.ratio([k * size for k, size in zip(keep, sizes, strict=True)])
        regulariser = torch.log(ratio.clamp(min=self.flops.target) / self.flops.target)
        distances = [k - torch.sigmoid(s / TEMPERATURE).mean() for s, k in zip(raw, keep, strict=True)]
        coupling = torch.stack(distances).square().sum()
        loss = cross_entropy + DDNP_REGULARISATION * regulariser + DDNP_COUPLING * coupling
        return loss, cross_entropy, regulariser, coupling


def soft_top_k(scores: Tensor, keep: Tensor) -> Tensor:
    """Return one layer's mask [C] (eq. 7) for scores [C] and a keep ratio; the gradient goes straight to the scores."""
    size = len(scores)
    centre = size * keep
    window = torch.minimum(2 * (size - centre), 2 * centre).clamp(1e-6, max(1e-6, float(round(WINDOW * size))))
    places = torch.arange(size, device=scores.device) + 0.5
    t = ((centre - places) / window).clamp(-0.5, 0.5)
    values = (-2 * t**3 + 1.5 * t + 0.5).to(scores.dtype)
    order = torch.argsort(scores.detach(), descending=True, stable=True)
    return pass_gradient(torch.empty_like(values).scatter(0, order, values), scores)


def pass_gradient(hard: Tensor, soft: Tensor) -> Tensor:
    """Return the values of ``hard`` with the gradient of ``soft``."""
    return soft + (hard - soft).detach()


def gradients_of(module: nn.Module) -> list[Tensor]:
    """Return the gradients of a module's parameters."""
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
