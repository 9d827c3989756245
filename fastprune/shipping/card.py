"""The model card of a compact network, and the command that makes it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fastprune.engine.run import plain
from fastprune.methods.registry import load
from fastprune.options import fields_of
from fastprune.shipping.subject import Subject
from fastprune.training.options import TrainConfig

PLAIN = {"min_keep": 1, "round_to": 1, "precision": "float32", "seed": 0}
"""Defaults of settings that need not be written."""

SETTINGS = (
    *("model", "weights", "data", "input", "image_size", "held_out", "method", "budget", "min_keep", "round_to"),
    *("keep_ratio", "ignore", "keep_class", "inexact", "precision", "channels_last", "seed"),
)
"""Settings of ``fastprune prune`` in the order of the command."""

SEVERAL = ("keep_ratio", "ignore")
"""Settings whose values follow one another; other lists are one word."""

ROWS = {"baseline": "before", "compact": "pruned", "fine-tuned": "pruned and fine-tuned"}


def card_text(subject: Subject, repository: str) -> str:
    """Return the text of a model card, without its header.

    Args:
        subject: the network.
        repository: the name under which the card shows how to load it.
    """
    settings = subject.settings
    name = subject.source.model if subject.source is not None else subject.class_name
    given = "" if subject.source is not None and subject.source.is_known else ", model=net"
    parts = [
        f"# {name}, pruned" if subject.plan is not None else f"# {name}",
        f"A `{name}` whose channels were pruned with [fastprune](https://pypi.org/project/fastprune)."
        if subject.plan is not None else f"A `{name}`, trained with fastprune.",
    ]  # fmt: skip
    if settings.get("method"):
        parts.append(f"* method: `{settings['method']}`\n* budget: `{settings.get('budget')}`")
    if subject.plan is not None:
        parts += ["## Before and after", table(subject)]
    parts += ["## How to load it", loading_text(repository, given, subject)]
    command = reproduce(subject)
    if command:
        parts += ["## How to make it again", command]
    return "\n\n".join(parts) + "\n"


def loading_text(repository: str, given: str, subject: Subject) -> str:
    """Return code that loads the network."""
    sizes = ", ".join("×".join(map(str, spec.shape[1:])) for spec in subject.inputs)
    code = f'import fastprune as fp\n\nmodel = fp.from_pretrained("{repository}"{given})'
    note = f"\n\n`net` is the full network, a `{subject.class_name}`, with any weights." if given else ""
    return f"```python\n{code}\n```{note}\n\nIt takes inputs of {sizes}, in batches of any size."


def table(subject: Subject) -> str:
    """Return MACs, parameters and, where they were measured, accuracies before and after."""
    plan = subject.plan
    assert plan is not None
    accuracies = {
        title: 100 * subject.results[name]["accuracy"]
        for name, title in ROWS.items()
        if isinstance(subject.results.get(name, {}).get("accuracy"), (int, float))
    }
    heads = ["network", "MACs", "parameters", *(["top-1 accuracy"] if accuracies else [])]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for title in ROWS.values():
        if title == ROWS["fine-tuned"] and title not in accuracies:
            continue
        nth = 0 if title == ROWS["baseline"] else 1
        cells = [change(plan.macs, nth), change(plan.params, nth)]
        if accuracies:
            cells.append(f"{accuracies[title]:.2f} %" if title in accuracies else "not measured")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def change(sizes: tuple[int, int], nth: int) -> str:
    """Return a size in millions, the second one also as a percentage of the first."""
    part = f" ({100 * sizes[1] / sizes[0]:.1f} %)" if nth else ""
    return f"{sizes[nth] / 1e6:,.2f} M{part}"


def reproduce(subject: Subject) -> str:
    """Return the commands, or the call, that make the network again; "" if its settings are not known."""
    settings = subject.settings
    command = settings.get("command")
    if command == "demo":
        return f"```sh\nfastprune demo --seed {settings.get('seed', 0)} --out RUN\n```"
    if command not in ("prune", "train"):
        return ""
    if command == "prune" and not settings.get("model"):
        return f"```python\n{call_text(settings)}\n```"
    words = ["fastprune", command, *flags({name: settings.get(name) for name in SETTINGS})]
    if command == "prune":
        method = str(settings["method"])
        words += flags({f"{method}.{name}": value for name, value in changed_options(settings).items()})
    else:
        words += flags(changed_recipe(settings))
    lines = [shlex.join([*words, "--out", "RUN"])]
    if subject.finetuning:
        lines.append(shlex.join(["fastprune", "finetune", "--run", "RUN", *flags(changed_recipe(subject.finetuning))]))
    before = (
        f"It prunes the network of the run `{settings['from_run']}` further.\n\n" if settings.get("from_run") else ""
    )
    return before + "```sh\n" + "\n".join(lines) + "\n```"


def flags(values: Mapping[str, Any]) -> list[str]:
    """Return settings as words of a command, without those that are not set."""
    words: list[str] = []
    for name, value in values.items():
        if value in (None, "", False, [], ()) or (name in PLAIN and value == PLAIN[name]):
            continue
        words.append(f"--{name}")
        if name in SEVERAL:
            words += map(str, value)
        elif isinstance(value, (list, tuple)):
            words.append(json.dumps(list(value), separators=(",", ":")))
        elif value is not True or "." in name:
            words.append(str(value).lower() if isinstance(value, bool) else str(value))
    return words


def call_text(settings: Mapping[str, Any]) -> str:
    """Return the call of ``fastprune.prune``."""
    lines = [
        f"method={settings.get('method')!r}",
        f"budget={settings.get('budget')!r}",
        f"seed={settings.get('seed')!r}",
    ]
    for name, argument in (("ignore", "ignore"), ("precision", "precision"), ("channels_last", "channels_last")):
        if settings.get(name) not in (None, [], False, "float32"):
            lines.append(f"{argument}={settings[name]!r}")
    lines += [
        text for name, text in (("keep_class", "rewrite=False"), ("inexact", "exact=False")) if settings.get(name)
    ]
    limits = {name: settings.get(name) for name in ("min_keep", "round_to") if settings.get(name) not in (None, 1)}
    if limits or settings.get("keep_ratio"):
        words = [repr(settings.get("keep_ratio") or []), *(f"{name}={value}" for name, value in limits.items())]
        lines.append(f"limits=fp.Limits.parse({', '.join(words)})")
    lines += [f"{name}={value!r}" for name, value in changed_options(settings).items()]
    return f"fp.prune(net, example, {', '.join(lines)})"


def changed_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the method's options that differ from their defaults; all of them if the method is not installed."""
    options = settings.get(str(settings.get("method")))
    if not isinstance(options, Mapping):
        return {}
    try:
        config = load(str(settings["method"])).Config
    except ValueError:
        return dict(options)
    defaults = plain({f.name: getattr(config(), f.name) for f in fields_of(config)})
    return {name: value for name, value in options.items() if defaults.get(name, ...) != value}


def changed_recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a training that differ from their defaults, and those that every reader looks for."""
    defaults = plain({f.name: getattr(TrainConfig(), f.name) for f in fields(TrainConfig)})
    always = {"lr", "schedule", "epochs", "batch_size"}
    names = [name for name in settings if name in {*defaults, "from_scratch"}]
    return {
        name: settings[name]
        for name in names
        if name in always or (name not in defaults and settings[name]) or settings[name] != defaults.get(name, False)
    }
