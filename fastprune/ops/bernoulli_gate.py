"""Discrete gates, each open with its own probability."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprune.ops.arguments import HALVES
from fastprune.ops.library import _C, refuse_transforms, register
from fastprune.ops.seed_and_step import split_step


def _kernel(theta: Tensor, seed: int, step: int, step_tensor: Tensor | None) -> tuple[Tensor, Tensor]:
    theta = theta.contiguous()
    gate, slope = torch.empty_like(theta), torch.empty_like(theta)
    counter = step if step_tensor is None else step_tensor
    _C.bernoulli_gate(theta, seed, counter, gate, slope, torch.get_num_threads())
    return gate, slope


def _fake(theta: Tensor, seed: int, step: int, step_tensor: Tensor | None) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(theta, memory_format=torch.contiguous_format),
        torch.empty_like(theta, memory_format=torch.contiguous_format),
    )


# SymInt: under torch.compile another seed or step is another input, not another program.
register(
    "_bernoulli_gate(Tensor theta, SymInt seed, SymInt step, Tensor? step_tensor) -> (Tensor gate, Tensor slope)",
    _kernel,
    _fake,
)


class _BernoulliGate(torch.autograd.Function):
    """Straight-through where theta is in [0, 1] (DMC, eq. 3): there the kernel has written a slope of 1, else 0."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, seed: int, step: int, step_tensor: Tensor | None) -> Tensor:
        gate: Tensor
        gate, slope = torch.ops.fastprune._bernoulli_gate(theta, seed, step, step_tensor)
        ctx.save_for_backward(slope)
        return gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return grad_outputs[0] * slope, None, None, None


def bernoulli_gate(theta: Tensor, *, seed: int, step: int | Tensor) -> Tensor:
    r"""Draw discrete gates, each open with probability ``theta``, in one kernel.

    .. math:: g_i = 1[u_i < \theta_i], \quad u_i \text{ uniform on } \{0, 1, \dots, 2^{32} - 1\} / 2^{32}.

    The noise is a function of (seed, step, i) only, with i counted in row-major order: Philox4x32-10 with the seed as
    key and (step, i) as counter. The same call therefore gives the same bits on the CPU and on CUDA, on every rank and
    for every number of threads, and the gates of a prefix of ``theta`` are the prefix of its gates. Another step is
    another draw; two calls with the same seed and step draw the same noise.

    The gradient is straight-through: that of the gate where ``theta`` is in the closed interval [0, 1], 0 outside. It
    cannot be differentiated once more.

    Args:
        theta: Probabilities, any shape, float32 or float64 (float16 and bfloat16 are computed in float32). A gate with
            at most 0 never opens, one with at least 1 always.
        seed: Seed of the run, in [0, 2^63).
        step: Number of the draw, in [0, 2^63): an int, or an int64 tensor without dimensions on the device of
            ``theta``. The kernel reads a tensor where it is: a captured CUDA graph draws anew whenever it has changed,
            and a program from ``torch.export`` takes it as an input. Under ``torch.compile`` a tensor never recompiles,
            an int once, when it first changes (as an attribute of a module every time, since torch takes such ints for
            constants: keep the step in a buffer there).

    Returns:
        0 or 1, with the shape, dtype and device of ``theta``, contiguous.

    Raises:
        TypeError: An argument has another type or dtype.
        ValueError: The seed or the step is out of range, ``step`` has another shape or is on another device; on the CPU
            also NaN in ``theta``. On CUDA values cannot be refused without waiting for the device: there the gate of a
            NaN is NaN, and so are all gates if the step is a negative tensor.
        RuntimeError: The call is under ``torch.func`` (``vmap``, ``grad`` and their like).

    Source: DMC (Gao et al., CVPR 2020), eq. 3 and 4; Philox: Salmon et al. (SC 2011).

    Example:
        >>> import torch
        >>> from fastprune import ops
        >>> theta = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0])
        >>> ops.bernoulli_gate(theta, seed=0, step=0)
        tensor([0., 0., 0., 1., 1.])
        >>> ops.bernoulli_gate(theta, seed=0, step=1)
        tensor([0., 0., 1., 1., 1.])
    """
    refuse_transforms("bernoulli_gate")
    if theta.dtype in HALVES:  # widening is exact, and so is the way back
        return bernoulli_gate(theta.float(), seed=seed, step=step).to(theta.dtype)
    gate: Tensor = _BernoulliGate.apply(theta, seed, *split_step(seed, step))
    return gate
