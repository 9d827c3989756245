"""Fused operators: the torch face of the kernels in ``fastprune._C``.

Each has a namesake in :mod:`fastprune.reference`: the same function in plain torch.
"""

from fastprune.ops.masked_bn_act import masked_bn_act
from fastprune.ops.topk_mask import topk_mask

__all__ = ["masked_bn_act", "topk_mask"]
