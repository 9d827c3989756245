"""What a command tells people at its end: what is odd about the results, and the command to type next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from fastprune.cli.settings import (
    CalibrateSettings,
    EvaluateSettings,
    InspectSettings,
    ModelSettings,
    NetworkSettings,
    PruneSettings,
    SensitivitySettings,
)
from fastprune.data import Data
from fastprune.host.distributed import Distributed

ODD = "odd: "


def print_advice(lines: Sequence[str]) -> None:
    """Print lines; what is odd in yellow."""
    for line in lines:
        odd = line.startswith(ODD)  # a command stays on one line, so that it can be copied
        Console(markup=False, highlight=False).print(line, style="yellow" if odd else None, soft_wrap=not odd)


def warn_of_random_weights(
    settings: PruneSettings | SensitivitySettings,
    peers: Distributed,
    so: str = "so the channels that stay mean nothing",
) -> None:
    """Say in red, before the work, that the weights are random.

    Args:
        settings: the network.
        peers: this process among its peers; one of them speaks.
        so: what follows from it.
    """
    unknown = ":" in settings.model and not settings.model.startswith(("torchvision:", "timm:"))
    random = settings.model.startswith("yolo:") and not settings.model.endswith(".pt")
    is_new = settings.weights is None and getattr(settings, "from_run", None) is None
    if is_new and (random or not unknown) and peers.is_main:
        text = f"warning: no --weights: the weights are random, {so}"
        Console(stderr=True, markup=False, highlight=False).print(text, style="bold red", soft_wrap=True)


def at_chance(results: Mapping[str, Mapping[str, Any]], data: Data | None, *, trained: bool = False) -> list[str]:
    """Return a line for accuracies that guessing would reach, if there are some.

    Args:
        results: the measurements of each network.
        data: the data set.
        trained: whether the command has just trained the network.
    """
    if data is None or not data.knows_classes or not data.size("test"):
        return []
    chance, samples = 1 / data.num_classes, data.size("test")
    limit = chance + 3 * math.sqrt(chance * (1 - chance) / samples)  # three standard deviations of guessing
    low = [name for name, row in results.items() if "accuracy" in row and row["accuracy"] <= limit]
    if not low:
        return []
    guess = f"at chance ({100 * chance:.1f} % for {data.num_classes} classes)"
    if "compact" in low and "baseline" in results and "baseline" not in low:
        return [f"{ODD}the compact network is {guess}, as pruned networks often are: fine-tune it"]
    if low == ["compact"] or trained:
        name = "compact network" if low == ["compact"] else low[0]
        return [f"{ODD}the {name} is {guess}: train it longer, or with another --lr"]
    verb = "is" if len(low) == 1 else "are"
    return [f"{ODD}the {' and the '.join(low)} {verb} {guess}: are the weights trained on these data?"]


def unmeasured(results: Mapping[str, Mapping[str, Any]], data: Data) -> list[str]:
    """Return a line if a user's data have no part to measure on."""
    if data.size("test") or data.size("held_out") or not results:
        return []
    return [
        f"{ODD}{data.name} gives training batches alone, so nothing is measured: let it return (train, held out) or "
        "(train, held out, test)"
    ]


def too_few(samples: int, drop: float) -> list[str]:
    """Return a line if one sample more or less is a larger difference than the one that is looked for."""
    if not drop or 1 / samples <= drop:
        return []
    need = math.ceil(1 / drop)
    part = f"{100 / samples:.1f} %"
    return [
        f"{ODD}one of {samples} held-out samples is {part}, more than --drop {drop:g}: hold out {need} (--held_out)"
    ]


def after_training(settings: NetworkSettings) -> str:
    """Return the command that prunes what was trained."""
    return prune_command(settings, f" --data {word(settings.data)}", f"{settings.out}/model.safetensors")


def after_pruning(settings: PruneSettings, metrics: Mapping[str, Any]) -> str:
    """Return the command that trains the compact network, or compensates it if that has failed.

    Args:
        settings: the command's.
        metrics: those of the pruning.
    """
    if "failed" in metrics.get("compensation", {}):
        return f"next: fastprune calibrate {word(settings.out)} --how {metrics['compensation']['how']}"
    if settings.model.startswith("yolo:"):
        return train_with_ultralytics(str(settings.out), settings.data)
    data = "" if settings.data else " --data DATA"
    teacher = " --teacher auto" if settings.weights and settings.recipe is None else ""  # a recipe has its own
    return f"next: fastprune finetune --run {word(settings.out)}{data}{teacher}"


def train_with_ultralytics(run: str, data: str | None) -> str:
    """Return the call that trains the network of a run where it comes from."""
    file = data.removeprefix("yolo:") if data is not None and data.startswith("yolo:") else "DATA.yaml"
    return f"next, in Python: fastprune.adapters.yolo.load({run!r}).train(data={file!r})"


def tell_compensation(metrics: Mapping[str, Any]) -> list[str]:
    """Return a line on what was compensated; none if nothing was, or if the attempt failed, which was a warning."""
    work = metrics.get("compensation", {})
    if not work or "failed" in work:
        return []
    parts = [
        f"{work['fitted']} layers fitted",
        f"{work['shifted']} shifted",
        f"{len(work['skipped'])} left as they were",
    ]
    told = [part for part in parts if not part.startswith("0 ")]
    return [f"compensated without training ({work['how']}): {', '.join(told) or 'statistics measured again'}"]


def after_calibrating(settings: CalibrateSettings, origin: NetworkSettings, out: str, *, tuned: bool) -> str:
    """Return the command that trains the compensated network, or shows one that has been trained.

    Args:
        settings: the command's.
        origin: those of the pruning.
        out: the new run.
        tuned: whether it has been trained.
    """
    if tuned:
        return f"next: fastprune report --run {word(out)}"
    if origin.model.startswith("yolo:"):
        return train_with_ultralytics(out, settings.data or origin.data)
    data = f" --data {word(settings.data)}" if settings.data else ""
    return f"next: fastprune finetune --run {word(out)}{data}"


def after_evaluating(settings: EvaluateSettings) -> str:
    """Return the command that shows more of a run, or prunes a network."""
    if settings.run is not None:
        return f"next: fastprune report --run {word(settings.run)}"
    return prune_command(settings, f" --data {word(settings.data)}")


def after_inspecting(settings: InspectSettings) -> str:
    """Return the command that prunes the network."""
    data = word(settings.data or "DATA")
    return prune_command(settings, f" --data {data}" + (f" --forward {settings.forward}" if settings.forward else ""))


def prune_command(settings: ModelSettings, data: str, weights: str | None = None) -> str:
    """Return the command that prunes a network."""
    own = settings.model.startswith("yolo:") and settings.model.endswith(".pt") and not settings.weights
    weights = "" if own else f" --weights {word(weights or settings.weights or 'FILE')}"
    return f"next: fastprune prune --model {word(settings.model)}{weights}{data} --out RUN"


def word(value: object) -> str:
    """Return a value as one word of a shell."""
    return shlex.quote(str(value))
