"""The command line: what users type becomes dataclasses, and bad input becomes one clear line and exit code 2.

torch and what builds on it are imported when a command that needs them runs, and not before.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastprune.cli.arguments import list_names, normalise, read_invocation, refuse_unknown
from fastprune.cli.commands import COMMANDS
from fastprune.cli.parser import parse
from fastprune.host.errors import Interrupted, UserError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
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
    try:
        invocation = read_invocation(given)
        given = normalise(given, invocation)
        if not {"-h", "--help"} & set(given):
            refuse_unknown(given, invocation)
        command, settings = str(invocation.command), parse(given, invocation)
        with log_to_stderr():
            return COMMANDS[command].load_run()(settings, set(list_names(given)))
    except Interrupted as stopped:
        print(f"fastprune: {stopped}{how_to_go_on(command, settings)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone (head, less): not an error. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (ValueError, OSError, UserError) as error:
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
    """Return the command that resumes an interrupted one; nothing for commands that cannot be resumed."""
    if not COMMANDS[command].resumes:
        return ""
    place = "run" if settings.get("run") else "out"
    return f": fastprune {command} --{place} {settings[place]} --resume"


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
