"""What can be told of a command line before it is parsed: its command, its method, and options that do not exist."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastprune.cli.commands import COMMANDS, FAMILIES, Command
from fastprune.cli.settings import PruneSettings, read_settings
from fastprune.host.spelling import did_you_mean
from fastprune.methods import catalogue
from fastprune.options import POSITIONAL, POSITIONALS, fields_of


@dataclass(frozen=True)
class Invocation:
    """The choices of a command line that decide which options there are.

    Args:
        command: the command; None before any, as in ``fastprune --help``.
        method: the pruning method; None for commands without one.
        defaults: the settings of a recipe, with the method's options under its name.
    """

    command: str | None
    method: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


def read_invocation(arguments: Sequence[str]) -> Invocation:
    """Find the command, the method and the recipe that the arguments name.

    Raises:
        ValueError: for a command that does not exist, or a file that cannot be read.
    """
    command = find_command(arguments)
    path = None if "--resume" in arguments else find_value(arguments, "--recipe")
    if command == "train" and path is not None:
        from fastprune.cli.recipes import read_training  # imports torch

        return Invocation(command, None, read_training(path))
    if command is None or not COMMANDS[command].takes_method:
        return Invocation(command)
    if path is None:
        return Invocation(command, find_method(arguments, PruneSettings.method))
    from fastprune.cli.recipes import read_recipe  # imports torch

    recipe = read_recipe(path)
    method = find_method(arguments, recipe.method)
    if method != recipe.method:
        raise ValueError(f"--recipe {path} is for method {recipe.method!r}, not {method!r}; leave out --method")
    return Invocation(command, method, recipe.settings)


def find_command(arguments: Sequence[str]) -> str | None:
    """Return the command that the arguments begin with, of one word or two; None if they begin with an option.

    Raises:
        ValueError: for a command that does not exist; suggests another one.
    """
    words = list(arguments[:2])
    if not words or words[0].startswith("-"):
        return None
    if words[0] not in FAMILIES:
        return require_command(words[0], list(dict.fromkeys(name.partition(" ")[0] for name in COMMANDS)))
    members = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if len(words) == 1:
        raise ValueError(f"{words[0]} needs one more word: give one of {', '.join(members)}")
    return None if words[1].startswith("-") else require_command(" ".join(words), members)  # None: the help of a family


def require_command(name: str, known: Sequence[str]) -> str:
    """Return a command's name; refuse one that does not exist."""
    if name not in COMMANDS:
        hint = did_you_mean(name, known) or f"give one of {', '.join(known)}"
        raise ValueError(f"there is no command {name!r}: {hint}")
    return name


def find_method(arguments: Sequence[str], default: str) -> str:
    """Return the method that the arguments or the file of ``--config`` name."""
    config = find_value(arguments, "--config")
    settings = read_settings(config, "--config") if config is not None else {}
    named = find_value(arguments, "--method")
    method = settings.get("method", default) if named is None else named
    if not isinstance(method, str):
        raise ValueError(f"--config {config}: method {method!r}: the name of one method is needed")
    own = settings.get(method, {})
    if not isinstance(own, dict):
        raise ValueError(f"--config {config}: {method} {own!r}: options by name are needed, as in '{method}: {{…}}'")
    return method


def find_value(arguments: Sequence[str], name: str) -> str | None:
    """Return the last value of an option that is written ``--name value`` or ``--name=value``."""
    value = None
    for index, argument in enumerate(arguments):
        if argument == name and index + 1 < len(arguments):
            value = arguments[index + 1]
        elif argument.startswith(f"{name}="):
            value = argument.partition("=")[2]
    return value


def normalise(arguments: Sequence[str], invocation: Invocation) -> list[str]:
    """Return the arguments as the parser takes them: ``--image-size`` as ``--image_size``, a first word as its option.

    Where a command takes no words of its own, the first one is the directory of a run or else a model.

    Args:
        arguments: what the user typed.
        invocation: what it chooses.

    Raises:
        ValueError: for a run where a command takes a model, but could take the run by another option.
    """
    if invocation.command is None:
        return list(arguments)
    known, words = set(list_options(invocation)), len(invocation.command.split())
    rest = list(arguments[words:])
    if rest and not rest[0].startswith("-") and not takes_words(invocation.command):
        holds_run = (Path(rest[0]) / "config.yaml").is_file()
        if holds_run and "from_run" in known:
            raise ValueError(
                f"{rest[0]!r} is a run; to prune its network further give --from_run {shlex.quote(rest[0])}"
            )
        is_run = "run" in known and ("weights" not in known or holds_run)
        rest[:0] = ["--run"] if is_run else ["--model"] if "model" in known else []
    return [*arguments[:words], *(with_underscores(argument, known) for argument in rest)]


def takes_words(command: str) -> bool:
    """Return whether a command takes arguments without an option's name."""
    flags = (f.metadata["flag"] for settings in COMMANDS[command].load_settings() for f in fields_of(settings))
    return any(flag in (POSITIONAL, POSITIONALS) for flag in flags)


def with_underscores(argument: str, known: set[str]) -> str:
    """Return an option with underscores in place of hyphens, if that is the one that exists."""
    name, equals, value = argument[2:].partition("=")
    other = name.replace("-", "_")
    return (
        f"--{other}{equals}{value}" if argument.startswith("--") and name not in known and other in known else argument
    )


def list_names(arguments: Sequence[str]) -> list[str]:
    """Return the names of the options that were written on the command line."""
    return [argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")]


def refuse_unknown(arguments: Sequence[str], invocation: Invocation) -> None:
    """Refuse the first option that does not exist, before the parser is built and its settings' modules are imported.

    Raises:
        ValueError: for an unknown option; suggests another one.
    """
    known = set(list_options(invocation))
    for name in list_names(arguments):
        if name and name not in known:
            raise ValueError(unknown_option(name, invocation, resume="--resume" in arguments))


def unknown_option(name: str, invocation: Invocation, *, resume: bool = False) -> str:
    """Return the message about an option that does not exist."""
    if resume:
        return f"--resume takes its settings from the run's directory; leave out --{name}"
    program = " ".join(filter(None, ["fastprune", invocation.command]))
    hint = did_you_mean(name, list_options(invocation), show="--{}".format) or f"see {program} --help"
    method, (owner, dot, _) = invocation.method, name.partition(".")
    if method is not None and dot and owner != method:
        hint = f"the method is {method!r}; --method {owner} has options of that name"
    return f"there is no option --{name}: {hint}"


def list_options(invocation: Invocation) -> Iterator[str]:
    """Yield the names of all options, without their dashes."""
    yield "help"
    if invocation.command is None:
        yield "version"
        return
    command = COMMANDS[invocation.command]
    for settings in command.load_settings():
        yield from (f.name for f in fields_of(settings) if f.metadata["flag"] not in (POSITIONAL, POSITIONALS))
    yield from common_options(command)
    if command.takes_method:
        yield "print_config"  # which --config brings
    if invocation.method is not None:
        yield invocation.method
        yield from (f"{invocation.method}.{option.name}" for option in catalogue.find(invocation.method).options)


def common_options(command: Command) -> dict[str, dict[str, Any]]:
    """Return the options that come from the command itself: {name: arguments of ``add_argument``}."""
    options: dict[str, dict[str, Any]] = {}
    if command.resumes:
        options["resume"] = {"action": "store_true", "help": "continue the run from its last checkpoint"}
    if not any(f.name == "json" for settings in command.load_settings() for f in fields_of(settings)):
        options["json"] = {"action": "store_true", "help": "print the result as JSON, for programs"}
    if command.takes_method:
        options["config"] = {"action": "config", "help": "YAML file with any of these settings"}
    return options
