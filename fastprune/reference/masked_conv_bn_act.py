"""A convolution, frozen batch norm, sum, activation and mask, one after another."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastprune.reference.masked_bn_act import ACTIVATIONS
from fastprune.reference.straight_through import straight_through


def masked_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn: tuple[Tensor | None, Tensor | None, Tensor, Tensor] | None,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str | None = "relu",
    eps: float = 1e-5,
    open_in: int | None = None,
    open_out: int | None = None,
) -> Tensor:
    """``mask * act(bn(conv(x)) + residual)``, with the statistics in ``bn``.

    The same arguments and gradients as :func:`fastprune.ops.masked_conv_bn_act`. Channels of x behind the first
    ``open_in``, and of the mask behind the first ``open_out``, count as zero.
    """
    if open_in is not None:
        x = keep_first(x, open_in, dim=1)
    bias = None if bias is None else bias.to(x.dtype)
    z = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if bn is not None:
        gamma, beta, mean, variance = (None if tensor is None else tensor.to(z.dtype) for tensor in bn)
        z = F.batch_norm(z, mean, variance, gamma, beta, training=False, eps=eps)
    r = ACTIVATIONS[activation or "identity"](z if residual is None else z + residual)
    if open_out is not None:
        mask = keep_first(r.new_ones(r.shape[1]) if mask is None else mask, open_out, dim=0)
    return r if mask is None else r * mask.to(r.dtype).view(-1, 1, 1)


def keep_first(values: Tensor, count: int, dim: int) -> Tensor:
    """Zero ``values`` behind the first ``count`` places of ``dim``; the gradient passes everywhere."""
    kept = values.detach().clone()
    kept.narrow(dim, count, values.shape[dim] - count).zero_()
    return straight_through(kept, values)
