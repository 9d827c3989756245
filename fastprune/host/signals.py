"""Ctrl-C without tracebacks: in a command, and in the worker processes that it starts. Nothing here imports torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from fastprune.host import progress

EXIT_INTERRUPTED = 130


class Interrupts:
    """A context in which the first Ctrl-C raises ``KeyboardInterrupt``, and the next one ends the process.

    Before ``has_work`` the first one ends the process, too: modules that are half imported cannot clean up.

    Python prints and forgets an exception in a destructor or a callback of C code: an interrupt that is lost in this
    way ends the process too. Signals reach the main thread only, so in another thread this does nothing.

    Attributes:
        came: whether Ctrl-C was pressed. Code on the way may turn the exception into another one.
        has_work: whether the work has begun.
    """

    def __init__(self) -> None:
        self.came = False
        self.has_work = False
        self._previous: Any = None
        self._hook = sys.unraisablehook

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._interrupt)
            self._hook, sys.unraisablehook = sys.unraisablehook, self._catch_lost
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            sys.unraisablehook = self._hook
            signal.signal(signal.SIGINT, self._previous)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.came or not self.has_work:
            end_now()
        self.came = True
        raise KeyboardInterrupt

    def _catch_lost(self, lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            end_now()
        self._hook(lost)


def end_now() -> NoReturn:
    """End the process without cleaning up, as Ctrl-C asks for."""
    progress.TERMINAL.restore()
    sys.stderr.write("\nfastprune: interrupted\n")
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Keep Ctrl-C from processes that are started in this context, for good; this process gets it at the end.

    A terminal sends Ctrl-C to all of its processes. A worker would print a traceback, in its first second too, before
    any of our code runs in it. A child inherits the signals that wait, and never looks at them.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # it is started with the first worker, and lets signals through afterwards
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent() -> None:
    """Let a worker process end with the process that started it, however that one ends."""
    from multiprocessing import parent_process

    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: Any) -> None:
    parent.join()
    os._exit(1)
