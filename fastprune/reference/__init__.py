"""The operators of :mod:`fastprune.ops` in plain torch: readable, any dtype, what the tests compare with."""

from fastprune.reference.group_prox import UnitTable, group_prox_
from fastprune.reference.topk_mask import topk_mask

__all__ = ["UnitTable", "group_prox_", "topk_mask"]
