"""Networks by name, and weights on disk."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastprune import models


def tiny(num_classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, num_classes))


def not_a_model() -> int:
    return 1


def test_own_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "own_package", sys.modules[__name__])
    assert models.create("own_package:tiny", num_classes=5)[1].out_features == 5
    with pytest.raises(ValueError, match="in_channels"):
        models.create("own_package:tiny", in_channels=1)
    with pytest.raises(ValueError, match=r"must return a torch\.nn\.Module"):
        models.create("own_package:not_a_model")
    with pytest.raises(ValueError, match="did you mean tiny"):
        models.create("own_package:tinny")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet65", "did you mean resnet56"),
        ("nothing_at_all", "resnet20, resnet32"),
        ("no.such.package:net", "cannot import"),
    ],
)
def test_unknown_models(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.create(spec)


def test_torchvision() -> None:
    pytest.importorskip("torchvision")
    model = models.create("torchvision:resnet18", num_classes=4)
    assert model.fc.out_features == 4
    with pytest.raises(ValueError, match="did you mean resnet18"):
        models.create("torchvision:resnet81")
    with pytest.raises(ValueError, match="3 channels, not 1"):
        models.create("torchvision:resnet18", in_channels=1)


def test_timm() -> None:
    pytest.importorskip("timm")
    model = models.create("timm:resnet10t", num_classes=4, in_channels=1).eval()
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 4)
    with pytest.raises(ValueError, match="did you mean"):
        models.create("timm:resnet10tt")


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_missing_extra_says_how_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.models", None)
    with pytest.raises(ValueError, match=r"pip install 'fastprune\[vision\]'"):
        models.create(f"{package}:resnet18")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_weights_round_trip(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    original = models.create("resnet20")
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        models.save_weights(original, path)
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in original.state_dict().items()}}, path)
    loaded = models.create("resnet20", weights=path)
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_mismatched_weights_name_file_and_keys(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    models.save_weights(models.create("resnet20", num_classes=3), path)
    with pytest.raises(ValueError, match=r"weights\.safetensors.*fc\.weight \[3, 64\], needs \[10, 64\]"):
        models.create("resnet20", weights=path)
    with pytest.raises(ValueError, match=r"missing: layer1\.3\.conv1\.weight.*and \d+ more"):
        models.create("resnet32", weights=path)


def test_weights_from_before_batch_norms_counted_batches(tmp_path: Path) -> None:
    path, model, other = tmp_path / "old.safetensors", models.create("resnet20"), models.create("resnet20")
    old = {name: tensor for name, tensor in other.state_dict().items() if "num_batches_tracked" not in name}
    assert len(old) < len(other.state_dict())
    save_file(old, path)
    models.load_weights(model, path)
    assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items() if name in old)
    save_file({name: tensor for name, tensor in old.items() if name != "bn1.running_mean"}, path)
    with pytest.raises(ValueError, match=r"do not fit ResNet: missing: bn1\.running_mean$"):
        models.load_weights(model, path)


def test_damaged_and_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        models.read_weights(tmp_path / "absent.safetensors")
    path = tmp_path / "cut.safetensors"
    models.save_weights(models.create("resnet20"), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.safetensors.*not a whole"):
        models.read_weights(path)
    other = tmp_path / "weights.bin"
    other.write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.safetensors, \.pt or \.pth"):
        models.read_weights(other)
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ValueError, match=r"cut\.pt"):
        models.read_weights(tmp_path / "cut.pt")


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_python_objects_are_never_unpickled(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "bomb.pt"
    if writer == "torch":
        torch.save({"weights": Bomb()}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(ValueError, match=r"bomb\.pt"):
        models.read_weights(path)
