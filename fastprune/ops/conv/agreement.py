"""The comparison of kernels with the library, on numbers made for the purpose."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastprune.ops.conv.timing import Call, synchronize

GUARD_BYTES = 512
GUARD_VALUE = -7.25  # any number that all dtypes represent exactly


@dataclass(frozen=True)
class Candidate:
    """A kernel that may replace the fallback.

    Args:
        name: A name that no other candidate for the problem has, and that stays: the cache remembers it.
        run: Writes the results into the tensors that it is given.
    """

    name: str
    run: Callable[[Sequence[Tensor]], None]


@dataclass(frozen=True)
class Problem:
    """One computation on inputs made for the purpose, as large as the real ones.

    Args:
        fallback: Computes the results as the library does.
        exact: Computes them in float64, or nearly so.
        candidates: The kernels that support these inputs.
        unit: The error, relative to the results, that a candidate may make even where the fallback makes none: that of
            one rounding.
    """

    fallback: Callable[[], Sequence[Tensor]]
    exact: Callable[[], Sequence[Tensor]]
    candidates: Sequence[Candidate]
    unit: float


def verify(
    problem: Problem, title: object, device: torch.device
) -> tuple[list[tuple[Candidate, Call]], dict[str, str]]:
    """Return the candidates that agree with the fallback, each with a call that runs it, and why the others do not.

    The error of each result against the exact one may be twice the fallback's, plus one rounding (``Problem.unit``),
    both at its largest and on average: the former shows a few wrong elements, the latter small errors everywhere. A
    candidate that writes outside of its results, or not everywhere, differs as well.

    Args:
        problem: The computation.
        title: What a warning calls it.
        device: Where it runs.
    """
    usual = problem.fallback()
    exact = problem.exact()
    allowed = [
        (measure(a.to(b.dtype) - b) * 2.0) + measure(b) * problem.unit for a, b in zip(usual, exact, strict=True)
    ]
    good: list[tuple[Candidate, Call]] = []
    dropped: dict[str, str] = {}
    outputs = [torch.empty_like(result) for result in usual]  # of all timed calls, never read
    for candidate in problem.candidates:
        why = find_difference(candidate, usual, exact, allowed, device)
        if why is None:
            good.append((candidate, partial(candidate.run, outputs)))
        else:
            dropped[candidate.name] = why
            warnings.warn(f"kernel {candidate.name!r} is not used for {title}: {why}", RuntimeWarning, stacklevel=5)
    return good, dropped


def find_difference(
    candidate: Candidate,
    usual: Sequence[Tensor],
    exact: Sequence[Tensor],
    allowed: Sequence[Size],
    device: torch.device,
) -> str | None:
    """Run a candidate twice, into memory with guards around it; None if it agrees, both times with the same bits."""
    runs = [[Guarded(result) for result in usual] for _ in range(2)]
    try:
        for guarded in runs:
            candidate.run([guard.inside for guard in guarded])
        synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:
        return f"it failed with {type(failure).__name__}: {failure}"
    for number, (first, second, truth, most) in enumerate(zip(*runs, exact, allowed, strict=True)):
        if not (first.is_intact() and second.is_intact()):
            return f"it wrote outside of result {number}"
        got = measure(first.inside.to(truth.dtype) - truth)
        if not (got.largest <= most.largest and got.mean <= most.mean):  # NaN compares as false
            return f"result {number} has an error of {got}, where {most} is allowed"
        if not torch.equal(first.inside, second.inside):
            return f"result {number} has other bits on a second run"
    return None


class Guarded:
    """A tensor like another one, dense, full of NaN, between two stretches of memory that must not change."""

    def __init__(self, like: Tensor) -> None:
        guard = GUARD_BYTES // like.element_size()
        self._memory = torch.full((like.numel() + 2 * guard,), GUARD_VALUE, dtype=like.dtype, device=like.device)
        self._memory[guard : guard + like.numel()] = torch.nan
        self._guards = self._memory[:guard], self._memory[guard + like.numel() :]
        strides = torch.empty_like(like).stride()
        self.inside = self._memory.as_strided(like.shape, strides, guard)

    def is_intact(self) -> bool:
        """Return whether the memory around the tensor is unchanged."""
        return all(bool((guard == GUARD_VALUE).all()) for guard in self._guards)


@dataclass(frozen=True)
class Size:
    """The size of a tensor's elements: of the largest, and their root mean square."""

    largest: float
    mean: float

    def __add__(self, other: Size) -> Size:
        return Size(self.largest + other.largest, self.mean + other.mean)

    def __mul__(self, factor: float) -> Size:
        return Size(self.largest * factor, self.mean * factor)

    def __str__(self) -> str:
        return f"{self.largest:.3g} ({self.mean:.3g} on average)"


def measure(tensor: Tensor) -> Size:
    """Measure the size of the elements; NaN if there is a NaN."""
    if tensor.numel() == 0:
        return Size(0.0, 0.0)
    return Size(float(tensor.abs().max()), float(torch.linalg.vector_norm(tensor)) * tensor.numel() ** -0.5)
