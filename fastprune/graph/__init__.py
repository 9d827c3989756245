"""Channels of a network: tracing, groups and cost."""

from fastprune.graph.build import trace
from fastprune.graph.channel_graph import ChannelGraph, Group, Layer, Slice
from fastprune.graph.cost import Cost
from fastprune.graph.custom import Operator, rule
from fastprune.graph.refusals import TraceError

__all__ = ["ChannelGraph", "Cost", "Group", "Layer", "Operator", "Slice", "TraceError", "rule", "trace"]
