"""The recipes that fastprune brings, by name, and ``fastprune recipes ls | show | cp``. Nothing here imports torch."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprune.cli.settings import pick, read_settings
from fastprune.host.spelling import did_you_mean
from fastprune.options import POSITIONAL, option

FOLDER = Path(__file__).parents[1] / "recipes"


@dataclass
class RecipeSettings:
    """A recipe."""

    name: str | None = option(None, "a recipe's name, as 'fastprune recipes ls' lists it", flag=POSITIONAL)


@dataclass
class CopySettings(RecipeSettings):
    """A recipe to copy."""

    file: str | None = option(None, "the new file; by default NAME.yaml in the current folder", flag=POSITIONAL)


def recipe_names() -> list[str]:
    """Return the names of the recipes that fastprune brings."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: a user's file, or one that fastprune brings.

    ``recipes/NAME.yaml``, its place in earlier versions, also names the latter.

    Raises:
        ValueError: if there is neither; suggests a name.
    """
    path = Path(name)
    if path.exists():
        return path
    shipped = FOLDER / f"{path.stem if path.suffix == '.yaml' else path.name}.yaml"
    if str(path.parent) in (".", "recipes") and shipped.is_file():
        return shipped
    hint = did_you_mean(path.stem, recipe_names()) or "'fastprune recipes ls' lists those that fastprune brings"
    raise ValueError(f"--recipe {name}: No such file or recipe: {hint}")


def run_ls(values: dict[str, Any], given: set[str]) -> int:
    """List the recipes."""
    from fastprune.report.tables import print_recipes

    recipes = {name: read_settings(str(FOLDER / f"{name}.yaml"), "recipe") for name in recipe_names()}
    if values["json"]:
        print(json.dumps(recipes))
    else:
        print_recipes(recipes)
        print("next: fastprune recipes show NAME, which ends with the command that takes it")
    return 0


def run_show(values: dict[str, Any], given: set[str]) -> int:
    """Print a recipe."""
    name, path = required(pick(RecipeSettings, values).name)
    if values["json"]:
        print(json.dumps(read_settings(str(path), "recipe")))
    else:
        print(path.read_text(encoding="utf-8"), end="")
        print(f"# next: {command_of(path, name)}")
    return 0


def run_cp(values: dict[str, Any], given: set[str]) -> int:
    """Copy a recipe into a file of one's own."""
    settings = pick(CopySettings, values)
    _, path = required(settings.name)
    target = Path(settings.file or path.name)
    if target.is_dir():
        target = target / path.name
    if target.exists():
        raise ValueError(f"{target} exists already: give another file")
    shutil.copyfile(path, target)
    if values["json"]:
        print(json.dumps({"file": str(target)}))
    else:
        print(f"copied to {target}")
        print(f"next: {command_of(path, target)}")
    return 0


def command_of(path: Path, name: str | Path) -> str:
    """Return the command that takes a recipe."""
    if "train" in read_settings(str(path), "recipe"):
        return f"fastprune train --recipe {name} --data DATA --out RUN"
    return f"fastprune prune --recipe {name} --data DATA --weights FILE --out RUN"


def required(name: str | None) -> tuple[str, Path]:
    """Return the name of a recipe and its file."""
    if name is None:
        raise ValueError("give a recipe's name; 'fastprune recipes ls' lists them")
    return name, find_recipe(name)
