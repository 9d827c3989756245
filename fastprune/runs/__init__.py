"""Runs on disk as networks: what a run keeps of its networks, and how they are built again."""

from fastprune.runs.loading import is_training, load, load_baseline, load_pruned
from fastprune.runs.origin import Origin
from fastprune.runs.record import NetworkRecord
from fastprune.runs.uncut import expand_pruned, load_uncut

__all__ = [
    "NetworkRecord",
    "Origin",
    "expand_pruned",
    "is_training",
    "load",
    "load_baseline",
    "load_pruned",
    "load_uncut",
]
