"""``--log mlflow``: a run of MLflow, which reads its own settings from the environment (MLFLOW_TRACKING_URI, …)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from fastprune.engine.loggers import Record, flatten, numbers_of


class MLflowRun:
    """Metrics as ``stage/name`` by step, and the settings as parameters."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.client = MlflowClient()
        experiment = self.client.get_experiment_by_name("fastprune")
        number = experiment.experiment_id if experiment else self.client.create_experiment("fastprune")
        self.run = self.client.create_run(number, run_name=folder.name).info.run_id
        self.step = 0
        for name, value in flatten(config).items():
            self.client.log_param(self.run, name, value)

    def log(self, record: Record) -> None:
        """Send a record."""
        self.step = int(record.get("step", self.step))
        stage = str(record.get("stage", "run"))
        for name, value in numbers_of(record).items():
            self.client.log_metric(self.run, f"{stage}/{name}", value, step=self.step)

    def close(self) -> None:
        """Finish the run."""
        self.client.set_terminated(self.run)
