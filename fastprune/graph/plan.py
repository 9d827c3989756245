"""The pruning plan: which channels stay. It carries all that is needed to apply it, and is JSON both ways."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastprune.graph.export.inputs import Inputs, InputSpec
from fastprune.graph.plan_json import Code, decode, encode
from fastprune.graph.structure import GraphStructure, HeldSize, Norm, Slice, belong_to, index_slices
from fastprune.host.atomic import write_text
from fastprune.host.wording import Facts, card, change, html_card, narrowest, percent


class PlanError(ValueError):
    """A plan that cannot be read, or does not fit the model."""


@dataclass(frozen=True)
class PruningPlan:
    """Which units of each group stay, and which indices of which tensors belong to each unit.

    Args:
        mask: True = the unit stays, bool [U].
        groups: {name of the group: number of its units}, in the order of the flat vector.
        slices: the tensor dimensions that shrink.
        inputs: shapes and dtypes of the traced example.
        macs: (full, planned) multiply-accumulates per sample.
        params: (full, planned) number of parameters.
        code: the code that runs the compact network: "own", the model's own; "rewritten", its rewritten graph; or
            "either", the own code if it can.
        exact: whether removing the units equals zeroing them where they are read; False = some of them change
            statistics that normalise others, see ``trace(exact=False)``.
        attributes: {attribute of the model's own code: its numbers of channels before and after}; see
            ``graph.held_sizes``.
        norms: the norms whose statistics count removed channels as zeros; see ``trace(replace_norms=True)``.
    """

    mask: Tensor
    groups: Mapping[str, int]
    slices: tuple[Slice, ...]
    inputs: tuple[InputSpec, ...]
    macs: tuple[int, int]
    params: tuple[int, int]
    code: Code = "own"
    exact: bool = True
    attributes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    norms: tuple[Norm, ...] = ()

    @staticmethod
    def from_mask(graph: GraphStructure, mask: Tensor) -> PruningPlan:
        """Return the plan that keeps the units where ``mask`` [U] is 1; see ``ChannelGraph.plan``."""
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
            inputs=graph.traced.inputs.specs,
            macs=(round(float(full.macs)), round(float(planned.macs))),
            params=(round(float(full.params)), round(float(planned.params))),
            code="either" if graph.rewrites else "own",
            exact=bool((keep | ~graph.inexact_units).all()),
            attributes=resized(graph.held_sizes, keep),
            norms=graph.norms,
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
    def layers(self) -> dict[str, tuple[int, int]]:
        """{layer whose output channels can go: (channels that stay, all channels)}, in the order of the network."""
        made: dict[str, tuple[int, int]] = {}
        for piece in self.slices:
            layer, _, kind = piece.tensor.rpartition(".")
            if piece.role in ("out", "depthwise") and kind != "bias" and layer not in made:
                made[layer] = (len(self.kept_indices(piece)), len(piece.units))
        return made

    def __repr__(self) -> str:
        """Show cost, widths and code; ``plan.keep`` and ``plan.slices`` have the indices."""
        return card(*self._card())

    def _repr_html_(self) -> str:
        """Show the same in a notebook."""
        return html_card(*self._card())

    def _card(self) -> tuple[str, Facts]:
        kept, all_units = int(self.mask.sum()), len(self.mask)
        part = f" ({percent(kept / all_units)})" if all_units else ""
        shapes = ", ".join(f"{'×'.join(map(str, spec.shape))} {spec.dtype}" for spec in self.inputs)
        code = {"own": "the model's own", "rewritten": "the rewritten graph", "either": "own if it can, else rewritten"}
        replaced = len(self.narrowed_norms())
        title = f"PruningPlan: {kept:,} of {all_units:,} units stay{part}, in {len(self.groups)} groups"
        return title, [
            ("MACs", change(*self.macs)),
            ("parameters", change(*self.params)),
            ("narrowest", narrowest(self.widths)),
            ("inputs", shapes),
            ("code", code[self.code]),
            *([("attributes", f"{len(self.attributes)} numbers in the model change")] if self.attributes else []),
            *([("norms", f"{replaced} count removed channels as zeros, in a class of their own")] if replaced else []),
            ("exact", "yes" if self.exact else "no: norms or statistics change, see trace(exact=False)"),
        ]

    @property
    def removes_nothing(self) -> bool:
        """Whether every unit stays."""
        return bool(self.mask.all())

    def example(self, model: nn.Module) -> Inputs:
        """Return random inputs like the traced example, on the device of ``model``; the same in every call."""
        generator = torch.Generator().manual_seed(0)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        samples = [(spec.name, spec.sample(generator).to(device)) for spec in self.inputs]
        return Inputs(tuple(x for name, x in samples if name is None), {name: x for name, x in samples if name})

    def narrowed_norms(self) -> tuple[Norm, ...]:
        """Return the norms that lose channels."""
        return tuple(norm for norm in self.norms if len(self.kept_indices(norm)) < len(norm.units))

    def kept_indices(self, piece: Slice | Norm) -> Tensor:
        """Return the indices of ``piece`` that stay, int64 ascending."""
        return (~belong_to(piece.units, ~self.mask)).nonzero().flatten()

    def then(self, following: PruningPlan) -> PruningPlan:
        """Join this plan and a plan for its compact network to one plan for the full network.

        Args:
            following: a plan for a network that ``apply(self, model)`` made. It may prune groups that always stay in
                this plan (which was made with ``ignore``, say): they become groups of the result.

        Returns:
            A plan with this plan's inputs and the other's cost.

        Raises:
            PlanError: if the other is a plan for another network.
        """
        places = places_of(self, following)
        fresh = places < 0
        added = {name: size for name, size in following.groups.items() if bool(fresh[start_of(following, name)])}
        mask = torch.cat([self.mask, following.mask[fresh]])
        mask[places[~fresh]] &= following.mask[~fresh]
        codes = {self.code, following.code}
        both = PruningPlan(
            mask=mask,
            groups={**self.groups, **{free_name(name, self.groups): size for name, size in added.items()}},
            slices=join_slices(self, following, fresh),
            inputs=self.inputs,
            macs=(self.macs[0], following.macs[1]),
            params=(self.params[0], following.params[1]),
            code="rewritten" if "rewritten" in codes else "either" if "either" in codes else "own",
            exact=self.exact and following.exact,
            attributes={
                name: (self.attributes.get(name, sizes)[0], following.attributes.get(name, sizes)[1])
                for name, sizes in {**following.attributes, **self.attributes}.items()
            },
            norms=join_norms(self, following, fresh),
        )
        require_same_widths(self, following, both)
        return both

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return encode(vars(self), self.keep)

    @staticmethod
    def from_json(values: Any) -> PruningPlan:
        """Return the plan that ``to_json`` described.

        Raises:
            PlanError: if anything is missing, of the wrong type or out of range.
        """
        try:
            return PruningPlan(**decode(values))
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise PlanError(f"not a pruning plan: {what}") from error

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
    """Return the unit of ``first`` for each unit of ``following``, a plan for the compact network of ``first``.

    -1 is a unit whose channels always stay in ``first``.

    Raises:
        PlanError: if the second plan is for another network, or unites units that stay with units that may go.
    """
    own = index_slices(first.slices)
    unseen = -2
    places = torch.full((len(following.mask),), unseen)
    for piece in following.slices:
        made = own.get(piece.place)
        units = torch.full((len(piece.units),), -1)
        if made is not None:
            units = made.units[first.kept_indices(made)]
            if len(units) != len(piece.units):
                raise PlanError(f"the second plan is not for what the first one makes: {piece.tensor!r} differs")
        inside = piece.units >= 0
        before = places[piece.units[inside]]
        both = (before != unseen) & ((before < 0) != (units[inside] < 0))
        if bool(both.any()):
            raise PlanError(f"the second plan unites channels of {piece.tensor!r} that the first one keeps apart")
        places[piece.units[inside]] = units[inside]
    return places


def join_slices(first: PruningPlan, following: PruningPlan, fresh: Tensor) -> tuple[Slice, ...]:
    """Return the slices of the full network under both plans.

    Args:
        first: the plan for the full network.
        following: the plan for its compact network.
        fresh: the units of ``following`` that always stay in ``first``, bool; they are numbered after its units.
    """
    own, theirs = index_slices(first.slices), index_slices(following.slices)
    return tuple(join_units(first, own.get(place), theirs.get(place), fresh) for place in {**own, **theirs})


def join_norms(first: PruningPlan, following: PruningPlan, fresh: Tensor) -> tuple[Norm, ...]:
    """Return the norms of the full network under both plans; see ``join_slices``."""
    own, theirs = ({norm.module: norm for norm in plan.norms} for plan in (first, following))
    return tuple(join_units(first, own.get(name), theirs.get(name), fresh) for name in {**own, **theirs})


Piece = TypeVar("Piece", Slice, Norm)


def join_units(first: PruningPlan, own: Piece | None, theirs: Piece | None, fresh: Tensor) -> Piece:
    """Return a slice or a norm of the full network, of which the plans know ``own`` and ``theirs``, or one of them."""
    piece = own or theirs
    assert piece is not None
    numbers = len(first.mask) - 1 + fresh.cumsum(0)
    units = piece.units.clone() if own is not None else torch.full((len(piece.units),), -1)
    if theirs is not None:
        left = first.kept_indices(piece) if own is not None else torch.arange(len(units))
        added = belong_to(theirs.units, fresh)
        units[left[added]] = numbers[theirs.units[added]]
    return replace(piece, units=units)


def require_same_widths(first: PruningPlan, following: PruningPlan, both: PruningPlan) -> None:
    """Refuse a second plan under which a tensor does not get the width that it has under both plans."""
    own, theirs = index_slices(first.slices), index_slices(following.slices)
    for piece in both.slices:
        last = following.kept_indices(theirs[piece.place]) if piece.place in theirs else None
        expected = first.kept_indices(own[piece.place]) if last is None else last
        if len(both.kept_indices(piece)) != len(expected):
            raise PlanError(f"the second plan parts channels of {piece.tensor!r} that belong together in the first")


def start_of(plan: PruningPlan, name: str) -> int:
    """Return the first unit of a group."""
    names = list(plan.groups)
    return sum(plan.groups[before] for before in names[: names.index(name)])


def free_name(name: str, taken: Mapping[str, int]) -> str:
    """Return the name, with a number if it is taken."""
    count, free = 1, name
    while free in taken:
        count += 1
        free = f"{name}#{count}"
    return free


def resized(held_sizes: Iterable[HeldSize], keep: Tensor) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return {attribute: (its numbers, those that are left)} of those that change, and on which all uses agree."""
    found: dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for held in held_sizes:
        found.setdefault(held.name, set()).add((held.full, held.under(keep)))
    agreed = {name: next(iter(sizes)) for name, sizes in found.items() if len(sizes) == 1}
    return {name: (full, left) for name, (full, left) in agreed.items() if full != left}


def unique_names(graph: GraphStructure) -> dict[str, int]:
    """Return {name: size} of the groups; groups with the same first layer get "#2", "#3" … after its name."""
    named: dict[str, int] = {}
    for group in graph.groups:
        named[free_name(group.name, named)] = group.size
    return named
