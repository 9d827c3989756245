"""What stands between two convolutions: scale, shift, activation and mask of every channel, forward and backward.

Private: :func:`fastprune.ops.masked_bn_act` and the fused convolution are made of these two. Tensors are
``[N, C, *spatial]``, contiguous or channels_last, and may be views of some neighbouring channels of a wider tensor:
``x[:, :k]`` is taken as it is. Vectors are ``[C]``, float64 beside float64 tensors, else float32.
"""

import torch
from torch import Tensor

from fastprune.ops.layout import as_views, empty_like_views
from fastprune.ops.library import _C, register


def _forward(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, mask: Tensor | None, activation: str, want_saved: bool
) -> tuple[Tensor, Tensor]:
    (x,) = as_views(x)
    scale, shift, mask = (None if vector is None else vector.contiguous() for vector in (scale, shift, mask))
    y = empty_like_views(x)
    saved = empty_like_views(x) if want_saved else None
    _C.masked_act(x, scale, shift, mask, activation, y, saved, torch.get_num_threads())
    return y, x.new_empty(0) if saved is None else saved


def _forward_fake(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, mask: Tensor | None, activation: str, want_saved: bool
) -> tuple[Tensor, Tensor]:
    return empty_like_views(x), empty_like_views(x) if want_saved else x.new_empty(0)


register(
    "_masked_act(Tensor x, Tensor? scale, Tensor? shift, Tensor? mask, str activation, bool want_saved)"
    " -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)


def _gradients(saved: Tensor, wants: list[bool]) -> list[Tensor]:
    """Uninitialised ``dx``, ``dmask``, ``dshift`` and ``dscale``; empty where not wanted."""
    dx = empty_like_views(saved) if wants[0] else saved.new_empty(0)
    real = torch.float64 if saved.dtype == torch.float64 else torch.float32
    return [dx, *(saved.new_empty(saved.size(1) if want else 0, dtype=real) for want in wants[1:])]


def _backward(
    dy: Tensor,
    saved: Tensor,
    x: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    centre: Tensor | None,
    slope: Tensor | None,
    offset: Tensor | None,
    activation: str,
    wants: list[bool],
) -> list[Tensor]:
    saved, dy, *rest = as_views(saved, dy, x)
    x = rest[0] if rest else None
    mask, scale, centre, slope, offset = (
        None if vector is None else vector.contiguous() for vector in (mask, scale, centre, slope, offset)
    )
    results = _gradients(saved, wants)
    outputs = [result if want else None for want, result in zip(wants, results, strict=True)]
    partials = None
    if dy.is_cuda and any(wants[1:]):
        count = sum(wants[1:]) * _C.masked_act_partials(dy, saved, x, outputs[0])
        partials = torch.empty(count, dtype=torch.float64, device=dy.device)
    dx, dmask, dshift, dscale = outputs
    _C.masked_act_backward(
        dy,
        saved,
        x,
        mask,
        scale,
        centre,
        slope,
        offset,
        activation,
        dx,
        dmask,
        dshift,
        dscale,
        partials,
        torch.get_num_threads(),
    )
    return results


def _backward_fake(
    dy: Tensor,
    saved: Tensor,
    x: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    centre: Tensor | None,
    slope: Tensor | None,
    offset: Tensor | None,
    activation: str,
    wants: list[bool],
) -> list[Tensor]:
    return _gradients(saved, wants)


register(
    "_masked_act_backward(Tensor dy, Tensor saved, Tensor? x, Tensor? mask, Tensor? scale, Tensor? centre,"
    " Tensor? slope, Tensor? offset, str activation, bool[] wants) -> Tensor[]",
    _backward,
    _backward_fake,
)


def masked_act(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    activation: str = "relu",
    want_saved: bool = False,
) -> tuple[Tensor, Tensor]:
    """``act(x * scale + shift) * mask`` and what :func:`masked_act_backward` needs of it. No gradient of its own.

    Args:
        x: ``[N, C, *spatial]``, float16, bfloat16, float32 or float64.
        scale: ``[C]``; ``None``: 1.
        shift: ``[C]``; ``None``: 0.
        mask: ``[C]``; ``None``: 1.
        activation: One of ``fastprune.ops.activations.ACTIVATIONS``.
        want_saved: Whether there will be a backward pass.

    Returns:
        ``y``, and ``saved`` (empty if not wanted): the activation from before the mask for identity, relu and relu6,
        ``x * scale + shift`` for silu and hardswish. Both in the memory format of ``x``.
    """
    y, saved = torch.ops.fastprune._masked_act(x, scale, shift, mask, activation, want_saved)
    return y, saved


def masked_act_in_place(x: Tensor, scale: Tensor, shift: Tensor, *, activation: str) -> Tensor:
    """Compute ``act(x * scale + shift)`` in the memory of x, which must not be used again.

    An x that the kernels cannot read in place is copied. Autograd does not see this.
    """
    (x,) = as_views(x)
    _C.masked_act(x, scale.contiguous(), shift.contiguous(), None, activation, x, None, torch.get_num_threads())
    return x


def masked_act_saving_in_place(z: Tensor, mask: Tensor | None, *, activation: str) -> tuple[Tensor, Tensor]:
    """Compute ``act(z) * mask`` and what :func:`masked_act_backward` needs, in the memory of z; do not use z again.

    Autograd does not see this.
    """
    (z,) = as_views(z)
    y = empty_like_views(z)
    saved = z if activation in ("relu", "relu6") else None  # for the others z is saved unchanged
    mask = None if mask is None else mask.contiguous()
    _C.masked_act(z, None, None, mask, activation, y, saved, torch.get_num_threads())
    return y, z


def masked_act_backward(
    dy: Tensor,
    saved: Tensor,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    activation: str = "relu",
    x: Tensor | None = None,
    centre: Tensor | None = None,
    slope: Tensor | None = None,
    offset: Tensor | None = None,
    want_dx: bool = True,
    want_dmask: bool = False,
    want_dshift: bool = False,
    want_dscale: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of :func:`masked_act`, in one pass over ``dy`` and ``saved`` (and ``x`` where it is needed).

    With ``dz = dy * mask * act'(z)``: ``dx = dz * scale + (x - centre) * slope + offset``, ``dmask`` = sum of
    ``dy * r``, also where the mask is 0, ``dshift`` = sum of ``dz``, ``dscale`` = sum of ``dz * (x - centre)``.

    Args:
        dy: ``[N, C, *spatial]``, gradient of ``y``.
        saved: What the forward pass saved; ``dx`` gets its memory format.
        mask: As in the forward pass, ``[C]``.
        scale: As in the forward pass, ``[C]``.
        activation: As in the forward pass.
        x: As in the forward pass, for ``want_dscale`` and for ``slope``.
        centre: ``[C]``, what ``dscale`` and ``slope`` subtract from ``x``; ``None``: 0.
        slope: ``[C]``, together with ``offset``: the gradient through batch statistics.
        offset: ``[C]``.
        want_dx: Whether to compute ``dx``, and so on.
        want_dmask: ...
        want_dshift: ...
        want_dscale: ...

    Returns:
        ``(dx, dmask, dshift, dscale)``, ``None`` where not wanted. Sums are float32, float64 beside float64 tensors.
    """
    wants = [want_dx, want_dmask, want_dshift, want_dscale]
    vectors = (mask, scale, centre, slope, offset)
    results = torch.ops.fastprune._masked_act_backward(dy, saved, x, *vectors, activation, wants)
    dx, dmask, dshift, dscale = (result if want else None for want, result in zip(wants, results, strict=True))
    return dx, dmask, dshift, dscale
