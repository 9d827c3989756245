"""Trials of kernels, here or in another process.

A kernel that reads beside its tensors can end a CUDA context, and with it everything that a process has on the device;
one that hangs is never caught by the process that waits for it. So kernels are tried in a process of their own, which
lives as long as there are kernels to try, and is started again without the one that ended it.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import IO, Any

import torch

from fastprune.ops.conv.agreement import Candidate, Problem, verify
from fastprune.ops.conv.timing import Call, Timer, time_calls

Key = tuple[tuple[str, Any], ...]
"""Everything but the machine that a choice depends on: operator, dtype, shapes, pitches, parameters. JSON values."""

MARGIN = 0.97
"""A candidate has to be 3 % faster than the fallback: less is noise, and then the library is preferred."""


def try_candidates(make_problem: Callable[[], Problem], key: Key, device: torch.device, timer: Timer) -> dict[str, Any]:
    """Verify and time the candidates of a problem.

    Returns:
        ``winner``, the name of the candidate to run or None for the fallback; ``milliseconds`` by name; ``dropped``,
        the reasons why candidates are not used.

    Raises:
        torch.OutOfMemoryError: if the device has no memory for it.
    """
    # Under autocast the fallback would compute in another dtype than the candidates.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        problem = make_problem()
        good, dropped = verify(problem, dict(key), device)
        calls: list[Call] = [problem.fallback, *(call for _, call in good)]
        times = timer(calls, device) if good else [0.0]
    names = [None, *(candidate.name for candidate, _ in good)]
    best = min(range(len(names)), key=times.__getitem__)
    winner = names[best] if times[best] < MARGIN * times[0] else None
    milliseconds = {name or "fallback": time for name, time in zip(names, times, strict=True)}
    return {"winner": winner, "milliseconds": milliseconds, "dropped": dropped}


class TrialError(RuntimeError):
    """The other process ended, or gave no answer in time."""


@dataclass
class Trials:
    """Tries kernels in another process.

    Args:
        problems: ``module:function``; it makes the :class:`Problem` of a key (a dict), a device and candidates' names.
        start_seconds: Time for the process to start, which imports torch and opens the device.
        seconds: Time for one candidate to be verified, and for all of them to be timed.
    """

    problems: str
    start_seconds: float = 120.0
    seconds: float = 60.0
    _worker: _Worker | None = field(default=None, repr=False)
    _is_broken: bool = field(default=False, repr=False)

    def tune(self, key: Key, device: torch.device, names: Sequence[str]) -> dict[str, Any] | None:
        """Try the candidates of a key.

        Returns:
            The record of :func:`try_candidates`, with a reason also for candidates that ended the process. None if
            nothing can be tried: the first time a warning says why, and the process is not started again.
        """
        lost: dict[str, str] = {}
        while not self._is_broken:
            candidate = None
            left = [name for name in names if name not in lost]
            try:
                for answer in self._ask({"key": key, "device": str(device), "names": left}):
                    if "record" in answer:
                        record: dict[str, Any] = answer["record"]
                        record["dropped"].update(lost)
                        return record
                    if "refusal" in answer:
                        _warn(f"cannot try kernels for {dict(key)}: {answer['refusal']}; the library runs")
                        return None
                    candidate = answer["trying"]
            except TrialError as error:
                self.close()
                if candidate is None:
                    self._is_broken = True
                    _warn(f"cannot try kernels in another process: {error}; the library runs")
                else:
                    lost[candidate] = str(error)
                    _warn(f"kernel {candidate!r} is not used for {dict(key)}: the process that tried it: {error}")
        return None

    def _ask(self, question: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Send a question and yield the answers, until the consumer has the one that it wants."""
        if self._worker is None:
            self._worker = _Worker(self.problems)
            self._worker.read(self.start_seconds)  # says that it is ready
        self._worker.write(question)
        while True:
            yield self._worker.read(self.seconds)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None


class _Worker:
    """The other process, which reads and writes lines of JSON."""

    def __init__(self, problems: str) -> None:
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by end
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fastprune.ops.conv.trial", problems],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, encoding="utf-8",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )  # fmt: skip
        except OSError as error:
            self.errors.close()
            raise TrialError(f"the process does not start: {error}") from error
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._collect, daemon=True).start()
        atexit.register(self.end)

    def _collect(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")  # it has ended

    def write(self, question: dict[str, Any]) -> None:
        """Send a line."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise TrialError(self.describe_end()) from error

    def read(self, seconds: float) -> dict[str, Any]:
        """Return the next line."""
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            raise TrialError(f"no answer in {seconds:g} seconds") from None
        if not line:
            raise TrialError(self.describe_end())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def describe_end(self) -> str:
        """Return how the process ended, with the last line of what it said."""
        code = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"it ended with exit code {code}" + (f": {said[-1][:200]}" if said else "")

    def end(self) -> None:
        """End the process."""
        atexit.unregister(self.end)
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                with suppress(OSError):  # of what was not sent yet
                    stream.close()


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=6)


def serve(problems: str, questions: IO[str], answers: IO[str]) -> None:
    """Answer questions until there are no more: what the other process does."""
    module, _, function = problems.partition(":")
    make_problem = getattr(importlib.import_module(module), function)

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    say(ready=True)
    for line in questions:
        try:
            say(record=answer_question(json.loads(line), make_problem, lambda name: say(trying=name)))
        except torch.OutOfMemoryError:
            say(refusal="the device has no memory for it")


def answer_question(
    question: dict[str, Any], make_problem: Callable[..., Problem], announce: Callable[[str | None], None]
) -> dict[str, Any]:
    """Return the record of a question; announce each candidate before it runs first, and None before all are timed."""
    key, device = question["key"], torch.device(question["device"])
    announced: set[str] = set()

    def run(candidate: Candidate, results: Any) -> None:
        if candidate.name not in announced:
            announced.add(candidate.name)
            announce(candidate.name)
        candidate.run(results)

    def make_announced() -> Problem:
        problem = make_problem(dict(key), device, question["names"])
        return replace(problem, candidates=[Candidate(c.name, partial(run, c)) for c in problem.candidates])

    def timer(calls: Sequence[Call], device: torch.device) -> list[float]:
        announce(None)
        return time_calls(calls, device)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is dropped is in the record
        return try_candidates(make_announced, key, device, timer)


if __name__ == "__main__":
    # Whatever a library prints must not come between the answers.
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.argv[1], sys.stdin, stdout)
