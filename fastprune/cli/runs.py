"""Runs on disk as commands see them: the settings of an earlier run, and the results of a new one."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml

from fastprune.cli.advice import print_advice
from fastprune.cli.settings import require
from fastprune.cli.shelf import find_recipe
from fastprune.engine import RunDirectory
from fastprune.host.distributed import Distributed
from fastprune.models import names_weights
from fastprune.report import tables
from fastprune.runs import NetworkRecord

FINETUNE_CONFIG = "finetune.yaml"  # in the run's directory, beside its config.yaml


def read_begun_settings(settings: Mapping[str, Any], given: set[str], command: str) -> dict[str, Any]:
    """Return the settings that a run was begun with; only its place and its device can be given anew."""
    require(out=settings["out"])
    run = RunDirectory.open(settings["out"])
    refuse_beside_resume(given, "out", run.path / "config.yaml")
    if run.config.get("command") != command:
        raise ValueError(f"{settings['out']!r} is a run of 'fastprune {run.config.get('command')}', not of '{command}'")
    anew = {name: settings[name] for name in ("out", "resume", "json", *({"device"} & given))}
    return {**run.config, **anew}


def refuse_beside_resume(given: set[str], place: str, file: Path) -> None:
    """Refuse options beside ``--resume`` that ``file`` has already."""
    extra = sorted(given - {place, "resume", "json", "device"})
    if extra:
        raise ValueError(f"--resume takes its settings from {file}; leave out --{extra[0]}")


def inherit_settings(values: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """Return the settings of ``prune``; with ``--from_run`` network, input and data are those of the earlier run."""
    if values.get("from_run") is None or values["resume"]:
        return values
    own = sorted({"model", "weights", "recipe"} & given)
    if own:
        raise ValueError(f"--from_run {values['from_run']} has a network of its own: leave out --{own[0]}")
    run = RunDirectory.open(values["from_run"])
    earlier = run.config
    if run.network_path.is_file() and not earlier.get("model"):  # a run of the Python interface
        earlier["model"] = NetworkRecord.read(run).name
    if earlier.get("command") not in ("prune", "demo"):
        raise ValueError(f"--from_run {values['from_run']}: this is a run of 'fastprune {earlier.get('command')}'")
    # The held-out part stays what it was: the earlier run has trained on the rest.
    names = {"data", "image_size", "held_out", "balanced", "seed", "loss", "forward"} - given
    earlier.setdefault("balanced", False)  # runs of earlier versions
    if not values["data"]:
        names.add("input")  # the size that the earlier run was given for want of images
    return {**values, **{name: earlier.get(name) for name in ("model", "weights", *(names - given))}}


def read_fine_tuning(run: RunDirectory, given: set[str]) -> dict[str, Any]:
    """Return what the recipe of a run says of its fine-tuning, without the options in ``given``."""
    section = run.config.get("finetune", {})
    if not isinstance(section, dict):
        raise ValueError(f"{str(run.path / 'config.yaml')!r}: finetune {section!r}: settings by name are needed")
    return {name: value for name, value in section.items() if name not in given}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the settings in a file of a run that is resumed."""
    if not path.is_file():
        raise ValueError(f"--resume takes its settings from {path}; there is none, so there is nothing to resume")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{str(path)!r} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} holds no mapping")
    return values


def choose_out(values: dict[str, Any], what: str, peers: Distributed) -> None:
    """Give a new run without ``--out`` a directory: the first of ``runs/METHOD-MODEL-1``, ``-2``, … that is free.

    Args:
        values: the settings; ``out`` is set in place, so that an interruption can name it.
        what: the method, or what else is done.
        peers: this process among its peers, which must choose the same.
    """
    if values.get("out") or values["resume"] or values.get("dry_run"):  # a dry run writes nothing
        return
    model = str(values.get("model") or Path(str(values.get("from_run"))).name).rpartition(":")[2]
    name = f"{what}-{re.sub(r'[^A-Za-z0-9_.]+', '-', model)}"
    number = next(n for n in count(1) if not Path("runs", f"{name}-{n}").exists())
    number = int(peers.broadcast_(torch.tensor([number])))
    values["out"] = str(Path("runs", f"{name}-{number}"))
    if peers.is_main:
        print(f"fastprune: files go to {values['out']}", file=sys.stderr)


def make_config(settings: Any, command: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``config.yaml``: the settings, with files by their absolute paths."""
    values = asdict(settings)
    for name in ("out", "run", "dry_run"):
        values.pop(name, None)
    for name in ("weights", "from_run", "recipe"):
        if values.get(name) and not (name == "weights" and names_weights(values[name])):
            path = Path(values[name])
            if name == "recipe" and not path.is_absolute():  # a resumed run need not find the file again
                path = find_recipe(values[name])
            values[name] = str(path.absolute())
    for name in ("model", "data", "loss", "forward"):
        file, _, function = str(values.get(name) or "").rpartition(":")
        if file.endswith(".py"):
            values[name] = f"{Path(file).expanduser().absolute()}:{function}"
    return {"fastprune": version("fastprune"), "command": command, **values, **extra}


def print_results(
    results: Mapping[str, Mapping[str, Any]],
    as_json: bool,
    peers: Distributed,
    path: Path | None,
    advice: Sequence[str] = (),
) -> None:
    """Print results once, for people or for programs; people also get advice, what is odd and the next command."""
    if not peers.is_main:
        return
    if as_json:
        print(json.dumps({**results, **({"run": str(path)} if path else {})}))
    else:
        tables.print_results(results)
        if path is not None:
            print(f"run directory: {path}")
        print_advice(advice)
