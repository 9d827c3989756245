"""Batch norm, activation and mask in one pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprune.ops.activations import check_activation
from fastprune.ops.arguments import check_floats, check_vector, vector_dtype
from fastprune.ops.channel_moments import channel_moments
from fastprune.ops.library import refuse_transforms
from fastprune.ops.masked_act import masked_act, masked_act_backward, masked_act_in_place

BatchNorm = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Weight, bias, running mean and running variance, ``[C]`` each."""


def _compute_coefficients(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``scale`` and ``shift`` of ``z = x * scale + shift``, and 1 / the standard deviation."""
    inverse_deviation = (variance + eps).rsqrt()
    scale = inverse_deviation if weight is None else weight * inverse_deviation
    shift = -mean * scale if bias is None else bias - mean * scale
    return scale, shift, inverse_deviation


class _MaskedBNAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        mask: Tensor | None,
        activation: str,
        eps: float,
        training: bool,
    ) -> Tensor:
        scale, shift, inverse_deviation = _compute_coefficients(weight, bias, mean, variance, eps)
        y, saved = masked_act(x, scale, shift, mask, activation=activation, want_saved=True)
        ctx.activation, ctx.training = activation, training
        # The input is needed for the gradient of the weight and through batch statistics, not for that of the mask.
        keeps_input = ctx.needs_input_grad[1] or (training and ctx.needs_input_grad[0])
        ctx.save_for_backward(saved, x if keeps_input else None, mask, scale, mean, inverse_deviation)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved, x, mask, scale, mean, inverse_deviation = ctx.saved_tensors
        want_dx, want_dweight, want_dbias, _, _, want_dmask, *_ = ctx.needs_input_grad
        through_statistics = ctx.training and want_dx
        dx, dmask, dshift, dscale = masked_act_backward(
            dy,
            saved,
            mask,
            scale,
            activation=ctx.activation,
            x=x,
            centre=mean,
            want_dx=want_dx and not through_statistics,
            want_dmask=want_dmask,
            want_dshift=want_dbias or through_statistics,
            want_dscale=want_dweight or through_statistics,
        )
        if through_statistics:
            assert dshift is not None
            assert dscale is not None
            # dx = scale (dz - mean(dz) - x_hat mean(dz x_hat)), x_hat = (x - mean) / deviation
            factor = -scale / (dy.numel() // dy.size(1))
            dx = masked_act_backward(
                dy,
                saved,
                mask,
                scale,
                activation=ctx.activation,
                x=x,
                centre=mean,
                slope=factor * inverse_deviation.square() * dscale,
                offset=factor * dshift,
            )[0]
        dweight = dscale * inverse_deviation if want_dweight and dscale is not None else None
        return dx, dweight, dshift if want_dbias else None, None, None, dmask, None, None, None


def _check_vector(name: str, vector: Tensor | None, x: Tensor) -> Tensor | None:
    return None if vector is None else check_vector(name, vector, x, x.size(1))


def _update_running(running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor, momentum: float) -> None:
    """Update them with torch's own in-place operators, which compilers know how to functionalise."""
    with torch.no_grad():
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(variance, alpha=momentum)


def _frozen_statistics(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None) -> tuple[Tensor, Tensor]:
    if running_mean is None or running_var is None:
        raise ValueError("bn: got no running statistics, needs them unless training=True")
    mean = check_vector("running_mean", running_mean, x, x.size(1))
    return mean, check_vector("running_var", running_var, x, x.size(1))


def _batch_statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float | None
) -> tuple[Tensor, Tensor]:
    """Compute mean and variance of the batch, and update the running ones."""
    if momentum is None:
        raise ValueError("momentum: got None, needs a number; for a cumulative average pass 1 / num_batches_tracked")
    if (running_mean is None) != (running_var is None):
        raise ValueError("bn: got one of running_mean and running_var, needs both or neither")
    _check_vector("running_mean", running_mean, x)
    _check_vector("running_var", running_var, x)
    if x.numel() == 0:  # nothing to learn from, and nothing to normalise
        dtype = vector_dtype(x)
        return x.new_zeros(x.size(1), dtype=dtype), x.new_ones(x.size(1), dtype=dtype)
    count = x.numel() // x.size(1)
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
    mean, variance = channel_moments(x.detach())
    if running_mean is not None and running_var is not None:
        _update_running(running_mean, running_var, mean, variance * (count / (count - 1)), momentum)
    return mean, variance


def batch_norm_in_place(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, activation: str, eps: float
) -> Tensor:
    """Compute ``act(bn(x))`` with the statistics of the batch in the memory of x, which must not be used again.

    Private, and without checks. Autograd does not see this.

    Args:
        x: ``[N, C, *spatial]``, more than one value for each channel.
        weight: ``[C]``, float64 beside a float64 x, else float32, as is ``bias``.
        bias: ``[C]``.
        activation: One of ``fastprune.ops.activations.ACTIVATIONS``.
        eps: Number added to the variance.
    """
    mean, variance = channel_moments(x)
    scale, shift, _ = _compute_coefficients(weight, bias, mean, variance, eps)
    return masked_act_in_place(x, scale, shift, activation=activation)


def masked_bn_act(
    x: Tensor,
    bn: BatchNorm,
    mask: Tensor | None = None,
    *,
    activation: str | None = "relu",
    eps: float = 1e-5,
    training: bool = False,
    momentum: float | None = 0.1,
) -> Tensor:
    r"""Compute batch norm, activation and channel mask in one pass over ``x``.

    .. math:: y = m_c \, r, \qquad
        r = \operatorname{act}\left(\frac{x - \mu_c}{\sqrt{\sigma^2_c + \epsilon}} w_c + b_c\right)

    The backward pass reads the gradient and one tensor of the size of ``y`` once. It computes the gradients of ``x``,
    ``mask`` and, if they require one, of weight and bias (which also read ``x``). That of the mask is straight-through:
    :math:`\partial L / \partial m_c = \sum \partial L / \partial y \cdot r`, also for closed channels.

    With ``training=True`` the statistics are those of the batch (biased variance, summed in float64), the gradient of
    ``x`` goes through them, and ``running_mean`` and ``running_var`` (unbiased) are updated in place, also for closed
    channels. Everything is deterministic.

    Args:
        x: ``[N, C, *spatial]`` of any rank from 2, float16, bfloat16, float32 or float64. Contiguous and channels_last
            tensors, and some neighbouring channels of such tensors, are read in place; others are copied.
        bn: ``(weight, bias, running_mean, running_var)``, each ``[C]``. ``weight`` and ``bias`` may be ``None`` (1 and
            0), in training also both running statistics (not updated).
        mask: ``[C]``; ``None``: 1 everywhere. Vectors, also those of ``bn``, have the dtype of ``x``, or float32 beside
            float16 and bfloat16, as under autocast. Kernels compute with them in float32 (float64 beside float64).
        activation: ``"identity"`` (or ``None``), ``"relu"``, ``"relu6"``, ``"silu"`` or ``"hardswish"``.
        eps: Number added to the variance.
        training: Whether to normalise with the statistics of the batch.
        momentum: Weight of the batch in the running statistics. For a cumulative average (torch's ``None``) pass
            ``1 / num_batches_tracked``.

    Returns:
        ``y``, with the dtype and memory format of ``x``.

    Raises:
        TypeError: A tensor has a dtype that is not listed above.
        ValueError: Shapes or devices do not fit; the activation is unknown; running statistics are missing; in
            training, ``momentum`` is ``None`` or a channel has a single value.

    Source: straight-through mask gradient: DMC (Gao et al., CVPR 2020), section 3.

    Example:
        >>> import torch
        >>> from fastprune import ops
        >>> x = torch.tensor([[1.0, -2.0, 3.0], [5.0, 6.0, -7.0]])
        >>> frozen = (None, None, torch.ones(3), torch.full((3,), 4.0))
        >>> ops.masked_bn_act(x, frozen, torch.tensor([1.0, 0.5, 0.0]), eps=0.0)
        tensor([[0.0000, 0.0000, 0.0000],
                [2.0000, 1.2500, 0.0000]])
    """
    refuse_transforms("masked_bn_act")
    activation = check_activation(activation)
    check_floats("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: got shape {list(x.shape)}, needs [N, C] or [N, C, *spatial]")
    weight, bias = _check_vector("weight", bn[0], x), _check_vector("bias", bn[1], x)
    mask = _check_vector("mask", mask, x)
    mean, variance = _batch_statistics(x, *bn[2:], momentum) if training else _frozen_statistics(x, *bn[2:])
    inputs = (x, weight, bias, mask)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        y: Tensor = _MaskedBNAct.apply(x, weight, bias, mean, variance, mask, activation, eps, training)
        return y
    scale, shift, _ = _compute_coefficients(weight, bias, mean, variance, eps)
    return masked_act(x, scale, shift, mask, activation=activation)[0]
