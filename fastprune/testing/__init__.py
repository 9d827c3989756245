"""Contract tests that the author of a method runs against it.

    from fastprune.testing import check_method

    def test_my_method_keeps_the_contract():
        check_method(MyMethod, epochs=2)

It runs the method through the real engine on a small network (a residual block, a depthwise convolution with
squeeze-and-excitation, a linear classifier) and synthetic images, and takes seconds on a CPU.
"""

from fastprune.testing.contract import check_method
from fastprune.testing.network import network, sample_data, traced
from fastprune.testing.trial import ContractError, photograph

__all__ = ["ContractError", "check_method", "network", "photograph", "sample_data", "traced"]
