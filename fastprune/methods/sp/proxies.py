"""The measurements of a search of SP: candidates of a super-net under one proxy, or under all of them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastprune.methods.sp.stage_losses import PROXIES, Proxy, Query, StageData, lay_out, make_stage_data
from fastprune.methods.sp.supernet import Part, SuperNet, WholeNetwork
from fastprune.training.objective import Objective

Adaptor = Literal["closed_form", "trained"]
ADAPTORS: tuple[Adaptor, ...] = ("closed_form", "trained")


@dataclass(frozen=True)
class Candidates:
    """The candidates of a super-net under one proxy.

    Args:
        parts: the stages, or the whole network alone.
        data: what their losses are measured on.
    """

    parts: Sequence[Part]
    data: Sequence[StageData]

    def query(self, number: int, mask: Tensor) -> Query:
        """Return the query for a part under a mask [U] over the whole network."""
        return number, self.parts[number].own_mask(mask)

    def losses(self, mask: Tensor) -> list[float]:
        """Measure the loss of each part under a mask [U] over the whole network; their sum is the proxy."""
        return [self.data[number].loss(own) for number, own in (self.query(n, mask) for n in range(len(self.parts)))]


@torch.no_grad()
def make_candidates(
    net: SuperNet,
    groups: Sequence[int],
    images: Tensor,
    targets: Tensor,
    *,
    proxy: Proxy,
    adaptor: Adaptor,
    objective: Objective | None = None,
    features: Sequence[Tensor] | None = None,
) -> Candidates:
    """Compute what the losses of candidates are measured on.

    Args:
        net: the super-net.
        groups: the groups whose widths are searched.
        images: held-out images, [N, C, H, W].
        targets: their targets, [N, ...].
        proxy: the loss.
        adaptor: whether candidates are compared through the trained adaptors or through their own best ones.
        objective: the loss of the full network, for ``fisher``; None = cross-entropy.
        features: what ``net.features(images)`` returns, if it is known.

    Raises:
        ValueError: if ``network`` is asked for under a loss of the user's own, or there are too few images to fit
            adaptors on.
    """
    objective = objective or Objective()
    if proxy == "network":
        objective.require_classification("proxy 'network'")
        whole = WholeNetwork(net.graph, net.model, groups, images)
        return Candidates([whole], [StageData(whole.slices.freeze(), lay_out(images), targets, proxy)])
    fitted = adaptor == "closed_form"
    parts = net.own_features if fitted else net.parts
    data = make_stage_data(
        [part.slices for part in parts],
        net.features(images) if features is None else features,
        proxy=proxy,
        fitted=fitted,
        gradients=net.gradients(images, targets, objective) if proxy == "fisher" else None,
    )
    return Candidates(parts, data)


def measure_proxies(
    net: SuperNet,
    groups: Sequence[int],
    masks: Sequence[Tensor],
    images: Tensor,
    targets: Tensor,
    objective: Objective | None = None,
) -> list[dict[str, list[float]]]:
    """Measure sub-networks of a trained super-net by all proxies, for example to see how well each of them ranks.

    Args:
        net: the super-net; ``SP.net`` after the training.
        groups: the groups whose widths differ; ``sum(SP.groups, ())``.
        masks: the sub-networks, bool [U] each.
        images: held-out images, [N, C, H, W].
        targets: their targets, [N, ...].
        objective: the loss of the full network; None = cross-entropy.

    Returns:
        For each mask the losses by name of the proxy: ``network`` alone, the others for each stage, as ``mse`` (with
        the adaptor in closed form) and ``mse_trained``. The sum over stages is what a search minimises; less is better.
    """
    features = net.features(images)
    found: list[dict[str, list[float]]] = [{} for _ in masks]
    for proxy in PROXIES:
        for adaptor in ADAPTORS if proxy != "network" else ADAPTORS[:1]:
            candidates = make_candidates(
                net, groups, images, targets, proxy=proxy, adaptor=adaptor, objective=objective, features=features
            )
            name = proxy if adaptor == "closed_form" else f"{proxy}_trained"
            for losses, mask in zip(found, masks, strict=True):
                losses[name] = candidates.losses(mask)
    return found
