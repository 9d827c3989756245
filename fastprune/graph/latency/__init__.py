"""Latency of a network under a mask, from measured operators.

* ``axes``: the numbers of channels that times depend on, and the widths at which operators are measured.
* ``operations``: the operators of a network as calls that can be made again with fewer channels.
* ``widths``: the axes of each operator.
* ``recording``: one pass of the full network, written down as operations.
* ``segments``: a layer and the operators behind it, which are timed together.
* ``calls``: one call of an operator, its timers, and the memory of its operands.
* ``stopwatch``: times of segments on their grids of widths.
* ``measurements``: measured times on disk.
* ``interpolation``: times between the measured widths, as tensors.
* ``model``: ``LatencyModel``, which users call.
* ``timing``: ``measure``, which makes the model of a network.
"""

from fastprune.graph.latency.model import LatencyModel
from fastprune.graph.latency.timing import measure

__all__ = ["LatencyModel", "measure"]
