"""Checks that the settings of several benchmarks share."""

from __future__ import annotations

from pathlib import Path

import torch

PROCESSOR_TIME = "count the processor's time in place of the wall's; for one thread on a machine that others use"
"""Help of a flag that several benchmarks have."""


def check_folder(name: str, file: str | None) -> None:
    """Refuse a file to write whose folder does not exist, before minutes of measuring."""
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise ValueError(f"{name} {file!r}: there is no such folder")


def check_processor_time(device: str) -> None:
    """Refuse to count processor time where it is not the time of one thread."""
    if device != "cpu" or torch.get_num_threads() > 1:
        raise ValueError("processor_time: it can be told for one thread of the CPU only; set OMP_NUM_THREADS=1")
