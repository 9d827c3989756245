"""The plain version of a search step agrees with the method, and the other numbers of the benchmark are right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastprune import models
from fastprune.bench import OURS, BenchmarkError, eager_search, search
from fastprune.bench.case import check_agreement
from fastprune.bench.eager_search import Flops, soft_top_k
from fastprune.bench.memory import memory_of
from fastprune.bench.step import Network, Plain, prepare
from fastprune.cli.main import main
from fastprune.engine import Placement
from fastprune.graph import trace
from fastprune.ops import topk_mask

CPU = torch.device("cpu")
SIDE = 32


def basic_blocks() -> nn.Module:
    return models.ResNet(14)


def bottlenecks() -> nn.Module:
    resnet = pytest.importorskip("torchvision.models.resnet")
    model: nn.Module = resnet.ResNet(resnet.Bottleneck, [2, 2, 2, 1], num_classes=5)
    return model


def both(method: str, model: nn.Module, precision: str = "float32") -> tuple[search.Ours, search.Step]:
    """Return our step and the peer's, with the same parameters."""
    dtype = next(model.parameters()).dtype
    ours = search.METHODS[method](
        trace(model, torch.zeros(1, 3, SIDE, SIDE, dtype=dtype)), model, Placement(CPU, precision)
    )
    network = Network(model)
    flops = Flops(network, torch.zeros(1, 3, SIDE, SIDE, dtype=dtype), search.KEEP_RATIO)
    return ours, ours.make_peer(Plain(network, torch.contiguous_format), flops)


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, SIDE, SIDE).to(dtype), torch.tensor([0, 3, 1, 4])


@pytest.mark.parametrize("make", [basic_blocks, pytest.param(bottlenecks, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", list(search.METHODS))
def test_both_compute_the_same(method: str, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    ours, eager = both(method, prepare(make(), CPU).double())  # in float64 rounding flips no relu
    inputs = batch(torch.float64)
    for _ in range(2 if method == "ddnp" else 1):  # in its second step DMC's peer draws its own gates
        results, expectations = ours(*inputs), eager(*inputs)
        assert len(results) == len(expectations) == len(ours.peer.names) + len(ours.gradients())
        for result, expected in zip(results, expectations, strict=True):
            assert expected.norm() > 0
            assert (result - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("method", list(search.METHODS))
def test_both_compute_the_same_under_autocast(method: str) -> None:
    torch.manual_seed(0)
    ours, eager = both(method, prepare(basic_blocks(), CPU), "bf16")
    inputs = batch(torch.float32)
    for result, expected in zip(ours(*inputs), eager(*inputs), strict=True):
        assert result.dtype == torch.float32
        assert (result - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("dmc", "DMC_REGULARISATION", 3.9),
        ("ddnp", "DDNP_REGULARISATION", 1.9),
        ("ddnp", "DDNP_COUPLING", 2.1),
        ("ddnp", "TEMPERATURE", 0.5),
        ("ddnp", "WINDOW", 0.5),
        ("ddnp", "WIDTH_BIAS", 2.9),
    ],
)
def test_a_step_that_disagrees_ends_the_benchmark(
    method: str, name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager_search, name, value)
    torch.manual_seed(0)
    (case,) = search.cases(CPU, quick=True, only=[method])
    with pytest.raises(BenchmarkError, match="disagrees with eager"):
        check_agreement(case)


def test_gates_that_are_not_drawn_end_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        search.DMC, "sample", lambda self, seed: (self.theta >= 0.5) * 1.0 + self.theta - self.theta.detach()
    )
    (case,) = search.cases(CPU, quick=True, only=["dmc"])
    with pytest.raises(BenchmarkError, match="fastprune disagrees with eager"):
        check_agreement(case)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("size", [4, 16, 64])
def test_the_peers_mask_equals_ours(size: int, keep: float) -> None:
    scores = torch.rand(size, requires_grad=True)
    peer = soft_top_k(scores, torch.tensor(keep))
    window = torch.tensor([float(round(eager_search.WINDOW * size))])
    ours = topk_mask(scores, torch.tensor([keep]), torch.tensor([0, size]), window)
    torch.testing.assert_close(peer, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", list(search.METHODS))
def test_a_step_runs_without_the_network(method: str) -> None:
    model = prepare(basic_blocks(), CPU)
    ours, _ = both(method, model)
    handle = next(iter(ours.task.model.children())).register_forward_hook(lambda *_: pytest.fail("the network ran"))
    constants = torch.randn(4, 10)
    before = [parameter.detach().clone() for parameter in parameters_of(ours)]
    results = ours.replace_network(constants)(*batch(torch.float32))
    handle.remove()
    labels = batch(torch.float32)[1]
    torch.testing.assert_close(results[1], nn.functional.cross_entropy(constants, labels))
    assert any((now != then).any() for now, then in zip(parameters_of(ours), before, strict=True))


def parameters_of(ours: search.Ours) -> list[Tensor]:
    parameters: list[Tensor] = ours.method.optimizer.param_groups[0]["params"]
    return parameters


def test_memory_of_a_step_with_known_sizes() -> None:
    state: list[Tensor] = []

    def step(x: Tensor) -> Tensor:
        y = x * 2  # 4 MB
        z = y + 1  # 4 MB
        del y
        w = z[: 1 << 19] * 2  # 2 MB
        if len(state) < 2:
            state.append(torch.ones(1 << 18))  # 1 MB
        return w

    found = memory_of(step, (torch.rand(1 << 20),), CPU)
    assert abs(found.kept - (2 << 20)) < 10_000
    assert abs(found.peak - (8 << 20)) < 10_000


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_command_times_every_method(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "numbers.json"
    assert main(["bench", "search", "--quick", "--device", device, "--json", str(file)]) == 0
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["kernels"]["search"]
    assert [case["shape"]["method"] for case in found["cases"]] == list(search.METHODS)
    for case in found["cases"]:
        peers = ["eager", "eager channels_last"] if device == "cpu" else ["eager channels_last"]
        assert list(case["variants"]) == [*peers, "outside", OURS]
        ours = case["variants"][OURS]
        assert ours["samples_per_second"] == pytest.approx(case["samples"] / ours["median_seconds"])
        sizes = case["more"]["bytes"]
        assert case["more"]["peak memory"] == sizes[OURS]["peak"] / sizes[peers[0]]["peak"]
        assert sizes["weights"] > 0
    out = capsys.readouterr().out
    for text in ("samples/s", "peak memory", "all memory", "geometric mean, dmc", "geometric mean, ddnp"):
        assert text in out


def test_the_clock_can_be_the_processors(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    assert main(["bench", "search", "--quick", "--only", "dmc", "--processor_time", "--json", str(file)]) == 0
    (case,) = json.loads(file.read_text(encoding="utf-8"))["kernels"]["search"]["cases"]
    assert case["clock"] == "processor"


def test_only_the_methods_of_only_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "search", "--quick", "--only", "ddnp"]) == 0
    out = capsys.readouterr().out
    assert "ddnp, ResNet-8" in out
    assert "dmc, ResNet-8" not in out
