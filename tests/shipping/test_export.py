"""Exported files compute what the network computes, and run where fastprune is not installed."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_networks import Plain, Split
from torch import Tensor, nn

import fastprune as fp
from fastprune.cli.main import main
from fastprune.shipping import exporting, program
from fastprune.shipping.subject import ExportError, Subject

RUN_ALONE = """
import sys
sys.modules["fastprune"] = None  # any import of it fails
import torch
network = torch.export.load(sys.argv[1]).module()
images, expected = (torch.load(path, weights_only=True) for path in sys.argv[2:])
with torch.no_grad():
    for place in range(len(images)):
        assert torch.allclose(network(images[: place + 1]), expected[: place + 1], atol=1e-5)
assert not any(name.startswith("fastprune.") for name in sys.modules)
"""


class Two(nn.Module):
    """A network of two inputs, one by name, with two results."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.other = nn.Conv2d(3, 8, 3), nn.Linear(5, 8)
        self.last, self.side = nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, image: Tensor, other: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.image(image)).mean((2, 3)) + torch.relu(self.other(other))
        return {"y": self.last(x), "side": self.side(x)}


class Keeping(nn.Module):
    """A network that keeps a tensor for the size of its images, as heads of detectors keep their grids."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.size: torch.Size | None = None

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images)
        if self.size != features.shape[2:]:
            self.size = features.shape[2:]
            self.grid = torch.arange(self.size.numel(), dtype=features.dtype).reshape(self.size)
        return features + self.grid


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=[Plain, Split])
def result(request: pytest.FixtureRequest, images: Tensor) -> fp.PruningResult:
    torch.manual_seed(0)
    found = fp.prune(request.param(), images, method="l1")
    assert isinstance(found.model, fp.RewrittenNetwork) == (request.param is Split)
    return found


def test_a_program_runs_without_fastprune(result: fp.PruningResult, images: Tensor, tmp_path: Path) -> None:
    file = fp.export(result, tmp_path / "net.pt2")
    assert (file.format, file.batches, file.bytes) == ("pt2", (1, 3), (tmp_path / "net.pt2").stat().st_size)
    assert file.difference < 1e-6
    torch.save(images, tmp_path / "images.pt")
    with torch.no_grad():
        torch.save(result.model(images), tmp_path / "expected.pt")
    names = [str(tmp_path / name) for name in ("net.pt2", "images.pt", "expected.pt")]
    done = subprocess.run([sys.executable, "-c", RUN_ALONE, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("opset", [None, 18])
def test_onnx(result: fp.PruningResult, opset: int | None, images: Tensor, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    file = fp.export(result, tmp_path / "net.onnx", opset=opset)
    assert file.difference < 1e-5
    model = onnx.load(tmp_path / "net.onnx")
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == file.opset
    assert opset in (None, file.opset)
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 4):
        (scores,) = session.run(None, {"input": images[:batch].numpy()})
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(scores), result.model(images[:batch]), atol=1e-5)
    sizes = " ".join(f"--{flag}Shapes=input:{size}x3x8x8" for flag, size in (("min", 1), ("opt", 8), ("max", 64)))
    assert file.trtexec == f"trtexec --onnx={tmp_path}/net.onnx --saveEngine={tmp_path}/net.engine {sizes}"


@pytest.mark.parametrize("name", ["net.onnx", "net.pt2"])
def test_a_network_that_keeps_tensors(name: str, images: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    network = Keeping().eval()
    assert fp.export(network, tmp_path / name, example=images).difference < 1e-6
    assert network(images).isfinite().all()


def test_a_fixed_batch(images: Tensor, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    file = fp.export(Plain(), tmp_path / "net.onnx", example=images, batch=2)
    assert file.batches == (2,)
    assert file.trtexec is not None
    assert "Shapes" not in file.trtexec
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [2, 3, 8, 8]


def test_two_inputs_and_two_results(images: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    result = fp.prune(Two(), {"image": images, "other": torch.randn(4, 5)}, method="l1")
    file = fp.export(result, tmp_path / "net.onnx")
    assert file.difference < 1e-5
    assert file.trtexec is not None
    assert "--minShapes=image:1x3x8x8,other:1x5" in file.trtexec
    assert fp.export(result, tmp_path / "net.pt2").difference < 1e-5


def test_weights_carry_what_is_known(images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = fp.prune(Plain(), images, method="l1", seed=5, limits=fp.Limits(min_keep=3))
    fp.export(result, tmp_path / "net.safetensors")
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        facts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert all(torch.equal(tensors[name], tensor) for name, tensor in result.model.state_dict().items())
    plan = fp.PruningPlan.from_json(json.loads(facts["plan"]))
    assert torch.equal(plan.mask, result.plan.mask)
    settings = json.loads(facts["settings"])
    assert (settings["method"], settings["seed"], settings["min_keep"]) == ("l1", 5, 3)
    assert json.loads(facts["network"])["class"] == "Plain"


def test_widths_are_told(images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = fp.models.create("resnet20", num_classes=4)
    odd = fp.export(fp.prune(model, images, method="l1"), tmp_path / "odd.safetensors")
    assert odd.unaligned["conv1"] % 8
    assert "prune with --round_to 8" in odd.advice
    aligned = fp.prune(model, images, method="l1", limits=fp.Limits(round_to=8))
    even = fp.export(aligned, tmp_path / "even.safetensors")
    assert (even.unaligned, even.advice) == ({}, "")
    assert even.narrowed > 0


@pytest.mark.parametrize("name", ["net.onnx", "net.pt2"])
def test_a_file_that_differs_is_not_kept(
    name: str, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    out = tmp_path / "folder" / name
    make = program.make_program

    def make_other(subject: Subject, batch: int | None) -> object:
        other = copy.deepcopy(subject.model)
        other.get_parameter("last.weight").data.mul_(1.01)
        return make(dataclasses.replace(subject, model=other), batch)

    for module in ("program", "onnx_file"):
        monkeypatch.setattr(f"fastprune.shipping.{module}.make_program", make_other)
    with pytest.raises(ExportError, match=r"outputs differ from the network's by .*was not kept"):
        fp.export(Plain(), out, example=images, batch=2)
    assert list(tmp_path.iterdir()) == []


class Noisy(nn.Module):
    """A network whose code fixes the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).reshape(2, -1)


class Gated(nn.Module):
    """A network that calls an operator of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * fp.ops.bernoulli_gate(torch.full((4, 1, 1), 0.5), seed=0, step=0)


def test_refusals(images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "net.pt2"
    with pytest.raises(ExportError, match="give example="):
        fp.export(Plain(), out)
    with pytest.raises(ExportError, match=r"cannot be exported: .*fixes the batch size, give one: batch=8"):
        fp.export(Noisy(), out, example=images[:2])
    with pytest.raises(ExportError, match=r"calls fastprune.*, which other runtimes do not have"):
        fp.export(Gated(), out, example=images)
    with pytest.raises(ValueError, match="opset: a file of format 'pt2' has none"):
        fp.export(Plain(), out, example=images, opset=18)
    with pytest.raises(ValueError, match="its suffix names no format"):
        fp.export(Plain(), tmp_path / "net.bin", example=images)
    with pytest.raises(ValueError, match="format: got 'tflite'"):
        fp.export(Plain(), out, example=images, format="tflite")
    with pytest.raises(ValueError, match="batch: got 0"):
        fp.export(Plain(), out, example=images, batch=0)
    with pytest.raises(ValueError, match="is a folder"):
        fp.export(Plain(), tmp_path, example=images, format="pt2")
    with pytest.raises(TypeError, match="got a int"):
        fp.export(3, out)  # type: ignore[arg-type]
    pytest.importorskip("onnxruntime")
    with pytest.raises(ExportError, match="opset: got 11; torch writes 18 and newer ones"):
        fp.export(Plain(), tmp_path / "net.onnx", example=images, opset=11)
    with pytest.raises(ExportError, match="holds bfloat16"):
        fp.export(Plain().bfloat16(), tmp_path / "net.onnx", example=images.bfloat16())
    monkeypatch.setattr("fastprune.shipping.onnx_file.LARGEST", 1000)
    with pytest.raises(ExportError, match=r"one ONNX file holds less than 2 GiB.*use format 'pt2'"):
        fp.export(Plain(), tmp_path / "net.onnx", example=images)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["onnxscript", "onnx", "onnxruntime"])
def test_without_onnx(missing: str, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ExportError, match=r"pip install 'fastprune\[onnx\]'"):
        fp.export(Plain(), tmp_path / "net.onnx", example=images)


def test_the_difference_is_relative() -> None:
    assert exporting.relative_difference(torch.tensor([100.0, 0.0]), torch.tensor([100.0, 1.0])) == pytest.approx(0.01)
    assert exporting.relative_difference(torch.zeros(2), torch.tensor([0.0, 0.5])) == 0.5
    assert exporting.relative_difference(torch.zeros(2), torch.zeros(3)) == float("inf")


def test_the_command(images: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = fp.models.create("resnet20", num_classes=4)
    fp.prune(model, images, method="l1", out=tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--format", "pt2", "--out", str(tmp_path / "net")]) == 0
    printed = capsys.readouterr().out
    assert "net: pt2, 0." in printed
    assert "compared in torch at batch size 1 and 3" in printed
    assert "prune with --round_to 8" in printed
    assert printed.splitlines()[-1] == f"next: fastprune report --run {tmp_path / 'run'}"
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "w.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "safetensors"
    assert main(["export", str(tmp_path / "run"), "--format", "pt2"]) == 0
    assert (tmp_path / "run" / "run.pt2").is_file()
    assert main(["export", str(tmp_path / "run"), "--format", "safetensors"]) == 2
    assert "--out is needed" in capsys.readouterr().err
    assert main(["export", "--out", "x.pt2"]) == 2
    assert "fastprune export RUN --out FILE" in capsys.readouterr().err


def test_the_command_with_a_network_in_memory(
    images: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fp.models.resnet20(num_classes=4)  # not by create: nothing says what builds it
    fp.prune(model, images, method="l1", out=tmp_path / "run")
    line = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "net.pt2")]
    assert main(line) == 2
    assert "name it with --model in a command" in capsys.readouterr().err
    assert main([*line, "--model", "resnet20", "--num_classes", "4"]) == 0
    assert (tmp_path / "net.pt2").is_file()
