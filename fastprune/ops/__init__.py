"""Fused operators: the torch face of the kernels in ``fastprune._C``.

Each has a namesake in :mod:`fastprune.reference`: the same function in plain torch.
"""

from fastprune.ops.group_prox import UnitTable, group_prox_
from fastprune.ops.topk_mask import topk_mask

__all__ = ["UnitTable", "group_prox_", "topk_mask"]
