"""The operators of :mod:`fastprune.ops` in plain torch: readable, any dtype, what the tests compare with."""

from fastprune.reference.masked_bn_act import masked_bn_act
from fastprune.reference.topk_mask import topk_mask

__all__ = ["masked_bn_act", "topk_mask"]
