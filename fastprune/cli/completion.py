"""``fastprune completion SHELL``, and the answers to a shell that asks for completions. Nothing here imports torch."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from typing import Any

from fastprune.cli.arguments import Invocation, list_options, read_invocation
from fastprune.cli.commands import COMMANDS
from fastprune.cli.settings import PruneSettings, pick
from fastprune.cli.shelf import recipe_names
from fastprune.methods.plugins import offers
from fastprune.options import POSITIONAL, option

SHELLS = ("bash", "zsh", "fish")


@dataclass
class CompletionSettings:
    """A shell."""

    shell: str = option("bash", "the shell: bash, zsh or fish", choices=SHELLS, flag=POSITIONAL)


def run_completion(values: dict[str, Any], given: set[str]) -> int:
    """Print the script for a shell."""
    shell = pick(CompletionSettings, values).shell
    script = load_argcomplete().shellcode(["fastprune"], shell=shell)
    if values["json"]:
        print(json.dumps({"shell": shell, "script": script}))
    else:
        print(script)
    return 0


def load_argcomplete() -> Any:
    """Import the library that talks to the shells."""
    try:
        import argcomplete
    except ImportError as error:
        raise ValueError(
            "completion: the package 'argcomplete' is needed: pip install 'fastprune[completion]'"
        ) from error
    return argcomplete


def answer() -> None:
    """Answer a shell's question, which is in the environment, and end the process."""
    words = os.environ.get("COMP_LINE", "").split()[1:]
    load_argcomplete().autocomplete(make_parser(words), always_complete_options=True)


def make_parser(words: list[str]) -> argparse.ArgumentParser:
    """Return a parser that knows the commands, and the options of the one that the words begin with."""
    parser = argparse.ArgumentParser(prog="fastprune", add_help=False)
    for name in list_options(Invocation(None)):
        parser.add_argument(f"--{name}", action="store_true")
    places: dict[str, Any] = {"": parser.add_subparsers()}
    invocation = understand(words)
    for name, command in COMMANDS.items():
        family, _, member = name.rpartition(" ")
        if family not in places:
            places[family] = places[""].add_parser(family, add_help=False).add_subparsers()
        own = places[family].add_parser(member, help=command.help, add_help=False)
        if name == invocation.command:
            add_options(own, invocation)
    return parser


def understand(words: list[str]) -> Invocation:
    """Return what the words say so far; a word that is not finished says nothing."""
    for known in (words, [*words[:1], "--method", PruneSettings.method], words[:2], words[:1]):
        try:
            invocation = read_invocation(known)
            list(list_options(invocation))  # refuses a method that does not exist
        except ValueError:
            continue
        return invocation
    return Invocation(None)


def add_options(parser: argparse.ArgumentParser, invocation: Invocation) -> None:
    """Add the options of a command."""
    choices = {"method": lambda **_: sorted(offers()), "recipe": lambda **_: recipe_names()}
    for name in list_options(invocation):
        action: Any = parser.add_argument(f"--{name}")
        if name in choices:
            action.completer = choices[name]
    words = {"methods": sorted(offers()), "completion": list(SHELLS)}
    if invocation.command in ("recipes show", "recipes cp"):
        parser.add_argument("name", choices=recipe_names())
    elif invocation.command in words:
        parser.add_argument("name", choices=words[invocation.command])
