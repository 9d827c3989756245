"""The parser: settings dataclasses become flags, and its complaints become lines that a user understands."""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from jsonargparse import ArgumentParser

from fastprune.cli.arguments import Invocation, common_options, unknown_option
from fastprune.cli.commands import COMMANDS, FAMILIES
from fastprune.options import POSITIONAL, POSITIONALS, fields_of, help_of, types_of

# No abbreviations: read_invocation looks at the arguments before the parser does, and must see what the parser sees.
PARSING: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}

NEEDED = {
    "int": "a whole number",
    "float": "a finite number",
    "bool": "true or false",
    "str": "a text",
    "tuple": "a list such as [0.5,0.75]",
}
"""What is needed for a value, by the names of Python's types."""


def parse(arguments: Sequence[str], invocation: Invocation) -> dict[str, Any]:
    """Return the settings that the arguments give; print help and exit if they ask for it.

    Raises:
        ValueError: for a value that an option does not take, and options that a file must not have.
    """
    try:
        parsed = build_parser(invocation).parse_args(list(arguments) or ["--help"])
    except ArgumentError as error:
        raise ValueError(explain(error, invocation)) from error
    for word in (invocation.command or "").split():
        parsed = parsed[word]
    # Without metadata: the path of a file with a method's options is no option of the method.
    settings: dict[str, Any] = parsed.clone(with_meta=False).as_dict()
    return settings


def build_parser(invocation: Invocation) -> ArgumentParser:
    """Build the parser; of all commands but the chosen one it knows name and help only."""
    parser = ArgumentParser(prog="fastprune", description="Channel pruning of convolutional networks.", **PARSING)
    parser.add_argument("--version", action="version", version=f"fastprune {version('fastprune')}")
    commands = parser.add_subcommands(required=True, dest="command")
    places = {"": commands}
    for name, command in COMMANDS.items():
        family, _, member = name.rpartition(" ")
        if family not in places:
            branch = ArgumentParser(prog=f"fastprune {family}", description=FAMILIES[family], **PARSING)
            commands.add_subcommand(family, branch, help=FAMILIES[family])
            places[family] = branch.add_subcommands(required=True, dest="command")
        own = build_command_parser(name, invocation) if name == invocation.command else ArgumentParser(**PARSING)
        places[family].add_subcommand(member, own, help=command.help)
    return parser


def build_command_parser(name: str, invocation: Invocation) -> ArgumentParser:
    """Build the parser of one command; ``prune`` has the method's options under its name (``--dmc.epochs 30``)."""
    command = COMMANDS[name]
    parser = ArgumentParser(prog=f"fastprune {name}", description=command.help, **PARSING)
    for settings in command.load_settings():
        add_settings(parser, settings)
    for option, arguments in common_options(command).items():
        parser.add_argument(f"--{option}", **arguments)
    if invocation.method is not None:
        from fastprune.methods.registry import load  # imports torch

        add_settings(parser, load(invocation.method).Config, invocation.method)
    parser.set_defaults(flatten(invocation.defaults))
    return parser


def add_settings(parser: ArgumentParser, settings: type[Any], key: str | None = None) -> None:
    """Add the options of a dataclass as flags, under ``key.`` if one is given."""
    options, kinds, defaults = fields_of(settings), types_of(settings), settings()
    if key is None:
        title = (inspect.getdoc(settings) or "").partition("\n")[0].rstrip(".")
        group: Any = parser.add_argument_group(title)
    else:
        parser.add_class_arguments(settings, key, skip={f.name for f in options})  # adds --KEY FILE alone
        group = (parser.groups or {})[key]
    for f in options:
        flag = f.metadata.get("flag") or {"type": kinds[f.name]}
        name = f.name if flag in (POSITIONAL, POSITIONALS) else f"--{f'{key}.' if key else ''}{f.name}"
        default = getattr(defaults, f.name)
        default = list(default) if isinstance(default, tuple) else default  # the parser writes into its defaults
        group.add_argument(name, default=default, help=help_of(f), **flag)


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as the parser has them: those of a section under ``section.name``."""
    sections = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    within = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return {**{name: value for name, value in settings.items() if name not in sections}, **within}


def explain(error: ArgumentError, invocation: Invocation) -> str:
    """Return a parser's complaint in a user's words: which option, what was given, what is needed."""
    text = " ".join(str(error).split())
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
    unknown = re.search(r"not accept option '(.*)'", text)  # in a file of settings
    return unknown_option(unknown[1], invocation) if unknown else text
