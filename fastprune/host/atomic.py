"""Files that are either complete or absent: written beside their place, flushed, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write(path: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write a file under a temporary name beside ``path``, flush it to disk and rename it to ``path``.

    If anything fails, an earlier file at ``path`` stays untouched and the temporary one is removed.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        os.close(handle)
        fill(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~read_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""

    def fill(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write(path, fill)


def read_umask() -> int:
    """Return the file mode mask of the process. It cannot be read without being set."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
