"""A problem whose kernels crash, hang or talk, for tests of trials in another process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastprune.ops.conv import trial
from fastprune.ops.conv.agreement import Candidate, Problem


def make_problem(key: Mapping[str, Any], device: torch.device, names: Sequence[str]) -> Problem:
    """Make the problem of doubling a tensor, which takes the fallback 2 ms."""
    if key["operator"] == "too large":
        raise torch.OutOfMemoryError
    if key["operator"] == "unusable":
        raise RuntimeError("all CUDA-capable devices are busy or unavailable")
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

    def poisoning(results: Sequence[Tensor]) -> None:
        """Fail as an illegal access does: nothing works on the device from then on."""

        def fail(device: torch.device) -> None:
            raise RuntimeError("an illegal memory access was encountered")

        trial.synchronize = fail
        raise RuntimeError("an illegal memory access was encountered")

    def failing(results: Sequence[Tensor]) -> None:
        raise RuntimeError("misaligned address")

    def slow(results: Sequence[Tensor]) -> None:
        time.sleep(3)
        right(results)

    def talking(results: Sequence[Tensor]) -> None:
        os.write(1, b"a library says something\n")
        right(results)

    def fallback() -> tuple[Tensor]:
        time.sleep(0.002)
        return (2 * x,)

    kernels = {run.__name__: run for run in (right, wrong, crashing, hanging, poisoning, failing, slow, talking)}
    candidates = [Candidate(name, kernels[name]) for name in names]
    return Problem(fallback, lambda: (2 * x.double(),), candidates, unit=2.0**-23)
