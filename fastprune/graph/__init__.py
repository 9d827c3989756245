"""Channels of a network: tracing, groups, cost and latency."""

from fastprune.graph.build import trace
from fastprune.graph.channel_graph import ChannelGraph, Group, Layer, Slice
from fastprune.graph.cost import Cost
from fastprune.graph.latency import LatencyModel
from fastprune.graph.tracing import TraceError

__all__ = ["ChannelGraph", "Cost", "Group", "LatencyModel", "Layer", "Slice", "TraceError", "trace"]
