"""Terms that draw the cost of a network towards its target; r = T̂/T is the ratio that is left, p the one that is asked.

On ratios rather than FLOPs, so that one weight λ serves all networks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def log_distance(ratio: Tensor, target: float) -> Tensor:
    """R_log(r, p) = log(|r − p| + 1); its slope grows towards the target, from ½ at a distance of 1 to 1.

    Source: Gao et al., CVPR 2020, eq. 10, on ratios: with raw FLOPs the slope would jump by 1e8 at the target.
    """
    return torch.log((ratio - target).abs() + 1)


def one_sided(ratio: Tensor, target: float) -> Tensor:
    """R = log(max(r, p)/p): nothing once the budget is met. Source: Gao et al., ECCV 2022, §3.4."""
    return torch.log(ratio.clamp(min=target) / target)


def two_sided(ratio: Tensor, target: float) -> Tensor:
    """|log(r/p)|, which also draws back what went too far; the authors' release of DDNP has it for ResNets."""
    return torch.log(ratio / target).abs()


SIDES: dict[str, Callable[[Tensor, float], Tensor]] = {"one_sided": one_sided, "two_sided": two_sided}
"""By the names of the option ``resource``."""
