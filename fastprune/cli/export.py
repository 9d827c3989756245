"""``fastprune export``."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from fastprune import models
from fastprune.cli.networks import choose_sizes
from fastprune.cli.settings import ExportSettings, pick, require
from fastprune.engine import RunDirectory
from fastprune.runs import NetworkRecord
from fastprune.shipping import ExportedFile, export


def run_export(values: dict[str, Any], given: set[str]) -> int:
    """Write the network of a run as a file for other runtimes."""
    settings = pick(ExportSettings, values)
    if not settings.run:
        raise ValueError("the directory of a run is needed: fastprune export RUN --out FILE")
    if not settings.out and settings.format in ("onnx", "pt2"):  # a run has a file of weights already
        settings.out = str(Path(settings.run) / f"{Path(settings.run).resolve().name}.{settings.format}")
    require(out=settings.out)
    model = None
    if settings.model:
        record = NetworkRecord.read(RunDirectory.open(settings.run))
        channels = record.inputs[0].shape[1] if record.inputs and len(record.inputs[0].shape) == 4 else 3
        model = models.create(settings.model, settings.num_classes, choose_sizes(settings.model, None, channels)[1])
    file = export(
        settings.run, settings.out, format=settings.format, opset=settings.opset, batch=settings.batch, model=model
    )
    if values["json"]:
        print(json.dumps({**asdict(file), "path": str(file.path), "advice": file.advice}))
    else:
        print_file(file)
        print(f"next: fastprune report --run {shlex.quote(settings.run)}")
    return 0


def print_file(file: ExportedFile) -> None:
    """Say what was written, and what to do with it."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    opset = f", opset {file.opset}" if file.opset is not None else ""
    console.print(f"{file.path}: {file.format}{opset}, {file.bytes / 1e6:,.2f} MB")
    if file.batches:
        sizes = " and ".join(map(str, file.batches))
        runtime = "ONNX Runtime" if file.format == "onnx" else "torch"
        console.print(f"compared in {runtime} at batch size {sizes}: {file.difference:.1e} of the largest output apart")
    if file.advice:
        console.print(file.advice)
    if file.trtexec is not None:
        console.print(f"TensorRT (not tried here): {file.trtexec}")
