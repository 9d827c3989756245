"""Checkpoints: any nest of plain values and tensors in one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastprune.host import atomic
from fastprune.host.distributed import Distributed
from fastprune.host.errors import UserError

log = logging.getLogger(__name__)

KEEP = 2


class CheckpointError(UserError):
    """A checkpoint that cannot be read."""


def save_state(path: Path, state: object) -> None:
    """Write ``state`` to ``path``, atomically.

    Args:
        path: the file; its folder must exist.
        state: dicts (with str, int, float, bool or None keys), lists, tuples, tensors, numbers, strings, None.

    Raises:
        TypeError: for anything else; names its place in the nest.
    """
    tensors: dict[str, Tensor] = {}
    structure = _encode(state, tensors, "state")
    checksums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    metadata = {"structure": json.dumps(structure), "checksums": json.dumps(checksums)}
    atomic.write(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_state(path: Path) -> Any:
    """Read what ``save_state`` wrote; its tensors are on the CPU.

    Raises:
        CheckpointError: if the file is missing, cut off or changed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        structure, checksums = json.loads(metadata["structure"]), json.loads(metadata["checksums"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"checkpoint {str(path)!r} cannot be read: {error}") from error
    for name, checksum in checksums.items():
        if name not in tensors or _checksum(tensors[name]) != checksum:
            raise CheckpointError(f"checkpoint {str(path)!r} is damaged: tensor {name} differs from what was written")
    return _decode(structure, tensors)


class Checkpoints:
    """The last two checkpoints in a folder. Rank 0 writes; every rank reads the same one.

    Args:
        folder: the folder, made at the first write; all ranks must see it.
        distributed: this process among its peers.
    """

    def __init__(self, folder: Path, distributed: Distributed | None = None) -> None:
        self.folder = folder
        self.distributed = distributed or Distributed()

    def save(self, step: int, state: object) -> None:
        """Write the checkpoint of ``step`` and remove all but the last two; do nothing on ranks other than 0."""
        if not self.distributed.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        save_state(self._path(step), state)
        for old in self._steps()[:-KEEP]:
            self._path(old).unlink(missing_ok=True)

    def load_latest(self) -> Any | None:
        """Return the state of the newest checkpoint that can be read; None if there is no checkpoint.

        Raises:
            CheckpointError: if there are checkpoints, but none can be read.
        """
        state, step, failure = None, -1, None
        if self.distributed.is_main:
            for candidate in reversed(self._steps()):
                try:
                    state, step = load_state(self._path(candidate)), candidate
                    break
                except CheckpointError as error:
                    failure = error
                    log.warning("%s; trying the one before", error)
        # Rank 0 alone decides: a rank whose read fails differently must not continue from another step.
        outcome = torch.tensor([-2 if failure is not None and step < 0 else step])
        step = int(self.distributed.broadcast_(outcome))
        if step == -2:
            raise CheckpointError(f"no checkpoint in {str(self.folder)!r} can be read") from failure
        if step >= 0 and not self.distributed.is_main:
            state = load_state(self._path(step))
        return state

    def clear(self) -> None:
        """Remove all checkpoints, for a run that starts anew; do nothing on ranks other than 0."""
        if self.distributed.is_main:
            for step in self._steps():
                self._path(step).unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}.safetensors"

    def _steps(self) -> list[int]:
        found = [re.fullmatch(r"step-(\d+)\.safetensors", path.name) for path in self.folder.glob("step-*")]
        return sorted(int(match[1]) for match in found if match)


def _encode(value: object, tensors: dict[str, Tensor], where: str) -> Any:
    """Return JSON for ``value``: lists stay lists, everything else that nests becomes an object with one tag."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        for key in value:
            if key is not None and not isinstance(key, (bool, int, float, str)):
                raise TypeError(f"{where} has a key of type {type(key).__name__}, which a checkpoint cannot hold")
        return {"dict": [[key, _encode(item, tensors, f"{where}[{key!r}]")] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, tensors, f"{where}[{index}]") for index, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    raise TypeError(
        f"{where} is a {type(value).__name__}; a checkpoint holds dicts, lists, tuples, tensors, numbers, strings, None"
    )


def _decode(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(structure, list):
        return [_decode(item, tensors) for item in structure]
    if not isinstance(structure, dict):
        return structure
    if "tensor" in structure:
        return tensors[structure["tensor"]]
    if "tuple" in structure:
        return tuple(_decode(item, tensors) for item in structure["tuple"])
    return {key: _decode(item, tensors) for key, item in structure["dict"]}


def weights_checksum(model: nn.Module) -> int:
    """Return a checksum of a model's state dict; of a tensor on the meta device the name alone counts."""
    found = 0
    for name, tensor in model.state_dict().items():
        bits = 0 if tensor.is_meta else _checksum(tensor.detach().cpu().contiguous())
        found = zlib.crc32(f"{name} {bits}".encode(), found)
    return found


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else 0
