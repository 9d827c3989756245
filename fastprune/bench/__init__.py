"""How fast the kernels are, beside their peers and beside what the machine can do at most.

A kernel's benchmark is a module with a function ``cases(device, *, quick=False)`` that yields :class:`Case` objects,
and a line in ``KERNELS``. Agreement, timing, ceilings, tables and JSON are the same for all.
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
"""What the kernels are for: a step of gate training as a whole."""

SEARCH: dict[str, Callable[..., Iterable[Case]]] = {"search": search.cases}
"""What the step is for: a method's search step as users run it."""

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
