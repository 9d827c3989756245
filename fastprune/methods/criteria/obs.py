"""Structured Optimal Brain Surgeon: what the network loses when a channel goes and the others take its place.

A reader computes y = W x + b over its patches x. If channel c goes and the reader is fitted anew to those that stay,

    L_c = ½ T tr(S W_c ([G⁻¹]_cc)⁻¹ W_cᵀ)

with the covariance G of the patches, the columns W_c and the block [G⁻¹]_cc of the channel, the number T of positions
per sample, and S, the curvature of the network's loss in y, by the mean of the products of its gradients (Grosse and
Martens, ICML 2016: the Fisher matrix of a convolution is about T G ⊗ S). The channel that loses least goes, then

    W ← W − W_c ([G⁻¹]_cc)⁻¹ [G⁻¹]_c:        G⁻¹ ← G⁻¹ − [G⁻¹]_:c ([G⁻¹]_cc)⁻¹ [G⁻¹]_c:

(Hassibi and Stork, NIPS 1992, eq. 5, for blocks), until one is left. A channel that several layers read loses in each.

A score is L_c to a power. The curvature takes the positions of a map as independent, and does not see that later layers
make up for earlier ones; so losses of early layers are too large beside those of late ones. The power moves them
together.

Where a reader has several columns for a channel (maps that were flattened), the sum of their single losses stands for
the loss of all.

Channels with a reader that cannot be fitted stay: a transposed convolution, a weight that is computed, too many inputs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastprune.data.nests import count_samples
from fastprune.graph import Group
from fastprune.graph.model_state import state_of
from fastprune.methods.contract import Task
from fastprune.methods.criteria.calibrated import CalibratedConfig, CalibratedMethod
from fastprune.methods.criteria.readings import true_readers
from fastprune.methods.scores.ranking import RANKINGS, Ranking
from fastprune.networks.observed import ObservedNetwork, Reading
from fastprune.options import option
from fastprune.recovery.compensation import MOST_UNKNOWNS
from fastprune.recovery.moments import sum_rows
from fastprune.recovery.readers import Reader, count_unknowns

log = logging.getLogger(__name__)

ROWS = 8  # rows per unknown, as compensation takes
LEAST_ROWS = 16384
RIDGE = 1e-2  # of the mean variance, as compensation chooses most often


@dataclass(frozen=True)
class OBSConfig(CalibratedConfig):
    """Options of structured OBS."""

    ranking: Ranking = option("knapsack", RANKINGS)
    curvature: Literal["outputs", "loss", "none"] = option(
        "outputs",
        "outputs: of the squared change of the network's outputs; loss: of its loss; none: every layer's alike",
    )
    exponent: float = option(
        0.5,
        "losses are raised to this power before they are added; below 1 layers are treated more alike",
        above=0.0,
    )
    rounds: int = option(64, "rounds in which the channels of a group go; each computes the losses anew", minimum=1)


class OBS(CalibratedMethod):
    """Remove the channels that the others can replace, with what the network loses by each."""

    name = "obs"
    paper = "Hassibi and Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon, NIPS 1992"
    comparable = True
    Config: ClassVar[type[Any]] = OBSConfig
    config: OBSConfig

    def setup(self, task: Task) -> None:
        """Find the readers.

        Raises:
            BudgetError: if the budget is out of reach; says what is in reach.
            ValueError: if no prunable channel has readers that can be fitted.
        """
        graph, layers = task.graph, true_readers(task.graph)
        self.network = ObservedNetwork(graph, task.model, layers)
        self.parameters = state_of(task.model)
        nodes = {node.name: node for node in self.network.module.graph.nodes}
        found = {layer.node: Reader.of(nodes[layer.node], layer) for layer in layers}
        self.readers = {
            node: reader
            for node, reader in found.items()
            if reader is not None and count_unknowns(reader, self.parameters[reader.layer.weight]) <= MOST_UNKNOWNS
        }
        unread = [layer for layer in layers if layer.node not in self.readers]
        self.measured = torch.ones(graph.num_units, dtype=torch.bool)
        for group in graph.groups:
            self.measured[group.units] = not any(layer.reads(group) for layer in unread)
        staying = super().prunable(task) & ~self.measured
        if bool(staying.any()):
            names = [group.name for group in graph.groups if bool(staying[group.units].any())]
            log.warning(
                "obs: the channels of %s stay, since a layer that reads them cannot be fitted", ", ".join(names)
            )
        super().setup(task)
        self.steps = max(1, -(-self.config.images // self.config.batch_size))

    def prunable(self, task: Task) -> Tensor:
        """Return the units of the option ``groups`` whose readers can all be fitted."""
        prunable = super().prunable(task) & self.measured
        if not bool(prunable.any()):
            raise ValueError("obs: no prunable channel has readers that can be fitted; choose another method")
        return prunable

    def calibrate(self, task: Task, inputs: Any, targets: Any) -> None:
        """Sum the products of inputs, and of gradients, over some positions of every reader."""
        uses_gradients = self.config.curvature != "none"
        # A generator of its own for each batch: ranks may draw different numbers of numbers.
        drawn = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=task.rng)))
        with torch.set_grad_enabled(uses_gradients):
            output, target = task.objective.run(self.network, inputs, targets)
            readings = self.network.readings
            grads: list[Tensor | None] = [None] * len(readings)
            if uses_gradients:
                grads = list(
                    self.network.output_gradients(self.scalar(task, output, target, drawn) * count_samples(inputs))
                )
            with torch.no_grad():
                for reading, grad in zip(readings, grads, strict=True):
                    self.sum_up(reading, grad, drawn)

    def scalar(self, task: Task, output: Any, target: Any, drawn: torch.Generator) -> Tensor:
        """Return what is differentiated, a mean over the samples."""
        if self.config.curvature == "loss":
            return task.objective.compute(output, target)
        outputs = [
            x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()
        ]
        # The mean of the squared gradients of random projections is the mean of all squared gradients.
        noises = [torch.randn(x.shape, generator=drawn).to(x.device) for x in outputs]
        parts = [(x.float() * noise).sum() / len(x) for x, noise in zip(outputs, noises, strict=True)]
        return torch.stack(parts).sum()

    def sum_up(self, reading: Reading, grad: Tensor | None, drawn: torch.Generator) -> None:
        """Add the moments of one reading."""
        reader = self.readers.get(reading.node.name)
        if reader is None:
            return
        weight = self.parameters[reader.layer.weight]
        most = max(LEAST_ROWS, ROWS * count_unknowns(reader, weight)) // self.steps + 1
        count = reader.count_places(reading.y)
        places = torch.randperm(count, generator=drawn)[:most] if count > most else torch.arange(count)
        x, g = reader.rows(reading.x, reading.y if grad is None else grad, weight, places.to(reading.x.device))
        sums = sum_rows(x, g[..., :0])
        for part in ("count", "x", "xx"):
            self.add(f"{reading.node.name}/{part}", getattr(sums, part))
        if grad is not None:
            self.add(f"{reading.node.name}/gg", (g.mT @ g).double())

    def scores(self, task: Task) -> Tensor:
        """Return the loss of each unit's removal, after all that lose less in its group."""
        totals = self.reduced(task)
        losses = torch.zeros(task.graph.num_units, dtype=torch.float64)
        for group in task.graph.groups:
            readers = [reader for reader in self.readers.values() if reader.layer.reads(group)]
            if readers:
                losses[group.units] = self.eliminate(group, [self.surgery(r, group, totals) for r in readers])
        return losses.clamp(min=0) ** self.config.exponent  # rounding may leave less than nothing

    def surgery(self, reader: Reader, group: Group, totals: dict[str, Tensor]) -> Surgery:
        """Return the reader's weight and moments, ready for the removal of the group's channels."""
        name, weight = reader.node.name, self.parameters[reader.layer.weight].detach()
        count, x, xx = (totals[f"{name}/{part}"] for part in ("count", "x", "xx"))
        mean = x / count
        gram = xx / count - mean.unsqueeze(2) * mean.unsqueeze(1)
        outputs = weight.shape[0] // reader.groups
        curvature = torch.eye(outputs, dtype=torch.float64, device=weight.device).expand(reader.groups, -1, -1)
        w = weight.double().reshape(reader.groups, outputs, -1)
        if f"{name}/gg" in totals:
            curvature = totals[f"{name}/gg"] / count
        else:  # relative to the variance of what the layer returns
            curvature = curvature / ((w @ gram) * w).sum()
        units = reader.layer.in_units.reshape(reader.groups, -1)
        return Surgery.begin(w, gram, curvature * reader.layer.positions / 2, units, weight[0, 0].numel())

    def eliminate(self, group: Group, surgeries: list[Surgery]) -> Tensor:
        """Return the losses of a group's units."""
        left = torch.ones(group.size, dtype=torch.bool)
        order, marginal = [], []
        step = max(1, -(-group.size // self.config.rounds))
        while bool(left.any()):
            losses = sum(s.losses(group) for s in surgeries)
            losses = torch.where(left, losses, torch.inf)
            gone = losses.topk(min(step, int(left.sum())), largest=False).indices
            for s in surgeries:
                s.remove(group.start + gone)
            left[gone] = False
            order += gone.tolist()
            marginal += losses[gone].tolist()
        result = torch.empty(group.size, dtype=torch.float64)
        result[torch.tensor(order)] = rising(torch.tensor(marginal, dtype=torch.float64))
        return result


@dataclass
class Surgery:
    """The weight of a reader and the inverse of its inputs' covariance, as channels go one after the other.

    Args:
        weight: W, [G, O, C, B] for C channels of B inputs each.
        curved: S W with the curvature S, in the same shape.
        inverse: [G, C, B, C, B].
        units: the unit of each channel, [G, C]; -1 once it has gone, or if it has none.
    """

    weight: Tensor
    curved: Tensor
    inverse: Tensor
    units: Tensor

    @staticmethod
    def begin(weight: Tensor, gram: Tensor, curvature: Tensor, units: Tensor, block: int) -> Surgery:
        """Return the state with all channels."""
        groups, outputs, inputs = weight.shape
        epsilon = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
        inverse = torch.linalg.inv(
            gram + epsilon.view(-1, 1, 1) * torch.eye(inputs, dtype=gram.dtype, device=gram.device)
        )
        channels = inputs // block
        return Surgery(
            weight.reshape(groups, outputs, channels, block).clone(),
            (curvature @ weight).reshape(groups, outputs, channels, block),
            inverse.reshape(groups, channels, block, channels, block),
            units.clone(),
        )

    def losses(self, group: Group) -> Tensor:
        """Return the loss of each of a group's units, float64 [group.size]; 0 for units that it does not read."""
        result = torch.zeros(group.size, dtype=torch.float64)
        g, c = group.holds(self.units).nonzero(as_tuple=True)
        if len(g):
            blocks = self.inverse[g, c, :, c, :]  # [n, B, B]
            columns = self.weight[g, :, c]  # [n, O, B]
            spread = torch.linalg.solve(blocks, columns.mT)  # [n, B, O]
            values = (self.curved[g, :, c] * spread.mT).sum((1, 2))
            result.index_add_(0, self.units[g, c] - group.start, values.cpu())
        return result

    def remove(self, units: Tensor) -> None:
        """Remove units and let the others take their place."""
        _, outputs, channels, block = self.weight.shape
        going = torch.isin(self.units, units)
        for g in going.any(1).nonzero().flatten().tolist():
            chosen = going[g].nonzero().flatten()
            flat = self.inverse[g].reshape(channels * block, channels * block)
            rows = (chosen.unsqueeze(1) * block + torch.arange(block)).flatten().to(flat.device)
            across = flat[rows]  # [r, I]
            solved = torch.linalg.solve(across[:, rows], across)  # [r, I]
            for w in (self.weight[g].reshape(outputs, -1), self.curved[g].reshape(outputs, -1)):
                w -= w[:, rows] @ solved
                w[:, rows] = 0
            flat -= across.mT @ solved
            # What has gone: 0 in the weights and the identity here, so that later steps leave it alone.
            flat[rows] = 0
            flat[:, rows] = 0
            flat[rows, rows] = 1
            self.units[g, chosen] = -1


def rising(values: Tensor) -> Tensor:
    """Return the nearest rising sequence (least squares), plus a trace of the order, so that ties keep it."""
    means: list[float] = []
    counts: list[int] = []
    for value in values.tolist():
        means.append(value)
        counts.append(1)
        while len(means) > 1 and means[-2] >= means[-1]:
            count = counts[-2] + counts[-1]
            means[-2:] = [(means[-2] * counts[-2] + means[-1] * counts[-1]) / count]
            counts[-2:] = [count]
    result = torch.repeat_interleave(torch.tensor(means, dtype=torch.float64), torch.tensor(counts))
    return result * (1 + 1e-12 * torch.arange(len(result), dtype=torch.float64))
