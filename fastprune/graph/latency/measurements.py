"""Measured times on disk: one small JSON file for each measurement, so that processes need no lock."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastprune.host import atomic

FORMAT = 1  # a new number for other files, or another way to measure times


@dataclass(frozen=True)
class Measurements:
    """The measurements of one machine with one set of versions.

    Args:
        folder: the folder of the files.
        facts: facts that all of them depend on (device, versions, threads, dtype, layout), as text by name.
    """

    folder: Path
    facts: dict[str, str]

    def path(self, key: Any) -> Path:
        """Return the file of a measurement."""
        text = json.dumps([FORMAT, self.facts, key], sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def get(self, key: Any, shapes: Sequence[tuple[int, int]]) -> list[Any] | None:
        """Return a measurement, tables of ``shapes``; None if there is none or, with a warning, its file is damaged."""
        path = self.path(key)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            tables = [np.asarray(table, dtype=np.float64) for table in document["ms"]]
            sound = [t.shape for t in tables] == list(shapes) and all(bool(np.isfinite(t).all()) for t in tables)
            if document["key"] == key and document["facts"] == self.facts and sound:
                return [table.tolist() for table in tables]
            reason = "it holds another one"
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(f"{str(path)!r} is no measurement ({reason}); it is made again", stacklevel=2)
        return None

    def put(self, key: Any, ms: list[Any]) -> None:
        """Write a measurement to its file; warn if it cannot be written, so that it is made again the next time."""
        document = {"format": FORMAT, "facts": self.facts, "key": key, "ms": ms}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic.write_text(self.path(key), json.dumps(document) + "\n")
        except OSError as error:
            warnings.warn(f"measured times cannot be kept: {error}", stacklevel=2)
