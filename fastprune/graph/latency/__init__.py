"""Latency of a network under a mask, from measured operators."""

from fastprune.graph.latency.model import LatencyModel, measure

__all__ = ["LatencyModel", "measure"]
