"""Which of several kernels to run for given shapes: verified, timed once, and remembered.

A candidate is trusted where it has agreed with the fallback, on numbers of its own, and nowhere else: agreement and
timings are filed under the device, the driver, the versions of torch and fastprune and the very bytes of the compiled
module. Whoever is faster is used from then on, in this process and, through files in the user's cache folder, in later
ones.

Candidates add in different orders, hence differ in last bits. Two processes that time the same shapes at the same
moment, such as the ranks of a distributed run on an empty cache, may choose differently. That is as with
``torch.backends.cudnn.benchmark``, and it is harmless where ranks see different data and exchange gradients: parameters
stay equal, since each rank applies the same sum. Where bits must repeat (``torch.backends.cudnn.deterministic`` or
``torch.use_deterministic_algorithms``), nothing is tuned and the fallback runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fastprune.host import atomic
from fastprune.host.cache import cache_folder
from fastprune.ops.library import _C

Key = tuple[tuple[str, Any], ...]
"""What a choice depends on besides the machine: operator, dtype, shapes, pitches, parameters. JSON values."""

Call = Callable[[], object]
Timer = Callable[[Sequence[Call], torch.device], list[float]]

ROUNDS = 10
MARGIN = 0.97
"""A candidate has to be 3 % faster than the fallback: less is noise, and then the library is preferred."""

GUARD_BYTES = 512
GUARD_VALUE = -7.25  # any number that all dtypes hold exactly


@dataclass(frozen=True)
class Candidate:
    """A kernel that may replace the fallback.

    Args:
        name: unique among the candidates for a problem, and stable: it is what the cache remembers.
        run: writes the results into the tensors that it is given.
    """

    name: str
    run: Callable[[Sequence[Tensor]], None]


@dataclass(frozen=True)
class Problem:
    """One computation on inputs made for the purpose, as large as the real ones.

    Args:
        fallback: computes the results as the library does.
        exact: computes them in float64, or nearly so.
        candidates: that support these inputs.
        unit: the error, relative to the results, that a candidate may make even where the fallback makes none: that of
            one rounding.
    """

    fallback: Callable[[], Sequence[Tensor]]
    exact: Callable[[], Sequence[Tensor]]
    candidates: Sequence[Candidate]
    unit: float


@dataclass
class Autotuner:
    """Chooses and remembers.

    Args:
        folder: where choices are kept between processes; None: nowhere.
        timer: measures calls, in milliseconds.
        enabled: if not, every answer is the fallback. The environment variable ``FASTPRUNE_AUTOTUNE=0`` switches off.
    """

    folder: Path | None = None
    timer: Timer = field(default_factory=lambda: time_calls)
    enabled: bool = True

    def __post_init__(self) -> None:
        self._choices: dict[tuple[Key, torch.device], str | None] = {}
        self._lock = threading.RLock()

    def choose(
        self, key: Key, device: torch.device, names: Sequence[str], make_problem: Callable[[], Problem]
    ) -> str | None:
        """The candidate to run.

        Args:
            key: what the choice depends on besides the machine.
            device: where the tensors are.
            names: of the candidates that support the tensors.
            make_problem: called if the choice has to be made now.

        Returns:
            One of ``names``, or None: the fallback. Also None without a choice being made where none can be: switched
            off, deterministic, or while a CUDA graph is captured or torch traces.
        """
        if not names or not self.active():
            return None
        if (key, device) in self._choices:
            return self._choices[key, device]
        with self._lock:
            if (key, device) in self._choices:  # another thread was faster
                return self._choices[key, device]
            where = environment(device)
            label = digest([where, key, names])
            record = self._read(label, where, key, names)
            if record is None:
                if busy(device):
                    return None
                record = self._tune(key, device, make_problem)
                if record is not None:
                    self._write(label, {"environment": where, "key": dict(key), **record})
            self._choices[key, device] = None if record is None else record["winner"]
            return self._choices[key, device]

    def active(self) -> bool:
        """Whether candidates may be used at all."""
        deterministic = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
        return self.enabled and not deterministic

    def forget(self) -> None:
        """Forget what this process knows; files stay."""
        with self._lock:
            self._choices.clear()

    def _tune(self, key: Key, device: torch.device, make_problem: Callable[[], Problem]) -> dict[str, Any] | None:
        try:
            # Under autocast the fallback would compute in another dtype than the candidates.
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                problem = make_problem()
                good, dropped = verified(problem, key, device)
                calls: list[Call] = [problem.fallback, *(call for _, call in good)]
                times = self.timer(calls, device) if good else [0.0]
        except torch.OutOfMemoryError:
            warnings.warn(f"no memory to try kernels for {dict(key)}: the library runs", RuntimeWarning, stacklevel=4)
            return None
        names = [None, *(candidate.name for candidate, _ in good)]
        best = min(range(len(names)), key=times.__getitem__)
        winner = names[best] if times[best] < MARGIN * times[0] else None
        milliseconds = {name or "fallback": taken for name, taken in zip(names, times, strict=True)}
        return {"winner": winner, "milliseconds": milliseconds, "dropped": dropped}

    def _read(self, label: str, where: Mapping[str, str], key: Key, names: Sequence[str]) -> dict[str, Any] | None:
        if self.folder is None:
            return None
        path = self.folder / f"{label}.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            why = unusable(record, where, key, names)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as failure:
            why = str(failure)
        if why is not None:
            warnings.warn(f"ignored the remembered choice {path}: {why}", RuntimeWarning, stacklevel=4)
            return None
        return cast("dict[str, Any]", record)

    def _write(self, label: str, record: Mapping[str, Any]) -> None:
        """One file for each choice: whoever writes last wins, and readers see the old file or the whole new one."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic.write_text(self.folder / f"{label}.json", json.dumps(record, indent=1) + "\n")
        except OSError as error:
            warnings.warn(f"cannot remember choices in {self.folder}: {error}", RuntimeWarning, stacklevel=4)
            self.folder = None


def unusable(record: Any, where: Mapping[str, str], key: Key, names: Sequence[str]) -> str | None:
    """Why a record that was read cannot be used; None if it can."""
    if not isinstance(record, dict) or "winner" not in record:
        return "it is no record of a choice"
    if record.get("environment") != where or record.get("key") != json.loads(json.dumps(dict(key))):
        return "it was made for something else"
    if record["winner"] is not None and record["winner"] not in names:
        return f"its winner {record['winner']!r} is no candidate"
    return None


def verified(problem: Problem, key: Key, device: torch.device) -> tuple[list[tuple[Candidate, Call]], dict[str, str]]:
    """The candidates that agree with the fallback, each with a call that runs it, and why the others do not.

    The error of each result against the exact one may be twice the fallback's, plus one rounding (``Problem.unit``),
    both at its largest and on average: the former shows a few wrong elements, the latter small errors everywhere. A
    candidate that writes outside of its results, or not everywhere, differs as well.
    """
    usual = problem.fallback()
    exact = problem.exact()
    allowed = [(size(a.to(b.dtype) - b) * 2.0) + size(b) * problem.unit for a, b in zip(usual, exact, strict=True)]
    good: list[tuple[Candidate, Call]] = []
    dropped: dict[str, str] = {}
    outputs = [torch.empty_like(result) for result in usual]  # of all timed calls: nobody reads them
    for candidate in problem.candidates:
        why = why_differs(candidate, usual, exact, allowed, device)
        if why is None:
            good.append((candidate, partial(candidate.run, outputs)))
        else:
            dropped[candidate.name] = why
            warnings.warn(f"kernel {candidate.name!r} is not used for {dict(key)}: {why}", RuntimeWarning, stacklevel=5)
    return good, dropped


def why_differs(
    candidate: Candidate,
    usual: Sequence[Tensor],
    exact: Sequence[Tensor],
    allowed: Sequence[Size],
    device: torch.device,
) -> str | None:
    """Run a candidate twice, into memory with guards around it; None if it agrees, both times with the same bits."""
    runs = [[Guarded(result) for result in usual] for _ in range(2)]
    try:
        for guarded in runs:
            candidate.run([guard.inside for guard in guarded])
        synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:
        return f"it failed with {type(failure).__name__}: {failure}"
    for number, (first, second, truth, most) in enumerate(zip(*runs, exact, allowed, strict=True)):
        if not (first.intact() and second.intact()):
            return f"it wrote outside of result {number}"
        got = size(first.inside.to(truth.dtype) - truth)
        if not (got.largest <= most.largest and got.mean <= most.mean):  # NaN compares as false
            return f"result {number} has an error of {got}, where {most} is allowed"
        if not torch.equal(first.inside, second.inside):
            return f"result {number} has other bits on a second run"
    return None


class Guarded:
    """A tensor like another one, dense, full of NaN, between two stretches of memory that must not change."""

    def __init__(self, like: Tensor) -> None:
        guard = GUARD_BYTES // like.element_size()
        self._memory = torch.full((like.numel() + 2 * guard,), GUARD_VALUE, dtype=like.dtype, device=like.device)
        self._memory[guard : guard + like.numel()] = torch.nan
        self._guards = self._memory[:guard], self._memory[guard + like.numel() :]
        strides = torch.empty_like(like).stride()
        self.inside = self._memory.as_strided(like.shape, strides, guard)

    def intact(self) -> bool:
        """Whether the memory around is as it was."""
        return all(bool((guard == GUARD_VALUE).all()) for guard in self._guards)


@dataclass(frozen=True)
class Size:
    """How large the elements of a tensor are."""

    largest: float
    mean: float  # root of the mean square

    def __add__(self, other: Size) -> Size:
        return Size(self.largest + other.largest, self.mean + other.mean)

    def __mul__(self, factor: float) -> Size:
        return Size(self.largest * factor, self.mean * factor)

    def __str__(self) -> str:
        return f"{self.largest:.3g} ({self.mean:.3g} on average)"


def size(tensor: Tensor) -> Size:
    """How large the elements are; NaN if there is a NaN."""
    if tensor.numel() == 0:
        return Size(0.0, 0.0)
    return Size(float(tensor.abs().max()), float(torch.linalg.vector_norm(tensor)) * tensor.numel() ** -0.5)


def time_calls(calls: Sequence[Call], device: torch.device) -> list[float]:
    """Median milliseconds of each call, with cold caches on CUDA.

    The calls take turns, so that a clock that changes in between changes all of them.
    """
    for call in calls:
        call()
    synchronize(device)
    measure = _time_on_cuda if device.type == "cuda" else _time_on_cpu
    samples = measure(calls, device)
    return [statistics.median(sample) for sample in zip(*samples, strict=True)]


def _time_on_cuda(calls: Sequence[Call], device: torch.device) -> list[list[float]]:
    # Writing four times the L2 cache empties it, and keeps the device busy while the host enqueues the next call, so
    # that the time between two events holds no waiting for the host; twice, since a fallback of several calls takes it
    # a tenth of a millisecond.
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(max(4 * cache_bytes, 1 << 28), dtype=torch.int8, device=device)
    samples = []
    with torch.cuda.device(device):
        for _ in range(ROUNDS):
            events = []
            for call in calls:
                flush.zero_()
                flush.zero_()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                end.record()
                events.append((start, end))
            torch.cuda.synchronize(device)
            samples.append([start.elapsed_time(end) for start, end in events])
    return samples


def _time_on_cpu(calls: Sequence[Call], _: torch.device) -> list[list[float]]:
    samples = []
    for _round in range(ROUNDS):
        row = []
        for call in calls:
            start = time.perf_counter()
            call()
            row.append((time.perf_counter() - start) * 1e3)
        samples.append(row)
    return samples


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that its errors come to light here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def busy(device: torch.device) -> bool:
    """Whether nothing may be measured now: a CUDA graph is being captured, or torch is tracing."""
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def environment(device: torch.device) -> dict[str, str]:
    """The machine and the software that a choice is valid for."""
    return _environment(device.type, device.index if device.index is not None else -1)


@cache
def _environment(kind: str, index: int) -> dict[str, str]:
    facts = {
        "torch": torch.__version__,
        "fastprune": _C.build_info()["version"],
        "module": hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()[:16],
    }
    if kind == "cuda":
        device = torch.device(kind, index if index >= 0 else torch.cuda.current_device())
        driver = Path("/proc/driver/nvidia/version")
        return facts | {
            "device": torch.cuda.get_device_name(device),
            "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)),
            "driver": driver.read_text(encoding="utf-8").splitlines()[0] if driver.is_file() else "",
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
        }
    return facts | {"device": f"{kind} {platform.machine()} {platform.processor()}"}


def digest(value: object) -> str:
    """A file name for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


AUTOTUNER = Autotuner(folder=cache_folder("autotune"), enabled=os.environ.get("FASTPRUNE_AUTOTUNE", "1") != "0")
"""The one that the operators use."""
