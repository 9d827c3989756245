"""The scales of all batch norms as one vector, with one mask for channels that are pruned together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastprune.graph import ChannelGraph
from fastprune.methods.scores.filters import UnitNorm, unit_batch_norms, unit_norms
from fastprune.ops import UnitTable, group_prox_


def trained_batch_norms(graph: ChannelGraph, model: nn.Module) -> list[UnitNorm]:
    """Return all batch norms whose scale takes gradients, including those without units."""
    with_units = {id(norm.module): norm for norm in unit_batch_norms(graph, model)}
    return [
        with_units.get(id(module), UnitNorm(name, module, torch.full((module.num_features,), -1)))
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.weight is not None and module.weight.requires_grad
    ]


class Scales:
    """γ and β of all channels of batch norms, and a factor m for coupled units.

    A unit whose channels pass one batch norm is pruned by its γ. A unit that passes several (a residual stream) is
    pruned by a mask m, which multiplies γ and β of all of them (§5.1 of the paper).

    Args:
        graph: the channels of ``model``.
        model: the model with the batch norms; only ``write`` changes them.
        units: the prunable units, bool [U].

    Attributes:
        gamma: γ of all channels of all batch norms that take gradients, [K].
        beta: β of the same channels, [K].
        mask: m, [U]; 1 for units that are not coupled.
        open: the open units, bool [U]; the others have γ = β = 0.
        coupled: the units that pass several batch norms, bool [U].
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module, units: Tensor) -> None:
        self.graph, self.model = graph, model
        self.norms = trained_batch_norms(graph, model)
        self.sizes = [len(norm.units) for norm in self.norms]
        device = self.norms[0].module.weight.device
        owner = torch.cat([norm.units for norm in self.norms])
        owner = owner.masked_fill((owner < 0) | ~units[owner], graph.num_units)  # the last entry is always open
        counts = torch.zeros(graph.num_units + 1).index_add(0, owner, torch.ones(len(owner)))[:-1]
        self.coupled = (counts > 1).to(device)
        self.owner = owner.to(device)
        self.gamma = nn.Parameter(torch.cat([norm.module.weight.detach() for norm in self.norms]))
        shifts = [norm.module.bias if norm.module.bias is not None else norm.module.weight * 0 for norm in self.norms]
        self.beta = nn.Parameter(torch.cat([shift.detach() for shift in shifts]))
        self.mask = nn.Parameter(torch.ones(graph.num_units, device=device, dtype=self.gamma.dtype))
        self.open = torch.ones(graph.num_units, dtype=torch.bool, device=device)
        single = torch.cat([~self.coupled.cpu(), torch.zeros(1, dtype=torch.bool)])[self.owner.cpu()]
        places = torch.arange(graph.num_units).masked_fill(~self.coupled.cpu(), -1)
        slices = [(self.gamma.detach(), 0, self.owner.cpu().masked_fill(~single, -1)), (self.mask.detach(), 0, places)]
        self.table = UnitTable(slices, graph.num_units)

    def effective(self) -> dict[str, Tensor]:
        """Return γ and β of the network by their names in the model; differentiable in γ, β and m."""
        factors = torch.where(self.coupled, self.mask, 1.0) * self.open
        factor = torch.cat([factors, factors.new_ones(1)])[self.owner]
        values: dict[str, Tensor] = {}
        parts = zip(self.norms, *((v * factor).split(self.sizes) for v in (self.gamma, self.beta)), strict=True)
        for norm, gamma, beta in parts:
            values[f"{norm.name}.weight"] = gamma
            if norm.module.bias is not None:
                values[f"{norm.name}.bias"] = beta
        return values

    @torch.no_grad()
    def write(self) -> None:
        """Write the current γ and β to the model's batch norms."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, value in self.effective().items():
            parameters[name].copy_(value)

    @torch.no_grad()
    def magnitudes(self) -> Tensor:
        """Return |γ| or |m| of every unit, [U]; 0 for closed units and those without a batch norm."""
        return self.table.norms() * self.open

    @torch.no_grad()
    def importance(self) -> Tensor:
        """Compute the factor of the magnitudes, [U]: s_k, for coupled units times the norm of their γ.

        s_k = ‖W_{·k}‖ over all readers. The paper scales it into γ and β, which relu allows and other activations do
        not, so here it is a separate factor (§4.1, eq. 3).
        """
        readers = unit_norms(self.graph, self.model, roles=("in",))
        # index_add has one order on the CPU; on CUDA it uses atomics.
        squares = torch.zeros(len(self.open) + 1, dtype=torch.float64)
        squares = squares.index_add(0, self.owner.cpu(), self.gamma.detach().cpu().double().square())[:-1]
        return (readers * torch.where(self.coupled.cpu(), squares.sqrt(), 1.0)).to(self.gamma)

    def rates(self, importance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return factors of the learning rates of γ [K], β [K] and m [U], whose steps are those of s·γ, s·β, s·m.

        A step η along the gradient of s·γ moves γ by η/s² times its own gradient.

        Args:
            importance: s, [U].
        """
        squares = importance.square()
        single = torch.cat([torch.where(self.coupled, 1.0, squares), squares.new_ones(1)])[self.owner]
        return 1 / single, 1 / single, torch.where(self.coupled, 1 / squares, 1.0)

    def shrink_(self, threshold: Tensor) -> None:
        """Apply soft thresholds [U] to γ, or to m of coupled units."""
        group_prox_(self.table, threshold)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of γ, β, m and ``open``."""
        return {name: getattr(self, name).detach().clone() for name in ("gamma", "beta", "mask", "open")}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: if the state is for another network.
        """
        for name in ("gamma", "beta", "mask", "open"):
            value: Tensor = getattr(self, name)
            if state[name].shape != value.shape:
                raise ValueError(
                    f"gcp: the state has {len(state[name])} values of {name}, this network has {len(value)}; resume "
                    "with the model and the option 'groups' of the first run"
                )
            value.copy_(state[name])
