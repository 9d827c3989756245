"""Every operator refuses more threads than a machine could start: OpenMP's runtime would end the process."""

import numpy as np
import pytest

from fastprune import _C

X, Y, CHANNELS, SUMS = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32), np.ones(3, np.float32), np.ones(3)
OTHER = np.ones(3, np.float32)
OFFSETS = np.array([0, 3])
CALLS = {
    "topk_mask": lambda n: _C.topk_mask(CHANNELS, np.ones(1, np.float32), OFFSETS, None, OTHER, n),
    "bernoulli_gate": lambda n: _C.bernoulli_gate(CHANNELS, 0, 0, OTHER, np.ones(3, np.float32), n),
    "gumbel_gate": lambda n: _C.gumbel_gate(CHANNELS, 0, 0, 1, 0, True, "none", OTHER, np.ones(3, np.float32), n),
    "group_prox": lambda n: _C.group_prox(_C.UnitTable([(X, 1, np.arange(3))], 3), None, OTHER, n),
    "masked_act": lambda n: _C.masked_act(X, None, None, None, "relu", Y, None, n),
    "masked_act_backward": lambda n: _C.masked_act_backward(
        X, X, None, None, None, None, None, None, "relu", Y, None, None, None, None, n
    ),
    "channel_moments": lambda n: _C.channel_moments(X, CHANNELS, OTHER, None, n),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_number_of_threads(name):
    for number in (1025, 2**31 - 1):
        with pytest.raises(ValueError, match=f"^num_threads: got {number}, needs at most 1024"):
            CALLS[name](number)
    for number in (1024, 0, -1):  # a kernel takes no more threads than it has work for
        CALLS[name](number)
