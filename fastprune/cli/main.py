"""The command line: what users type becomes dataclasses, and bad input becomes one clear line and exit code 2."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from fastprune.cli import commands
from fastprune.cli.recipes import Recipe, read_recipe
from fastprune.cli.settings import PruneSettings, read_settings
from fastprune.engine import CheckpointError, Interrupted, NonFiniteError, RunError
from fastprune.host.distributed import Distributed
from fastprune.methods.registry import load

BAD_INPUT = (ValueError, RunError, CheckpointError, NonFiniteError, OSError)
# No abbreviations: method_in reads the arguments before the parser does, and must see what the parser sees.
PARSING: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell has it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None = the process' own.

    Returns:
        0 on success, 2 for bad input (with one line on standard error), 130 after an interruption.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    settings: dict[str, Any] = {}
    try:
        parser = build_parser(method_in(given), recipe_in(given))
        parsed = parser.parse_args(given or ["--help"])
        own = parsed[parsed.command]
        settings = (own[own.command] if parsed.command in commands.FAMILIES else own).as_dict()
        return commands.COMMANDS[command_in(given)].run(settings, overridden(given))
    except Interrupted as stopped:
        print(f"fastprune: {stopped}{how_to_go_on(command_in(given), settings)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone (head, less): not an error. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except ArgumentError as error:
        print(f"fastprune: error: {explained(error, given)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except BAD_INPUT as error:
        print(f"fastprune: error: {one_line(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    finally:
        Distributed.leave()


def how_to_go_on(command: str, settings: Mapping[str, Any]) -> str:
    """The command that resumes an interrupted one; nothing for commands that cannot be resumed."""
    if not commands.COMMANDS[command].resumes:
        return ""
    place = "run" if settings.get("run") else "out"
    return f": fastprune {command} --{place} {settings[place]} --resume"


def build_parser(method: str | None, recipe: Recipe | None = None) -> ArgumentParser:
    """The parser of all commands; ``prune`` has the options of ``method`` under its name (``--dmc.epochs 30``)."""
    parser = ArgumentParser(prog="fastprune", description="Channel pruning of convolutional networks.", **PARSING)
    parser.add_argument("--version", action="version", version=f"fastprune {version('fastprune')}")
    subcommands = parser.add_subcommands(required=True, dest="command")
    places = {"": subcommands}
    for name, command in commands.COMMANDS.items():
        family, _, member = name.rpartition(" ")
        if family not in places:
            text = commands.FAMILIES[family]
            branch = ArgumentParser(prog=f"fastprune {family}", description=text, **PARSING)
            subcommands.add_subcommand(family, branch, help=text)
            places[family] = branch.add_subcommands(required=True, dest="command")
        places[family].add_subcommand(member, command_parser(name, method, recipe), help=command.help)
    return parser


def command_in(arguments: Sequence[str]) -> str:
    """The name of the command that the arguments begin with: one word, or two for a member of a family."""
    return " ".join(arguments[: 2 if arguments[0] in commands.FAMILIES else 1])


def command_parser(name: str, method: str | None, recipe: Recipe | None = None) -> ArgumentParser:
    """The parser of one command; a recipe's settings are the defaults of ``prune``."""
    command = commands.COMMANDS[name]
    parser = ArgumentParser(prog=f"fastprune {name}", description=command.help, **PARSING)
    for settings in command.settings:
        add_settings(parser, settings)
    if command.resumes:
        parser.add_argument("--resume", action="store_true", help="continue the run from its last checkpoint")
    if not any(f.name == "json" for settings in command.settings for f in fields(settings)):
        parser.add_argument("--json", action="store_true", help="print the result as JSON, for programs")
    if command.takes_method:
        parser.add_argument("--config", action="config", help="YAML file with any of these settings")
        if method is not None:
            add_settings(parser, load(method).Config, method)
        if recipe is not None:
            parser.set_defaults(dotted(recipe.settings))
    return parser


def dotted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as the parser has them: those of a section under ``section.name``."""
    sections = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    within = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return {**{name: value for name, value in settings.items() if name not in sections}, **within}


def add_settings(parser: ArgumentParser, settings: type[Any], key: str | None = None) -> None:
    """Make a dataclass' fields flags, under ``key.`` where given, with the help of their metadata."""
    special = {f.name: f for f in fields(settings) if f.metadata.get("flag")}
    parser.add_class_arguments(settings, key, skip=set(special))
    for name, f in special.items():
        text, flag = f.metadata["help"], f.metadata["flag"]
        parser.add_argument(f"--{key}.{name}" if key else f"--{name}", default=f.default, help=text, **flag)
    texts = {f"{key}.{f.name}" if key else f.name: f.metadata.get("help") for f in fields(settings)}
    for action in parser._actions:
        if texts.get(action.dest):
            action.help = texts[action.dest]


def method_in(arguments: Sequence[str]) -> str | None:
    """The method that a ``prune`` command names, on the command line or in a file; None for other commands."""
    if not arguments or arguments[0] != "prune":
        return None
    recipe = recipe_in(arguments)
    config = option(arguments, "--config")
    settings = read_settings(config, "--config") if config is not None else {}
    named = option(arguments, "--method")
    if named is None:
        named = settings.get("method", PruneSettings.method if recipe is None else recipe.method)
    if recipe is not None and named != recipe.method:
        raise ValueError(f"--recipe {recipe.path} is for method {recipe.method!r}, not {named!r}; leave out --method")
    if not isinstance(named, str):
        raise ValueError(f"--config {config}: method {named!r}: the name of one method is needed")
    own = settings.get(named, {})
    if not isinstance(own, dict):
        raise ValueError(f"--config {config}: {named} {own!r}: options by name are needed, as in '{named}: {{…}}'")
    return named


def recipe_in(arguments: Sequence[str]) -> Recipe | None:
    """The recipe that a ``prune`` command names."""
    path = option(arguments, "--recipe") if arguments and arguments[0] == "prune" else None
    return None if path is None or "--resume" in arguments else read_recipe(path)


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


def explained(error: ArgumentError, arguments: Sequence[str]) -> str:
    """A parser's complaint in the words of a user: which option, what was given, what is needed."""
    text = one_line(error)
    wrong_type = re.search(r'Parser key "([\w.]+)": (.*(?:Got|Given) value: (.*))', text)
    if wrong_type:
        key, rest, value = wrong_type.groups()
        choices = re.search(r"Literal\[(.*?)\]", rest)
        kinds = [NEEDED[kind] for kind in re.findall(r"<class '(\w+)'>", rest) if kind in NEEDED]
        need = f"one of {choices[1]}" if choices else " or ".join(dict.fromkeys(kinds)) or "another value"
        return f"--{key} {value}: {need} is needed"
    no_file = re.search(r'Parser key "(\w+)": Unable to load config \'(.*?)\'', text)
    if no_file:
        return f"--{no_file[1]} {no_file[2]}: a YAML file with options of {no_file[1]!r} is needed"
    unknown = re.match(r"unrecognized arguments: (--[\w.-]+)", text) or re.search(r"not accept option '(.*)'", text)
    if unknown is None:
        return text
    name = unknown[1].removeprefix("--")
    if "--resume" in arguments:
        return f"--resume takes its settings from the run's directory; leave out --{name}"
    command, method = command_in(arguments), method_in(arguments)
    known = known_options(command, method)
    near = difflib.get_close_matches(name, known, n=1) or [k for k in known if k == name.replace("-", "_")]
    hint = f"did you mean --{near[0]}?" if near else f"see fastprune {command} --help"
    if method is not None and "." in name and name.partition(".")[0] != method:
        hint = f"the method is {method!r}; --method {name.partition('.')[0]} has options of that name"
    return f"there is no option --{name}: {hint}"


def known_options(command: str, method: str | None) -> list[str]:
    """The names of a command's options, without their dashes."""
    if command not in commands.COMMANDS:
        return ["help", "version"]
    options = command_parser(command, method)._option_string_actions
    return [name.removeprefix("--") for name in options if name.startswith("--")]


NEEDED = {
    "int": "a whole number",
    "float": "a finite number",
    "bool": "true or false",
    "str": "a text",
    "tuple": "a list such as [0.5,0.75]",
}  # by the names of Python's types


def one_line(error: BaseException) -> str:
    """An error's message without line breaks."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
