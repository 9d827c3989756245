"""The passes between two convolutions: scale, shift, activation and mask of every channel, forward and backward.

Private: parts of :func:`fastprune.ops.masked_bn_act` and the convolutions. Tensors are ``[N, C, *spatial]``, contiguous
or channels_last, and may be views of some neighbouring channels of a wider tensor: ``x[:, :k]`` is not copied. Vectors
are ``[C]``, float64 beside float64 tensors, else float32.
"""

from typing import Any

import torch
from torch import Tensor

from fastprune.ops.arguments import vector_dtype
from fastprune.ops.layout import as_views, empty_like_views
from fastprune.ops.library import _C, register

Vectors = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Scale, shift and mask."""


def _prepare(x: Tensor, vectors: Vectors, residual: Tensor | None) -> tuple[Tensor, Vectors, Tensor | None]:
    """Return the arguments as the kernels read them; copy only those that they cannot read."""
    x, *rest = as_views(x, residual)
    scale, shift, mask = (None if vector is None else vector.contiguous() for vector in vectors)
    return x, (scale, shift, mask), rest[0] if rest else None


def _forward(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    activation: str,
    want_saved: bool,
) -> tuple[Tensor, Tensor]:
    x, vectors, residual = _prepare(x, (scale, shift, mask), residual)
    y = empty_like_views(x)
    saved = empty_like_views(x) if want_saved else None
    _C.masked_act(x, *vectors, activation, y, saved, torch.get_num_threads(), residual)
    return y, x.new_empty(0) if saved is None else saved


def _fake_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    want_saved = rest[-1]
    return empty_like_views(x), empty_like_views(x) if want_saved else x.new_empty(0)


register(
    "_masked_act(Tensor x, Tensor? scale, Tensor? shift, Tensor? mask, Tensor? residual, str activation,"
    " bool want_saved) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)


def _in_place(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> None:
    _C.masked_act(x, scale, shift, mask, activation, x, None, torch.get_num_threads(), residual)


def _saving_in_place(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    activation: str,
    writes: bool,
) -> Tensor:
    y = empty_like_views(x)
    _C.masked_act(x, scale, shift, mask, activation, y, x if writes else None, torch.get_num_threads(), residual)
    return y


_ARGUMENTS = "Tensor(a!) x, Tensor? scale, Tensor? shift, Tensor? mask, Tensor? residual, str activation"
register(f"_masked_act_in_place({_ARGUMENTS}) -> ()", _in_place, lambda *arguments: None)
register(
    f"_masked_act_saving_in_place({_ARGUMENTS}, bool writes) -> Tensor",
    _saving_in_place,
    lambda x, *rest: empty_like_views(x),
)


def _make_gradients(saved: Tensor, wants: list[bool]) -> list[Tensor]:
    """Return uninitialised ``dx``, ``dmask``, ``dshift`` and ``dscale``; empty where not wanted."""
    dx = empty_like_views(saved) if wants[0] else saved.new_empty(0)
    return [dx, *(saved.new_empty(saved.size(1) if want else 0, dtype=vector_dtype(saved)) for want in wants[1:])]


def _backward(
    dy: Tensor,
    saved: Tensor,
    x: Tensor | None,
    others: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    centre: Tensor | None,
    slope: Tensor | None,
    offset: Tensor | None,
    activation: str,
    wants: list[bool],
) -> list[Tensor]:
    saved, dy, *rest = as_views(saved, dy, x, others)
    x, others = (None if given is None else rest.pop(0) for given in (x, others))
    mask, scale, centre, slope, offset = (
        None if vector is None else vector.contiguous() for vector in (mask, scale, centre, slope, offset)
    )
    results = _make_gradients(saved, wants)
    outputs = [result if want else None for want, result in zip(wants, results, strict=True)]
    partials = None
    if dy.is_cuda and any(wants[1:]):
        count = sum(wants[1:]) * _C.masked_act_partials(dy, saved, x, outputs[0], others)
        partials = torch.empty(count, dtype=torch.float64, device=dy.device)
    dx, dmask, dshift, dscale = outputs
    _C.masked_act_backward(
        dy, saved, x, mask, scale, centre, slope, offset, activation, dx, dmask, dshift, dscale, partials,
        torch.get_num_threads(), others,
    )  # fmt: skip
    return results


def _fake_backward(dy: Tensor, saved: Tensor, *rest: Any) -> list[Tensor]:
    wants = rest[-1]
    return _make_gradients(saved, wants)


register(
    "_masked_act_backward(Tensor dy, Tensor saved, Tensor? x, Tensor? others, Tensor? mask, Tensor? scale,"
    " Tensor? centre, Tensor? slope, Tensor? offset, str activation, bool[] wants) -> Tensor[]",
    _backward,
    _fake_backward,
)


def masked_act(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "relu",
    want_saved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute ``act(x * scale + shift + residual) * mask``, and what :func:`masked_act_backward` needs.

    Autograd does not see this.

    Args:
        x: ``[N, C, *spatial]``, float16, bfloat16, float32 or float64.
        scale: ``[C]``; ``None``: 1.
        shift: ``[C]``; ``None``: 0.
        mask: ``[C]``; ``None``: 1.
        residual: Shape and dtype of ``x``; ``None``: 0.
        activation: One of ``fastprune.ops.activations.ACTIVATIONS``.
        want_saved: Whether to compute the second result.

    Returns:
        ``y``, and ``saved`` (empty if not wanted): the activation before the mask for identity, relu and relu6,
        ``x * scale + shift + residual`` for silu and hardswish. Both have the memory format of ``x``.
    """
    y, saved = torch.ops.fastprune._masked_act(x, scale, shift, mask, residual, activation, want_saved)
    return y, saved


def masked_act_in_place(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str,
) -> Tensor:
    """Compute the first result of :func:`masked_act` in the memory of x, which must not be used again.

    An x that the kernels cannot read in place is copied. Autograd does not see this.
    """
    x, vectors, residual = _prepare(x, (scale, shift, mask), residual)
    torch.ops.fastprune._masked_act_in_place(x, *vectors, residual, activation)
    return x


def masked_act_saving_in_place(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Compute the two results of :func:`masked_act`, the second in the memory of x, which must not be used again.

    Autograd does not see this.
    """
    x, vectors, residual = _prepare(x, (scale, shift, mask), residual)
    is_z = scale is None and shift is None and residual is None
    writes = not is_z or activation in ("relu", "relu6")  # the others would save x unchanged
    y = torch.ops.fastprune._masked_act_saving_in_place(x, *vectors, residual, activation, writes)
    return y, x


def masked_act_backward(
    dy: Tensor,
    saved: Tensor,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    activation: str = "relu",
    x: Tensor | None = None,
    others: Tensor | None = None,
    centre: Tensor | None = None,
    slope: Tensor | None = None,
    offset: Tensor | None = None,
    want_dx: bool = True,
    want_dmask: bool = False,
    want_dshift: bool = False,
    want_dscale: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of :func:`masked_act`, in one pass over ``dy`` and ``saved``, ``x`` and ``others``.

    With ``d = dy + others`` and ``dz = d * mask * act'(z)``: ``dx = dz * scale + (x - centre) * slope + offset``,
    ``dmask`` = sum of ``d * r``, also where the mask is 0, ``dshift`` = sum of ``dz``, ``dscale`` = sum of
    ``dz * (x - centre)``.

    Args:
        dy: ``[N, C, *spatial]``, gradient of ``y``.
        saved: Second result of the forward pass; ``dx`` gets its memory format.
        mask: ``[C]``, as in the forward pass.
        scale: ``[C]``, as in the forward pass.
        activation: As in the forward pass.
        x: As in the forward pass; needed for ``dscale`` and for ``slope``.
        others: Shape and dtype of ``dy``: the gradient of ``y`` from other readers; ``None``: 0. Not beside ``slope``,
            ``dshift`` and ``dscale``.
        centre: ``[C]``, subtracted from ``x`` in ``dscale`` and with ``slope``; ``None``: 0.
        slope: ``[C]``, together with ``offset``: the gradient through batch statistics.
        offset: ``[C]``.
        want_dx: Whether to compute ``dx``.
        want_dmask: Whether to compute ``dmask``.
        want_dshift: Whether to compute ``dshift``.
        want_dscale: Whether to compute ``dscale``.

    Returns:
        ``(dx, dmask, dshift, dscale)``, ``None`` where not wanted. Sums are float32, float64 beside float64 tensors.
    """
    wants = [want_dx, want_dmask, want_dshift, want_dscale]
    vectors = (mask, scale, centre, slope, offset)
    results = torch.ops.fastprune._masked_act_backward(dy, saved, x, others, *vectors, activation, wants)
    dx, dmask, dshift, dscale = (result if want else None for want, result in zip(wants, results, strict=True))
    return dx, dmask, dshift, dscale
