"""The logs of pruning runs as a report needs them: curves of searches, widths, sizes and accuracies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import yaml

from fastprune.engine import RunDirectory, RunError
from fastprune.graph.plan import PruningPlan
from fastprune.planning.budget import Budget

Over = Literal["epochs", "steps"]

KEEP = "keep/"  # in front of the names of groups, in metrics of a GateSearch


@dataclass(frozen=True, eq=False)
class PruningRun:
    """The files of one pruning run.

    Args:
        name: its name in the report.
        config: the content of ``config.yaml``.
        records: the lines of ``metrics.jsonl``.
        plan: its plan; None before the search is finished.
        finetuning: the content of ``finetune.yaml``; empty without one.
    """

    name: str
    config: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    plan: PruningPlan | None
    finetuning: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(path: str | Path, name: str | None = None) -> PruningRun:
        """Read a run's directory.

        Raises:
            RunError: if there is no pruning run, or nothing in it yet.
            PlanError: if its plan is broken.
        """
        directory = RunDirectory.open(path)
        config = directory.config
        if config.get("command") not in ("prune", "demo"):
            raise RunError(f"{str(path)!r} is a run of 'fastprune {config.get('command')}': a run of 'prune' is needed")
        if not (isinstance(config.get("method"), str) and isinstance(config.get("budget"), str)):
            raise RunError(f"{str(directory.path / 'config.yaml')!r} does not name a method and a budget")
        plan = PruningPlan.load(directory.plan_path) if directory.plan_path.is_file() else None
        own_name = name or directory.path.resolve().name
        run = PruningRun(own_name, config, directory.metrics(), plan, read_finetuning(directory.path / "finetune.yaml"))
        for record in run.search:
            places = [record.get(key) for key in ("epoch", "step")]
            if not all(isinstance(place, int) and place >= 0 for place in places):
                raise RunError(
                    f"{directory.metrics_path}: a line of the search is at epoch {places[0]}, step {places[1]}"
                )
        if plan is None and not run.search:
            raise RunError(f"{str(path)!r} holds nothing to report yet: its search has logged nothing, and has no plan")
        return run

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.config["method"])

    @property
    def label(self) -> str:
        """Its name in figures."""
        return f"{self.method} · {self.name}"

    @property
    def options(self) -> Mapping[str, Any]:
        """The method's options."""
        options = self.config.get(self.method)
        return options if isinstance(options, Mapping) else {}

    @cached_property
    def budget(self) -> Budget:
        """The budget of the search."""
        return Budget.parse(str(self.config["budget"]))

    @property
    def budget_part(self) -> float | None:
        """The budget as a fraction of the full cost; None if the log does not say.

        An absolute budget is compared with the plan, whose cost and fraction are both in the log: the full cost depends
        on whether the network had been pruned before.
        """
        if not self.budget.absolute:
            return self.budget.value
        plan = self.last("plan")
        cost = number(plan, self.budget.metric, "planned")
        part = number(plan, "search", f"{self.budget.resource}_of_plan")
        return self.budget.value / cost * part if cost and part else None

    @cached_property
    def search(self) -> list[Mapping[str, Any]]:
        """The lines of the search."""
        return [record for record in self.records if record.get("stage") == "search"]

    @cached_property
    def epochs(self) -> list[float]:
        """The epochs done at each line of the search, over all its phases."""
        places: list[float] = []
        done, begun = 0, 0
        for _, lines in groupby(self.search, key=lambda record: record.get("phase")):
            phase = list(lines)
            # A line within an epoch gives less than the line at its end, which gives the length of the epochs.
            length = max((line["step"] - begun) / (line["epoch"] + 1) for line in phase) or 1
            places += [done + (line["step"] - begun) / length for line in phase]
            done, begun = done + phase[-1]["epoch"] + 1, phase[-1]["step"]
        return places

    def tuning(self, metric: str) -> dict[float, float]:
        """Return a metric of the fine-tuning by epochs done; of the training that a demonstration logs, too."""
        lines = [r for r in self.records if r.get("stage") == "finetune" and number(r, "epoch") is not None]
        points = {}
        for record in lines:
            value = number(record, metric)
            if value is not None:
                points[float(record["epoch"]) + 1] = value  # the line at an epoch's end is its last
        return points

    def curve(self, metric: str, over: Over = "epochs") -> dict[float, float]:
        """Return a metric of the search by epochs done or by steps; nan if it was not finite.

        Raises:
            RunError: if the log has something other than a number.
        """
        points: dict[float, float] = {}
        for place, record in zip(self.epochs, self.search, strict=True):
            if metric in record:
                value = record[metric]
                if value is not None and not isinstance(value, (int, float)):
                    raise RunError(f"run {self.name!r}: {metric} of step {record['step']} is no number: {value!r}")
                points[place if over == "epochs" else record["step"]] = math.nan if value is None else float(value)
        return points

    @property
    def kept(self) -> dict[str, dict[float, float]]:
        """{group with gates: {epochs done: fraction of its channels that stay}}, in the order of the network."""
        names = dict.fromkeys(key for record in self.search for key in record if key.startswith(KEEP))
        return {name.removeprefix(KEEP): self.curve(name) for name in names}

    def last(self, stage: str, method: str | None = None) -> Mapping[str, Any]:
        """Return the newest line of a stage, and of a method; empty if there is none."""
        found = [r for r in self.records if r.get("stage") == stage and method in (None, r.get("method"))]
        return found[-1] if found else {}


def read_finetuning(path: Path) -> Mapping[str, Any]:
    """Read the settings of a fine-tuning; empty if there is none, or nothing that can be read."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


Metric = Callable[[PruningRun], str]
"""Returns the name of a metric in the log of a run."""


@dataclass(frozen=True)
class Line:
    """One curve of a figure.

    Args:
        number: place of the run among all runs of the report; of the first run if several differ in the seed only.
        label: its text in the legend.
        x: epochs or steps, ascending.
        y: the metric, or its mean over the runs.
        low: the smallest values of the runs; None for a single run.
        high: the largest values of the runs.
    """

    number: int
    label: str
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


def read_runs(paths: Sequence[str]) -> list[PruningRun]:
    """Read runs; the names of their directories, with as many parents as are needed, tell them apart.

    Raises:
        ValueError: if a run is given twice.
        RunError, PlanError: see ``PruningRun.read``.
    """
    paths = [step for path in paths for step in steps_of(path)]
    parts = [Path(path).resolve().parts for path in paths]
    twice = [path for number, path in enumerate(paths) if parts[number] in parts[:number]]
    if twice:
        raise ValueError(f"--run {twice[0]}: this run is given twice")
    lengths = range(1, max(map(len, parts), default=0) + 1)
    names = next((ends for n in lengths if len(set(ends := ["/".join(p[-n:]) for p in parts])) == len(ends)), [])
    return [PruningRun.read(path, name) for path, name in zip(paths, names, strict=True)]


def steps_of(path: str) -> list[str]:
    """Return the runs of ``prune_in_steps`` in a directory, or the directory itself."""
    if (Path(path) / "config.yaml").is_file():
        return [path]
    steps = [
        step for step in Path(path).glob("step-*") if step.name[5:].isdecimal() and (step / "config.yaml").is_file()
    ]
    return [str(step) for step in sorted(steps, key=lambda step: int(step.name[5:]))] or [path]


def group_by_seed(runs: Sequence[PruningRun]) -> list[list[PruningRun]]:
    """Group runs that differ in the seed only."""
    families: list[list[PruningRun]] = []
    for run in runs:
        for family in families:
            if run.config.get("seed") not in [r.config.get("seed") for r in family] and _same_but_seed(run, family[0]):
                family.append(run)
                break
        else:
            families.append([run])
    return families


def _same_but_seed(one: PruningRun, other: PruningRun) -> bool:
    apart = {"seed", "fastprune", "device"}
    first, second = ({k: v for k, v in run.config.items() if k not in apart} for run in (one, other))
    return first == second


def lines(runs: Sequence[PruningRun], metric_of: Metric, over: Over = "epochs") -> list[Line]:
    """Return the curves of a metric, one per group of seeds, without runs that did not log it."""
    found = []
    for family in group_by_seed(runs):
        curves = {run.name: run.curve(metric_of(run), over) for run in family}
        curves = {name: curve for name, curve in curves.items() if curve}
        if curves:
            found.append(_make_line(runs.index(family[0]), family[0].method, curves))
    return found


def _make_line(number: int, method: str, curves: Mapping[str, Mapping[float, float]]) -> Line:
    first, *others = curves.values()
    if not others:
        return Line(number, f"{method} · {next(iter(curves))}", list(first), list(first.values()))
    names = ", ".join(curves) if len(curves) <= 4 else f"{next(iter(curves))} and {len(others)} other seeds"
    # A run that stopped early has fewer points: a mean over the other runs alone would jump where it ends.
    x = [place for place in first if all(place in curve for curve in others)]
    values = [[curve[place] for curve in curves.values()] for place in x]
    means = [sum(v) / len(v) for v in values]
    label = f"{method} · {names} (mean, min to max)"
    return Line(number, label, x, means, [min(v) for v in values], [max(v) for v in values])


def number(record: Mapping[str, Any], *keys: str) -> float | None:
    """Return the number at nested keys of a line of the log; None if there is none."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else None
