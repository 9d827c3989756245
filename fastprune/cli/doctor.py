"""What is installed, and whether it works here."""

from __future__ import annotations

import platform
from typing import Any

import torch

from fastprune import _C, ops, reference
from fastprune.methods import registry


def doctor() -> dict[str, Any]:
    """Look at the installation and try each kernel on each device.

    Returns:
        Facts by name; "kernels" says for each device "ok" or what went wrong, "broken_methods" why a plugin cannot be
        loaded, "healthy" whether all is well.
    """
    kernels = {"cpu": try_kernels(torch.device("cpu"))}
    cuda = torch.cuda.is_available()
    if cuda:
        kernels["cuda"] = try_kernels(torch.device("cuda"))
    broken = registry.broken()
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "CPU only",
        "build": _C.build_info(),
        "kernels": kernels,
        "methods": sorted(registry.available()),
        "broken_methods": broken,
        "healthy": all(verdict == "ok" for verdict in kernels.values()) and not broken,
    }


def try_kernels(device: torch.device) -> str:
    """Compare every operator with its plain-torch reference on a small input."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, generator=generator).to(device)
    keep = torch.tensor([0.5, 0.25, 0.9], device=device)
    offsets = torch.tensor([0, 16, 80, 300])
    window = torch.tensor([2.0, 6.0, 0.0], device=device)
    try:
        got = ops.topk_mask(scores, keep, offsets, window)
    except (RuntimeError, ValueError, TypeError) as error:
        return f"topk_mask fails: {error}"
    expected = reference.topk_mask(scores.cpu(), keep.cpu(), offsets, window.cpu())
    difference = float((got.cpu() - expected).abs().max())
    return "ok" if difference < 1e-5 else f"topk_mask differs from its reference by {difference:.1e}"
