"""Stopping at a step's end when a signal asks for it, on all ranks together."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch

from fastprune.host import progress
from fastprune.host.distributed import Distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """A context that remembers the first SIGINT or SIGTERM; the second one stops the process at once.

    Signals reach the main thread only, so in another thread this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if progress.TERMINAL.live is not None:
            progress.TERMINAL.write("stopping at the end of this step; press Ctrl-C again to stop at once")

    def requested_anywhere(self, distributed: Distributed) -> bool:
        """Return whether any rank was asked to stop; all ranks must call, and all get the same answer."""
        return bool(distributed.sum_(torch.tensor([int(self.requested)])).item())
