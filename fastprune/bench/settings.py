"""Checks that the settings of several benchmarks share."""

from __future__ import annotations

from pathlib import Path

import torch

PROCESSOR_TIME = "count processor time, not wall time: for one thread on a machine with other jobs"
"""The help of a flag that two benchmarks have."""


def check_folder(name: str, file: str | None) -> None:
    """Refuse a file whose folder does not exist, before minutes of measuring."""
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise ValueError(f"{name} {file!r}: there is no such folder")


def check_processor_time(device: str) -> None:
    """Refuse to count processor time if it is not the time of one thread."""
    if device != "cpu" or torch.get_num_threads() > 1:
        raise ValueError("processor_time: needs device cpu and one thread; set OMP_NUM_THREADS=1")
