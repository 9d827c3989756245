"""The command line: what users type becomes dataclasses, and bad input becomes one clear line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from fastprune import commands
from fastprune.engine import CheckpointError, Interrupted, NonFiniteError, RunError
from fastprune.methods.registry import load
from fastprune.settings import PruneSettings

BAD_INPUT = (ValueError, ArgumentError, RunError, CheckpointError, NonFiniteError, OSError)
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None = the process' own.

    Returns:
        0 on success, 2 for bad input (with one line on standard error), 130 after an interruption.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parser = build_parser(method_in(given))
        parsed = parser.parse_args(given or ["--help"])
        settings = parsed[parsed.command].as_dict()
        return commands.COMMANDS[parsed.command].run(settings, overridden(given))
    except Interrupted as stopped:
        print(f"fastprune: {stopped}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BAD_INPUT as error:
        print(f"fastprune: error: {one_line(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT


def build_parser(method: str | None) -> ArgumentParser:
    """The parser of all commands; ``prune`` has the options of ``method`` under its name (``--dmc.epochs 30``)."""
    parser = ArgumentParser(
        prog="fastprune", description="Channel pruning of convolutional networks.", exit_on_error=False
    )
    parser.add_argument("--version", action="version", version=f"fastprune {version('fastprune')}")
    subcommands = parser.add_subcommands(required=True, dest="command")
    for name, command in commands.COMMANDS.items():
        sub = ArgumentParser(prog=f"fastprune {name}", description=command.help, exit_on_error=False)
        for settings in command.settings:
            add_settings(sub, settings)
        if command.resumes:
            sub.add_argument("--resume", action="store_true", help="continue the run from its last checkpoint")
        sub.add_argument("--json", action="store_true", help="print the result as JSON, for programs")
        if command.takes_method:
            sub.add_argument("--config", action="config", help="YAML file with any of these settings")
            if method is not None:
                add_settings(sub, load(method).Config, method)
        subcommands.add_subcommand(name, sub, help=command.help)
    return parser


def add_settings(parser: ArgumentParser, settings: type[Any], key: str | None = None) -> None:
    """Make a dataclass' fields flags, under ``key.`` where given, with the help of their metadata."""
    parser.add_class_arguments(settings, key)
    texts = {f"{key}.{f.name}" if key else f.name: f.metadata.get("help") for f in fields(settings)}
    for action in parser._actions:
        if texts.get(action.dest):
            action.help = texts[action.dest]


def method_in(arguments: Sequence[str]) -> str | None:
    """The method that a ``prune`` command names, on the command line or in its YAML file; None for other commands."""
    if not arguments or arguments[0] != "prune":
        return None
    named = option(arguments, "--method")
    config = option(arguments, "--config")
    if named is None and config is not None:
        try:
            settings = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"--config {config}: {error}") from error
        named = settings.get("method") if isinstance(settings, dict) else None
    return named or PruneSettings.method


def option(arguments: Sequence[str], name: str) -> str | None:
    """The last value of an option that is written ``--name value`` or ``--name=value``."""
    value = None
    for index, argument in enumerate(arguments):
        if argument == name and index + 1 < len(arguments):
            value = arguments[index + 1]
        elif argument.startswith(f"{name}="):
            value = argument.partition("=")[2]
    return value


def overridden(arguments: Sequence[str]) -> set[str]:
    """The names of the options that were written on the command line."""
    return {argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")}


def one_line(error: BaseException) -> str:
    """An error's message without line breaks."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
