"""Channels of a network: which can only leave together, what they cost, and plans that remove some.

Each line imports only from lines above it:

1. ``model_state``: parameters and buffers by name. ``export``: the model becomes an operator graph.
2. ``cost``: MACs and parameters under a mask.
3. ``structure``: slices, layers and groups as plain data.
4. ``labels``: channel labels flow through the graph.
5. ``units``, ``description``, ``unprunable``: from united labels to the plain data. ``stages``, ``interior``,
   ``conventions``: readings of the plain data. ``plan_json``, ``plan``: which channels stay. ``norms``: those that
   count removed channels as zeros. ``rewrite``: the graph for the channels that stay.
6. ``latency``: measured milliseconds under a mask.
7. ``channel_graph``: the plain data with its costs, latencies and plans.
8. ``build``: ``trace``, from a model to its channel graph.
"""

from fastprune.graph.build import trace
from fastprune.graph.channel_graph import ChannelGraph
from fastprune.graph.cost import Cost
from fastprune.graph.export.refusals import TraceError
from fastprune.graph.labels.custom import Operator, rule
from fastprune.graph.latency.model import LatencyModel
from fastprune.graph.stages import Stage, find_stages
from fastprune.graph.structure import Group, Layer, Slice

__all__ = [
    "ChannelGraph",
    "Cost",
    "Group",
    "LatencyModel",
    "Layer",
    "Operator",
    "Slice",
    "Stage",
    "TraceError",
    "find_stages",
    "rule",
    "trace",
]
