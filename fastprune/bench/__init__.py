"""How fast the kernels are, beside their peers and beside what the machine can do at most.

A kernel's benchmark is a module with a function ``cases(device, *, quick=False)`` that yields :class:`Case` objects,
and a line in ``KERNELS``. Agreement, timing, ceilings, tables and JSON are the same for all.
"""

from collections.abc import Callable, Iterable

from fastprune.bench import group_prox, masked_bn_act, topk_mask
from fastprune.bench.case import OURS, BenchmarkError, Case, Compiled

KERNELS: dict[str, Callable[..., Iterable[Case]]] = {
    "group_prox": group_prox.cases,
    "masked_bn_act": masked_bn_act.cases,
    "topk_mask": topk_mask.cases,
}
"""Cases by kernel."""

__all__ = ["KERNELS", "OURS", "BenchmarkError", "Case", "Compiled"]
