"""``fastprune doctor``: what is installed, and whether it works here."""

from __future__ import annotations

import json
import platform
from typing import Any

import torch

from fastprune import _C, ops, reference
from fastprune.methods import registry
from fastprune.ops.examples import Example, examples
from fastprune.report import tables


def run_doctor(values: dict[str, Any], given: set[str]) -> int:
    """Say what is installed and whether it works."""
    checks = doctor()
    if values["json"]:
        print(json.dumps(checks))
    else:
        tables.print_checks(checks)
        print("next: fastprune demo")
    return 0 if checks["healthy"] else 1


def doctor() -> dict[str, Any]:
    """Look at the installation and try each operator on each device.

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
    """Compare every operator, and its gradients, with the reference in float64; return "ok" or what is wrong."""
    faults = [fault for example in examples() if (fault := find_fault(example, device))]
    return "; ".join(faults) or "ok"


def find_fault(example: Example, device: torch.device) -> str | None:
    """Return what is wrong with an operator on a device, or None."""
    try:
        got = example.results(ops, [tensor.to(device) for tensor in example.inputs])
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{example.operator} fails: {error}"
    expected = example.results(reference, [tensor.double() for tensor in example.inputs])
    differences = [
        float((one - other).abs().max() / other.abs().max().clamp(min=1))
        for one, other in zip(got, expected, strict=True)
    ]
    worst = max(differences)
    return None if worst <= example.tolerance else f"{example.operator} differs from its reference by {worst:.1e}"
