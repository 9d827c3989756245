"""The folder for what is kept between runs: measurements, choices of kernels, descriptions of methods."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import platformdirs


def cache_folder(kind: str) -> Path:
    """Return the folder for one kind of content: in ``$FASTPRUNE_CACHE``, or else in the user's cache folder.

    A process without a home folder uses the folder for temporary files.
    """
    named = os.environ.get("FASTPRUNE_CACHE")
    base = Path(named) if named else Path(platformdirs.user_cache_dir("fastprune", appauthor=False))
    return (base if base.is_absolute() or named else Path(tempfile.gettempdir()) / "fastprune") / kind
