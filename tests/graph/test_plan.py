"""Plans: JSON both ways, and files that are whole or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import fastprune as fp


@pytest.fixture
def plan(tiny: nn.Module) -> fp.PruningPlan:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    mask = torch.ones(graph.num_units)
    mask[[1, 2, 9, 22, 45]] = 0
    return graph.plan(mask)


def test_a_saved_plan_is_the_same_plan(plan: fp.PruningPlan, tiny: nn.Module, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    loaded = fp.PruningPlan.load(tmp_path / "plan.json")
    assert torch.equal(loaded.mask, plan.mask)
    assert (loaded.groups, loaded.inputs, loaded.macs, loaded.params) == (
        plan.groups,
        plan.inputs,
        plan.macs,
        plan.params,
    )
    for a, b in zip(loaded.slices, plan.slices, strict=True):
        assert (a.tensor, a.dim, a.role) == (b.tensor, b.dim, b.role)
        assert torch.equal(a.units, b.units)
    a, b = fp.apply(plan, tiny).state_dict(), fp.apply(loaded, tiny).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "name",
    ["shufflenet_v2_x1_0", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vgg11_bn", "regnet_y_400mf"))],
)
def test_units_survive_run_length_coding(name: str, tmp_path: Path) -> None:
    graph = fp.trace(getattr(torchvision.models, name)(), torch.zeros(1, 3, 64, 64))
    graph.plan(torch.ones(graph.num_units)).save(tmp_path / "plan.json")
    loaded = fp.PruningPlan.load(tmp_path / "plan.json")
    assert all(torch.equal(a.units, b.units) for a, b in zip(loaded.slices, graph.slices, strict=True))
    assert (tmp_path / "plan.json").stat().st_size < 250_000


def test_widths_and_kept_indices(plan: fp.PruningPlan) -> None:
    assert plan.widths == {
        "stem.0": (6, 8),
        "conv1": (11, 12),
        "expand": (15, 16),
        "squeeze": (4, 4),
        "project": (9, 10),
    }
    assert plan.keep["stem.0"] == [0, 3, 4, 5, 6, 7]
    assert not plan.removes_nothing


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(7), "a vector of 50 units is needed"),
        (torch.full((50,), 0.5), r"only 0 \(goes\) and 1"),
        (torch.cat([torch.zeros(8), torch.ones(42)]), "group 'stem.0' would lose all its 8 units"),
    ],
)
def test_masks_that_make_no_plan(tiny: nn.Module, mask: torch.Tensor, message: str) -> None:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=message):
        graph.plan(mask)


def spoil(values: dict[str, Any], *path: Any, value: Any) -> dict[str, Any]:
    *heads, last = path
    target: Any = values
    for key in heads:
        target = target[key]
    target[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "fastprune-plan-99", "format"),
        (("groups", 0, "keep"), [], "at least one"),
        (("groups", 0, "keep"), [8], "by index from 0"),
        (("groups", 0, "keep"), [-1], "by index from 0"),
        (("groups", 0, "size"), "8", "positive integer"),
        (("groups", 1, "name"), "stem.0", "same name"),
        (("slices", 0, "units"), [[0, 500, 1]], "outside the 50 units"),
        (("slices", 0, "units"), [[0, 1]], "not enough values"),
        (("inputs", 0, "dtype"), "floaty", "floaty"),
        (("macs",), None, "not a pruning plan"),
        (("slices",), 3, "not a pruning plan"),
    ],
)
def test_a_damaged_plan_is_refused(
    plan: fp.PruningPlan, tmp_path: Path, path: tuple[Any, ...], value: Any, message: str
) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(spoil(plan.to_json(), *path, value=value)))
    with pytest.raises(fp.PlanError, match=message) as caught:
        fp.PruningPlan.load(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\x01", "null"])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(fp.PlanError, match="not a pruning plan"):
        fp.PruningPlan.load(tmp_path / "plan.json")


def test_a_failed_save_leaves_the_old_file(
    plan: fp.PruningPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "plan.json"
    plan.save(file)
    before = file.read_bytes()

    def full_disk(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        plan.save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
