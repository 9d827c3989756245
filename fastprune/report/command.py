"""The commands that make a run again, from the settings in its directory."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from fastprune.host.wording import fill_command
from fastprune.methods import catalogue
from fastprune.report.log import PruningRun
from fastprune.training.options import TrainConfig

RESULTS = {"command", "fastprune", "method", "budget", "finetune", "train", "recipe"}
"""Settings that have a place of their own in the command, or none."""

ALWAYS = ("epochs", "batch_size", "lr", "schedule")  # of a fine-tuning; its defaults are not those of a training
SEVERAL = ("ignore", "keep_ratio")  # several words, not a list in brackets
SWITCHES = ("keep_class", "inexact", "channels_last", "latency_channels_last")
NOT_OPTIONS = {"command", "fastprune", "data", "device", "seed", "run", "out"}
DEFAULTS = {
    "seed": 0, "device": "auto", "min_keep": 1, "round_to": 1, "latency_batch": 1, "latency_dtype": "float32",
    "precision": "float32",
}  # fmt: skip


def commands(run: PruningRun) -> list[str]:
    """Return the commands of a run, ready for a shell; Python code for a run of ``fastprune.prune``."""
    config = run.config
    if config.get("command") == "demo":
        return [fill_command(["fastprune", "demo", "--seed", str(config.get("seed", 0)), "--out", f"runs/{run.name}"])]
    if not config.get("model") and not config.get("from_run"):
        return [python_call(run)]
    words = ["fastprune", "prune", *flags(config, run.method), "--out", f"runs/{run.name}"]
    found = [fill_command(words)]
    if run.finetuning:
        usual = {**asdict(TrainConfig()), "from_scratch": False}
        own = {
            name: value
            for name, value in run.finetuning.items()
            if name not in NOT_OPTIONS and (name in ALWAYS or value != plain(usual.get(name)))
        }
        tuned = [word for name, value in own.items() for word in flag(name, value)]
        found.append(fill_command(["fastprune", "finetune", "--run", f"runs/{run.name}", *tuned]))
    return found


def plain(value: Any) -> Any:
    """Return a value as YAML has it."""
    return list(value) if isinstance(value, tuple) else value


def flags(config: Mapping[str, Any], method: str) -> Iterator[str]:
    """Yield the options of a pruning and of its method that are not at their defaults."""
    yield from (word for name in ("model", "weights", "from_run", "data") for word in flag(name, config.get(name)))
    yield from (*flag("method", method), *flag("budget", config.get("budget")))
    shown = {"model", "weights", "from_run", "data", method} | RESULTS
    for name, value in config.items():
        if name not in shown and value != DEFAULTS.get(name):
            yield from flag(name, value)
    options = config.get(method)
    if isinstance(options, Mapping):
        usual = default_options(method)
        for name, value in options.items():
            if name not in usual or value != plain(usual[name]):
                yield from flag(f"{method}.{name}", value)


def default_options(method: str) -> dict[str, Any]:
    """Return the defaults of a method's options; none for a method that is not installed here."""
    try:
        return {option.name: option.default for option in catalogue.find(method).options}
    except ValueError:
        return {}


def flag(name: str, value: Any) -> list[str]:
    """Return an option as words of a command; none for values that stand for "not given"."""
    if value is None or value == [] or isinstance(value, Mapping):
        return []
    if name in SWITCHES:
        return [f"--{name}"] if value else []
    if isinstance(value, bool):
        return [f"--{name}", str(value).lower()]
    if isinstance(value, (list, tuple)):
        texts = [str(item) for item in value]
        return [f"--{name}", *map(shlex.quote, texts)] if name in SEVERAL else [f"--{name}", f"[{','.join(texts)}]"]
    return [f"--{name}", shlex.quote(str(value))]


def python_call(run: PruningRun) -> str:
    """Return the call of ``fastprune.prune`` that a run without a named network was made by."""
    options = run.options.items()
    given = {"method": run.method, "budget": run.config["budget"], "seed": run.config.get("seed", 0)}
    lines = [f"    {name}={value!r}," for name, value in (*given.items(), *options)]
    return "\n".join(["import fastprune as fp", "", "fp.prune(", "    model, example_inputs,", *lines, ")"])
