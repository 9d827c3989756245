"""A problem whose kernels crash, hang or talk, for tests of trials in another process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastprune.ops.conv.agreement import Candidate, Problem


def make_problem(key: Mapping[str, Any], device: torch.device, names: Sequence[str]) -> Problem:
    """Make the problem of doubling a tensor, which takes the fallback 2 ms."""
    if key["operator"] == "too large":
        raise torch.OutOfMemoryError
    x = torch.randn(key["shape"], device=device)

    def right(results: Sequence[Tensor]) -> None:
        results[0].copy_(2 * x)

    def wrong(results: Sequence[Tensor]) -> None:
        results[0].copy_(3 * x)

    def crashing(results: Sequence[Tensor]) -> None:
        print("an illegal memory access was encountered", file=sys.stderr, flush=True)
        os.abort()

    def hanging(results: Sequence[Tensor]) -> None:
        time.sleep(1000)

    def talking(results: Sequence[Tensor]) -> None:
        os.write(1, b"a library says something\n")
        right(results)

    def fallback() -> tuple[Tensor]:
        time.sleep(0.002)
        return (2 * x,)

    kernels = {run.__name__: run for run in (right, wrong, crashing, hanging, talking)}
    candidates = [Candidate(name, kernels[name]) for name in names]
    return Problem(fallback, lambda: (2 * x.double(),), candidates, unit=2.0**-23)
