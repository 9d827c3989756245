"""A compact network is pickled like any other module."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp


class Split(nn.Module):
    """A network whose compact form is a rewritten graph in both modes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Conv2d(3, 12, 3), nn.Conv2d(4, 6, 1), nn.Conv2d(8, 6, 1)
        self.norm, self.last = nn.BatchNorm2d(12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(torch.relu(self.norm(self.first(x))), [4, 8], 1)
        return self.last(torch.cat([self.left(a), self.right(b)], 1).mean((2, 3)))


@pytest.fixture(scope="module", params=["own", "rewritten"])
def compact(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = Split() if request.param == "rewritten" else fp.models.create("resnet20", num_classes=4)
    result = fp.prune(model, torch.zeros(2, 3, 8, 8), method="l1")
    assert result.plan.code == request.param
    return result.model


def save_and_load(model: nn.Module, folder: Path, how: str) -> nn.Module:
    if how == "pickle":
        found = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        found = torch.load(buffer, weights_only=False)
    assert isinstance(found, nn.Module)
    return found


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_it_computes_the_same(compact: nn.Module, how: str, tmp_path: Path) -> None:
    again, x = save_and_load(compact, tmp_path, how), torch.randn(5, 3, 8, 8)
    assert type(again) is type(compact)
    assert torch.equal(again(x), compact(x))


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_it_trains_the_same(compact: nn.Module, how: str, tmp_path: Path) -> None:
    again, x = save_and_load(compact, tmp_path, how), torch.randn(6, 3, 8, 8)
    before = [tensor.clone() for tensor in compact.state_dict().values()]
    gradients = []
    for network in (again, compact):
        network.train()
        network.zero_grad()
        network(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
        network.eval()
    assert all(map(torch.equal, *gradients))
    for tensor, value in zip(compact.state_dict().values(), before, strict=True):
        tensor.copy_(value)


def test_a_pickle_of_a_plain_compact_network_names_no_class_of_ours() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    compact = fp.prune(model, torch.zeros(2, 3, 8, 8), method="l1").model
    assert b"fastprune" not in pickle.dumps(compact)
