"""Ultralytics networks: pruned by their own loss on their own data, they train, save and export as before."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_yolo import HEADS, SIDE, make_data, make_network

import fastprune as fp

pytest.importorskip("ultralytics")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ultralytics warns of much

PAGE = Path(__file__).parents[2] / "docs/detectors.md"


def train(network: Any, data: Path | list[Path], folder: Path) -> None:
    """Train for an epoch; Ultralytics takes a relative ``project`` for one in its own folder where pytest runs."""
    options = {"epochs": 1, "imgsz": SIDE, "batch": 3, "workers": 0, "plots": False, "device": "cpu"}
    given = [str(path) for path in data] if isinstance(data, list) else str(data)
    network.train(data=given, project=str(folder / "runs"), **options)


def adapter() -> Any:
    return importlib.import_module("fastprune.adapters.yolo")


@pytest.mark.parametrize("task", list(HEADS))
def test_a_network_of_each_task_is_pruned_by_its_own_loss_and_trains_on(task: str, tmp_path: Path) -> None:
    yolo, network, data = adapter(), make_network(tmp_path, task), make_data(tmp_path / "data", task)
    options = {"image_size": SIDE, "batch_size": 3, "images": 6, "calibration": 6}
    small = yolo.prune(network, budget=0.5, method="taylor", data=data, **options)
    result = small.pruning
    assert result.plan.code == "own"
    assert result.plan.macs[1] <= 0.5 * result.plan.macs[0]
    assert type(small.model) is type(network.model)
    assert small.names == network.names
    assert isinstance(small, type(network))
    train(small, data, tmp_path)
    assert sum(p.numel() for p in small.model.parameters()) == result.plan.params[1]
    assert sum(p.numel() for p in network.model.parameters()) == result.plan.params[0]
    small.save("small.pt")
    again = yolo.load("small.pt")
    train(again, data, tmp_path)
    assert sum(p.numel() for p in again.model.parameters()) == result.plan.params[1]


def test_a_pruned_network_is_exported_to_onnx(tmp_path: Path) -> None:
    runtime = importlib.import_module("onnxruntime")
    small = adapter().prune(make_network(tmp_path, "detect"), image_size=SIDE)
    path = small.export(format="onnx", imgsz=SIDE, simplify=False)
    session = runtime.InferenceSession(path)
    images = torch.rand(1, 3, SIDE, SIDE)
    (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = small.model.eval()(images)[0]
    assert torch.allclose(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-4)


def test_other_sizes_of_images_and_the_split_form_of_its_blocks_run(tmp_path: Path) -> None:
    small = adapter().prune(make_network(tmp_path, "detect"), image_size=SIDE)
    images = torch.rand(2, 3, 96, 128)
    with torch.no_grad():
        expected = small.model.eval()(images)[0]
        for module in small.model.modules():
            if hasattr(module, "forward_split"):
                module.forward = module.forward_split
        assert torch.equal(small.model(images)[0], expected)


def test_data_of_other_classes_are_refused(tmp_path: Path) -> None:
    yolo, network, data = adapter(), make_network(tmp_path, "detect"), make_data(tmp_path / "data", "detect")
    values = yaml.safe_load(data.read_text()) | {"names": ["a", "b", "c"]}
    data.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="has 3 classes, the network 2"):
        yolo.prune(network, method="taylor", data=data, image_size=SIDE)
    small = yolo.prune(network, image_size=SIDE)
    with pytest.raises(ValueError, match="the data set has 3 classes, the pruned network 2"):
        train(small, data, tmp_path)


def test_several_data_sets_train_the_pruned_network(tmp_path: Path) -> None:
    small = adapter().prune(make_network(tmp_path, "detect"), image_size=SIDE)
    data = [make_data(tmp_path / name, "detect") for name in ("first", "second")]
    train(small, data, tmp_path)
    found = [adapter().load(path) for path in sorted((tmp_path / "runs").rglob("best.pt"))]
    assert len(found) == 2
    for network in found:
        assert sum(p.numel() for p in network.model.parameters()) == small.pruning.plan.params[1]


def test_a_copy_has_its_own_callbacks_and_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    network = make_network(tmp_path, "detect")
    small = adapter().prune(network, image_size=SIDE)
    before = len(network.callbacks["on_train_start"])
    small.add_callback("on_train_start", print)
    small.add_callback("of_my_own", print)
    assert len(network.callbacks["on_train_start"]) == before
    with pytest.raises(NotImplementedError, match="tune the full network"):
        small.tune()
    with pytest.raises(TypeError, match="rewrite: this function decides it"):
        adapter().prune(network, image_size=SIDE, rewrite=True)


def test_what_is_no_network_of_ultralytics_is_refused() -> None:
    with pytest.raises(TypeError, match=r"got ResNet; an ultralytics\.YOLO"):
        adapter().prune(fp.models.create("resnet20"))


def test_a_published_network_keeps_its_class() -> None:
    torch.manual_seed(0)
    network = importlib.import_module("ultralytics").YOLO("yolo11n.yaml")
    small = adapter().prune(network, image_size=128, budget=0.5)
    assert type(small.model) is type(network.model)
    assert small.pruning.plan.macs[1] <= 0.5 * small.pruning.plan.macs[0]
    assert torch.equal(small.model.stride, network.model.stride)


def test_the_guide_runs_on_few_small_images(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", "detect")
    data.write_text(yaml.safe_dump(yaml.safe_load(data.read_text()) | {"names": [f"class {n}" for n in range(80)]}))
    blocks = re.findall(
        r"^```python\n(.*?)^```$", PAGE.read_text().split("## Detectors of torchvision")[0], re.MULTILINE | re.DOTALL
    )
    code = "\n".join(blocks)
    for printed, here in {
        "yolo11n.pt": "yolo11n.yaml",
        "coco8.yaml": str(data),
        "640": str(SIDE),
        "epochs=100": f"epochs=1, workers=0, plots=False, device='cpu', project='{tmp_path}/runs'",
        'format="onnx"': 'format="onnx", simplify=False',
    }.items():
        assert printed in code
        code = code.replace(printed, here)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, PAGE.name, "exec"), names)
    assert names["small"].model.yaml["nc"] == 80


def test_a_rewritten_network_has_the_names_and_the_loss_of_its_model(tmp_path: Path) -> None:
    model = make_network(tmp_path, "detect").model.eval()
    model.args = importlib.import_module("ultralytics.cfg").get_cfg()
    graph = fp.trace(model, torch.rand(2, 3, SIDE, SIDE))
    mask = torch.ones(graph.num_units)
    for group in graph.groups:
        mask[group.units][torch.randperm(group.size)[: group.size // 3]] = 0
    plan = dataclasses.replace(graph.plan(mask), code="rewritten")
    network: Any = fp.apply(plan, model)
    assert isinstance(network, fp.RewrittenNetwork)
    assert (network.names, network.yaml, network.task) == (model.names, model.yaml, "detect")
    assert torch.equal(network.stride, model.stride)
    assert torch.equal(network.model[-1].stride, model.model[-1].stride)
    batch = {
        "img": torch.rand(2, 3, SIDE, SIDE),
        "batch_idx": torch.tensor([0.0, 1.0, 1.0]),
        "cls": torch.tensor([[0.0], [1.0], [1.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.4, 0.4, 0.6, 0.5], [0.7, 0.6, 0.3, 0.3]]),
    }
    expected, _ = fp.masked(model, plan).train().loss(batch)
    loss, _ = network.train().loss(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.sum().backward()
    assert network.model[0].conv.weight.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match=r"^'model\.0' \(Conv\) cannot be called by itself"):
        network.predict(batch["img"])
