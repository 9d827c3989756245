"""Cost terms that pull the cost ratio r = T̂/T of a network towards its target p.

They take ratios instead of FLOPs, so that one weight λ serves all networks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def log_distance(ratio: Tensor, target: float) -> Tensor:
    """Compute R_log(r, p) = log(|r − p| + 1); its slope grows from ½ at a distance of 1 to 1 at the target.

    Source: Gao et al., CVPR 2020, eq. 10, on ratios: with raw FLOPs the slope would jump by 1e8 at the target.
    """
    return torch.log((ratio - target).abs() + 1)


def one_sided(ratio: Tensor, target: float) -> Tensor:
    """Compute R = log(max(r, p)/p), 0 within the budget. Source: Gao et al., ECCV 2022, §3.4."""
    return torch.log(ratio.clamp(min=target) / target)


def two_sided(ratio: Tensor, target: float) -> Tensor:
    """Compute |log(r/p)|, which also raises a ratio below the target; DDNP's release has it for ResNets."""
    return torch.log(ratio / target).abs()


SIDES: dict[str, Callable[[Tensor, float], Tensor]] = {"one_sided": one_sided, "two_sided": two_sided}
"""The cost term of each value of the option ``resource``."""
