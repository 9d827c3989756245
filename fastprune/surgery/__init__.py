"""From a plan to the compact network, with the proof that it computes what the masked network computes."""

from fastprune.surgery.own_code import trace
from fastprune.surgery.rewritten import RewrittenNetwork
from fastprune.surgery.slicing import SurgeryError, slice_optimizer
from fastprune.surgery.surgery import Cut, apply, cut
from fastprune.surgery.verification import masked, verify

__all__ = ["Cut", "RewrittenNetwork", "SurgeryError", "apply", "cut", "masked", "slice_optimizer", "trace", "verify"]
