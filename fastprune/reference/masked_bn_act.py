"""Batch norm, activation and mask, one after another."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": Tensor.clone,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def masked_bn_act(
    x: Tensor,
    bn: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    mask: Tensor | None = None,
    *,
    activation: str | None = "relu",
    eps: float = 1e-5,
    training: bool = False,
    momentum: float = 0.1,
) -> Tensor:
    """``mask * act(bn(x))``, rounded to the dtype of ``x`` after every step.

    The same arguments and gradients as :func:`fastprune.ops.masked_bn_act`. The product has the straight-through
    gradient of the mask by itself: the activation, whatever the mask.
    """
    weight, bias, running_mean, running_var = bn
    z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    r = ACTIVATIONS[activation or "identity"](z)
    if mask is None:
        return r
    return (r * mask.view(1, -1, *[1] * (x.dim() - 2))).to(x.dtype)
