"""The mean absolute activation of a channel (Molchanov et al., ICLR 2017, §2.2).

I_u = mean over samples, positions and readers of |x_u|
"""

from __future__ import annotations

from torch import Tensor

from fastprune.methods.criteria.features import FeatureMethod


class Activation(FeatureMethod):
    """Keep the channels whose features are strongest where they are read."""

    name = "activation"
    paper = "Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, ICLR 2017"

    def measure(self, maps: Tensor) -> Tensor:
        """Return the mean over positions of |x|, summed over the samples."""
        return maps.abs().reshape(*maps.shape[:2], -1).mean(2).sum(0)
