"""``--help``: examples first, then the options that most people need, then the others by name.

``--help-all`` explains them all. The value beside an option is its default. Nothing here imports torch.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastprune.cli.arguments import Invocation, common_options
from fastprune.cli.commands import COMMANDS, FAMILIES
from fastprune.methods import catalogue
from fastprune.options import POSITIONAL, describe, fields_of

MARGIN = 29  # column at which meanings begin
LINES = 60  # of a help without --help-all

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "fastprune demo",
        "fastprune prune --model torchvision:resnet50 --weights W.safetensors --method l1 --out runs/l1",
    ),
    "train": (
        "fastprune train --model resnet56 --data cifar10:FOLDER --epochs 200 --out runs/base",
        "fastprune train --recipe train-resnet56-cifar10 --data cifar10:FOLDER --out runs/base",
    ),
    "methods": ("fastprune methods", "fastprune methods dmc"),
    "inspect": ("fastprune inspect --model torchvision:resnet50",),
    "sensitivity": ("fastprune sensitivity --model resnet56 --weights W.safetensors --data cifar10:FOLDER --out sens",),
    "prune": (
        "fastprune prune --model resnet56 --data cifar10:FOLDER --weights W.safetensors --out runs/dmc",
        "fastprune prune --model torchvision:resnet50 --weights W.safetensors --method l1 --out runs/l1",
        "fastprune prune --recipe dmc-resnet50-imagenet --data imagefolder:FOLDER --weights W.safetensors --out runs/x",
    ),
    "finetune": (
        "fastprune finetune --run runs/dmc --epochs 60",
        "fastprune finetune --run runs/dmc --epochs 10 --teacher auto --ema 0.999",
    ),
    "calibrate": (
        "fastprune calibrate runs/l1 --data digits",
        "fastprune calibrate runs/dmc --how bn --images 1024 --out runs/bn",
    ),
    "evaluate": ("fastprune evaluate --run runs/dmc",),
    "report": ("fastprune report --run runs/dmc runs/l1 --out page",),
    "recipes show": ("fastprune recipes show dmc-resnet50-imagenet",),
    "recipes cp": ("fastprune recipes cp dmc-resnet50-imagenet mine.yaml",),
    "completion": (
        'bash: eval "$(fastprune completion bash)" in ~/.bashrc',
        'zsh:  eval "$(fastprune completion zsh)" in ~/.zshrc',
        "fish: fastprune completion fish > ~/.config/fish/completions/fastprune.fish",
    ),
}

MAIN: dict[str, tuple[str, ...]] = {
    "train": (
        *("model", "data", "out", "weights", "num_classes", "recipe", "epochs", "batch_size", "lr", "schedule"),
        *("resume", "json"),
    ),
    "prune": (
        *("model", "weights", "data", "method", "budget", "out", "recipe", "compensate", "round_to", "dry_run"),
        *("seed", "device", "resume", "config", "json"),
    ),
    "finetune": (
        *("run", "data", "epochs", "batch_size", "lr", "schedule", "teacher", "distill", "temperature", "ema"),
        *("from_scratch", "num_classes", "device", "resume", "json"),
    ),
}
"""The options that are explained in ``--help`` of commands with many."""


@dataclass(frozen=True)
class Entry:
    """An option as its help shows it: ``--epochs 300``, and what it means."""

    name: str
    form: str
    meaning: str

    def lines(self, width: int) -> list[str]:
        """Return its lines; a long form has one of its own."""
        texts = textwrap.wrap(self.meaning, max(20, width - MARGIN)) or [""]
        head = f"  {self.form}"
        if len(head) > MARGIN - 2:
            return [head, *(" " * MARGIN + text for text in texts)]
        return [head.ljust(MARGIN) + texts[0], *(" " * MARGIN + text for text in texts[1:])]


def wants_help(arguments: Sequence[str]) -> bool:
    """Return whether the arguments ask for help."""
    return not arguments or bool({"-h", "--help", "--help-all", "--help_all"} & set(arguments))


def print_help(invocation: Invocation, arguments: Sequence[str]) -> None:
    """Print the help of a command, of a family of commands, or of all."""
    width = max(50, min(shutil.get_terminal_size((80, 24)).columns, 110))
    everything = bool({"--help-all", "--help_all"} & set(arguments))
    family = next((word for word in arguments[:1] if word in FAMILIES), "")
    if invocation.command is None:
        lines = list(describe_commands(family, width))
    else:
        lines = list(describe_command(invocation, width, everything=everything))
    print("\n".join(lines))


def describe_commands(family: str, width: int) -> Iterator[str]:
    """Yield the help of the command line, or of a family of commands."""
    yield from textwrap.wrap(FAMILIES.get(family, "Channel pruning of convolutional networks."), width)
    yield from examples(family, width)
    yield from ("", "commands:")
    seen = set()
    for name, command in COMMANDS.items():
        first, _, second = name.partition(" ")
        shown = second if family else first
        if (not family or first == family) and shown not in seen:
            seen.add(shown)
            yield from Entry(shown, shown, command.help if family or not second else FAMILIES[first]).lines(width)
    yield from ("", f"'fastprune {f'{family} ' if family else ''}COMMAND --help' explains a command")
    if not family:
        yield "'fastprune --version' prints the version"


def describe_command(invocation: Invocation, width: int, *, everything: bool) -> Iterator[str]:
    """Yield the help of one command."""
    name = str(invocation.command)
    entries = list(list_entries(invocation))
    main = MAIN.get(name, ())
    shown = [entry for entry in entries if everything or not main or entry.name in main]
    yield from textwrap.wrap(f"fastprune {name}: {COMMANDS[name].help}", width)
    yield from examples(name, width)
    yield from ("", "options, with their defaults:")
    for entry in sorted(shown, key=lambda entry: main.index(entry.name) if entry.name in main else len(main)):
        yield from entry.lines(width)
    rest = [f"--{entry.name}" for entry in entries if entry not in shown]
    if rest:
        yield from ("", f"more options, which 'fastprune {name} --help-all' explains:")
        yield from textwrap.wrap(
            " ".join(rest), width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
        )
    if invocation.method is not None:
        yield from describe_method(invocation.method, width, everything=everything)


def describe_method(method: str, width: int, *, everything: bool) -> Iterator[str]:
    """Yield the options of a method, each on a line that is cut off at the margin unless ``everything`` is wanted."""
    info = catalogue.find(method)
    yield from ("", f"options of {method}, which 'fastprune methods {method}' explains:")
    entries = [
        Entry(o.name, f"--{method}.{o.name} {value_text(o.default)}", o.help + choices_of(o.type)) for o in info.options
    ]
    if everything:
        for entry in entries:
            yield from entry.lines(width)
    elif len(entries) <= 12:
        for entry in entries:
            yield textwrap.shorten(f"  {entry.form}", width) if len(entry.form) > width else cut(entry, width)
    else:
        names = " ".join(f"--{method}.{entry.name}" for entry in entries)
        yield from textwrap.wrap(names, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def cut(entry: Entry, width: int) -> str:
    """Return an option on one line."""
    line = f"  {entry.form}".ljust(MARGIN + 8) + "  " + entry.meaning
    return line if len(line) <= width else line[: width - 1] + "…"


def examples(name: str, width: int) -> Iterator[str]:
    """Yield the examples of a command, folded by backslashes."""
    if name in EXAMPLES:
        yield from ("", "examples:")
        for line in EXAMPLES[name]:
            glued = re.sub(r"(--\S+) (?!-)", "\\1\N{NO-BREAK SPACE}", line)  # an option and its value stay together
            wrapped = textwrap.wrap(
                glued, width - 4, initial_indent="  ", subsequent_indent="      ",
                break_on_hyphens=False, break_long_words=False,
            )  # fmt: skip
            parts = [*(f"{part} \\" for part in wrapped[:-1]), wrapped[-1]]
            yield from (part.replace("\N{NO-BREAK SPACE}", " ") for part in parts)


def list_entries(invocation: Invocation) -> Iterator[Entry]:
    """Yield the options of a command, without those of a method."""
    command = COMMANDS[str(invocation.command)]
    for settings in command.load_settings():
        for f, info in zip(fields_of(settings), describe(settings), strict=True):
            flag = f.metadata.get("flag") or {}
            default = invocation.defaults.get(f.name, info.default)
            if flag == POSITIONAL:
                form = f.name.upper()
            elif flag.get("action") == "store_true":
                form = f"--{f.name}"
            else:
                form = f"--{f.name} {value_text(default) or f.name.upper()}"
            yield Entry(f.name, form, info.help + choices_of(info.type))
    for name, arguments in common_options(command).items():
        yield Entry(name, f"--{name} FILE" if arguments["action"] == "config" else f"--{name}", arguments["help"])


def value_text(value: Any) -> str:
    """Return a default as it would be typed; "" for none."""
    if value is None or value == () or value == "":
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(str, value))}]" if isinstance(value, (tuple, list)) else str(value)


def choices_of(kind: str) -> str:
    """Return the choices of a type as text; nothing for other types."""
    return f" ({kind.replace(' | ', ', ')})".replace("'", "") if "'" in kind else ""
