"""New classifiers on networks with trained weights: everything else keeps its values."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastprune import models
from fastprune.models.heads import find_head


class Bodies(nn.Module):
    """A network whose size does not follow the number of classes."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.classes = num_classes
        self.fc = nn.Linear(4, 8)


def same_but_head(model: nn.Module, other: nn.Module, head: set[str]) -> bool:
    """Return whether two networks have the same tensors under all names but ``head``, and others under these."""
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    different = {name for name in one if one[name].shape != two[name].shape or not torch.equal(one[name], two[name])}
    return different == head


@pytest.fixture
def trained(tmp_path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(7)
    model = models.create("resnet20", num_classes=10)
    path = tmp_path / "w.safetensors"
    models.save_weights(model, path)
    return model, path


HEAD = {"fc.weight", "fc.bias"}


def test_weights_for_other_classes(trained: tuple[nn.Module, Path]) -> None:
    model, path = trained
    new = models.create("resnet20", num_classes=7, weights=path)
    assert new.fc.out_features == 7
    assert same_but_head(model, new, HEAD)
    with pytest.raises(ValueError, match=r"of another shape: fc\.weight"):
        models.create("resnet20", num_classes=7, weights=path, new_head=False)


def test_weights_for_as_many_classes(trained: tuple[nn.Module, Path]) -> None:
    model, path = trained
    assert same_but_head(model, models.create("resnet20", num_classes=10, weights=path), set())
    assert same_but_head(model, models.create("resnet20", num_classes=10, weights=path, new_head=True), HEAD)
    with pytest.raises(ValueError, match="give num_classes"):
        models.create("resnet20", weights=path, new_head=True)


def test_the_new_classifier_is_that_of_a_new_network(trained: tuple[nn.Module, Path]) -> None:
    torch.manual_seed(3)
    expected = models.create("resnet20", num_classes=7)
    torch.manual_seed(3)
    assert torch.equal(models.create("resnet20", num_classes=7, weights=trained[1]).fc.weight, expected.fc.weight)


def test_a_prefix_of_all_names(trained: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, _ = trained
    torch.save({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "w.pt")
    assert same_but_head(model, models.create("resnet20", num_classes=7, weights=tmp_path / "w.pt"), HEAD)


def test_another_network_is_still_refused(trained: tuple[nn.Module, Path]) -> None:
    with pytest.raises(ValueError, match="missing: "):
        models.create("resnet32", num_classes=7, weights=trained[1])


def test_a_network_without_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "own_package", sys.modules[__name__])
    models.save_weights(Bodies(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="num_classes 3: no weight of model 'own_package:Bodies' is of that size"):
        models.create("own_package:Bodies", num_classes=3, weights=tmp_path / "w.safetensors", new_head=True)


def test_mobilenet() -> None:
    assert find_head("mobilenetv2-cifar", lambda n: models.create("mobilenetv2-cifar", n), 5) == HEAD


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("mobilenet_v2", {"classifier.1.weight", "classifier.1.bias"}),
        ("squeezenet1_1", {"classifier.1.weight", "classifier.1.bias"}),  # a convolution
        ("googlenet", {f"{place}.{kind}" for place in ("fc", "aux1.fc2", "aux2.fc2") for kind in ("weight", "bias")}),
    ],
)
def test_torchvision(name: str, head: set[str], tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    model = models.create(f"torchvision:{name}", num_classes=5)
    models.save_weights(model, tmp_path / "w.safetensors")
    new = models.create(f"torchvision:{name}", num_classes=3, weights=tmp_path / "w.safetensors")
    assert same_but_head(model, new, head)


@pytest.mark.parametrize("named", [False, True])
def test_published_weights_of_torchvision(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: tuple[nn.Module, Path]
) -> None:
    vision = pytest.importorskip("torchvision")
    full = vision.models.resnet18(num_classes=1000)
    state = full.state_dict()
    kind = vision.models.ResNet18_Weights

    def fetch(self: object, *_: object, **__: object) -> dict[str, Tensor]:
        return dict(state)

    monkeypatch.setattr(kind, "get_state_dict", fetch)
    classes = 1000 if named else 6
    new = models.create("torchvision:resnet18", num_classes=classes, weights="DEFAULT", new_head=named or None)
    assert new.fc.out_features == classes
    assert same_but_head(full, new, HEAD)
    with pytest.raises(ValueError, match="are for 1000 classes, not 6; first train"):
        models.create("torchvision:resnet18", num_classes=6, weights="DEFAULT", new_head=False)


def test_published_weights_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    make = timm.create_model
    torch.manual_seed(0)
    full = make("resnet18", pretrained=False, num_classes=10)

    def pretrained(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        model = make(name, pretrained=False, **options)
        if pretrained:
            model.load_state_dict(full.state_dict())
        return model  # type: ignore[no-any-return]

    monkeypatch.setattr(timm, "create_model", pretrained)
    new = models.create("timm:resnet18", num_classes=10, weights="pretrained", new_head=True)
    assert same_but_head(full, new, HEAD)
