"""The pruning plan: which channels stay. It carries all that is needed to apply it, and is JSON both ways."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastprune.graph.export.inputs import Inputs
from fastprune.graph.structure import GraphStructure, Role, Slice
from fastprune.host.atomic import write_text

FORMAT = "fastprune-plan-1"

Code = Literal["own", "either", "rewritten"]


class PlanError(ValueError):
    """A plan that cannot be read, or does not fit the model."""


@dataclass(frozen=True)
class InputSpec:
    """Shape and dtype of one input of the network, as traced, and its name where it is not given by position."""

    shape: tuple[int, ...]
    dtype: str
    name: str | None = None

    def sample(self, generator: torch.Generator) -> Tensor:
        """A random input: normal for real and complex inputs, bytes for images, zeros for others (indices, masks)."""
        dtype = getattr(torch, self.dtype)
        if dtype.is_complex:
            return torch.randn(self.shape, generator=generator, dtype=torch.complex128).to(dtype)
        if dtype.is_floating_point:
            return torch.randn(self.shape, generator=generator, dtype=torch.float64).to(dtype)
        if dtype == torch.uint8:
            return torch.randint(256, self.shape, generator=generator, dtype=dtype)
        return torch.zeros(self.shape, dtype=dtype)


@dataclass(frozen=True)
class PruningPlan:
    """Which units of each group stay, and which indices of which tensors belong to each unit.

    Args:
        mask: True = the unit stays, bool [U].
        groups: {name of the group: number of its units}, in the order of the flat vector.
        slices: the tensor dimensions that shrink.
        inputs: what the network was traced with.
        macs: (full, planned) multiply-accumulates per sample.
        params: (full, planned) number of parameters.
        code: what runs the compact network: "own", the model's own code; "rewritten", its rewritten graph; or "either",
            the own code if it can.
        exact: whether removing the units equals zeroing what reads them; False = some of them change statistics that
            others are normalised by, see ``trace(exact=False)``.
    """

    mask: Tensor
    groups: Mapping[str, int]
    slices: tuple[Slice, ...]
    inputs: tuple[InputSpec, ...]
    macs: tuple[int, int]
    params: tuple[int, int]
    code: Code = "own"
    exact: bool = True

    @staticmethod
    def from_mask(graph: GraphStructure, mask: Tensor) -> PruningPlan:
        """The plan that keeps the units where ``mask`` [U] is 1; see ``GraphStructure.plan``."""
        if mask.shape != (graph.num_units,):
            raise ValueError(f"mask: a vector of {graph.num_units} units is needed, got shape {tuple(mask.shape)}")
        mask = mask.detach().cpu()
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("mask: only 0 (goes) and 1 (stays) are allowed; threshold soft masks first")
        keep = mask.bool()
        for group in graph.groups:
            if not bool(keep[group.units].any()):
                raise ValueError(f"mask: group {group.name!r} would lose all its {group.size} units; keep at least one")
        full, planned = graph.cost_model(torch.ones(graph.num_units)), graph.cost_model(keep)
        return PruningPlan(
            mask=keep,
            groups=unique_names(graph),
            slices=graph.slices,
            inputs=tuple(
                InputSpec(tuple(x.shape), str(x.dtype).removeprefix("torch."), name)
                for x, name in zip(graph.traced.inputs.tensors, graph.traced.inputs.names, strict=True)
            ),
            macs=(round(float(full.macs)), round(float(planned.macs))),
            params=(round(float(full.params)), round(float(planned.params))),
            code="either" if graph.rewrites else "own",
            exact=bool((keep | ~graph.inexact_units).all()),
        )

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """{group: (kept units, all units)}."""
        parts = self.mask.split(list(self.groups.values()))
        return {name: (int(part.sum()), size) for (name, size), part in zip(self.groups.items(), parts, strict=True)}

    @property
    def keep(self) -> dict[str, list[int]]:
        """{group: indices of the kept units within the group}."""
        parts = self.mask.split(list(self.groups.values()))
        return {name: part.nonzero().flatten().tolist() for name, part in zip(self.groups, parts, strict=True)}

    @property
    def removes_nothing(self) -> bool:
        """True if every unit stays."""
        return bool(self.mask.all())

    def example(self, model: nn.Module) -> Inputs:
        """Random inputs like those that the network was traced with, where ``model`` is; always the same."""
        generator = torch.Generator().manual_seed(0)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        samples = [(spec.name, spec.sample(generator).to(device)) for spec in self.inputs]
        return Inputs(tuple(x for name, x in samples if name is None), {name: x for name, x in samples if name})

    def kept_indices(self, piece: Slice) -> Tensor:
        """The indices of ``piece`` that stay, int64 ascending."""
        return ((piece.units < 0) | self.mask[piece.units.clamp(min=0)]).nonzero().flatten()

    def then(self, following: PruningPlan) -> PruningPlan:
        """This plan and another one for the compact network that it makes, as one plan for the full network.

        Args:
            following: a plan for a network that ``apply(self, model)`` made. It may prune groups that always stay in
                this one (which was made with ``ignore``, say): they become groups of the result.

        Returns:
            A plan with this one's inputs, and the other's cost.

        Raises:
            PlanError: if the other is a plan for another network.
        """
        own = {(piece.tensor, piece.dim): piece for piece in self.slices}
        theirs = {(piece.tensor, piece.dim): piece for piece in following.slices}
        places = places_of(self, following)
        added = {name: size for name, size in following.groups.items() if int(places[start_of(following, name)]) < 0}
        number = {int(unit): len(self.mask) + n for n, unit in enumerate((places < 0).nonzero().flatten())}
        mask = torch.cat([self.mask, following.mask[places < 0]])
        mask[places[places >= 0]] &= following.mask[places >= 0]
        slices = []
        for key in {**own, **theirs}:
            piece, other = own.get(key, theirs.get(key)), theirs.get(key)
            assert piece is not None
            size = len(piece.units) if key in own else len(theirs[key].units)
            units = piece.units.clone() if key in own else torch.full((size,), -1)
            if other is not None:
                left = self.kept_indices(own[key]) if key in own else torch.arange(size)
                fresh = (other.units >= 0) & (places[other.units.clamp(min=0)] < 0)
                units[left[fresh]] = torch.tensor([number[int(u)] for u in other.units[fresh]], dtype=torch.int64)
            slices.append(replace(piece, units=units))
        codes = {self.code, following.code}
        both = PruningPlan(
            mask=mask, groups={**self.groups, **{free_name(name, self.groups): n for name, n in added.items()}},
            slices=tuple(slices), inputs=self.inputs,
            macs=(self.macs[0], following.macs[1]), params=(self.params[0], following.params[1]),
            code="rewritten" if "rewritten" in codes else "either" if "either" in codes else "own",
            exact=self.exact and following.exact,
        )  # fmt: skip
        for piece in both.slices:
            key = piece.tensor, piece.dim
            expected = following.kept_indices(theirs[key]) if key in theirs else self.kept_indices(own[key])
            if len(both.kept_indices(piece)) != len(expected):
                raise PlanError(f"the second plan parts channels of {piece.tensor!r} that belong together in the first")
        return both

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "format": FORMAT,
            "code": self.code,
            "exact": self.exact,
            "macs": {"full": self.macs[0], "planned": self.macs[1]},
            "params": {"full": self.params[0], "planned": self.params[1]},
            "groups": [{"name": name, "size": self.groups[name], "keep": kept} for name, kept in self.keep.items()],
            "inputs": [
                {"shape": list(spec.shape), "dtype": spec.dtype} | ({"name": spec.name} if spec.name else {})
                for spec in self.inputs
            ],
            "slices": [
                {"tensor": s.tensor, "dim": s.dim, "role": s.role, "units": encode_runs(s.units)}
                | ({"computed": True} if s.computed else {})
                for s in self.slices
            ],
        }

    @staticmethod
    def from_json(values: Any) -> PruningPlan:
        """The plan that ``to_json`` described.

        Raises:
            PlanError: if anything is missing, of the wrong type or out of range.
        """
        try:
            if values["format"] != FORMAT:
                raise PlanError(f"format {values['format']!r} is not {FORMAT!r}")
            groups = {str(g["name"]): positive(g["size"], "size") for g in values["groups"]}
            if len(groups) != len(values["groups"]):
                raise PlanError("two groups have the same name")
            mask = torch.cat([mask_of(g) for g in values["groups"]] or [torch.zeros(0, dtype=torch.bool)])
            slices = tuple(
                Slice(
                    str(s["tensor"]), positive(s["dim"], "dim", least=0), decode_runs(s["units"], len(mask)),
                    one_of(Role, s["role"], "role"), flag(s.get("computed", False), "computed"),
                )
                for s in values["slices"]
            )  # fmt: skip
            if len({(s.tensor, s.dim) for s in slices}) != len(slices):
                raise PlanError("one dimension of a tensor is listed twice")
            inputs = tuple(
                InputSpec(tuple(positive(n, "shape") for n in i["shape"]), dtype_name(i["dtype"]), name_of(i))
                for i in values["inputs"]
            )
            code = one_of(Code, values.get("code", "own"), "code")
            exact = flag(values.get("exact", True), "exact")
            macs, params = ((int(values[k]["full"]), int(values[k]["planned"])) for k in ("macs", "params"))
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise PlanError(f"not a pruning plan: {what}") from error
        return PruningPlan(mask, groups, slices, inputs, macs, params, code, exact)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file is complete or not there at all."""
        write_text(Path(path), json.dumps(self.to_json(), separators=(",", ":")) + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> PruningPlan:
        """Read a plan.

        Raises:
            FileNotFoundError: if there is no such file.
            PlanError: if it is no valid plan; names the file and what is wrong.
        """
        try:
            return PruningPlan.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: not a pruning plan: no valid JSON ({error})") from error


def places_of(first: PruningPlan, following: PruningPlan) -> Tensor:
    """For each unit of a plan for a compact network its unit in the plan that made it, -1 for channels that stay there.

    Raises:
        PlanError: if the second plan is for another network, or takes units together that stay and that may go.
    """
    own = {(piece.tensor, piece.dim): piece for piece in first.slices}
    unseen = -2
    places = torch.full((len(following.mask),), unseen)
    for piece in following.slices:
        made = own.get((piece.tensor, piece.dim))
        units = torch.full((len(piece.units),), -1)
        if made is not None:
            units = made.units[first.kept_indices(made)]
            if len(units) != len(piece.units):
                raise PlanError(f"the second plan is not for what the first one makes: {piece.tensor!r} differs")
        inside = piece.units >= 0
        before = places[piece.units[inside]]
        both = (before != unseen) & ((before < 0) != (units[inside] < 0))
        if bool(both.any()):
            raise PlanError(f"channels of {piece.tensor!r} that the second plan takes together stay apart in the first")
        places[piece.units[inside]] = units[inside]
    return places


def start_of(plan: PruningPlan, name: str) -> int:
    """The first unit of a group."""
    names = list(plan.groups)
    return sum(plan.groups[before] for before in names[: names.index(name)])


def free_name(name: str, taken: Mapping[str, int]) -> str:
    """The name, with a number where it is taken."""
    count, free = 1, name
    while free in taken:
        count += 1
        free = f"{name}#{count}"
    return free


def unique_names(graph: GraphStructure) -> dict[str, int]:
    """Group names with "#2", "#3" … where one layer makes the channels of several groups."""
    named: dict[str, int] = {}
    for group in graph.groups:
        named[free_name(group.name, named)] = group.size
    return named


def encode_runs(units: Tensor) -> list[list[int]]:
    """Runs ``[first, count, repeat]``: first, first + 1, … (count values), each ``repeat`` times; first = -1: kept."""
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
    """The inverse of ``encode_runs``; refuses units outside [-1, num_units)."""
    parts = []
    for first, count, repeat in runs:
        if (
            not all(isinstance(n, int) for n in (first, count, repeat))
            or min(count, repeat) < 1
            or first < -1
            or first + count > num_units
            or (first < 0 and count != 1)
        ):
            raise PlanError(f"units {[first, count, repeat]} lie outside the {num_units} units of the plan")
        parts.append(torch.arange(first, first + count).repeat_interleave(repeat))
    if not parts:
        raise PlanError("a slice has no units")
    return torch.cat(parts)


def mask_of(group: Mapping[str, Any]) -> Tensor:
    """The part of the mask that a group's JSON describes."""
    size, keep = positive(group["size"], "size"), group["keep"]
    if not keep or not all(isinstance(k, int) and 0 <= k < size for k in keep):
        raise PlanError(f"group {group['name']!r}: 'keep' must name at least one of its {size} units, by index from 0")
    mask = torch.zeros(size, dtype=torch.bool)
    mask[keep] = True
    return mask


def positive(value: Any, name: str, *, least: int = 1) -> int:
    """``value`` if it is an integer of at least ``least``."""
    if not isinstance(value, int) or value < least:
        needed = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise PlanError(f"{name} must be {needed}, got {value!r}")
    return value


def flag(value: Any, name: str) -> bool:
    """``value`` if it is true or false."""
    if not isinstance(value, bool):
        raise PlanError(f"{name} must be true or false, got {value!r}")
    return value


def one_of(choices: Any, value: Any, name: str) -> Any:
    """``value`` if it is one of the values of a ``Literal``."""
    if value not in get_args(choices):
        raise PlanError(f"{name} {value!r} is none of {', '.join(get_args(choices))}")
    return value


def name_of(spec: Mapping[str, Any]) -> str | None:
    """The name of an input, None for one by position."""
    name = spec.get("name")
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        raise PlanError(f"name {name!r} is no name of an argument")
    return name


def dtype_name(name: Any) -> str:
    """``name`` if it is a torch dtype's."""
    if not isinstance(getattr(torch, str(name), None), torch.dtype):
        raise PlanError(f"dtype {name!r} is unknown")
    return str(name)
