"""Checkpoints: bits survive, damage is noticed, and the previous checkpoint is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fastprune.engine import CheckpointError, Checkpoints, load_state, save_state


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    state = {
        "numbers": [1, 0.1, -1e-320, float("inf"), float("nan"), True, None, 2**70, "ü{}"],
        1: {"tensor": "a key that looks like a tag"},
        "tuple": (1, [2, (3,)], {}),
        "views": [base.t(), base[1], base[1], base.to(memory_format=torch.contiguous_format)],
        "types": [base.to(kind) for kind in (torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)],
        "empty": [torch.empty(0, 3), torch.tensor(3.5)],
        "rng": torch.get_rng_state(),
    }
    save_state(tmp_path / "x.safetensors", state)
    assert equal(load_state(tmp_path / "x.safetensors"), state)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_optimiser_state(tmp_path: Path, kind: type[torch.optim.Optimizer]) -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.1, **options)
    for _ in range(2):
        model(torch.rand(2, 3, 8, 8)).sum().backward()
        optimizer.step()
    save_state(tmp_path / "x.safetensors", optimizer.state_dict())
    assert equal(load_state(tmp_path / "x.safetensors"), optimizer.state_dict())


def test_unsupported_values_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a set"):
        save_state(tmp_path / "x", {"a": [1, {2}]})
    with pytest.raises(TypeError, match="key of type tuple"):
        save_state(tmp_path / "x", {(1, 2): 3})
    assert not list(tmp_path.iterdir())


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.load_latest() is None
    for step in (1, 20, 3, 100):
        checkpoints.save(step, {"step": step})
    assert len(list((tmp_path / "c").iterdir())) == 2
    assert checkpoints.load_latest() == {"step": 100}
    checkpoints.clear()
    assert checkpoints.load_latest() is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_damage_falls_back_to_the_previous_checkpoint(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"step": step, "weights": torch.full((1000,), float(step))})
    newest = tmp_path / "step-000000002.safetensors"
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[-10] ^= 1
    newest.write_bytes({"cut": content[:-10], "flipped": content, "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(CheckpointError, match="step-000000002"):
        load_state(newest)
    state = checkpoints.load_latest()
    assert state["step"] == 1
    assert "trying the one before" in caplog.text
    (tmp_path / "step-000000001.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoints.load_latest()
