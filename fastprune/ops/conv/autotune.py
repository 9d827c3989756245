"""The choice of a kernel for given shapes: candidates are verified, timed once, and the fastest is remembered.

A candidate is trusted where it has agreed with the fallback, and nowhere else: agreement and timings are filed under
the device, the driver, the versions of torch and fastprune and the bytes of the compiled module. The fastest is used
from then on, in this process and, through files in the user's cache folder, in later ones.

Candidates add in different orders and differ in their last bits. Two processes that time the same shapes at the same
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
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

from fastprune.host import atomic
from fastprune.host.cache import cache_folder
from fastprune.ops.conv import triton_conv
from fastprune.ops.conv.agreement import Problem
from fastprune.ops.conv.timing import Timer, time_calls
from fastprune.ops.conv.trial import Key, Trials, try_candidates
from fastprune.ops.library import _C


@dataclass
class Autotuner:
    """A memory of choices, which times candidates when it does not know the answer.

    Args:
        folder: Where choices are kept between processes; None: nowhere.
        timer: Measures calls, in milliseconds.
        enabled: Whether to choose at all; if not, every answer is the fallback. The environment variable
            ``FASTPRUNE_AUTOTUNE=0`` switches off.
        trials: Tries candidates on CUDA devices in another process; None: they are tried in this one.
    """

    folder: Path | None = None
    timer: Timer = field(default_factory=lambda: time_calls)
    enabled: bool = True
    trials: Trials | None = None

    def __post_init__(self) -> None:
        self._choices: dict[tuple[Key, torch.device], str | None] = {}
        self._launched: set[tuple[Key, torch.device]] = set()
        self._lock = threading.RLock()

    def choose(
        self, key: Key, device: torch.device, names: Sequence[str], make_problem: Callable[[], Problem]
    ) -> str | None:
        """Return the candidate to run.

        Args:
            key: Everything but the machine that the choice depends on.
            device: Where the tensors are.
            names: Names of the candidates that support the tensors.
            make_problem: Makes what is to be computed, if the choice has to be made now.

        Returns:
            One of ``names``, or None: the fallback. None is also the answer where nothing can be chosen: switched off,
            deterministic, or while a CUDA graph is captured or torch traces.
        """
        if not names or not self.is_active():
            return None
        winner = self._look_up(key, device, names, make_problem)
        if winner is not None and (key, device) not in self._launched:
            if is_captured(device):  # the first launch loads the kernel, which no capture allows
                return None
            self._launched.add((key, device))
        return winner

    def _look_up(
        self, key: Key, device: torch.device, names: Sequence[str], make_problem: Callable[[], Problem]
    ) -> str | None:
        if (key, device) in self._choices:
            return self._choices[key, device]
        with self._lock:
            if (key, device) in self._choices:  # another thread was faster
                return self._choices[key, device]
            where = environment(device)
            label = digest([where, key, names])
            record = self._read(label, where, key, names)
            if record is None:
                if is_busy(device):
                    return None
                record = self._tune(key, device, names, make_problem)
                if record is not None:
                    self._write(label, {"environment": where, "key": dict(key), **record})
            self._choices[key, device] = None if record is None else record["winner"]
            return self._choices[key, device]

    def is_active(self) -> bool:
        """Return whether candidates may be used at all."""
        deterministic = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
        return self.enabled and not deterministic

    def _tune(
        self, key: Key, device: torch.device, names: Sequence[str], make_problem: Callable[[], Problem]
    ) -> dict[str, Any] | None:
        if self.trials is not None and device.type == "cuda":
            return self.trials.tune(key, device, names)
        try:
            return try_candidates(make_problem, key, device, self.timer)
        except torch.OutOfMemoryError:
            warnings.warn(f"no memory to try kernels for {dict(key)}: the library runs", RuntimeWarning, stacklevel=4)
            return None

    def _read(self, label: str, where: Mapping[str, str], key: Key, names: Sequence[str]) -> dict[str, Any] | None:
        if self.folder is None:
            return None
        path = self.folder / f"{label}.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            why = find_fault(record, where, key, names)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as failure:
            why = str(failure)
        if why is not None:
            warnings.warn(f"ignored the remembered choice {path}: {why}", RuntimeWarning, stacklevel=4)
            return None
        return cast("dict[str, Any]", record)

    def _write(self, label: str, record: Mapping[str, Any]) -> None:
        """Write one file for each choice: the last writer wins, and readers see the old file or the whole new one."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic.write_text(self.folder / f"{label}.json", json.dumps(record, indent=1) + "\n")
        except OSError as error:
            warnings.warn(f"cannot remember choices in {self.folder}: {error}", RuntimeWarning, stacklevel=4)
            self.folder = None


def find_fault(record: Any, where: Mapping[str, str], key: Key, names: Sequence[str]) -> str | None:
    """Return why a record that was read cannot be used; None if it can."""
    if not isinstance(record, dict) or "winner" not in record:
        return "it is not the record of a choice"
    if record.get("environment") != where or record.get("key") != json.loads(json.dumps(dict(key))):
        return "it was made for something else"
    if record["winner"] is not None and record["winner"] not in names:
        return f"its winner {record['winner']!r} is not a candidate"
    return None


def is_busy(device: torch.device) -> bool:
    """Return whether nothing may be measured now: a CUDA graph is being captured, or torch is tracing."""
    return torch.compiler.is_compiling() or is_captured(device)


def is_captured(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def environment(device: torch.device) -> dict[str, str]:
    """The machine, the software and the settings that a choice is valid for."""
    facts = _environment(device.type, device.index if device.index is not None else -1)
    if device.type == "cuda":
        facts = facts | {"cudnn.benchmark": str(torch.backends.cudnn.benchmark)}
    return facts


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
            "triton": triton_conv.version(),
        }
    return facts | {"device": f"{kind} {platform.machine()} {platform.processor()}"}


def digest(value: object) -> str:
    """Return a file name for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


AUTOTUNER = Autotuner(
    folder=cache_folder("autotune"),
    enabled=os.environ.get("FASTPRUNE_AUTOTUNE", "1") != "0",
    trials=Trials("fastprune.ops.conv.problems:problem_of"),
)
"""The autotuner of all operators."""
