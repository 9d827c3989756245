"""The command line: what users type becomes dataclasses, and bad input becomes one clear line and exit code 2.

torch and what builds on it are imported when a command that needs them runs, and not before.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastprune.cli.arguments import list_names, normalise, read_invocation, refuse_unknown
from fastprune.cli.commands import COMMANDS
from fastprune.cli.help import print_help, wants_help
from fastprune.cli.parser import parse
from fastprune.host.errors import Interrupted, UserError
from fastprune.host.signals import EXIT_INTERRUPTED, Interrupts

EXIT_BAD_INPUT = 2
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell has it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the arguments without the program's name; None = the process' own.

    Returns:
        0 on success, 2 for bad input (with one line on standard error), 130 after an interruption.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    command, settings = "", {}
    with Interrupts() as interrupts:
        try:
            invocation = read_invocation(given)
            given = normalise(given, invocation)
            if wants_help(given):
                print_help(invocation, given)
                return 0
            refuse_unknown(given, invocation)
            command, settings = str(invocation.command), parse(given, invocation)
            run = COMMANDS[command].load_run()
            interrupts.has_work = True
            with log_to_stderr():
                return run(settings, set(list_names(given)))
        except Interrupted as stopped:
            print(f"fastprune: {stopped}{how_to_go_on(command, settings)}", file=sys.stderr)
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            # The reader of our output has gone (head, less), which is no error. Python would complain at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_BROKEN_PIPE
        except (Exception, KeyboardInterrupt) as error:
            if interrupts.came or isinstance(error, KeyboardInterrupt):
                print(f"fastprune: interrupted{how_to_go_on(command, settings)}", file=sys.stderr)
                return EXIT_INTERRUPTED
            if not isinstance(error, (ValueError, OSError, UserError)):
                raise
            print(f"fastprune: error: {one_line(error)}", file=sys.stderr)
            return EXIT_BAD_INPUT
        finally:
            leave_peers()


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Show what the package logs, such as which channels a method prunes, as lines on standard error."""
    logger, handler = logging.getLogger("fastprune"), logging.StreamHandler()
    level = logger.level
    handler.setFormatter(logging.Formatter("fastprune: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def how_to_go_on(command: str, settings: Mapping[str, Any]) -> str:
    """Return the command that resumes an interrupted one; nothing where there is nothing to resume."""
    if command not in COMMANDS or not COMMANDS[command].resumes:
        return ""
    place = "run" if settings.get("run") else "out"
    file = "finetune.yaml" if place == "run" else "config.yaml"
    if not settings.get(place) or not (Path(settings[place]) / file).is_file():
        return ""  # it had not begun to write
    return f": fastprune {command} --{place} {shlex.quote(str(settings[place]))} --resume"


def leave_peers() -> None:
    """Leave the process group, if this process has joined one."""
    if "torch.distributed" in sys.modules:  # without it there is none
        from fastprune.host.distributed import Distributed  # imports torch

        Distributed.leave()


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
