"""Free memory, and tensors in files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

import pytest
import torch

from fastprune.host import memory
from fastprune.host.memory import free_memory, is_in_file, to_file


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(3, 4).bfloat16().T,
        torch.tensor(3.0),
        torch.ones(3, 1).expand(3, 4),
        torch.randn(6, 4)[::2, 1:],
        torch.tensor([True, False]),
        torch.zeros(0, 3),
    ],
)
def test_a_file_holds_the_values(tensor: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stored = to_file(tensor)
    assert torch.equal(stored, tensor)
    assert stored.dtype == tensor.dtype
    assert stored.stride() == tensor.clone().stride()
    assert is_in_file(stored)
    assert is_in_file(stored.view(stored.shape))
    assert not is_in_file(tensor)
    assert not list(tmp_path.iterdir())  # it goes with the tensor


def test_a_full_disk_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def open_full(handle: int, mode: str) -> IO[bytes]:
        os.close(handle)
        return Path("/dev/full").open("wb", buffering=0)

    monkeypatch.setattr("fastprune.host.memory.os.fdopen", open_full)
    with pytest.raises(OSError, match="No space left"):
        to_file(torch.zeros(1000))
    assert not list(tmp_path.iterdir())


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    free = free_memory(torch.device("cpu"))
    assert free > 2**20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert free_memory(torch.device("cpu")) > 2**20
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_memory(torch.device("cpu")) == 4000
