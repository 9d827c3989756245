"""One workload of a benchmark and the ways to compute it, which have to agree before anything is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

OURS = "fastprune"
"""The variant that the others are compared with."""


class BenchmarkError(RuntimeError):
    """A benchmark that would show nothing: variants that compute different things, or one that fails."""


class Attempted:
    """A peer that may fail: a benchmark then says so and goes on."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        return self.function(*arguments)


class Compiled(Attempted):
    """A function under ``torch.compile``.

    On the CPU in the default mode, on CUDA with max-autotune. Sizes are constants (``dynamic=False``), as for our
    kernels' peers they always are.

    Args:
        function: what to compile.
        device: where it runs.
        around: makes of the compiled function what is timed, where that is more than can be compiled (gradients, say).

    Attributes:
        seconds: of the first call, which compiles.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        device: torch.device,
        around: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    ) -> None:
        self.on_cuda = device.type == "cuda"
        compiled = torch.compile(function, mode="max-autotune" if self.on_cuda else "default", dynamic=False)
        super().__init__(compiled if around is None else around(compiled))
        self.seconds: float | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Call the compiled function."""
        if self.on_cuda:  # or else CUDA graphs would wait for the backward pass of a call that wants none
            torch.compiler.cudagraph_mark_step_begin()
        if self.seconds is not None:
            return super().__call__(*arguments)
        begin = time.perf_counter()
        try:
            return super().__call__(*arguments)
        finally:
            self.seconds = time.perf_counter() - begin


@dataclass(frozen=True)
class Case:
    """One row of a benchmark.

    Args:
        name: what the row is called.
        draw: makes the inputs of one call, as a tuple. Whatever it makes is not charged to anybody.
        variants: functions of these inputs, by name; one is "fastprune". The first is what the others have to agree
            with. Each returns a tensor or a tuple of tensors: everything that the operator is for (gradients, say).
        bytes: the least that has to be read and written for the result.
        flops: the least floating-point operations, two for each multiply-accumulate.
        precision: of the arithmetic: float32, tf32, bfloat16, float16 or float64.
        shape: the workload, for programs.
        units: channels in all; a table then says nanoseconds for each.
        samples: images in the batch of a step; samples per second are then told.
        groups: what this case counts for: each gets geometric means of its own.
        rtol: how far variants may differ, relative to the first one's result.
        atol: how far they may differ on top of that.
        norm: instead of both, how far each tensor may differ in norm, relative to the first one's: for gradients
            through kinks, where a rounding makes a few elements others.
        unchecked: variants that are timed along and compute something else: a part of the work, other random numbers.
        fresh: draw anew for each call. Needed where a variant changes its inputs, or its speed depends on their
            values (branches that a CPU learns). Otherwise calls take turns through inputs that together are larger
            than the cache.
        cold: write over the cache before each call.
        clock: "wall", from the call until the result is there; "events", on CUDA the device's own time;
            "processor", the processor's time, for one thread of the CPU where other jobs run.
        rounds: how many at most.
        seconds: after these no further round begins, once there are five.
        more: measures what is no time, once the times are there: numbers for a column each, and dicts for programs.
    """

    name: str
    draw: Callable[[], tuple[Any, ...]]
    variants: Mapping[str, Callable[..., Any]]
    bytes: float
    flops: float = 0.0
    precision: str = "float32"
    shape: Mapping[str, Any] = field(default_factory=dict)
    units: int | None = None
    samples: int | None = None
    groups: tuple[str, ...] = ()
    rtol: float = 1e-4
    atol: float = 1e-5
    norm: float | None = None
    unchecked: tuple[str, ...] = ()
    fresh: bool = True
    cold: bool = False
    clock: Literal["wall", "events", "processor"] = "wall"
    rounds: int = 200
    seconds: float = 5.0
    more: Callable[[], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        if OURS not in self.variants or len(self.variants) < 2:
            raise ValueError(f"{self.name}: got variants {list(self.variants)}, needs {OURS!r} and one to compare with")
        if {OURS, next(iter(self.variants))} & set(self.unchecked):
            raise ValueError(f"{self.name}: got {self.unchecked} unchecked, needs the first and {OURS!r} checked")
        if not (self.bytes > 0 or self.flops > 0):
            raise ValueError(f"{self.name}: got no bytes and no flops, needs the least work of the result")

    @property
    def compiled(self) -> list[Compiled]:
        """The compiled variants."""
        return [variant for variant in self.variants.values() if isinstance(variant, Compiled)]

    def without_compiled(self) -> Case:
        """The same without them; where only they are there to compare with, the same."""
        rest = {name: variant for name, variant in self.variants.items() if not isinstance(variant, Compiled)}
        return replace(self, variants=rest) if len(rest) > 1 else self


def check_agreement(case: Case) -> dict[str, str]:
    """Call every variant once on the same inputs and compare what they return.

    This also compiles what is to be compiled, so that no compilation is timed.

    Returns:
        Why a variant that may fail cannot be timed, by name; mostly empty.

    Raises:
        BenchmarkError: where another variant fails, or one computes something else than the first.
    """
    failures: dict[str, str] = {}
    inputs = case.draw()
    expected = None
    for name, variant in case.variants.items():
        try:
            result = variant(*(copied(value) for value in inputs))
        except Exception as error:  # of every kind: torch.compile has its own, and its compilers' have theirs
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if not isinstance(variant, Attempted):
                raise BenchmarkError(f"{case.name}: {name} fails: {reason}") from error
            failures[name] = reason
            continue
        if name in case.unchecked:
            continue
        if expected is None:
            expected = copied(result)  # a CUDA graph's result is overwritten by its next run
        try:
            compare(result, expected, case)
        except AssertionError as error:
            first = next(iter(case.variants))
            difference = " ".join(str(error).split())[:300]
            raise BenchmarkError(f"{case.name}: {name} computes something else than {first}: {difference}") from error
    return failures


def compare(result: Any, expected: Any, case: Case) -> None:
    """Raise an AssertionError where a result is not what the case's tolerances allow."""
    if case.norm is None:
        torch.testing.assert_close(result, expected, rtol=case.rtol, atol=case.atol)
        return
    results, expectations = ((value,) if isinstance(value, Tensor) else value for value in (result, expected))
    kinds = [[(tuple(value.shape), value.dtype) for value in values] for values in (results, expectations)]
    if kinds[0] != kinds[1]:
        raise AssertionError(f"got {kinds[0]}, needs {kinds[1]}")
    for place, pair in enumerate(zip(results, expectations, strict=True)):
        one, other = (tensor.detach() for tensor in pair)
        difference, norm = float((one - other).float().norm()), float(other.float().norm())
        if not difference <= case.norm * norm:
            raise AssertionError(f"tensor {place} is {difference:.3g} away from one of norm {norm:.3g}")


def copied(value: Any) -> Any:
    """A tensor's copy, with its strides and whether it takes a gradient; of a tuple or list, its elements' copies."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)):
        return type(value)(copied(element) for element in value)
    return value
