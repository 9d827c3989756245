"""The result of pruning, as an object that says what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastprune.graph import ChannelGraph
from fastprune.graph.layer_widths import layer_widths
from fastprune.graph.plan import PruningPlan
from fastprune.host.wording import (
    Facts,
    card,
    change,
    count,
    duration,
    html_card,
    milliseconds,
    narrowest,
    percent,
    speed_change,
    text_table,
)
from fastprune.runs.origin import Origin


@dataclass(frozen=True)
class PruningResult:
    """The result of ``prune``.

    It can be pickled, without the operator graphs in ``graph``: after that ``graph`` knows groups, costs and plans, and
    refuses what runs the network.

    Args:
        model: the compact model, in eval mode, on the device that was used.
        plan: the channels that stay.
        metrics: ``macs`` and ``params`` (each ``{"full": …, "planned": …}``), ``difference`` (relative, of compact and
            masked outputs), ``seconds``, and ``search`` (the method's results and the last value of every metric that
            it logged); ``measured_ms``, of a forward pass of each network, and ``measured_on`` (device, threads,
            batch); ``compensation``, if there was one (how, numbers of fitted and shifted layers, skipped ones with the
            reason; or why it failed); under a budget of latency also ``ms``, with which the plan was made.
        graph: the channel graph of the full model.
        method: the name of the method.
        budget: the budget as it was given.
        settings: method, budget and all other settings, as ``config.yaml`` has them.
        origin: what the full network can be built from again.
    """

    model: nn.Module
    plan: PruningPlan
    metrics: dict[str, Any]
    graph: ChannelGraph
    method: str = ""
    budget: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)

    def __repr__(self) -> str:
        """Show what was gained; ``summary`` shows every layer."""
        return card(*self._card())

    def _repr_html_(self) -> str:
        """Show the same in a notebook."""
        return html_card(*self._card())

    def summary(self) -> str:
        """Return the same facts, and tables of all groups and layers before and after, as text."""
        groups = [[name, f"{kept} of {size}", percent(kept / size)] for name, (kept, size) in self.plan.widths.items()]
        layers = [
            [
                row.layer, row.kind, _arrow(row.channels), _arrow(row.macs), percent(row.macs[1] / (row.macs[0] or 1)),
                _arrow(row.params),
            ]
            for row in self._layers()
        ]  # fmt: skip
        parts = [card(*self._card()), text_table(["group", "units that stay", "part"], groups, left=1)]
        if layers:
            parts.append(text_table(["layer", "kind", "channels", "MACs", "part", "weights"], layers, left=2))
        return "\n\n".join(parts)

    def _layers(self) -> list[Any]:
        """Return the layers before and after; none where the plan leads from an earlier network to this one."""
        if self.plan.mask.shape != (self.graph.num_units,) or self.plan.groups.keys() != _names(self.graph):
            return []
        return layer_widths(self.graph, self.plan.mask)

    def _card(self) -> tuple[str, Facts]:
        given = {"method": self.method, "budget": self.budget}
        title = ", ".join([
            f"PruningResult: {type(self.model).__name__}", *(f"{name} {text}" for name, text in given.items() if text)
        ])  # fmt: skip
        kept, units = int(self.plan.mask.sum()), len(self.plan.mask)
        facts = [
            ("MACs", change(*self.plan.macs)),
            ("parameters", change(*self.plan.params)),
            *latency_facts(self.metrics),
            *accuracy_facts(self.metrics),
            ("widths", f"{kept:,} of {units:,} units stay, in {len(self.plan.groups)} groups"),
            ("narrowest", narrowest(self.plan.widths)),
        ]
        if "difference" in self.metrics:
            compared = "compact against masked network, on a random input"
            facts.append(("difference", f"{self.metrics['difference']:.1e} ({compared})"))
        if "seconds" in self.metrics:
            facts.append(("time", duration(self.metrics["seconds"])))
        facts.append(("see also", "result.model, result.plan, result.summary()"))
        return title, facts


def latency_facts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the latencies in the metrics of a pruning, one line for the measured and one for the modelled ones."""
    facts = []
    measured, modelled = metrics.get("measured_ms"), metrics.get("ms")
    if measured:
        where = measured_where(metrics.get("measured_on"))
        facts.append(("latency", speed_change(measured["full"], measured["planned"]) + (f", {where}" if where else "")))
    if modelled:
        text = f"{milliseconds(modelled['full'])} → {milliseconds(modelled['planned'])}, as the budget counts it"
        facts.append(("modelled", text))
    return facts


def measured_where(where: Mapping[str, Any] | None) -> str:
    """Return the conditions of a measurement in words."""
    if not where:
        return ""
    threads = "" if where.get("device") != "cpu" else f", {where.get('threads')} threads"
    return f"{where.get('device')}{threads}, batch of {where.get('batch')}".replace(" 1 threads", " 1 thread")


def accuracy_facts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the accuracy, if the search measured one."""
    found = metrics.get("search", {}).get("proxy_accuracy")
    return [] if found is None else [("accuracy", f"{percent(found)} on held-out data, before fine-tuning")]


def _arrow(pair: tuple[int, int]) -> str:
    full, planned = (count(value) if value >= 10_000 else f"{value:,}" for value in pair)
    return f"{full} → {planned}" if full != planned else full


def _names(graph: ChannelGraph) -> Any:
    return graph.plan(graph.offsets.new_ones(graph.num_units)).groups.keys()
