"""Append a line on a run to a file of results: a step of ``gpu_results.sh``.

    python bench/gpu_row.py RESULTS RECIPE SEED RUN MEASURED DEVICE

MEASURED is what ``fastprune evaluate --json`` printed for the run.
"""

from __future__ import annotations

import json
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

import fastprune as fp
from fastprune.cli.shelf import find_recipe


def describe(recipe: str, seed: str, run: str, measured: str, device: str) -> dict[str, Any]:
    """Return what a line says of a run."""
    config = yaml.safe_load((Path(run) / "config.yaml").read_text(encoding="utf-8"))
    line = {
        "recipe": recipe, "seed": int(seed), "data": config["data"], "epochs_of_finetuning": None,
        "paper": yaml.safe_load(find_recipe(recipe).read_text(encoding="utf-8"))["paper"],
        "measured": json.loads(measured), "date": date.today().isoformat(),
        "fastprune": version("fastprune"), "torch": torch.__version__,
        "machine": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
    }  # fmt: skip
    if config["command"] == "prune":
        line["outcome"] = fp.compare([run]).rows[0]
        tuned = Path(run) / "finetune.yaml"
        if tuned.exists():  # some recipes have no fine-tuning
            line["epochs_of_finetuning"] = yaml.safe_load(tuned.read_text(encoding="utf-8"))["epochs"]
    return line


def main() -> None:
    """Append the line."""
    path, *facts = sys.argv[1:]
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(describe(*facts)) + "\n")


if __name__ == "__main__":
    main()
