"""Benchmarks of the kernels beside their peers and the limits of the machine.

A kernel's benchmark is a module with a function ``cases(device, *, quick=False)`` that yields :class:`Case` objects,
and a line in ``KERNELS``. All benchmarks share agreement checks, timing, ceilings, tables and JSON.
"""

from collections.abc import Callable, Iterable

from fastprune.bench import (
    gates,
    group_prox,
    masked_bn_act,
    masked_conv_bn_act,
    search,
    step,
    topk_mask,
)
from fastprune.bench.case import OURS, Attempted, BenchmarkError, Case, Compiled

KERNELS: dict[str, Callable[..., Iterable[Case]]] = {
    "gates": gates.cases,
    "group_prox": group_prox.cases,
    "masked_bn_act": masked_bn_act.cases,
    "masked_conv_bn_act": masked_conv_bn_act.cases,
    "topk_mask": topk_mask.cases,
}
"""Cases by kernel."""

STEP: dict[str, Callable[..., Iterable[Case]]] = {"step": step.cases}
"""Cases of a whole step of gate training, which the kernels are for."""

SEARCH: dict[str, Callable[..., Iterable[Case]]] = {"search": search.cases}
"""Cases of a method's search step as users run it, which the training step is for."""

__all__ = [
    "KERNELS",
    "OURS",
    "SEARCH",
    "STEP",
    "Attempted",
    "BenchmarkError",
    "Case",
    "Compiled",
]
