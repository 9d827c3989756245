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
    for content in (b"", b"not weights", b"\x80"):
        other = tmp_path / "weights.bin"
        other.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"neither a safetensors file nor a torch file; save model\.state_dict\(\)"
        ):
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


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".th", ".tar", ".bin", ".safetensors", ""])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_the_content_says_what_a_file_is(tmp_path: Path, suffix: str, form: str) -> None:
    path, state = tmp_path / f"weights{suffix}", tiny().state_dict()
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=form == "zip")
    found = models.read_weights(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def ones(value: float, prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": torch.full_like(tensor, value) for name, tensor in tiny().state_dict().items()}


@pytest.mark.parametrize(
    ("content", "plain", "ema"),
    [
        ({"epoch": 3, "state_dict": ones(1), "state_dict_ema": ones(2), "optimizer": {"state": {}}}, 1, 2),
        ({"model": ones(1, "module."), "model_ema": {**ones(2, "module."), "n_averaged": torch.tensor(9)}}, 1, 2),
        ({"model": {"state_dict": ones(1)}, "ema_state_dict": ones(2)}, 1, 2),
        ({"checkpoint": 1, "net": ones(1, "_orig_mod.module."), "args": {"lr": 0.1}}, 1, None),
        ({"state_dict": ones(1, "model.")}, 1, None),  # a LightningModule's
        ({"state_dict_ema": ones(2)}, 2, 2),
        (ones(1), 1, None),
    ],
)
def test_nests_and_moving_averages(
    tmp_path: Path, content: object, plain: float, ema: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "checkpoint.tar"
    torch.save(content, path)
    with caplog.at_level("INFO", "fastprune"):
        assert models.create(f"{__name__}:tiny", weights=path)[1].bias[0].item() == plain
    if ema is not None and plain != ema:
        assert "took '" in caplog.text
        assert "ema" in caplog.text
    if ema is None:
        with pytest.raises(ValueError, match="no moving average"):
            models.create(f"{__name__}:tiny", weights=path, ema=True)
    else:
        assert models.create(f"{__name__}:tiny", weights=path, ema=True)[1].bias[0].item() == ema


NETWORK = """
from torch import nn
from layers import make_layer

def net(num_classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), make_layer(num_classes))

network = net()
broken = 3
"""


def test_a_factory_in_a_file_beside_its_own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "own_net.py").write_text(NETWORK)
    (tmp_path / "sub" / "layers.py").write_text("from torch import nn\ndef make_layer(n): return nn.Linear(4, n)\n")
    (tmp_path / "wrong.py").write_text("def net(:\n")
    (tmp_path / "own_package_2").mkdir()
    (tmp_path / "own_package_2" / "nets.py").write_text("from torch import nn\ndef net(): return nn.Linear(4, 2)\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    for name in ("own_net", "layers", "own_package_2", "own_package_2.nets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert models.create("sub/own_net.py:net", num_classes=7)[1].out_features == 7
    assert type(models.create(f"{tmp_path}/sub/own_net.py:net")) is nn.Sequential
    assert models.create("own_package_2.nets:net").out_features == 2
    for spec, message in {
        "sub/own_net.py:nets": "no function 'nets'.*did you mean net",
        "sub/own_net.py:network": "a network already",
        "sub/own_net.py:broken": "is a int",
        "gone.py:net": "no such file",
        "wrong.py:net": "SyntaxError",
    }.items():
        with pytest.raises(ValueError, match=message):
            models.create(spec)


def test_names_of_other_packages_are_suggested() -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=r"did you mean torchvision:resnet50"):
        models.create("resnet50")


def test_weights_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    vision = pytest.importorskip("torchvision")
    asked: list[bool] = []

    def from_cache(weights: object, *args: object, **options: object) -> dict[str, torch.Tensor]:
        asked.append(True)
        return vision.models.resnet18(weights=None).state_dict()

    monkeypatch.setattr(vision.models._api.WeightsEnum, "get_state_dict", from_cache)
    assert models.create("torchvision:resnet18", weights="IMAGENET1K_V1").fc.out_features == 1000
    assert models.create("torchvision:resnet18", weights="pretrained").fc.out_features == 1000
    assert asked == [True, True]
    with pytest.raises(ValueError, match="did you mean 'IMAGENET1K_V1'"):
        models.create("torchvision:resnet18", weights="IMAGENET1K_V3")
    with pytest.raises(ValueError, match="for 1000 classes, not 10"):
        models.create("torchvision:resnet18", 10, weights="DEFAULT", new_head=False)
    with pytest.raises(ValueError, match="'resnet20' has no weights of that name"):
        models.create("resnet20", weights="DEFAULT")

    def offline(*args: object, **options: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(vision.models._api.WeightsEnum, "get_state_dict", offline)
    with pytest.raises(ValueError, match=r"not in the cache.*Network is unreachable.*give the file"):
        models.create("torchvision:resnet18", weights="DEFAULT")
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm.models._builder, "load_pretrained", offline)
    with pytest.raises(ValueError, match=r"'timm:resnet18'.*not in the cache"):
        models.create("timm:resnet18", weights="pretrained")
