"""``fastprune sensitivity``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastprune.cli.advice import at_chance, print_advice, too_few, warn_of_random_weights, word
from fastprune.cli.inputs import check_batch, data_example, load_objective
from fastprune.cli.networks import build_model, check_fit, open_data
from fastprune.cli.settings import RunSettings, SensitivitySettings, pick, require
from fastprune.host.distributed import Distributed
from fastprune.report.tables import percent, show
from fastprune.sensitivity import Sensitivity, sensitivity
from fastprune.training.data_for_network import DataForNetwork

CHART, SUGGESTION = "sensitivity.png", "keep_ratio.yaml"


def run_sensitivity(values: dict[str, Any], given: set[str]) -> int:
    """Measure held-out accuracy, or loss, over the part of each group that stays."""
    settings = pick(SensitivitySettings, values)
    require(model=settings.model, data=settings.data)
    folder = Path(settings.out) if settings.out else None
    draw = load_chart() if folder is not None else None
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} exists already: give another --out")
    data = open_data(str(settings.data), pick(RunSettings, {**values, "out": None}))
    if isinstance(data, DataForNetwork):
        raise ValueError(f"data {data.name!r}: they hold nothing out to measure on; sensitivity does not take them")
    torch.manual_seed(settings.seed)
    objective = load_objective(settings)
    model = build_model(settings, data)
    example = data_example(data, objective, model)
    check_fit(model, settings.model, example)
    check_batch(model, data, objective, settings.device)
    warn_of_random_weights(settings, Distributed(), f"so the {objective.measure_name} means nothing")
    found = sensitivity(
        model, example, data, ratios=settings.ratios, device=settings.device, ignore=settings.ignore,
        loss=objective.loss, forward=objective.forward,
    )  # fmt: skip
    if folder is not None and draw is not None:
        folder.mkdir(parents=True, exist_ok=True)
        draw(found, folder / CHART)
        found.save(folder / SUGGESTION, settings.drop)
    if values["json"]:
        print(json.dumps({**asdict(found), "keep_ratio": list(found.keep_ratio(settings.drop))}))
        return 0
    print_sensitivity(found, settings.drop)
    odd = []
    if found.accuracy is not None:
        odd = [
            *at_chance({"network": {"accuracy": found.accuracy}}, data),
            *too_few(found.samples, settings.drop),
        ]
    print_advice([*odd, *(written(settings, folder))])
    return 0


def load_chart() -> Any:
    """Import what draws the chart, before anything is measured."""
    try:
        from fastprune.report.sensitivity_chart import draw_sensitivity  # matplotlib
    except ImportError as error:
        raise ValueError(
            "--out: the chart needs matplotlib: pip install 'fastprune[report]', or leave --out out"
        ) from error
    return draw_sensitivity


def print_sensitivity(found: Sensitivity, drop: float) -> None:
    """Print accuracies, a row for each group, and the suggestion."""
    ratios = sorted({point.ratio for point in found.points})
    suggested = found.suggest(drop)
    table = Table()
    table.add_column("group", overflow="fold")
    for ratio in ratios:
        table.add_column(f"{ratio:g}", justify="right")
    table.add_column("keep", justify="right")
    for name, least in suggested.items():
        table.add_row(name, *(describe(point.accuracy, point.loss) for point in found.of_group(name)), f"{least:g}")
    what = "loss" if found.accuracy is None else "accuracy in %"
    whole = f"{found.loss:.4g}" if found.accuracy is None else percent(found.accuracy)
    head = f"held-out {what} over the part of a group that stays; {whole} for the full network"
    console = Console(markup=False, highlight=False)
    console.print(f"{head}, on {found.samples} samples, untrained")
    show(table)
    most = (
        f"at most {percent(drop)} accuracy" if found.accuracy is not None else f"a loss at most {percent(drop)} higher"
    )
    console.print(f"keep: the smallest part that costs {most}, one group at a time")


def describe(accuracy: float | None, loss: float) -> str:
    """Return a cell of the table."""
    return f"{loss:.4g}" if accuracy is None else f"{100 * accuracy:.1f}"


def written(settings: SensitivitySettings, folder: Path | None) -> list[str]:
    """Return the lines about files and the next command."""
    same = f"fastprune prune --model {word(settings.model)} --weights {word(settings.weights or 'FILE')}"
    same += f" --data {word(settings.data)}"
    if folder is None:
        return ["next: the same with --out FOLDER writes the chart and a file for fastprune prune --config"]
    place = folder / SUGGESTION
    return [f"written: {folder / CHART}, {place}", f"next: {same} --config {word(place)} --out RUN"]
