"""A workload of a benchmark and its variants, which must agree before any is timed."""

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
    """A benchmark that would show nothing: its variants disagree, or one fails."""


class Attempted:
    """A peer that may fail; the benchmark then reports the failure and goes on."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        return self.function(*arguments)


class Compiled(Attempted):
    """A function under ``torch.compile``: in the default mode on the CPU, with max-autotune on CUDA.

    Sizes are constants (``dynamic=False``), as they always are for the peers of our kernels.

    Args:
        function: the function to compile.
        device: the device that it runs on.
        around: turns the compiled function into the one that is timed, where not all of that can be compiled
            (gradients, say).

    Attributes:
        seconds: time of the first call, which compiles.
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
        if self.on_cuda:  # otherwise CUDA graphs wait for the backward pass of a call that has none
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
    """A row of a benchmark.

    Args:
        name: title of the row.
        draw: makes the inputs of one call, as a tuple. No variant is charged for its time.
        variants: functions of these inputs, by name; one is "fastprune". The others must agree with the first. Each
            returns a tensor or a tuple of tensors: everything that the operator is for (gradients, say).
        bytes: least number of bytes that must be read and written for the result.
        flops: least number of floating-point operations, two for each multiply-accumulate.
        precision: arithmetic of the variants: float32, tf32, bfloat16, float16 or float64.
        shape: numbers that describe the workload, for programs.
        units: number of channels in all; a table then shows nanoseconds per channel.
        samples: images in the batch of a step; a table then shows samples per second.
        groups: groups of cases that this one belongs to; each group gets geometric means of its own.
        rtol: greatest difference from the first variant's result, relative to it.
        atol: greatest difference on top of that.
        norm: greatest norm of each tensor's difference, relative to the norm of the first variant's; replaces both
            tolerances. For gradients through kinks, where rounding changes a few elements altogether.
        unchecked: variants that are timed but not compared: they do a part of the work or draw other random numbers.
        fresh: whether to draw anew for each call. Needed where a variant changes its inputs, or where its speed depends
            on their values (a CPU learns branches). Otherwise calls rotate through inputs that together exceed the
            cache.
        cold: whether to overwrite the cache before each call.
        clock: "wall" runs from the call until the result is there; "events" is the device's own time on CUDA;
            "processor" is the processor's time, for one CPU thread on a machine with other jobs.
        rounds: greatest number of rounds.
        seconds: time after which no further round begins, once there are five.
        more: measures other things than time after the timing: numbers get a column each, dicts are for programs.
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
            raise ValueError(f"{self.name}: got variants {list(self.variants)}; needs {OURS!r} and a peer")
        if {OURS, next(iter(self.variants))} & set(self.unchecked):
            raise ValueError(f"{self.name}: got {self.unchecked} unchecked; the first and {OURS!r} must be checked")
        if not (self.bytes > 0 or self.flops > 0):
            raise ValueError(f"{self.name}: got no bytes and no flops; needs the least work of the result")

    @property
    def compiled(self) -> list[Compiled]:
        """The compiled variants."""
        return [variant for variant in self.variants.values() if isinstance(variant, Compiled)]

    def drop_compiled(self) -> Case:
        """Return the case without compiled variants, or the case itself if it has no other peer."""
        rest = {name: variant for name, variant in self.variants.items() if not isinstance(variant, Compiled)}
        return replace(self, variants=rest) if len(rest) > 1 else self


def check_agreement(case: Case) -> dict[str, str]:
    """Call every variant once on the same inputs and compare the results.

    These calls also compile, so that no compilation is timed.

    Returns:
        Reasons why an ``Attempted`` variant cannot be timed, by name; mostly empty.

    Raises:
        BenchmarkError: if another variant fails, or one disagrees with the first.
    """
    failures: dict[str, str] = {}
    inputs = case.draw()
    expected = None
    for name, variant in case.variants.items():
        try:
            result = variant(*(clone(value) for value in inputs))
        except Exception as error:  # torch.compile and its compilers raise errors of their own kinds
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if not isinstance(variant, Attempted):
                raise BenchmarkError(f"{case.name}: {name} fails: {reason}") from error
            failures[name] = reason
            continue
        if name in case.unchecked:
            continue
        if expected is None:
            expected = clone(result)  # a CUDA graph's next run overwrites its result
        try:
            compare(result, expected, case)
        except AssertionError as error:
            first = next(iter(case.variants))
            difference = " ".join(str(error).split())[:300]
            raise BenchmarkError(f"{case.name}: {name} disagrees with {first}: {difference}") from error
    return failures


def compare(result: Any, expected: Any, case: Case) -> None:
    """Raise an AssertionError if a result exceeds the case's tolerances."""
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


def clone(value: Any) -> Any:
    """Copy tensors, alone or in a tuple or list; copies keep their strides and ``requires_grad``."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)):
        return type(value)(clone(element) for element in value)
    return value
