"""``--log wandb``: a run of Weights & Biases, which reads its own settings from the environment (WANDB_PROJECT, …)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from fastprune.engine.loggers import Record, numbers_of


class WandbRun:
    """Metrics as ``stage/name``, over ``stage/step``."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.run = wandb.init(dir=str(folder), name=folder.name, config=dict(config))

    def log(self, record: Record) -> None:
        """Send a record."""
        stage = str(record.get("stage", "run"))
        self.run.log({f"{stage}/{name}": value for name, value in numbers_of(record).items()} | {
            f"{stage}/{name}": record[name] for name in ("step", "epoch") if name in record
        })  # fmt: skip

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()
