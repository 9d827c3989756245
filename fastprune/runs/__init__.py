"""Runs on disk as networks: what a run keeps of its networks, and how they are built again."""

from fastprune.runs.loading import is_training, load, load_baseline, load_pruned
from fastprune.runs.origin import Origin
from fastprune.runs.record import NetworkRecord

__all__ = ["NetworkRecord", "Origin", "is_training", "load", "load_baseline", "load_pruned"]
