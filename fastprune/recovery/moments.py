"""Second moments of the inputs and outputs of a layer, and the least squares that they determine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fastprune.host.distributed import Distributed


@dataclass
class Sums:
    """Sums over rows (x, y) of each group, float64.

    Args:
        count: number of rows, a scalar.
        x: sum of x, [G, I].
        y: sum of y, [G, O].
        xx: sum of x xᵀ, [G, I, I]; [G, 0, I] if it is not summed.
        xy: sum of x yᵀ, [G, I, O]; [G, 0, O] if it is not summed.
        yy: sum of y², [G, O].
    """

    count: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Sums)))

    def reduce_(self, peers: Distributed) -> Sums:
        """Add up over all ranks, in place."""
        for f in fields(Sums):
            peers.sum_(getattr(self, f.name))
        return self


def zero_sums(groups: int, inputs: int, outputs: int, device: torch.device, *, second: bool = True) -> Sums:
    """Return sums over no rows; ``second``: with products of x, which are large."""
    shapes = (
        (),
        (groups, inputs),
        (groups, outputs),
        (groups, inputs if second else 0, inputs),
        (groups, inputs if second else 0, outputs),
    )
    return Sums(*(torch.zeros(s, dtype=torch.float64, device=device) for s in (*shapes, (groups, outputs))))


def sum_rows(x: Tensor, y: Tensor, *, second: bool = True) -> Sums:
    """Sum over rows, ``[G, R, I]`` and ``[G, R, O]``; ``second``: with products of x.

    Products are computed in the dtype of the rows, relative to the rows' mean, so that a large mean costs no digits;
    the mean's part is added in float64.
    """
    count = x.shape[1]
    mean_x, mean_y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    x, y = x - mean_x, y - mean_y
    if not second:
        empty = zero_sums(len(x), x.shape[2], y.shape[2], x.device, second=False)
        sums = [
            total.sum(1, dtype=torch.float64) + count * mean.squeeze(1).double()
            for total, mean in ((x, mean_x), (y, mean_y))
        ]
        return replace(empty, count=empty.count + count, x=sums[0], y=sums[1])
    xx, xy, yy = (x.mT @ x).double(), (x.mT @ y).double(), y.square().sum(1, dtype=torch.float64)
    rest_x, rest_y = x.sum(1, dtype=torch.float64), y.sum(1, dtype=torch.float64)  # what rounding left of 0
    mx, my = mean_x.squeeze(1).double(), mean_y.squeeze(1).double()
    cross = rest_x.unsqueeze(2) * mx.unsqueeze(1)
    return Sums(
        torch.tensor(float(count), dtype=torch.float64, device=x.device),
        rest_x + count * mx,
        rest_y + count * my,
        xx + cross + cross.mT + count * mx.unsqueeze(2) * mx.unsqueeze(1),
        xy
        + rest_x.unsqueeze(2) * my.unsqueeze(1)
        + mx.unsqueeze(2) * rest_y.unsqueeze(1)
        + count * mx.unsqueeze(2) * my.unsqueeze(1),
        yy + 2 * rest_y * my + count * my.square(),
    )


@dataclass(frozen=True)
class Moments:
    """Moments per row, about the mean or, if the fit has no shift, about 0.

    Args:
        mean_x: [G, I]; 0 without a shift.
        mean_y: [G, O]; 0 without a shift.
        xx: [G, I, I].
        xy: [G, I, O].
        yy: [G, O].
    """

    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @staticmethod
    def of(sums: Sums, *, shifted: bool) -> Moments:
        """Return the moments of summed rows."""
        factor = 1.0 if shifted else 0.0
        x, y = factor * sums.x / sums.count, factor * sums.y / sums.count
        return Moments(
            x,
            y,
            sums.xx / sums.count - x.unsqueeze(2) * x.unsqueeze(1) if sums.xx.numel() else sums.xx,
            sums.xy / sums.count - x.unsqueeze(2) * y.unsqueeze(1) if sums.xx.numel() else sums.xy,
            sums.yy / sums.count - y.square(),
        )

    def errors(self, weight: Tensor, shift: Tensor) -> Tensor:
        """Return the mean squared error of ``y ≈ W x + b``, [G, O].

        Args:
            weight: W, [G, O, I].
            shift: b, [G, O].
        """
        spread = self.yy - 2 * (weight * self.xy.mT).sum(2) + ((weight @ self.xx) * weight).sum(2)
        offset = self.mean_y - (weight @ self.mean_x.unsqueeze(2)).squeeze(2) - shift
        return spread + offset.square()


def solve(moments: Moments, prior: Tensor, open_inputs: Tensor, ridge: float) -> Tensor:
    """Return the weight that minimises the squared error plus ``ridge`` times the squared distance from ``prior``.

    W = (Cov(y, x) + ε W₀) (Cov(x) + ε I)⁻¹ with ε = ridge · mean variance of the open inputs.

    Args:
        moments: the moments of the rows.
        prior: W₀, [G, O, I].
        open_inputs: which inputs may be used, bool [G, I]; the weights of the others are 0.
        ridge: ε, relative to the mean variance of the inputs.

    Returns:
        [G, O, I], float64.
    """
    if len(prior) == 1 and not bool(open_inputs.all()):
        chosen = open_inputs[0].nonzero().flatten()
        few = Moments(
            moments.mean_x[:, chosen],
            moments.mean_y,
            moments.xx[:, chosen][:, :, chosen],
            moments.xy[:, chosen],
            moments.yy,
        )
        weight = torch.zeros_like(prior)
        weight[:, :, chosen] = solve(few, prior[:, :, chosen], open_inputs[:, chosen], ridge)
        return weight
    both = open_inputs.unsqueeze(2) & open_inputs.unsqueeze(1)
    diagonal = moments.xx.diagonal(dim1=1, dim2=2)
    count = open_inputs.sum(1).clamp(min=1)
    epsilon = ridge * (diagonal * open_inputs).sum(1) / count
    # A row and column of the identity in place of a closed input, so that groups with different inputs solve together.
    identity = torch.eye(prior.shape[2], dtype=torch.float64, device=prior.device)
    gram = torch.where(both, moments.xx, 0.0) + identity * torch.where(
        open_inputs, epsilon.unsqueeze(1), 1.0
    ).unsqueeze(1)
    right = (moments.xy + epsilon.view(-1, 1, 1) * prior.mT) * open_inputs.unsqueeze(2)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool((failed != 0).any()):  # inputs that depend on each other, or none that varies
        found: Tensor = torch.linalg.pinv(gram, hermitian=True) @ right
    else:
        found = torch.cholesky_solve(right, factor)
    return found.mT


def choose_ridge(
    fitted: Moments, held_out: Moments, prior: Tensor, open_inputs: Tensor, ridges: Sequence[float]
) -> float:
    """Return the ridge whose fit has the smallest error on rows that it has not seen."""
    errors = {}
    for ridge in ridges:
        weight = solve(fitted, prior, open_inputs, ridge)
        shift = fitted.mean_y - (weight @ fitted.mean_x.unsqueeze(2)).squeeze(2)
        errors[ridge] = float(held_out.errors(weight, shift).sum())
    return min(errors, key=lambda ridge: errors[ridge])
