"""``--log tensorboard``: event files in the folder ``tensorboard`` of the run, one folder for each stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from fastprune.engine.loggers import Record, numbers_of


class TensorBoardEvents:
    """Scalars by step. A resumed run hides the steps that come again."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder / "tensorboard"
        self.writers: dict[str, SummaryWriter] = {}
        self.step = 0

    def log(self, record: Record) -> None:
        """Write the numbers of a record at its step; those of a result at the last step."""
        self.step = int(record.get("step", self.step))
        stage = str(record.get("stage", "run"))
        if stage not in self.writers:
            self.writers[stage] = SummaryWriter(str(self.folder / stage), purge_step=self.step)
        for name, value in numbers_of(record).items():
            self.writers[stage].add_scalar(name, value, self.step)

    def close(self) -> None:
        """Close the files."""
        for writer in self.writers.values():
            writer.close()
