"""Made-up directories of pruning runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastprune.graph.export.inputs import InputSpec
from fastprune.graph.plan import PruningPlan

WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Return a function that writes a run of two layers, of 4 and 6 channels, with given settings, log and plan."""

    def write(name: str, records: list[dict[str, Any]], kept: tuple[int, int] | None = (2, 3), **settings: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = {"command": "prune", "method": "dmc", "budget": "flops=0.5", "seed": 0, "dmc": {"epochs": 2}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config | settings))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        if kept is not None:
            mask = torch.cat([torch.arange(4) < kept[0], torch.arange(6) < kept[1]])
            inputs = (InputSpec((1, 3, 8, 8), "float32"),)
            PruningPlan(mask, {"conv1": 4, "conv2": 6}, (), inputs, (1000, 400), (100, 50)).save(folder / "plan.json")
        return folder

    return write
