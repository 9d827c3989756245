"""What differs between runs, as short labels; and curves compared by it, budget by budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastprune.report.log import Line, PruningRun, group_by_seed, lines

APART = {"command", "fastprune", "method", "budget", "seed", "device", "log", "recipe"}
"""Settings that labels leave out: they name a run in another way, or do not change its search."""


@dataclass(frozen=True)
class Panel:
    """The curves of one panel.

    Args:
        title: its title.
        lines: its curves; equal labels have equal numbers in all panels.
    """

    title: str
    lines: list[Line]


def describe_settings(runs: Sequence[PruningRun]) -> list[str]:
    """Return the method of each run, and the settings in which the runs of this method differ."""
    settings = [_settings_of(run) for run in runs]
    found = []
    for run, own in zip(runs, settings, strict=True):
        peers = [other for peer, other in zip(runs, settings, strict=True) if peer.method == run.method]
        changed = [name for name in own if any(peer.get(name) != own[name] for peer in peers)]
        found.append(", ".join([run.method, *(f"{name}={_as_word(own[name])}" for name in changed)]))
    return found


def name_runs(runs: Sequence[PruningRun]) -> list[str]:
    """Return a label for each run: what differs, its budget if there are several, its name if that is not enough."""
    labels = describe_settings(runs)
    budgets = [str(run.config["budget"]) for run in runs]
    if len(set(budgets)) > 1:
        labels = [f"{label}, {budget}" for label, budget in zip(labels, budgets, strict=True)]
    return [label if labels.count(label) == 1 else f"{label} · {r.name}" for label, r in zip(labels, runs, strict=True)]


@dataclass(frozen=True)
class Setting:
    """Runs at one budget that differ in nothing but the seed.

    Args:
        number: the place of the label among all labels.
        label: the method, and the settings that differ.
        runs: the runs, one for each seed.
    """

    number: int
    label: str
    runs: list[PruningRun]


def group_by_budget(runs: Sequence[PruningRun]) -> dict[str, list[Setting]]:
    """Return the settings at each budget; equal settings at other budgets have the same label."""
    families = group_by_seed(runs)
    found: dict[str, dict[str, list[PruningRun]]] = {}
    for family, label in zip(families, describe_settings([family[0] for family in families]), strict=True):
        own = found.setdefault(f"budget {family[0].config['budget']}", {})
        own[f"{label} · {family[0].name}" if label in own else label] = family  # the same run twice
    labels = list(dict.fromkeys(label for own in found.values() for label in own))
    return {
        budget: [Setting(labels.index(label), label, family) for label, family in own.items()]
        for budget, own in found.items()
    }


def compare_by_budget(runs: Sequence[PruningRun], metric: str) -> list[Panel]:
    """Return the curves of a metric in a panel for each budget, without budgets that have one curve only.

    Runs that differ in nothing but the seed are one line: their mean, between the least and the greatest.
    """
    panels = []
    for title, settings in group_by_budget([run for run in runs if len(run.curve(metric)) > 1]).items():
        drawn = [
            replace(line, number=setting.number, label=setting.label)
            for setting in settings
            for line in lines(setting.runs, lambda _: metric)
        ]
        if len(drawn) > 1:
            panels.append(Panel(title, drawn))
    return panels


def _settings_of(run: PruningRun) -> dict[str, Any]:
    common = {name: value for name, value in run.config.items() if name not in APART and not isinstance(value, dict)}
    return common | dict(run.options)


def _as_word(value: Any) -> str:
    """Return a value as the command line takes it."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
