"""The operators of :mod:`fastprune.ops` in plain torch: readable, any dtype, what the tests compare with."""

from fastprune.reference.topk_mask import topk_mask

__all__ = ["topk_mask"]
