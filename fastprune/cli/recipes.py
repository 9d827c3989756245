"""Recipes: files with all settings of a paper's row, except data, weights and the run's directory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fastprune.cli.settings import FinetuneConfig, PruneSettings, TrainSettings, pick, read_settings
from fastprune.cli.shelf import find_recipe
from fastprune.engine.run import plain
from fastprune.host.spelling import did_you_mean
from fastprune.methods import registry
from fastprune.options import build
from fastprune.planning.budget import Budget
from fastprune.training.options import TrainConfig

PLACES = {"data", "weights", "out", "from_run", "recipe", "dry_run", "log"}
"""Settings of ``prune`` that differ from machine to machine, and that no recipe has."""

NEEDED = ("model", "method", "budget")


@dataclass(frozen=True)
class Paper:
    """A row of a paper's table; accuracies and the reduction are in per cent, the speed-up is a factor."""

    title: str = ""
    table: str = ""
    baseline_top1: float | None = None
    pruned_top1: float | None = None
    flops_reduction: float | None = None
    baseline_top5: float | None = None
    pruned_top5: float | None = None
    speed_up: float | None = None


SECTIONS: dict[str, type[Any]] = {"finetune": FinetuneConfig, "paper": Paper}
"""Sections that the run's ``config.yaml`` takes over, for ``finetune`` and for the reader."""


@dataclass(frozen=True)
class Recipe:
    """The settings of a paper's row, for pruning and for fine-tuning.

    Args:
        path: the file.
        method: the method's name.
        settings: the settings of ``prune``, with the method's options under its name.
        sections: ``finetune`` and ``paper``, if the file has them.
    """

    path: str
    method: str
    settings: dict[str, Any]
    sections: dict[str, Any]


def read_recipe(path: str) -> Recipe:
    """Read and check a recipe.

    Raises:
        ValueError: for a file that is no recipe; the message names the file and the key.
    """
    values = read_settings(str(find_recipe(path)), "--recipe")
    try:
        return make_recipe(path, values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--recipe {path}: {error}") from error


def read_training(path: str) -> dict[str, Any]:
    """Read and check the recipe of a training, an unpruned network of a paper's table; return settings of ``train``.

    Raises:
        ValueError: for a file that is no such recipe; the message names the file and the key.
    """
    values = read_settings(str(find_recipe(path)), "--recipe")
    try:
        if "method" in values:
            raise ValueError("this recipe prunes; give it to 'fastprune prune'")
        own = {f.name for f in fields(TrainSettings)} - PLACES
        refuse_unknown(values, {*own, "train", "paper"})
        require_settings(values, ("model", "train"))
        section(values.get("paper", {}), Paper, "paper")
        given = {name: value for name, value in values.items() if name in own}
        settings = pick(TrainSettings, given)
        return {**{name: getattr(settings, name) for name in given}, **section(values["train"], TrainConfig, "train")}
    except (TypeError, ValueError) as error:
        raise ValueError(f"--recipe {path}: {error}") from error


def require_settings(values: Mapping[str, Any], needed: Sequence[str]) -> None:
    """Refuse a recipe that lacks a setting."""
    missing = [name for name in needed if name not in values]
    if missing:
        raise ValueError(f"{missing[0]!r} is missing; a recipe has {', '.join(needed)}")


def make_recipe(path: str, values: Mapping[str, Any]) -> Recipe:
    """Make a recipe from the values in a file, and check them."""
    if "train" in values:
        raise ValueError("this recipe trains a network that is not pruned; give it to 'fastprune train'")
    require_settings(values, NEEDED)
    method = values["method"]
    if not isinstance(method, str):
        raise ValueError(f"method {method!r}: the name of one method is needed")
    method_class = registry.load(method)
    own = {f.name for f in fields(PruneSettings)} - PLACES
    refuse_unknown(values, {*own, *SECTIONS, method})
    given = {name: value for name, value in values.items() if name in own}
    settings = pick(PruneSettings, given)
    Budget.parse(settings.budget)
    kinds = {name: kind for name, kind in {**SECTIONS, method: method_class.Config}.items() if name in values}
    sections = {name: section(values[name], kind, name) for name, kind in kinds.items()}
    options = {name: sections.pop(name) for name in (method,) if name in sections}
    return Recipe(path, method, {**{name: getattr(settings, name) for name in given}, **options}, sections)


def section(values: Any, kind: type[Any], name: str) -> dict[str, Any]:
    """Return a section of a recipe, checked against the dataclass whose fields it sets."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} {values!r}: settings by name are needed, as in '{name}: {{…}}'")
    built = build(kind, values, owner=name)
    return plain({key: getattr(built, key) for key in values})


def refuse_unknown(names: Iterable[Any], known: set[str]) -> None:
    """Refuse the first setting that no recipe has."""
    for name in names:
        if name in PLACES:
            raise ValueError(f"{name!r} is no part of a recipe; give it on the command line")
        if name not in known:
            hint = did_you_mean(name, known) or f"there are {', '.join(sorted(known))}"
            raise ValueError(f"there is no setting {name!r}: {hint}")
