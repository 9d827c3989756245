"""Where measurements are kept between runs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import platformdirs


def cache_folder(kind: str) -> Path:
    """The folder of one kind of measurements: in ``$FASTPRUNE_CACHE``, else in the user's cache folder.

    A process without a home folder keeps them among temporary files.
    """
    named = os.environ.get("FASTPRUNE_CACHE")
    base = Path(named) if named else Path(platformdirs.user_cache_dir("fastprune", appauthor=False))
    return (base if base.is_absolute() or named else Path(tempfile.gettempdir()) / "fastprune") / kind
