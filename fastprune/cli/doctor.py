"""``fastprune doctor``: what is installed, and whether it works here."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastprune import _C, ops, reference
from fastprune.methods import registry
from fastprune.report import tables


def run_doctor(values: dict[str, Any], given: set[str]) -> int:
    """Say what is installed and whether it works."""
    checks = doctor()
    if values["json"]:
        print(json.dumps(checks))
    else:
        tables.print_checks(checks)
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


@dataclass(frozen=True)
class Case:
    """An operator on small inputs.

    Args:
        operator: its name in ``fastprune.ops`` and ``fastprune.reference``.
        inputs: float32 tensors; the result is differentiated with respect to each.
        call: calls the operator of one of these modules on the inputs.
        tolerance: the largest allowed difference, relative to the largest value.
    """

    operator: str
    inputs: tuple[Tensor, ...]
    call: Callable[..., Tensor]
    tolerance: float = 1e-5


def cases() -> list[Case]:
    """Return a case for every operator; the same inputs on every call."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    keep, window = torch.tensor([0.5, 0.25, 0.9]), torch.tensor([2.0, 6.0, 0.0])
    vectors = (normal(8), normal(8), (torch.arange(8) % 2).float())
    return [
        Case("topk_mask", (normal(300), keep, window), call_topk_mask),
        Case("bernoulli_gate", (normal(99) + 0.5,), lambda module, x: module.bernoulli_gate(x, seed=0, step=1)),
        Case("gumbel_gate", (normal(99),), lambda module, x: module.gumbel_gate(x, seed=0, step=1, hard=False)),
        Case("masked_bn_act", (normal(2, 8, 7, 7), *vectors), call_masked_bn_act),
        # On CUDA torch computes float32 convolutions in TF32.
        Case("masked_conv_bn_act", (normal(2, 8, 7, 7), normal(8, 8, 3, 3), *vectors), call_masked_conv, 2e-3),
        Case("group_prox_", (normal(6, 5), torch.linspace(0, 4, 6)), call_group_prox),
    ]


def call_topk_mask(module: Any, scores: Tensor, keep: Tensor, window: Tensor) -> Tensor:
    """Call ``topk_mask`` on three groups, the last one with a hard mask."""
    mask: Tensor = module.topk_mask(scores, keep, torch.tensor([0, 16, 80, 300]), window.detach())
    return mask


def call_masked_bn_act(module: Any, x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Call ``masked_bn_act`` with frozen statistics."""
    y: Tensor = module.masked_bn_act(x, (weight, bias, *statistics_like(mask)), mask)
    return y


def call_masked_conv(module: Any, x: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Call ``masked_conv_bn_act`` with a smooth activation, so that a rounding cannot flip a gradient."""
    bn = (weight, bias, *statistics_like(mask))
    y: Tensor = module.masked_conv_bn_act(x, kernel, bn, mask, padding=1, activation="silu")
    return y


def statistics_like(vector: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and variances for as many channels as a vector has, in its dtype and on its device."""
    channels = torch.arange(len(vector), dtype=vector.dtype, device=vector.device)
    return channels / 10, 1 + channels


def call_group_prox(module: Any, rows: Tensor, threshold: Tensor) -> Tensor:
    """Call ``group_prox_`` on a copy of rows, and return the norms before and the rows after it."""
    rows = rows.detach().clone()
    table = module.UnitTable([(rows, 0, torch.arange(len(rows), device=rows.device))], len(rows))
    return torch.cat([module.group_prox_(table, threshold.detach()), rows.flatten()])


def try_kernels(device: torch.device) -> str:
    """Compare every operator, and its gradients, with the reference in float64; return "ok" or what is wrong."""
    faults = [fault for case in cases() if (fault := fault_of(case, device))]
    return "; ".join(faults) or "ok"


def fault_of(case: Case, device: torch.device) -> str | None:
    """Return what is wrong with an operator on a device, or None."""
    try:
        got = results(case, ops, [tensor.to(device) for tensor in case.inputs])
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{case.operator} fails: {error}"
    expected = results(case, reference, [tensor.double() for tensor in case.inputs])
    differences = [
        float((one - other).abs().max() / other.abs().max().clamp(min=1))
        for one, other in zip(got, expected, strict=True)
    ]
    worst = max(differences)
    return None if worst <= case.tolerance else f"{case.operator} differs from its reference by {worst:.1e}"


def results(case: Case, module: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Return the operator's result and its gradients, in float64 on the CPU."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    result = case.call(module, *inputs)
    found = [result]
    if result.requires_grad:
        weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype, device=result.device)
        gradients = torch.autograd.grad((result.flatten() * weights).sum(), inputs, allow_unused=True)
        found += [gradient for gradient in gradients if gradient is not None]
    return [tensor.detach().cpu().double() for tensor in found]
