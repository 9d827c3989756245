"""Loggers: what gets every record of a run, beside its ``metrics.jsonl``.

A package that declares

    [project.entry-points."fastprune.loggers"]
    mylogger = "mypackage.mylogger:MyLogger"

adds a logger by being installed: ``--log mylogger``, ``fp.prune(..., log=["mylogger"])``. The entry point names a class
or a function that is called with the run's folder (a ``Path``) and the content of its ``config.yaml``, and returns a
``Logger``. Rank 0 alone has loggers. They get every line of ``metrics.jsonl``: also the last one of a command, with the
results that it has measured.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

from fastprune.host.spelling import did_you_mean

GROUP = "fastprune.loggers"

Record = Mapping[str, Any]
"""One line of ``metrics.jsonl``: ``stage``, ``phase``, ``epoch``, ``step`` and metrics by name; or a result."""

Callback = Callable[[Record], None]
"""A function that gets every record, on rank 0, when it is written. What it raises ends the run."""


@runtime_checkable
class Logger(Protocol):
    """Something that keeps the records of a run.

    After ``--resume`` the steps since the last checkpoint come again, with the same numbers.
    """

    def log(self, record: Record) -> None:
        """Keep a record; see ``Record``."""

    def close(self) -> None:
        """Write what is left; called once, at the end or after an error."""


MakeLogger = Callable[[Path, Mapping[str, Any]], Logger]


class LoggerError(ValueError):
    """A logger that does not exist or cannot be used."""


def load_loggers(names: Sequence[str | MakeLogger | Logger]) -> list[MakeLogger | Logger]:
    """Import loggers by name, and leave objects, and what makes them, as they are.

    Raises:
        LoggerError: for an unknown name, a missing package, or an object that is no logger.
    """
    return [
        load_logger(item) if isinstance(item, str) else item if is_maker(item) else require_logger(item)
        for item in names
    ]


def is_maker(item: object) -> TypeGuard[MakeLogger]:
    """Return whether something makes a logger, as an entry point does: a class, or a function."""
    return isinstance(item, type) or (callable(item) and not isinstance(item, Logger))


def load_logger(name: str) -> MakeLogger:
    """Import what makes a logger.

    Raises:
        LoggerError: for an unknown name, or a package that is missing; says what to install.
    """
    points = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    if name not in points:
        hint = did_you_mean(name, points) or f"there are {', '.join(sorted(points))}"
        raise LoggerError(f"log {name!r}: no logger has this name: {hint}")
    try:
        make: MakeLogger = points[name].load()
    except ImportError as error:
        missing = str(error.name or error).partition(".")[0]
        raise LoggerError(
            f"log {name!r}: the package {missing!r} is needed: pip install 'fastprune[{name}]'"
        ) from error
    return make


def require_logger(found: object) -> Logger:
    """Return a logger; refuse anything else."""
    if not isinstance(found, Logger):
        raise LoggerError(f"log {found!r}: a name, or an object with the methods log(record) and close(), is needed")
    return found


def split_names(text: str | None) -> list[str]:
    """Return the names in "wandb,tensorboard"."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


class Records:
    """The loggers and callbacks of a run, as one function of a record."""

    def __init__(self, loggers: Sequence[Logger] = (), callbacks: Sequence[Callback] = ()) -> None:
        self.loggers, self.callbacks = tuple(loggers), tuple(callbacks)

    def __call__(self, record: Record) -> None:
        """Hand a record to all of them."""
        for logger in self.loggers:
            logger.log(record)
        for callback in self.callbacks:
            callback(record)


class OpenLoggers:
    """Loggers by name that stay open when a search or training ends, for the result that is measured after it.

    Args:
        names: the names.

    Raises:
        LoggerError: for an unknown name or a missing package.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.makers: list[MakeLogger] = [partial(self._make, load_logger(name)) for name in names]
        self._loggers: list[Logger] = []

    def _make(self, make: MakeLogger, folder: Path, config: Mapping[str, Any]) -> Logger:
        self._loggers.append(require_logger(make(folder, config)))
        return _StaysOpen(self._loggers[-1])

    def log(self, record: Record) -> None:
        """Hand a record to all of them."""
        Records(self._loggers)(record)

    def __enter__(self) -> OpenLoggers:
        return self

    def __exit__(self, *error: object) -> None:
        """Close them, each one even if another fails."""
        with ExitStack() as stack:
            for logger in self._loggers:
                stack.callback(logger.close)


class _StaysOpen:
    """A logger that somebody else closes."""

    def __init__(self, logger: Logger) -> None:
        self.log = logger.log

    def close(self) -> None:
        """Do nothing."""


@contextmanager
def open_records(
    log: Sequence[MakeLogger | Logger],
    callbacks: Sequence[Callback],
    folder: Path | None,
    config: Mapping[str, Any],
    *,
    wanted: bool = True,
) -> Iterator[Records]:
    """Open the loggers that were given by name, and close them at the end; objects are their owner's to close.

    Args:
        log: what ``load_loggers`` returned.
        callbacks: functions of a record.
        folder: the folder of the run.
        config: the content of ``config.yaml``.
        wanted: whether this process logs: rank 0 does.

    Raises:
        LoggerError: for a logger by name without a folder.
    """
    if not wanted:
        yield Records()
        return
    with ExitStack() as stack:
        loggers = []
        for item in log:
            if not is_maker(item):
                loggers.append(require_logger(item))
                continue
            if folder is None:
                raise LoggerError("log: a logger by name writes beside the run's files: give out=, its directory")
            loggers.append(require_logger(item(folder, config)))
            stack.callback(loggers[-1].close)
        yield Records(loggers, callbacks)


def flatten(record: Record, prefix: str = "") -> dict[str, float | str]:
    """Return the numbers and texts of a record, nested ones under ``outer/inner``; lists and None are left out."""
    flat: dict[str, float | str] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float, str)):
            flat[f"{prefix}{name}"] = value
    return flat


def numbers_of(record: Record) -> dict[str, float]:
    """Return the numbers of a record by name, without its place (phase, epoch, step)."""
    flat = {name: value for name, value in flatten(record).items() if not isinstance(value, str)}
    return {name: float(value) for name, value in flat.items() if name not in ("epoch", "step")}
