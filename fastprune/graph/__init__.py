"""Channels of a network: tracing, groups, cost and latency."""

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
