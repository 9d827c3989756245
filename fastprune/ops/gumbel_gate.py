"""Relaxed gates: sigmoids of noisy logits."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprune.ops.arguments import HALVES
from fastprune.ops.library import _C, refuse_transforms, register
from fastprune.ops.seed_and_step import split_step

Noise = Literal["gumbel", "logistic", "none"]


def _kernel(
    logits: Tensor,
    seed: int,
    step: int,
    step_tensor: Tensor | None,
    temperature: float,
    base: float,
    hard: bool,
    noise: Noise,
) -> tuple[Tensor, Tensor]:
    logits = logits.contiguous()
    gate, slope = torch.empty_like(logits), torch.empty_like(logits)
    counter = step if step_tensor is None else step_tensor
    _C.gumbel_gate(logits, seed, counter, temperature, base, hard, noise, gate, slope, torch.get_num_threads())
    return gate, slope


def _fake(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(logits, memory_format=torch.contiguous_format),
        torch.empty_like(logits, memory_format=torch.contiguous_format),
    )


# SymInt: under torch.compile another seed or step is another input, not another program.
register(
    "_gumbel_gate(Tensor logits, SymInt seed, SymInt step, Tensor? step_tensor, float temperature, float base, "
    "bool hard, str noise) -> (Tensor gate, Tensor slope)",
    _kernel,
    _fake,
)


class _GumbelGate(torch.autograd.Function):
    """The derivative of the soft gate, also for hard gates.

    The kernel writes the derivative beside the gate. It is one vector, as y would be, and backward is one
    multiplication. It is also more exact than y(1 - y) of a saved y: with base 3 most y are next to 1, where 1 - y of a
    float has few bits left or none.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *arguments: Any) -> Tensor:
        gate: Tensor
        gate, slope = torch.ops.fastprune._gumbel_gate(logits, *arguments)
        ctx.save_for_backward(slope)
        return gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return grad_outputs[0] * slope, *[None] * 7


def gumbel_gate(
    logits: Tensor,
    *,
    seed: int,
    step: int | Tensor,
    temperature: float = 0.4,
    base: float = 3.0,
    hard: bool = True,
    noise: Noise = "gumbel",
) -> Tensor:
    r"""Draw relaxed gates, the sigmoids of noisy logits, in one kernel.

    .. math:: y = \sigma\left(\frac{z + b + \epsilon}{T}\right), \quad \text{gate} = 1[y \ge \tfrac{1}{2}]
        \text{ if hard, else } y,

    with the noise :math:`\epsilon` of each gate

    =============  ===========================  ====================================
    ``noise``      :math:`\epsilon`             :math:`P(y \ge \tfrac{1}{2})`
    =============  ===========================  ====================================
    ``gumbel``     :math:`-\ln(-\ln u)`         :math:`1 - e^{-e^{z + b}}`
    ``logistic``   :math:`\ln u - \ln(1 - u)`   :math:`\sigma(z + b)`
    ``none``       0                            1 if :math:`z + b \ge 0`, else 0
    =============  ===========================  ====================================

    where :math:`u = (n + 1/2) 2^{-32}` and n is uniform on 32 bits. The releases of DDNP and SANP add one Gumbel
    sample; logistic noise makes the exact relaxed Bernoulli gate; ``none`` is for the final mask.

    The noise is a function of (seed, step, i) only, with i counted in row-major order: Philox4x32-10 with the seed as
    key and (step, i) as counter. The same call therefore gives the same bits on the CPU and on CUDA, on every rank and
    for every number of threads, and the gates of a prefix of ``logits`` are the prefix of its gates. Another step is
    another draw; two calls with the same seed and step draw the same noise, as does :func:`bernoulli_gate`.

    The gradient is that of the soft gate, :math:`y (1 - y) / T`, also for hard gates (straight-through). It cannot be
    differentiated once more.

    Args:
        logits: :math:`z`, any shape, float32 or float64 (float16 and bfloat16 are computed in float32). ``inf`` is
            allowed.
        seed: Seed of the run, in [0, 2^63).
        step: Number of the draw, in [0, 2^63): an int, or an int64 tensor without dimensions on the device of
            ``logits``. The kernel reads a tensor where it is: a captured CUDA graph draws anew whenever it has changed,
            and a program from ``torch.export`` takes it as an input. Under ``torch.compile`` a tensor never recompiles,
            an int once, when it first changes (as an attribute of a module every time, since torch takes such ints for
            constants: keep the step in a buffer there).
        temperature: :math:`T > 0`. A constant for ``torch.compile``: every value compiles its own program.
        base: :math:`b`, added to every logit; it decides how far open the gates begin.
        hard: Whether gates are 0 or 1; if not, they are soft.
        noise: ``"gumbel"``, ``"logistic"`` or ``"none"``.

    Returns:
        The gates, in [0, 1], with the shape, dtype and device of ``logits``, contiguous; computed in double and rounded
        once.

    Raises:
        TypeError: An argument has another type or dtype.
        ValueError: The seed, step, temperature or base is out of range, ``noise`` is another one, ``step`` has another
            shape or is on another device; on the CPU also NaN in ``logits``. On CUDA values cannot be refused without
            waiting for the device: there the gate of a NaN is NaN, and so are all gates if the step is a negative
            tensor.
        RuntimeError: The call is under ``torch.func`` (``vmap``, ``grad`` and their like).

    Source: the releases of DDNP (Gao et al., ECCV 2022) and SANP; logistic noise: Maddison et al. (ICLR 2017); Philox:
    Salmon et al. (SC 2011).

    Example:
        >>> import torch
        >>> from fastprune import ops
        >>> logits = torch.tensor([-6.0, -4.0, -3.0, 0.0])
        >>> ops.gumbel_gate(logits, seed=0, step=1)
        tensor([0., 1., 0., 1.])
        >>> ops.gumbel_gate(logits, seed=0, step=1, hard=False)
        tensor([0.0016, 0.9884, 0.0691, 0.9998])
        >>> ops.gumbel_gate(logits, seed=0, step=1, noise="none")
        tensor([0., 0., 1., 1.])
    """
    refuse_transforms("gumbel_gate")
    if logits.dtype in HALVES:
        options = {"temperature": temperature, "base": base, "hard": hard, "noise": noise}
        return gumbel_gate(logits.float(), seed=seed, step=step, **options).to(logits.dtype)  # type: ignore[arg-type]
    gate: Tensor = _GumbelGate.apply(logits, seed, *split_step(seed, step), temperature, base, hard, noise)
    return gate
