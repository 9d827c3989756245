"""Trials of kernels, here or in another process.

A kernel that reads beside its tensors can end a CUDA context, and with it everything that a process has on the device;
one that hangs is never caught by the process that waits for it. So kernels are tried in a process of their own. It is
started again without the one that ended it, and ends when it has had nothing to do for a minute.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import IO, Any

import torch

from fastprune.ops.conv.agreement import Candidate, Problem, verify
from fastprune.ops.conv.timing import Call, Timer, synchronize, time_calls

Key = tuple[tuple[str, Any], ...]
"""Everything but the machine that a choice depends on: operator, dtype, shapes, pitches, parameters. JSON values."""

LEAVE_SECONDS, IDLE_SECONDS = 10.0, 60.0

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
    """The other process ended, or gave no answer in time.

    Attributes:
        candidate: the kernel that it was about to run for the first time; None: none, or all have been verified.
    """

    candidate: str | None = None


@dataclass
class Trials:
    """Tries kernels in another process.

    Args:
        problems: ``module:function``; it makes the :class:`Problem` of a key (a dict), a device and candidates' names.
        start_seconds: Time for the process to start, which imports torch.
        seconds: Time for one candidate to be verified, and for all of them to be timed.
    """

    problems: str
    start_seconds: float = 120.0
    seconds: float = 60.0
    _worker: _Worker | None = field(default=None, repr=False)
    _is_broken: bool = field(default=False, repr=False)
    _has_answered: bool = field(default=False, repr=False)

    def tune(self, key: Key, device: torch.device, names: Sequence[str]) -> dict[str, Any] | None:
        """Try the candidates of a key.

        Returns:
            The record of :func:`try_candidates`, with a reason also for candidates that ended the process. None if
            nothing can be tried, with a warning. A process that cannot start, or fails at its first question as on a
            device for one process alone, is not started again.
        """
        lost: dict[str, str] = {}
        while not self._is_broken:
            left = [name for name in names if name not in lost]
            benchmark = torch.backends.cudnn.benchmark
            question = {"key": key, "device": str(device), "names": left, "benchmark": benchmark}
            try:
                answer = self._ask(question, device)
            except TrialError as error:
                self.close()
                if error.candidate is None:
                    self._is_broken |= not self._has_answered
                    _warn(f"cannot try kernels for {dict(key)} in another process: {error}; the library runs")
                    return None
                lost[error.candidate] = str(error)
                _warn(f"kernel {error.candidate!r} is not used for {dict(key)}: the process that tried it: {error}")
                continue
            except BaseException:  # Ctrl-C, say: what is not read yet must not answer the next question
                self.close()
                raise
            self._has_answered = True
            if "refusal" in answer:
                _warn(f"cannot try kernels for {dict(key)}: {answer['refusal']}; the library runs")
                return None
            record: dict[str, Any] = answer["record"]
            for name, why in record["dropped"].items():
                _warn(f"kernel {name!r} is not used for {dict(key)}: {why}")
            record["dropped"].update(lost)
            return record
        return None

    def _ask(self, question: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """Return the answer to a question: a record, or a refusal."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # our own work would be in its times
            torch.cuda.empty_cache()  # and our free memory is none to it
        candidate = None
        worker = self._worker
        try:
            if worker is None or not worker.write(question):  # it has had nothing to do, and ended
                self.close()
                worker = self._start()
                if not worker.write(question):
                    raise TrialError(worker.describe_end())
            while True:
                answer = worker.read(self.seconds)
                if "trying" not in answer:
                    return answer
                candidate = answer["trying"]
        except TrialError as error:
            error.candidate = candidate
            raise

    def _start(self) -> _Worker:
        """Start the process; if that fails, remember it."""
        try:
            self._worker = _Worker(self.problems)
            self._worker.read(self.start_seconds)  # says that it is ready
        except TrialError:
            self._is_broken = True
            raise
        return self._worker

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
                [sys.executable, "-c", "from fastprune.ops.conv.trial import main; main()", problems],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, encoding="utf-8",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )  # fmt: skip
        except OSError as error:
            self.errors.close()
            raise TrialError(f"the process does not start: {error}") from error
        assert self.process.stdout is not None
        self.lines = Lines(self.process.stdout)
        atexit.register(self.end)

    def write(self, question: dict[str, Any]) -> bool:
        """Send a line; return whether the process is there to read it."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except OSError:
            return False
        return self.process.poll() is None

    def read(self, seconds: float) -> dict[str, Any]:
        """Return the next line."""
        line = self.lines.get(seconds)
        if line is None:
            raise TrialError(f"no answer in {seconds:g} seconds")
        if not line:
            raise TrialError(self.describe_end())
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise TrialError(f"no answer but {line[:80]!r}") from None
        return answer

    def describe_end(self) -> str:
        """Return how the process ended, with the last line of what it said."""
        with suppress(subprocess.TimeoutExpired):  # a process that the driver holds
            self.process.wait(timeout=LEAVE_SECONDS)
        code = self.process.returncode
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"it ended with exit code {code}" + (f": {said[-1][:200]}" if said else "")

    def end(self) -> None:
        """End the process."""
        atexit.unregister(self.end)
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=LEAVE_SECONDS)
            self.lines.thread.join()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                with suppress(OSError):  # of what was not sent yet
                    stream.close()


class Lines:
    """The lines of a stream, read by a thread, so that one can wait for them for a limited time."""

    def __init__(self, stream: IO[str]) -> None:
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._stream = stream
        self.thread = threading.Thread(target=self._collect, daemon=True)
        self.thread.start()

    def _collect(self) -> None:
        for line in self._stream:
            self._lines.put(line)
        self._lines.put("")

    def get(self, seconds: float) -> str | None:
        """Return the next line; "": the stream has ended; None: there is none in this time."""
        try:
            return self._lines.get(timeout=seconds)
        except queue.Empty:
            return None


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=6)


def main() -> None:
    """Answer the questions on stdin: the other process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the process that asks, which ends this one
    # Whatever a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.argv[1], Lines(sys.stdin), answers)


def serve(problems: str, questions: Lines, answers: IO[str], idle_seconds: float = IDLE_SECONDS) -> None:
    """Answer questions until there are no more, or none for some time."""
    module, _, function = problems.partition(":")
    make_problem = getattr(importlib.import_module(module), function)

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    say(ready=True)
    while line := questions.get(idle_seconds):
        try:
            say(record=answer_question(json.loads(line), make_problem, lambda name: say(trying=name)))
        except torch.OutOfMemoryError:
            say(refusal="the device has no memory for it")
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # for the process that asks


def answer_question(
    question: dict[str, Any], make_problem: Callable[..., Problem], announce: Callable[[str | None], None]
) -> dict[str, Any]:
    """Return the record of a question; announce each candidate before it runs first, and None before all are timed."""
    key, device = question["key"], torch.device(question["device"])
    torch.backends.cudnn.benchmark = question["benchmark"]  # the library as it runs where the kernel would
    verified: set[str] = set()
    timing = False

    def run(candidate: Candidate, results: Any) -> None:
        if timing:
            candidate.run(results)
            return
        if candidate.name not in verified:
            verified.add(candidate.name)
            announce(candidate.name)
        try:
            candidate.run(results)
            synchronize(device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            end_if_unusable(device, error)
            raise

    def make_announced() -> Problem:
        problem = make_problem(dict(key), device, question["names"])
        return replace(problem, candidates=[Candidate(c.name, partial(run, c)) for c in problem.candidates])

    def timer(calls: Sequence[Call], device: torch.device) -> list[float]:
        nonlocal timing
        timing = True
        announce(None)
        return time_calls(calls, device)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is dropped is in the record
        return try_candidates(make_announced, key, device, timer)


def end_if_unusable(device: torch.device, error: Exception) -> None:
    """End the process if an error has left the device's context unusable, as an illegal access does."""
    try:
        synchronize(device)
    except Exception:  # whatever the driver says: nothing can be tried here any more
        raise SystemExit(f"{type(error).__name__}: {error}") from error
