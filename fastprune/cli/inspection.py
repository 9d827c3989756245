"""``fastprune inspect``."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

from fastprune.cli.advice import after_inspecting
from fastprune.cli.networks import build_model, check_fit, input_shape, make_example
from fastprune.cli.settings import InspectSettings, pick
from fastprune.graph import ChannelGraph, trace
from fastprune.report.graph_tables import print_graph


def run_inspect(values: dict[str, Any], given: set[str]) -> int:
    """Show a network's channel groups and what stands in the way of pruning."""
    settings = pick(InspectSettings, values)
    model, shape = build_model(settings, None), input_shape(settings, None)
    check_fit(model, settings.model, make_example(shape))
    begun = time.monotonic()
    graph = trace(
        model, make_example(shape), rewrite=not settings.keep_class, ignore=settings.ignore, exact=not settings.inexact
    )
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
        "unprunable": [{"layer": layer, "reason": reason} for layer, reason in graph.unprunable],
        "seconds": round(seconds, 3),
    }
