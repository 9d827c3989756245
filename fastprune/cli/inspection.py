"""``fastprune inspect``."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

from fastprune.cli.advice import after_inspecting
from fastprune.cli.inputs import find_example, load_objective
from fastprune.cli.networks import build_model, check_fit, open_data
from fastprune.cli.settings import InspectSettings, RunSettings, pick
from fastprune.graph import ChannelGraph
from fastprune.models.ultralytics import is_ultralytics
from fastprune.report.graph_tables import print_graph
from fastprune.surgery import trace
from fastprune.training.data_for_network import open_for


def run_inspect(values: dict[str, Any], given: set[str]) -> int:
    """Show a network's channel groups and what stands in the way of pruning."""
    settings = pick(InspectSettings, values)
    objective = load_objective(settings)
    data = open_data(settings.data, RunSettings()) if settings.data else None
    model = build_model(settings, data)
    data, objective = open_for(model, data, objective)
    example = find_example(settings, data, objective, model)
    check_fit(model, settings.model, example)
    begun = time.monotonic()
    rewrite = not (settings.keep_class or is_ultralytics(settings.model))
    graph = trace(
        model, example, rewrite=rewrite, ignore=settings.ignore, exact=not settings.inexact,
        replace_norms=settings.replace_norms, heads=settings.heads,
    )  # fmt: skip
    seconds = time.monotonic() - begun
    if values["json"]:
        print(json.dumps(as_json(graph, seconds)))
    else:
        print_graph(settings.model, graph)
        print(after_inspecting(settings))
    return 0


def as_json(graph: ChannelGraph, seconds: float) -> dict[str, Any]:
    """Return a channel graph, and how long tracing took, as JSON values."""
    cost = graph.cost()
    return {
        "macs": round(float(cost.macs)),
        "params": round(float(cost.params)),
        "units": graph.num_units,
        "groups": [{k: v for k, v in asdict(group).items() if k != "start"} for group in graph.groups],
        "layers": [
            {"layer": row.layer, "kind": row.kind, "macs": row.macs, "groups": list(row.groups), "kept": row.reason}
            for row in graph.table()
        ],
        "exact": graph.exact,
        "inexact": list(graph.inexact),
        "norms": [norm.module for norm in graph.norms],
        "unprunable": [{"layer": layer, "reason": reason} for layer, reason in graph.unprunable],
        "seconds": round(seconds, 3),
    }
