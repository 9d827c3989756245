"""Small networks and data sets of Ultralytics."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

SIDE = 64
BODY = """
nc: 2
kpt_shape: [3, 2]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, C3k2, [24, True]]
  - [-1, 1, Conv, [128, 3, 2]]
  - [-1, 1, C2PSA, [128]]
head:
"""
HEADS = {
    "detect": "  - [[2, 4], 1, Detect, [nc]]\n",
    "segment": "  - [[2, 4], 1, Segment, [nc, 8, 16]]\n",
    "pose": "  - [[2, 4], 1, Pose, [nc, kpt_shape]]\n",
    "obb": "  - [[2, 4], 1, OBB, [nc, 1]]\n",
    "classify": "  - [-1, 1, Classify, [nc]]\n",
}


def make_data(folder: Path, task: str) -> Path:
    """Write random images with labels; the third has no object."""
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for number in range(6):
            image = Image.fromarray(random.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))
            if task == "classify":
                place = folder / part / "ab"[number % 2] / f"{number}.jpg"
            else:
                place = folder / "images" / part / f"{number}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            image.save(place)
            if task != "classify":
                lines = [f"{random.integers(2)} {shape(random, task)}" for _ in range(number % 3 if number != 2 else 0)]
                text = folder / "labels" / part / f"{number}.txt"
                text.parent.mkdir(parents=True, exist_ok=True)
                text.write_text("\n".join(lines) + "\n")
    if task == "classify":
        return folder
    values = {"path": str(folder), "train": "images/train", "val": "images/val", "names": ["a", "b"]}
    (folder / "data.yaml").write_text(yaml.safe_dump(values | {"kpt_shape": [3, 2]}))
    return folder / "data.yaml"


def shape(random: np.random.Generator, task: str) -> str:
    """Return what a line of labels says of an object."""
    x, y, w, h = random.uniform(0.3, 0.6, 2).tolist() + random.uniform(0.2, 0.4, 2).tolist()
    numbers = [x, y, w, h]
    if task in ("segment", "obb"):
        numbers = [x, y, x + w, y, x + w, y + h, x, y + h]
    if task == "pose":
        numbers += [x, y, x - w / 4, y, x, y + h / 4]
    return " ".join(f"{number:.4f}" for number in numbers)


def make_network(folder: Path, task: str) -> Any:
    """Return a small untrained ``YOLO`` of a task, of the blocks of YOLO11."""
    path = folder / f"tiny-{task}.yaml"
    path.write_text(BODY + HEADS[task])
    torch.manual_seed(0)
    return importlib.import_module("ultralytics").YOLO(str(path), task=task)
