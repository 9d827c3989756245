"""Fused operators: torch functions on the kernels of ``fastprune._C``.

Each has a namesake in :mod:`fastprune.reference`: the same function in plain torch.
"""

from fastprune.ops.bernoulli_gate import bernoulli_gate
from fastprune.ops.group_prox import UnitTable, group_prox_
from fastprune.ops.gumbel_gate import gumbel_gate
from fastprune.ops.masked_bn_act import masked_bn_act
from fastprune.ops.masked_conv_bn_act import masked_conv_bn_act
from fastprune.ops.topk_mask import topk_mask

__all__ = [
    "UnitTable",
    "bernoulli_gate",
    "group_prox_",
    "gumbel_gate",
    "masked_bn_act",
    "masked_conv_bn_act",
    "topk_mask",
]
