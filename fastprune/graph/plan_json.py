"""A pruning plan as JSON values: the format of plan.json, and the checks of a document that is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastprune.graph.export.inputs import InputSpec
from fastprune.graph.structure import Norm, NormKind, Role, Slice

FORMAT = "fastprune-plan-1"

Code = Literal["own", "either", "rewritten"]


def encode(fields: Mapping[str, Any], keep: Mapping[str, list[int]]) -> dict[str, Any]:
    """Return the JSON document of a plan.

    Args:
        fields: the fields of the ``PruningPlan``.
        keep: {group: indices of the kept units within the group}.
    """
    macs, params = fields["macs"], fields["params"]
    return {
        "format": FORMAT,
        "code": fields["code"],
        "exact": fields["exact"],
        "macs": {"full": macs[0], "planned": macs[1]},
        "params": {"full": params[0], "planned": params[1]},
        "groups": [{"name": name, "size": fields["groups"][name], "keep": kept} for name, kept in keep.items()],
        "inputs": [encode_input(spec) for spec in fields["inputs"]],
        "slices": [
            {"tensor": s.tensor, "dim": s.dim, "role": s.role, "units": encode_runs(s.units)}
            | ({"computed": True} if s.computed else {})
            for s in fields["slices"]
        ],
        "attributes": [
            {"name": name, "full": list(full), "planned": list(left)}
            for name, (full, left) in fields["attributes"].items()
        ],
        "norms": [
            {"module": n.module, "kind": n.kind, "dim": n.dim, "count": n.count, "eps": n.eps}
            | {"units": encode_runs(n.units)}
            for n in fields["norms"]
        ],
    }


def decode(values: Any) -> dict[str, Any]:
    """Return the fields of the ``PruningPlan`` that a JSON document describes.

    Raises:
        KeyError, TypeError, IndexError, AttributeError, ValueError: if anything is missing, of the wrong type or out of
            range.
    """
    if values["format"] != FORMAT:
        raise ValueError(f"format {values['format']!r} is not {FORMAT!r}")
    groups = {str(g["name"]): require_integer(g["size"], "size") for g in values["groups"]}
    if len(groups) != len(values["groups"]):
        raise ValueError("two groups have the same name")
    mask = torch.cat([decode_mask(g) for g in values["groups"]] or [torch.zeros(0, dtype=torch.bool)])
    slices = tuple(decode_slice(s, len(mask)) for s in values["slices"])
    norms = tuple(decode_norm(n, len(mask)) for n in values.get("norms", []))
    if len({n.module for n in norms}) != len(norms):
        raise ValueError("one norm is listed twice")
    if len({s.place for s in slices}) != len(slices):
        raise ValueError("one dimension of a tensor is listed twice")
    return {
        "mask": mask,
        "groups": groups,
        "slices": slices,
        "inputs": tuple(map(decode_input, values["inputs"])),
        "code": require_choice(Code, values.get("code", "own"), "code"),
        "exact": require_bool(values.get("exact", True), "exact"),
        "attributes": dict(map(decode_attribute, values.get("attributes", []))),
        "norms": norms,
    } | {name: (int(values[name]["full"]), int(values[name]["planned"])) for name in ("macs", "params")}


def decode_mask(group: Mapping[str, Any]) -> Tensor:
    """Return the part of the mask that a group's JSON describes."""
    size, keep = require_integer(group["size"], "size"), group["keep"]
    if not keep or not all(isinstance(k, int) and 0 <= k < size for k in keep):
        raise ValueError(f"group {group['name']!r}: 'keep' must name at least one of its {size} units, by index from 0")
    mask = torch.zeros(size, dtype=torch.bool)
    mask[keep] = True
    return mask


def decode_slice(values: Mapping[str, Any], num_units: int) -> Slice:
    """Return the slice that its JSON describes."""
    return Slice(
        tensor=str(values["tensor"]),
        dim=require_integer(values["dim"], "dim", least=0),
        units=decode_runs(values["units"], num_units),
        role=require_choice(Role, values["role"], "role"),
        computed=require_bool(values.get("computed", False), "computed"),
    )


def decode_norm(values: Mapping[str, Any], num_units: int) -> Norm:
    """Return the norm that its JSON describes."""
    units, eps = decode_runs(values["units"], num_units), values["eps"]
    name, dim = str(values["module"]), values["dim"]
    count = require_integer(values["count"], f"norm {name!r}, count", least=len(units))
    if dim not in (-1, 1) or not (eps is None or (isinstance(eps, (int, float)) and 0 <= eps < 1)):
        raise ValueError(f"norm {name!r}: got dim {dim!r} and eps {eps!r}; -1 or 1, and a number in [0, 1) are needed")
    return Norm(name, require_choice(NormKind, values["kind"], "kind"), dim, count, eps, units)


def decode_attribute(values: Mapping[str, Any]) -> tuple[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return an attribute's name, and its numbers of channels before and after."""
    name = str(values["name"])
    full, left = (tuple(require_integer(n, f"attribute {name!r}") for n in values[key]) for key in ("full", "planned"))
    if len(full) != len(left) or not full:
        raise ValueError(
            f"attribute {name!r}: got {len(full)} numbers before and {len(left)} after; as many are needed"
        )
    return name, (full, left)


def encode_input(spec: InputSpec) -> dict[str, Any]:
    """Return the JSON of an input."""
    return {"shape": list(spec.shape), "dtype": spec.dtype} | ({"name": spec.name} if spec.name else {})


def decode_input(values: Mapping[str, Any]) -> InputSpec:
    """Return the input that its JSON describes; it has no name if it is given by position."""
    shape = tuple(require_integer(n, "shape") for n in values["shape"])
    dtype, name = values["dtype"], values.get("name")
    if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise ValueError(f"dtype {dtype!r} is unknown")
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"name {name!r} is no name of an argument")
    return InputSpec(shape, str(dtype), name)


def encode_runs(units: Tensor) -> list[list[int]]:
    """Return runs ``[first, count, repeat]``: ``count`` values from ``first`` up, each ``repeat`` times; -1 = kept."""
    values, repeats = (x.tolist() for x in torch.unique_consecutive(units, return_counts=True))
    runs: list[list[int]] = []
    for value, repeat in zip(values, repeats, strict=True):
        last = runs[-1] if runs else None
        if last and value >= 0 and last[0] >= 0 and value == last[0] + last[1] and repeat == last[2]:
            last[1] += 1
        else:
            runs.append([value, 1, repeat])
    return runs


def decode_runs(runs: list[list[int]], num_units: int) -> Tensor:
    """Invert ``encode_runs``; refuse units outside [-1, num_units)."""
    parts = []
    for first, count, repeat in runs:
        if (
            not all(isinstance(n, int) for n in (first, count, repeat))
            or min(count, repeat) < 1
            or first < -1
            or first + count > num_units
            or (first < 0 and count != 1)
        ):
            raise ValueError(f"units {[first, count, repeat]} lie outside the {num_units} units of the plan")
        parts.append(torch.arange(first, first + count).repeat_interleave(repeat))
    if not parts:
        raise ValueError("a slice has no units")
    return torch.cat(parts)


def require_integer(value: Any, name: str, *, least: int = 1) -> int:
    """Return ``value`` if it is an integer of at least ``least``."""
    if not isinstance(value, int) or value < least:
        needed = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name} must be {needed}, got {value!r}")
    return value


def require_bool(value: Any, name: str) -> bool:
    """Return ``value`` if it is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def require_choice(choices: Any, value: Any, name: str) -> Any:
    """Return ``value`` if it is one of the values of the ``Literal`` ``choices``."""
    if value not in get_args(choices):
        raise ValueError(f"{name} {value!r} is none of {', '.join(get_args(choices))}")
    return value
