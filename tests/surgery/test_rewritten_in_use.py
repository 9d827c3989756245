"""What training and deployment do to networks works with a network whose graph is rewritten."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastprune as fp
from fastprune.shipping.onnx_file import input_names
from fastprune.shipping.subject import read_subject
from fastprune.surgery.held_modules import LayerCallError
from fastprune.surgery.verification import masked


class Shuffled(nn.Module):
    """A channel shuffle, channels taken one by one, a constant of the code, and an even height."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.left, self.right = nn.Conv2d(12, 6, 1), nn.Conv2d(12, 6, 3, padding=1)
        self.last = nn.Linear(12, 5)

    def forward(self, image: Tensor) -> Tensor:
        assert image.shape[2] % 2 == 0
        x = torch.relu(self.norm(self.first(image)))
        n, c, h, w = x.shape
        x = x.view(n, 6, 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        a, b = torch.split(x, [12, 12], 1)
        y = torch.cat([self.left(a), self.right(b)], 1)[:, [11, 3, 0, 1, 2, 4, 5, 7, 6, 8, 10, 9]]
        y = y * torch.tensor([0.5, 2.0]).repeat(6).view(12, 1, 1)
        return self.last(y.mean((2, 3)))


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 4, 1, 0])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Shuffled().eval()


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> fp.PruningPlan:
    graph = fp.trace(model, IMAGES)
    return graph.plan((torch.arange(graph.num_units) % 3 > 0).int())


@pytest.fixture(scope="module")
def made(model: nn.Module, plan: fp.PruningPlan) -> fp.RewrittenNetwork:
    network = fp.apply(plan, model)
    assert isinstance(network, fp.RewrittenNetwork)
    return network


@pytest.fixture
def network(made: fp.RewrittenNetwork) -> fp.RewrittenNetwork:
    return copy.deepcopy(made)


def backward(network: nn.Module, x: Tensor = IMAGES) -> None:
    F.cross_entropy(network(x).float(), TARGET).backward()


def has_gradients(network: nn.Module) -> bool:
    return all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())


def test_a_copy_shares_nothing_and_runs_in_both_modes(made: nn.Module) -> None:
    other = copy.deepcopy(made)
    tensors = {t.data_ptr() for t in (*made.state_dict().values(), *made._program.fixed.values())}
    assert not tensors & {t.data_ptr() for t in (*other.state_dict().values(), *other._program.fixed.values())}
    for training in (True, False):
        expected = copy.deepcopy(made).train(training)(IMAGES)
        assert torch.equal(copy.deepcopy(other).train(training)(IMAGES), expected)
    backward(other.train())
    assert all(parameter.grad is None for parameter in made.parameters())


def test_weights_pass_through_a_file_without_code(network: nn.Module, model: nn.Module, plan: fp.PruningPlan) -> None:
    with torch.no_grad():
        network.last.bias.add_(1)
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    buffer.seek(0)
    again = fp.apply(plan, model)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(again(IMAGES), network(IMAGES))


def test_a_run_is_loaded_without_code(model: nn.Module, tmp_path: Path) -> None:
    result = fp.prune(model, IMAGES, method="l1", out=tmp_path / "run")
    assert isinstance(result.model, fp.RewrittenNetwork)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".pt", ".pth", ".pkl")]
    loaded = fp.load(tmp_path / "run", model=Shuffled())
    assert isinstance(loaded, fp.RewrittenNetwork)
    assert torch.equal(loaded(IMAGES), result.model(IMAGES))
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_exported_program_takes_any_batch_and_size(strict: bool, network: nn.Module) -> None:
    fixed = torch.export.export(network, (IMAGES,), strict=strict).module()
    assert torch.equal(fixed(IMAGES), network(IMAGES))
    sizes = {"image": {0: Dim("batch"), 2: 2 * Dim("half"), 3: Dim("width")}}
    program = torch.export.export(network, (IMAGES,), dynamic_shapes=sizes, strict=strict).module()
    for shape in [(4, 3, 8, 8), (2, 3, 12, 9), (7, 3, 6, 20)]:
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), network(x))


def test_an_export_has_the_conditions_of_the_models_code(network: nn.Module) -> None:
    sizes = {"image": {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")}}
    with pytest.raises(Exception, match=r"height"):
        torch.export.export(network, (IMAGES,), dynamic_shapes=sizes, strict=False)


def test_an_onnx_file_computes_the_same(network: nn.Module, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = fp.export(network, tmp_path / "net.onnx", example=IMAGES)
    assert (file.batches, file.difference < 1e-5) == ((1, 3), True)
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    for x in (IMAGES, IMAGES[:1]):
        (y,) = session.run(None, {"input": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), network(x).detach(), rtol=1e-4, atol=1e-5)


def test_its_arguments_are_those_of_the_model() -> None:
    class Two(Shuffled):
        def forward(self, image: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(image) + shift

    model, example = Two().eval(), (IMAGES, torch.zeros(4, 5))
    graph = fp.trace(model, example)
    network = fp.apply(graph.plan((torch.arange(graph.num_units) % 3 > 0).int()), model)
    assert isinstance(network, fp.RewrittenNetwork)
    assert torch.equal(network(IMAGES, shift=example[1]), network(*example))
    assert input_names(read_subject(network, example)) == ["image", "shift"]


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_compiled_network_computes_the_same(training: bool, network: nn.Module) -> None:
    torch.compiler.reset()
    compiled: Any = torch.compile(network.train(training), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES), copy.deepcopy(network)(IMAGES))
    backward(compiled)
    assert has_gradients(network)
    wide = torch.randn(3, 3, 12, 10)  # other sizes: compiled again, with open ones
    torch.testing.assert_close(compiled(wide), copy.deepcopy(network)(wide))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_data_parallel_training(network: nn.Module) -> None:
    parallel = nn.parallel.DistributedDataParallel(network.train())
    alone = copy.deepcopy(network)
    for one in (parallel, alone):
        backward(one)
    for a, b in zip(network.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert torch.equal(network.norm.running_mean, alone.norm.running_mean)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages_of_weights(use_buffers: bool, network: nn.Module) -> None:
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=use_buffers).eval()
    for _ in range(5):  # rounding makes 0.9999 × 11 + 0.0001 × 11 less than 11, which is 10 as an index
        average.update_parameters(network)
    torch.testing.assert_close(average(IMAGES), network(IMAGES))
    with torch.no_grad():
        network.last.bias.add_(1)
    average.update_parameters(network)
    torch.testing.assert_close(average(IMAGES) + 0.9999, network(IMAGES))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype, network: nn.Module) -> None:
    expected = copy.deepcopy(network)(IMAGES)
    network.to(dtype)
    result = network(IMAGES.to(dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, rtol=0.05, atol=0.02)
    backward(network.train(), IMAGES.to(dtype))
    assert has_gradients(network)


def test_autocast(network: nn.Module) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        result = network(IMAGES)
        backward(network.train())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), copy.deepcopy(network).eval()(IMAGES), rtol=0.05, atol=0.02)
    assert has_gradients(network)


def test_a_step_of_training_changes_weights_and_statistics(network: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(network.train()(IMAGES), TARGET)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert [name for name, tensor in network.state_dict().items() if torch.equal(tensor, before[name])] == []
    assert int(network.norm.num_batches_tracked) == 5


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (7, 3, 8, 8), (3, 3, 14, 9)])
def test_other_batches_and_sizes(
    training: bool, shape: tuple[int, ...], network: nn.Module, model: nn.Module, plan: fp.PruningPlan
) -> None:
    full = masked(model, plan).train(training)
    x = torch.randn(shape)
    torch.testing.assert_close(network.train(training)(x), full(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"size\(\)\[2\] % 2 == 0"):
        network(x[:, :, :-1])


def test_other_inputs_are_refused(network: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"got 2 inputs \(Tensor, Tensor\); this network was traced with 1 tensors"):
        network({"img": IMAGES, "cls": TARGET})


def test_a_second_pruning_keeps_sizes_names_and_selections(network: nn.Module) -> None:
    graph = fp.trace(network, IMAGES)
    mask = torch.ones(graph.num_units)
    mask[graph.groups[-1].start] = 0  # of one branch alone: what the shuffle selects stays as it was
    plan = graph.plan(mask)
    smaller = fp.apply(plan, network)
    assert isinstance(smaller, fp.RewrittenNetwork)
    assert fp.verify(plan, network, smaller, dtype=torch.float64) < 1e-12
    assert set(smaller.state_dict()) == set(network.state_dict())
    full = masked(network, plan)
    for x in (IMAGES, torch.randn(3, 3, 12, 9)):
        for training in (True, False):
            torch.testing.assert_close(smaller.train(training)(image=x), full.train(training)(x), rtol=1e-4, atol=1e-5)
    backward(smaller.train())
    assert has_gradients(smaller)
    program = torch.export.export(smaller, (IMAGES,), dynamic_shapes={"image": {0: Dim("batch")}})
    torch.testing.assert_close(program.module()(IMAGES[:3]), smaller(IMAGES[:3]))


@pytest.mark.slow
def test_a_network_of_torchvision() -> None:
    vision = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model, x = vision.shufflenet_v2_x0_5(num_classes=10).eval(), torch.randn(2, 3, 64, 64)
    graph = fp.trace(model, x)
    mask = torch.ones(graph.num_units)
    for group in graph.groups:
        mask[group.units][torch.randperm(group.size)[: group.size // 2]] = 0
    plan = graph.plan(mask)
    network: Any = fp.apply(plan, model)
    assert isinstance(network, fp.RewrittenNetwork)
    assert network._stage_out_channels == model._stage_out_channels
    assert network.stage2[0].branch2[0].out_channels == network.stage2[0].branch2[0].weight.shape[0]
    with pytest.raises(LayerCallError, match=r"^'conv1' \(Sequential\) cannot be called by itself"):
        network._forward_impl(x)
    full = masked(model, plan)
    for shape in [(1, 3, 64, 64), (3, 3, 96, 80)]:
        y = torch.randn(shape)
        torch.testing.assert_close(network(y), full(y), rtol=1e-4, atol=1e-5)
    program = torch.export.export(network, (x,), dynamic_shapes={"x": {0: Dim("batch")}})
    torch.testing.assert_close(program.module()(y[..., :64, :64]), network(y[..., :64, :64]))
    again = fp.trace(network, x)
    mask = (torch.arange(again.num_units) % 3 > 0).float()
    mask[[group.start for group in again.groups]] = 1
    smaller = fp.apply(again.plan(mask), network)
    F.cross_entropy(smaller.train()(x), torch.tensor([1, 2])).backward()
    assert has_gradients(smaller)
