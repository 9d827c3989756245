"""Where and how a network computes: device, precision, memory layout, and the seeds."""

from __future__ import annotations

import logging
import os
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fastprune.data.nests import map_tensors
from fastprune.training.options import PRECISIONS

T = TypeVar("T")

log = logging.getLogger(__name__)


def choose_device(name: str = "auto") -> torch.device:
    """Return the device that a user names.

    Args:
        name: "cpu", "cuda", "cuda:N", or "auto": CUDA if the machine has it. Under ``torchrun``, "auto" and "cuda" give
            each process the device of its LOCAL_RANK.

    Returns:
        The device; a CUDA device also becomes torch's current one.

    Raises:
        ValueError: for another name, or a CUDA device that this machine does not have.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if (kind != "cuda" and name != "auto") or (number and not number.isdecimal()):
        raise ValueError(f"device {name!r}: give auto, cpu, cuda or cuda:N")
    index = int(number or os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise ValueError(f"device {name!r}: number {index} is needed, but this machine has {count} CUDA device(s)")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch, and choose between cuDNN's fastest and its repeatable algorithms.

    Args:
        seed: seed of the run.
        deterministic: whether CUDA repeats the same bits. The CPU always does, for one number of threads.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - users' datasets draw from it
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


def cpu_computes_bf16() -> bool:
    """Return whether this CPU has convolutions and products in bfloat16; without, they take many times as long."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def warn_of_slow_bf16() -> None:
    """Log a warning, once in a process."""
    if os.environ.get("RANK", "0") == "0":
        log.warning(
            "precision bf16: this CPU has no fast bfloat16 (AVX-512 on x86, bf16 on ARM), so it takes many times as "
            "long as float32; give float32"
        )


@dataclass(frozen=True)
class Placement:
    """Device, precision and memory layout of a computation.

    The first one with "bf16" on a CPU that does not have it logs a warning.

    Args:
        device: device of the tensors.
        precision: "float32", or "bf16" for autocast to bfloat16 (weights stay float32).
        channels_last: whether the memory layout is NHWC, which tensor cores and oneDNN prefer.

    Raises:
        ValueError: for another precision.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "float32"
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r}: give {' or '.join(PRECISIONS)}")
        if self.precision == "bf16" and self.device.type == "cpu" and not cpu_computes_bf16():
            warn_of_slow_bf16()

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which forward passes run."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def images(self, images: T) -> T:
        """Return ``images`` [N, C, H, W], or a nest of inputs, on the device, in the layout."""
        return map_tensors(self.input, images)

    def input(self, tensor: Tensor) -> Tensor:
        """Return one input on the device, in the layout if it is a batch of images."""
        if self.channels_last and tensor.dim() == 4:
            return tensor.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return tensor.to(self.device, non_blocking=True)

    def labels(self, labels: T) -> T:
        """Return ``labels`` [N], or a nest of targets, on the device."""
        return map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True), labels)

    def model(self, model: nn.Module) -> nn.Module:
        """Move ``model`` to the device and into the layout, in place, and return it."""
        model.to(self.device)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        return model
