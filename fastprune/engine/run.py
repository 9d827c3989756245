"""A run is a directory: config.yaml, network.json, plan.json, model.safetensors, baseline.safetensors, metrics.jsonl,
report/, checkpoints/.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from fastprune.host.distributed import Distributed
from fastprune.host.errors import UserError


class RunError(UserError):
    """A run directory that cannot be made or used."""


class RunDirectory:
    """The files of one run. ``create`` makes a new directory, ``open`` returns to an old one; rank 0 writes.

    Args:
        path: the directory.
        distributed: this process among its peers.
    """

    def __init__(self, path: Path, distributed: Distributed) -> None:
        self.path = path
        self.distributed = distributed

    @classmethod
    def create(
        cls, path: str | Path, config: Mapping[str, Any], distributed: Distributed | None = None
    ) -> RunDirectory:
        """Make a new run directory that holds ``config.yaml``; it appears complete or not at all.

        Args:
            path: the directory; it must be empty or not exist.
            config: plain values (dicts, lists, numbers, strings, booleans, None).
            distributed: this process among its peers.

        Raises:
            RunError: on every rank, if the directory has content or cannot be made.
        """
        peers = distributed or Distributed()
        path = Path(path).absolute()  # "." has no name of its own to put a temporary one beside
        message = _set_up(path, config) if peers.is_main else None
        failed = int(peers.broadcast_(torch.tensor([int(message is not None)])))
        if failed:
            raise RunError(message or f"rank 0 could not make the run directory {str(path)!r}")
        return cls(path, peers)

    @classmethod
    def open(cls, path: str | Path, distributed: Distributed | None = None) -> RunDirectory:
        """Return to a run directory.

        Raises:
            RunError: if ``path`` is none.
        """
        path = Path(path)
        if not (path / "config.yaml").is_file():
            raise RunError(f"{str(path)!r} is not a run directory: it has no config.yaml")
        return cls(path, distributed or Distributed())

    @property
    def config(self) -> dict[str, Any]:
        """The settings that ``create`` was given.

        Raises:
            RunError: if ``config.yaml`` is not a mapping in YAML.
        """
        try:
            config = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise RunError(f"{str(self.path / 'config.yaml')!r} is not YAML: {error}") from error
        if not isinstance(config, dict):
            raise RunError(f"{str(self.path / 'config.yaml')!r} holds no mapping of settings")
        return config

    @property
    def plan_path(self) -> Path:
        """The file of the plan."""
        return self.path / "plan.json"

    @property
    def model_path(self) -> Path:
        """The file of the weights."""
        return self.path / "model.safetensors"

    @property
    def network_path(self) -> Path:
        """The file of what builds the full network."""
        return self.path / "network.json"

    @property
    def baseline_path(self) -> Path:
        """The file of the full network's weights."""
        return self.path / "baseline.safetensors"

    @property
    def report_path(self) -> Path:
        """The folder of the report."""
        return self.path / "report"

    @property
    def metrics_path(self) -> Path:
        """The log: one JSON object per line."""
        return self.path / "metrics.jsonl"

    def checkpoints_path(self, stage: str) -> Path:
        """Return the folder for the checkpoints of a stage ("search", "training", …)."""
        return self.path / "checkpoints" / stage

    def log(self, record: Mapping[str, Any]) -> None:
        """Append ``record`` to the log; a number that is not finite is written as null."""
        if self.distributed.is_main:
            line = json.dumps(_finite(record), allow_nan=False)
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Return all records of the log, in order, without a last line that was cut off.

        Raises:
            RunError: if another line is no JSON object; says which.
        """
        if not self.metrics_path.exists():
            return []
        content = self.metrics_path.read_bytes()
        lines = content[: content.rfind(b"\n") + 1].splitlines()
        return [_record(line, f"{self.metrics_path}, line {number}") for number, line in enumerate(lines, start=1)]

    def metrics_size(self) -> int:
        """Return the length of the log in bytes, for ``truncate_metrics`` later."""
        return self.metrics_path.stat().st_size if self.metrics_path.exists() else 0

    def truncate_metrics(self, size: int) -> None:
        """Cut the log back to ``size`` bytes, so that a resumed run does not write its lines twice."""
        if self.distributed.is_main and self.metrics_size() > size:
            os.truncate(self.metrics_path, size)


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:  # of JSON, or of UTF-8
        raise RunError(f"{where}: this is no JSON ({error})") from error
    if not isinstance(record, dict):
        raise RunError(f"{where}: a JSON object is needed, got {line[:40].decode()!r}")
    return record


def _set_up(path: Path, config: Mapping[str, Any]) -> str | None:
    """Make the directory under a temporary name and rename it; return an error message, or None."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        return f"{str(path)!r} exists already: continue that run with --resume, or give another --out"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        (temporary / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
        temporary.replace(path)
    except (OSError, yaml.YAMLError) as error:
        return f"cannot make the run directory {str(path)!r}: {error}"
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


@contextmanager
def run_directory(
    out: str | Path | None, config: Mapping[str, Any], peers: Distributed, *, resume: bool
) -> Iterator[RunDirectory | None]:
    """Open the directory of a run, new or resumed; an error before any progress removes a new one again.

    Progress is a line in the log, a plan, or a checkpoint after step 0: such a run can be resumed after the error.
    """
    if out is None:
        yield None
        return
    if resume:
        yield RunDirectory.open(out, peers)
        return
    path = Path(out).absolute()
    was_there, new_parents = path.is_dir(), [folder for folder in path.parents if not folder.exists()]
    run = RunDirectory.create(path, config, peers)
    try:
        yield run
    except Exception:
        if peers.is_main and not has_progress(run):
            shutil.rmtree(run.path)
            if was_there:
                run.path.mkdir()
            for folder in new_parents:
                with suppress(OSError):  # another process may have written there meanwhile
                    folder.rmdir()
        raise


def has_progress(run: RunDirectory) -> bool:
    """Return whether a run holds anything that took work: a line in its log, a plan, or a checkpoint after step 0."""
    return run.metrics_size() > 0 or run.plan_path.is_file() or took_steps(run, "*")


def took_steps(run: RunDirectory, stage: str) -> bool:
    """Return whether a stage (a glob pattern) has a checkpoint after step 0, from which it can be resumed."""
    found = run.path.glob(f"checkpoints/{stage}/step-*.safetensors")
    return any(int(path.stem.removeprefix("step-")) > 0 for path in found)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with lists in place of tuples, as YAML has them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
