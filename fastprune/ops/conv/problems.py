"""Problems of all tuned operators, by key: what a process that tries kernels starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastprune.ops.conv import fused, fused_back
from fastprune.ops.conv.agreement import Problem

PROBLEMS = {"fused_conv": fused.problem_of, "fused_input_gradient": fused_back.problem_of}


def problem_of(key: Mapping[str, Any], device: torch.device, names: Sequence[str]) -> Problem:
    """Make the problem of a key on a device, with the candidates of these names."""
    return PROBLEMS[key["operator"]](key, device, names)
