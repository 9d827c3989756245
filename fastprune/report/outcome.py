"""The outcome of a pruning run in numbers: sizes, times and accuracies, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastprune.host.wording import count, duration, milliseconds, percent, points, speed
from fastprune.report.log import PruningRun, number

Pair = tuple[float, float]
"""Values of the full and of the compact network."""


@dataclass(frozen=True)
class Outcome:
    """The numbers of one run. What was not measured is None.

    Args:
        name: the run's name.
        method: the method.
        budget: the budget.
        macs: multiply-accumulates per sample.
        params: parameters.
        latency: measured milliseconds of a forward pass.
        modelled: milliseconds by the model of a latency budget.
        baseline: test accuracy of the full network.
        pruned: test accuracy after pruning, before any fine-tuning.
        tuned: test accuracy after fine-tuning.
        top5: test accuracies among five guesses, (full, last), of networks with 10 classes or more.
        seconds: time of search and surgery.
        where: what the latency was measured on.
        model: the full network's name; "" if the run does not say.
    """

    name: str
    method: str
    budget: str
    macs: Pair | None = None
    params: Pair | None = None
    latency: Pair | None = None
    modelled: Pair | None = None
    baseline: float | None = None
    pruned: float | None = None
    tuned: float | None = None
    top5: tuple[float | None, float | None] = (None, None)
    seconds: float | None = None
    where: Mapping[str, Any] | None = None
    model: str = ""

    @property
    def accuracy(self) -> float | None:
        """The last accuracy: after fine-tuning, or after pruning if there was none."""
        return self.pruned if self.tuned is None else self.tuned

    @property
    def throughput(self) -> Pair | None:
        """The images per second, by the latency and its batch; None if one of them is not known."""
        batch = number(self.where or {}, "batch")
        if self.latency is None or batch is None:
            return None
        return 1000 * batch / self.latency[0], 1000 * batch / self.latency[1]

    @property
    def gain(self) -> float | None:
        """The last accuracy minus that of the full network."""
        return None if self.accuracy is None or self.baseline is None else self.accuracy - self.baseline

    def as_row(self) -> dict[str, Any]:
        """Return the numbers as JSON values by name."""
        row: dict[str, Any] = {"run": self.name, "method": self.method, "budget": self.budget}
        for name, pair in (("macs", self.macs), ("params", self.params), ("latency_ms", self.latency)):
            row[f"{name}_full"], row[name] = pair or (None, None)
        return row | {
            "accuracy_full": self.baseline,
            "accuracy_pruned": self.pruned,
            "accuracy_tuned": self.tuned,
            "top5_full": self.top5[0],
            "top5": self.top5[1],
            "seconds": self.seconds,
        }

    def as_texts(self) -> dict[str, str]:
        """Return the numbers as people read them, by heading; "–" for what is not known."""
        return {
            "run": self.name,
            "method": self.method,
            "budget": self.budget,
            "MACs": _size(self.macs),
            "parameters": _size(self.params),
            "latency": "–" if self.latency is None else f"{milliseconds(self.latency[1])} ({speed(*self.latency)})",
            "accuracy before": _part(self.baseline),
            "pruned": _part(self.pruned),
            "fine-tuned": _part(self.tuned)
            + ("" if None in (self.tuned, self.gain) else f" ({points(self.gain or 0)})"),
            "top-5": "–" if self.top5 == (None, None) else " → ".join(map(_part, self.top5)),
            "time": "–" if self.seconds is None else duration(self.seconds),
        }

    def headline(self) -> list[str]:
        """Return what was gained and lost, as far as it was measured."""
        parts = []
        if self.macs is not None:
            parts.append(f"{percent(self.macs[1] / self.macs[0], 0)} of the MACs")
        if self.latency is not None:
            parts.append(speed(*self.latency))
        if self.gain is not None:
            parts.append(points(self.gain) + ("" if self.tuned is not None else " before fine-tuning"))
        return parts


def outcome_of(run: PruningRun) -> Outcome:
    """Return the numbers in a run's log and plan."""
    done, pruned = run.last("plan"), run.last("result", run.method)
    tuned = run.last("result", "finetune")
    stages = _stages_of_demo(run)
    plan = run.plan
    latency = _pair(done, "measured_ms")
    return Outcome(
        name=run.name,
        method=run.method,
        budget=str(run.config["budget"]),
        macs=None if plan is None else (float(plan.macs[0]), float(plan.macs[1])),
        params=None if plan is None else (float(plan.params[0]), float(plan.params[1])),
        latency=latency,
        modelled=_pair(done, "ms"),
        baseline=_first(number(pruned, "baseline", "accuracy"), number(stages, "trained", "accuracy")),
        pruned=_first(number(pruned, "compact", "accuracy"), number(stages, "pruned", "accuracy")),
        tuned=_first(number(tuned, "compact", "accuracy"), number(stages, "fine-tuned", "accuracy")),
        top5=(
            number(pruned, "baseline", "top5"),
            _first(number(tuned, "compact", "top5"), number(pruned, "compact", "top5")),
        ),
        seconds=number(done, "seconds"),
        where=done.get("measured_on") if isinstance(done.get("measured_on"), Mapping) else None,
        model=str(run.config.get("model") or ""),
    )


def headline(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the parts of the headline of one run, or the ranges over several runs."""
    if len(outcomes) == 1:
        return outcomes[0].headline()
    parts = [f"{len(outcomes)} runs"]
    kept = [o.macs[1] / o.macs[0] for o in outcomes if o.macs is not None]
    if kept:
        parts.append(f"{_range(kept, lambda x: percent(x, 0))} of the MACs")
    gains = [o.gain for o in outcomes if o.gain is not None]
    if gains:
        parts.append(_range(gains, points).replace(" points to", " to"))
    return parts


def _range(values: Sequence[float], show: Any) -> str:
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def _stages_of_demo(run: PruningRun) -> dict[str, Any]:
    """Return the stages that the demonstration logs, by name."""
    stages = run.last("result").get("stages")
    if not isinstance(stages, list):
        return {}
    return {str(stage.get("stage")): stage for stage in stages if isinstance(stage, Mapping)}


def _pair(record: Mapping[str, Any], name: str) -> Pair | None:
    full, planned = number(record, name, "full"), number(record, name, "planned")
    return (full, planned) if full and planned else None


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _size(pair: Pair | None) -> str:
    return "–" if pair is None else f"{count(pair[1])} ({percent(pair[1] / pair[0])})"


def _part(value: float | None) -> str:
    return "–" if value is None else percent(value)
