"""The commands that make a run again, from the settings in its directory."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from fastprune.host.wording import fill_command
from fastprune.methods import catalogue
from fastprune.planning.budget import Conditions
from fastprune.training.options import TrainConfig

FIRST = ("model", "weights", "from_run", "data")  # the order of the command; other settings follow as in config.yaml
ELSEWHERE = {
    "command",
    "fastprune",
    "method",
    "budget",
    "finetune",
    "train",
    "recipe",
    "calibrate",
}  # has a place of its own, or none
ALWAYS = ("epochs", "batch_size", "lr", "schedule")  # of a training: its defaults differ between commands
SEVERAL = ("ignore", "keep_ratio", "mean", "std")  # several words, not a list in brackets
SWITCHES = (
    "ema",
    "balanced",
    "keep_class",
    "inexact",
    "replace_norms",
    "heads",
    "channels_last",
    "latency_channels_last",
    "latency_modelled",
)
NOT_OPTIONS = {"command", "fastprune", "data", "device", "seed", "run", "out"}
DEFAULTS = {
    "seed": 0, "device": "auto", "min_keep": 1, "round_to": 1, "latency_batch": 1, "latency_dtype": "float32",
    "precision": "float32", "calibration": 512,
}  # fmt: skip


def commands(settings: Mapping[str, Any], finetuning: Mapping[str, Any], out: str) -> list[str]:
    """Return the commands that make a run, ready for a shell; Python code for a run of ``fastprune.prune``.

    Args:
        settings: the content of ``config.yaml``.
        finetuning: the settings of its fine-tuning; empty without one.
        out: the directory of the run to make.
    """
    if isinstance(settings.get("calibrate"), Mapping):
        return calibration_commands(settings, finetuning, out)
    command, end = settings.get("command"), ["--out", shlex.quote(out)]
    if command == "demo":
        return [fill_command(["fastprune", "demo", "--seed", str(settings.get("seed", 0)), *end])]
    if command == "train":
        words = ["fastprune", "train", *flags(settings), *training_flags(settings)]
        return [fill_command([*words, *end])]
    if not settings.get("model") and not settings.get("from_run"):
        return [python_call(settings)]
    found = [fill_command(["fastprune", "prune", *flags(settings), *method_flags(settings), *end])]
    if finetuning:
        found.append(finetune_command(finetuning, out))
    return found


def calibration_commands(settings: Mapping[str, Any], finetuning: Mapping[str, Any], out: str) -> list[str]:
    """Return the commands that make the run that was calibrated, calibrate it, and fine-tune it if that came later."""
    section = settings["calibrate"]
    first = str(PurePosixPath(out).with_name(Path(str(section.get("run"))).name))
    earlier = {name: value for name, value in settings.items() if name != "calibrate"}
    if "before" in section:
        earlier["calibrate"] = section["before"]
    tuned = bool(section.get("after_finetuning"))
    found = commands(earlier, finetuning if tuned else {}, first)
    usual = {"how": "sequential", "images": 512, "seed": settings.get("seed", 0), "data": settings.get("data")}
    given = {name: section.get(name) for name, value in usual.items() if section.get(name) not in (None, value)}
    if found[0].startswith("import "):
        words = [repr(first), "data", *(f"{name}={value!r}" for name, value in given.items() if name != "data")]
        return [*found, f"fp.calibrate({', '.join([*words, 'model=net', f'out={out!r}'])})"]
    words = [word for name, value in given.items() for word in flag(name, value)]
    found.append(fill_command(["fastprune", "calibrate", shlex.quote(first), *words, "--out", shlex.quote(out)]))
    if finetuning and not tuned:
        found.append(finetune_command(finetuning, out))
    return found


def finetune_command(finetuning: Mapping[str, Any], out: str) -> str:
    """Return the command that trains the compact network of a run."""
    words = ["fastprune", "finetune", "--run", shlex.quote(out)]
    words += [word for name in ("data", "num_classes", "loss", "forward") for word in flag(name, finetuning.get(name))]
    return fill_command([*words, *training_flags(finetuning)])


def plain(value: Any) -> Any:
    """Return a value as YAML has it."""
    return list(value) if isinstance(value, tuple) else value


def flags(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the options of a command that are not at their defaults, without those of a method or a training."""
    names = [name for name in settings if name not in {*FIRST, *ELSEWHERE, *asdict(TrainConfig())}]
    usual = dict(DEFAULTS)
    if settings.get("command") == "prune":
        settings = {**settings, "compensate": kind_of_compensation(settings)}
        usual["compensate"] = "sequential" if settings.get("data") else "none"
        names = ["method", "budget", *(name for name in names if name != settings.get("method")), "precision"]
        names += ["channels_last", "compensate"]
    for name in dict.fromkeys((*FIRST, *names)):
        if name in ("method", "budget") or settings.get(name) != usual.get(name):
            yield from flag(name, settings.get(name))


def kind_of_compensation(settings: Mapping[str, Any]) -> str:
    """Return how the weights of a pruning were compensated; runs of earlier versions do not say, since none was."""
    return str(settings.get("compensate", "none"))


def training_flags(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the options of a training that are not at their defaults, and those that every reader looks for."""
    usual = {**asdict(TrainConfig()), "from_scratch": False}
    for name, value in settings.items():
        if name in usual and name not in NOT_OPTIONS and (name in ALWAYS or value != plain(usual[name])):
            yield from flag(name, value)


def method_flags(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the options of a pruning's method that are not at their defaults."""
    for name, value in changed_options(settings).items():
        yield from flag(f"{settings['method']}.{name}", value)


def changed_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the method's options that differ from their defaults; all of them if the method is not installed."""
    options = settings.get(str(settings.get("method")))
    if not isinstance(options, Mapping):
        return {}
    try:
        usual = {option.name: plain(option.default) for option in catalogue.find(str(settings["method"])).options}
    except ValueError:
        usual = {}
    return {name: value for name, value in options.items() if name not in usual or value != usual[name]}


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


def python_call(settings: Mapping[str, Any]) -> str:
    """Return the call of ``fastprune.prune`` that a run without a named network was made by."""
    given = {name: settings.get(name) for name in ("method", "budget", "seed")}
    for name, usual in (("ignore", []), ("precision", "float32"), ("channels_last", False)):
        if settings.get(name) not in (None, usual):
            given[name] = settings[name]
    compensated = kind_of_compensation(settings) != "none"
    if compensated:
        given |= {name: settings[name] for name in ("compensate", "calibration") if name in settings}
    elif needs_data(settings):
        given["compensate"] = "none"  # otherwise data would mean "sequential"
    lines = [f"{name}={value!r}" for name, value in given.items()]
    lines += conditions_of(settings)
    switches = {
        "keep_class": "rewrite=False",
        "inexact": "exact=False",
        "replace_norms": "replace_norms=True",
        "heads": "heads=True",
    }
    lines += [text for name, text in switches.items() if settings.get(name)]
    limits = {name: settings[name] for name in ("min_keep", "round_to") if settings.get(name) not in (None, 1)}
    if limits or settings.get("keep_ratio"):
        words = [repr(settings.get("keep_ratio") or []), *(f"{name}={value}" for name, value in limits.items())]
        lines.append(f"limits=fp.Limits.parse({', '.join(words)})")
    lines += [f"{name}={value!r}" for name, value in changed_options(settings).items()]
    first = "net, example, data=data" if compensated or needs_data(settings) else "net, example"
    return "\n".join(["import fastprune as fp", "", "fp.prune(", *(f"    {line}," for line in (first, *lines)), ")"])


def conditions_of(settings: Mapping[str, Any]) -> list[str]:
    """Return the conditions of a latency budget as an argument of ``fastprune.prune``; none for other budgets."""
    usual = asdict(Conditions())
    given = {name: settings.get(f"latency_{name}", value) for name, value in usual.items()}
    changed = [f"{name}={value!r}" for name, value in given.items() if value != usual[name]]
    return [f"conditions=fp.Conditions({', '.join(changed)})"] if changed else []


def needs_data(settings: Mapping[str, Any]) -> bool:
    """Return whether a pruning's method searches on data; False if the method is not installed."""
    try:
        return bool(catalogue.find(str(settings.get("method"))).needs_data)
    except ValueError:
        return False
