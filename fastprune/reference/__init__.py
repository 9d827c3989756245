"""The operators of :mod:`fastprune.ops` in plain torch: readable, in any dtype; the tests compare with them.

They compute in the dtype that they are given, half precision too, but draw noise in float64. They check nothing.
"""

from fastprune.reference.bernoulli_gate import bernoulli_gate
from fastprune.reference.group_prox import UnitTable, group_prox_
from fastprune.reference.gumbel_gate import gumbel_gate
from fastprune.reference.masked_bn_act import masked_bn_act
from fastprune.reference.masked_conv_bn_act import masked_conv_bn_act
from fastprune.reference.topk_mask import topk_mask

__all__ = [
    "UnitTable",
    "bernoulli_gate",
    "group_prox_",
    "gumbel_gate",
    "masked_bn_act",
    "masked_conv_bn_act",
    "topk_mask",
]
