"""The entry point of the command ``fastprune``: from here on Ctrl-C ends the process without a traceback.

It imports next to nothing, so that this holds while the command line, and later torch, are imported.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

EXIT_INTERRUPTED = 130


def main() -> int:
    """Run the command line of this process; return its exit code."""
    signal.signal(signal.SIGINT, leave)
    try:
        if "_ARGCOMPLETE" in os.environ:  # a shell asks what could come next
            from fastprune.cli.completion import answer

            answer()
        from fastprune.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def leave(number: int, frame: FrameType | None) -> None:
    """End the process at once; for moments in which nothing has been begun."""
    sys.stderr.write("\nfastprune: interrupted\n")
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)
