"""The training of gates: accuracy beside R, the shape of R with the search on it, and the edge of soft masks.

After Fig. 2 and 5 (a–d) of DMC (Gao et al., CVPR 2020) and Fig. 2 of DDNP (Gao et al., ECCV 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastprune.methods.gates.regularisers import SIDES, log_distance
from fastprune.reference.topk_mask import values_by_rank
from fastprune.report.log import PruningRun, number

FINE = 20  # points of a mask's continuous function between two ranks
FORMULAS = {"log": "log(|r − p| + 1)", "one_sided": "log(max(r, p)/p)", "two_sided": "|log(r/p)|"}


# --- accuracy beside R ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """The progress of one search of gates.

    Args:
        label: the run.
        accuracy: {epochs done: held-out accuracy under the hard gates}.
        regulariser: {epochs done: R}.
    """

    label: str
    accuracy: dict[float, float]
    regulariser: dict[float, float]


def trainings(runs: Sequence[PruningRun]) -> list[Training]:
    """Return the searches that logged curves of both accuracy and R."""
    found = [Training(run.label, run.curve("proxy_accuracy"), run.curve("regulariser")) for run in runs]
    return [one for one in found if min(len(one.accuracy), len(one.regulariser)) > 1]


# --- the shape of R ---------------------------------------------------------------------------------------------------


@dataclass
class CostTerm:
    """A cost term R around its target p.

    Args:
        formula: R as a formula.
        target: p.
        term: R as a function of cost ratios r [n] and p.
        points: (r − p, R) of all lines in the logs of the searches under this term.
    """

    formula: str
    target: float
    term: Callable[[Tensor, float], Tensor]
    points: list[tuple[float, float]] = field(default_factory=list)

    @property
    def depends_on_target(self) -> bool:
        """Whether R has another shape around every p."""
        return self.formula != FORMULAS["log"]

    def sample(self, distances: Sequence[float]) -> tuple[list[float], list[float]]:
        """Return the values of R at distances r − p, and its slopes there; nan where r ≤ 0."""
        ratio = torch.tensor(distances, dtype=torch.float64) + self.target
        ratio = torch.where(ratio > 0, ratio, torch.nan).requires_grad_()
        value = self.term(ratio, self.target)
        (slope,) = torch.autograd.grad(value.sum(), [ratio])
        return value.tolist(), torch.where(value.isnan(), torch.nan, slope).tolist()


def cost_terms(runs: Sequence[PruningRun]) -> list[CostTerm]:
    """Return the different cost terms of the runs that say where their target is, each with what was logged under it.

    Budget and logged costs are parts of the whole network's cost; p and r are parts of that of the layers at gates,
    ``gated_part`` of the whole. Both distances from the budget differ by this factor.
    """
    terms: dict[tuple[str, float], CostTerm] = {}
    for run in runs:
        kind = "log" if run.method == "dmc" else str(run.options.get("resource"))
        gated, part = number(run.last("plan"), "search", "gated_part"), run.budget_part
        if kind not in FORMULAS or gated is None or part is None:
            continue
        target = 1 - (1 - part) / gated
        term = log_distance if kind == "log" else SIDES[kind]
        costs, values = run.curve(f"{run.budget.resource}_ratio"), run.curve("regulariser")
        key = (kind, 0.0 if kind == "log" else round(target, 4))  # log(|r − p| + 1) is the same around every p
        own = terms.setdefault(key, CostTerm(FORMULAS[kind], target, term))
        own.points += [((costs[epoch] - part) / gated, values[epoch]) for epoch in values if epoch in costs]
    return [one for one in terms.values() if one.points]


def distances_around(terms: Sequence[CostTerm]) -> list[float]:
    """Return distances r − p from below every target up to the full network; nan between both sides of the target."""
    low, high = -0.6 * max(one.target for one in terms), 1 - min(one.target for one in terms)
    steps = range(200)
    return [*(low * (1 - n / 200) for n in steps), math.nan, *(high * (n + 1) / 200 for n in steps)]


# --- the edge of soft masks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskEdge:
    """The mask of one group by the rank of its channels.

    Args:
        title: the run and the group.
        size: C, the number of channels.
        centre: Ck, the width.
        window: γ, the width of the soft edge in channels, as far as it fits; 0 = a hard mask.
        values: the mask at ranks 1 to C.
        ranks: places at which the continuous function is sampled.
        function: the continuous function there.
    """

    title: str
    size: int
    centre: float
    window: float
    values: list[float]
    ranks: list[float]
    function: list[float]


def mask_edges(runs: Sequence[PruningRun]) -> list[MaskEdge]:
    """Return the mask of the largest gated group at the end of each search whose masks have an edge.

    The width is the last one in the log. Runs with the same group, window and width are one mask.
    """
    found: dict[tuple[str, int, float, float], MaskEdge] = {}
    for run in runs:
        window, kept = run.options.get("window"), run.kept
        sizes = {} if run.plan is None else {name: n for name, n in run.plan.groups.items() if name in kept}
        if not isinstance(window, (int, float)) or run.options.get("variant") == "release" or not sizes:
            continue
        group = max(sizes, key=lambda name: sizes[name])
        edge = _edge(f"{run.label}: {group}", sizes[group], list(kept[group].values())[-1], float(window))
        found.setdefault((group, edge.size, edge.centre, edge.window), edge)
    return list(found.values())


def _edge(title: str, size: int, keep: float, window: float) -> MaskEdge:
    share = torch.tensor(keep, dtype=torch.float64)
    asked = torch.tensor(float(round(window * size)), dtype=torch.float64)
    # The function between two ranks is that of a group of FINE times as many channels, with FINE times the window.
    fine = values_by_rank(FINE * size, share, FINE * asked)
    centre = size * keep
    return MaskEdge(
        title=title,
        size=size,
        centre=centre,
        window=min(float(asked), 2 * (size - centre), 2 * centre),
        values=values_by_rank(size, share, asked).tolist(),
        ranks=[(place + 0.5) / FINE + 0.5 for place in range(FINE * size)],
        function=fine.tolist(),
    )
