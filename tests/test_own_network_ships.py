"""Networks of a user's own on their whole way: ``prune``, ``finetune``, ``load`` and ``export``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_networks import PlainCNN, TwoInputs, UNet
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

import fastprune as fp
from fastprune.engine import LoopOptions, RunError

QUIET = LoopOptions(progress=False)
SEARCH: dict[str, Any] = {"epochs": 1, "samples": 32, "batch_size": 16, "loop": QUIET}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loader(*tensors: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), batch_size=16)


def segment(model: Callable[..., Any], batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return model(batch["image"])["out"], batch["mask"]


@dataclass(frozen=True)
class Case:
    """A network with its data; the names and shapes are those of its ONNX file, without the batch."""

    make: Callable[[], nn.Module]
    example: Any
    data: Any
    inputs: Mapping[str, tuple[int, ...]]
    output: tuple[str, tuple[int, ...]]
    objective: Mapping[str, Any] = field(default_factory=dict)

    def batch(self, size: int) -> dict[str, Tensor]:
        return {name: noise(size, *shape, seed=2) for name, shape in self.inputs.items()}

    def run(self, network: Callable[..., Any], size: int) -> Tensor:
        with torch.no_grad():
            (result,) = pytree.tree_leaves(network(*self.batch(size).values()))
        assert isinstance(result, Tensor)
        return result


def classifier() -> Case:
    images = noise(48, 3, 16, 16)
    labels = F.adaptive_avg_pool2d(images.mean(1), 2).flatten(1).argmax(1)
    return Case(PlainCNN, images[:1], loader(images, labels), {"input": (3, 16, 16)}, ("output", (4,)))


def segmentation() -> Case:
    images = noise(48, 3, 16, 16)
    masks = (images.mean(1) > 0).long() + (images.mean(1) > 0.5).long()
    samples = [{"image": x, "mask": y, "name": "a.png"} for x, y in zip(images, masks, strict=True)]
    data: DataLoader[Any] = DataLoader(samples, batch_size=16)  # type: ignore[arg-type]
    output = ("out", (3, 16, 16))  # scores of each pixel
    return Case(UNet, images[:1], data, {"input": (3, 16, 16)}, output, {"forward": segment})


def regression(*, by_name: bool = False) -> Case:
    images, numbers = noise(48, 3, 16, 16), noise(48, 5, seed=1)
    data = loader(images, numbers, images.mean((1, 2, 3))[:, None] + numbers[:, :1])
    example = {"numbers": numbers[:1], "image": images[:1]} if by_name else (images[:1], numbers[:1])
    inputs = {"image": (3, 16, 16), "numbers": (5,)}
    return Case(TwoInputs, example, data, inputs, ("output", (1,)), {"loss": nn.MSELoss()})


CASES: dict[str, Callable[[], Case]] = {
    "classifier": classifier,
    "segmentation": segmentation,
    "regression": regression,
    "regression by name": lambda: regression(by_name=True),
}


@dataclass(frozen=True)
class Pruned:
    case: Case
    run: Path
    full: nn.Module
    result: fp.PruningResult


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("classifier", marks=pytest.mark.slow),
        "segmentation",
        pytest.param("regression", marks=pytest.mark.slow),
        "regression by name",
    ],
)
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    case, run = CASES[request.param](), tmp_path_factory.mktemp("own") / "run"
    torch.manual_seed(0)
    full = case.make().eval()
    result = fp.prune(full, case.example, method="dmc", budget=0.5, data=case.data, out=run, **case.objective, **SEARCH)
    return Pruned(case, run, full, result)


def test_a_run_is_loaded_with_the_code_of_the_network(pruned: Pruned) -> None:
    case = pruned.case
    compact = fp.load(pruned.run, model=case.make())
    assert torch.equal(case.run(compact, 3), case.run(pruned.result.model, 3))
    baseline = fp.load(pruned.run, "baseline", model=case.make())
    assert torch.equal(case.run(baseline, 3), case.run(pruned.full, 3))
    assert case.run(compact, 3).shape == (3, *case.output[1])
    assert sum(p.numel() for p in compact.parameters()) < sum(p.numel() for p in baseline.parameters())


@pytest.mark.parametrize("suffix", ["safetensors", "pt2"])
def test_exported_files(suffix: str, pruned: Pruned, tmp_path: Path) -> None:
    case, network = pruned.case, fp.load(pruned.run, model=pruned.case.make())
    for what, arguments in (
        (pruned.result, {}),
        (pruned.run, {"model": case.make()}),
        (network, {"example": case.example}),
    ):
        path = tmp_path / f"net.{suffix}"
        fp.export(what, path, **arguments)  # type: ignore[arg-type]
        if suffix == "safetensors":
            stored = load_file(path)
            assert all(torch.equal(tensor, stored[name]) for name, tensor in network.state_dict().items())
            continue
        program = torch.export.load(path).module()
        for size in (1, 2, 5):
            given = case.batch(size)
            with torch.no_grad():
                results = program(**given) if isinstance(case.example, dict) else program(*given.values())
            assert torch.allclose(pytree.tree_leaves(results)[0], case.run(network, size), atol=1e-5)


def test_onnx_files_in_onnx_runtime(pruned: Pruned, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    case, path = pruned.case, tmp_path / "net.onnx"
    file = fp.export(pruned.run, path, model=case.make())
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = {name: ["batch", *shape] for name, shape in case.inputs.items()}
    assert {node.name: node.shape for node in session.get_inputs()} == wanted
    name, shape = case.output
    assert [(node.name, node.shape) for node in session.get_outputs()] == [(name, ["batch", *shape])]
    for size in (1, 2, 5):
        (got,) = session.run([name], {key: x.numpy() for key, x in case.batch(size).items()})
        assert got.shape == (size, *shape)
        assert torch.allclose(torch.from_numpy(got), case.run(pruned.result.model, size), atol=1e-4)
    shapes = ",".join(f"{key}:1x{'x'.join(map(str, size))}" for key, size in case.inputs.items())
    assert f"--minShapes={shapes} " in str(file.trtexec)


def test_a_fine_tuning_is_a_run_too(pruned: Pruned, tmp_path: Path) -> None:
    case, run = pruned.case, tmp_path / "tuned"
    result = copy.deepcopy(pruned.result)
    before = case.run(result.model, 3)
    fp.finetune(result, case.data, out=run, epochs=1, loop=QUIET, **case.objective)
    with pytest.raises(RunError, match=rf"its network, a {type(pruned.full).__name__}, .*; give the full network"):
        fp.load(run)
    tuned = fp.load(run, model=case.make())
    assert torch.equal(case.run(tuned, 3), case.run(result.model, 3))
    assert not torch.equal(case.run(tuned, 3), before)
    file = fp.export(run, tmp_path / "net.pt2", model=case.make())
    assert file.narrowed > 0  # the plan is known
    with pytest.raises(RunError, match="keeps no weights of its baseline: it is a fine-tuning"):
        fp.load(run, "baseline", model=case.make())


def test_a_fine_tuning_of_a_network_without_its_plan(pruned: Pruned, tmp_path: Path) -> None:
    case, run = pruned.case, tmp_path / "tuned"
    compact = fp.load(pruned.run, model=case.make())
    fp.finetune(compact, case.data, out=run, epochs=1, loop=QUIET, **case.objective)
    with pytest.raises(RunError, match=r"give the network that was trained, with any weights: .*model=net"):
        fp.load(run)
    again = fp.load(run, model=fp.load(pruned.run, model=case.make()))
    assert torch.equal(case.run(again, 3), case.run(compact, 3))
    assert fp.export(run, tmp_path / "net.pt2", model=again).difference < 1e-5  # the run knows the inputs


def test_a_network_by_name_is_loaded_by_name(tmp_path: Path) -> None:
    data = loader(noise(32, 3, 8, 8), torch.arange(32) % 4)
    full = fp.models.create("resnet20", num_classes=4)
    fp.finetune(full, data, out=tmp_path / "full", epochs=1, loop=QUIET)
    result = fp.prune(full, noise(1, 3, 8, 8), method="l1")
    fp.finetune(result, data, out=tmp_path / "tuned", epochs=1, loop=QUIET)
    images = noise(2, 3, 8, 8, seed=3)
    with torch.no_grad():
        for network, name in ((full, "full"), (result.model, "tuned")):
            assert torch.equal(network(images), fp.load(tmp_path / name)(images))
