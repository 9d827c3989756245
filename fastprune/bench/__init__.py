"""How fast the kernels are, beside their peers and beside what the machine can do at most.

A kernel's benchmark is a module with a function ``cases(device, *, quick=False)`` that yields :class:`Case` objects,
and a line in ``KERNELS``. Agreement, timing, ceilings, tables and JSON are the same for all.
"""

from collections.abc import Callable, Iterable

from fastprune.bench import (
    align,
    gates,
    group_prox,
    masked_bn_act,
    masked_conv_bn_act,
    search,
    step,
    subnets,
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

TRAINING: dict[str, Callable[..., Iterable[Case]]] = {"align": align.cases}
"""What a method adds to a step of training."""

EVALUATIONS: dict[str, Callable[..., Iterable[Case]]] = {"subnets": subnets.cases}
"""What a search by evolution does again and again."""

__all__ = [
    "EVALUATIONS",
    "KERNELS",
    "OURS",
    "SEARCH",
    "STEP",
    "TRAINING",
    "Attempted",
    "BenchmarkError",
    "Case",
    "Compiled",
]
