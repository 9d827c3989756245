"""Operations for latencies: their widths, the dtypes and modes in which they run, and networks that are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from fastprune.graph import Operator, rule
from fastprune.graph.export.regions import Autocast
from fastprune.graph.labels.rules import RULES
from fastprune.graph.latency.calls import Call, time_on_host
from fastprune.graph.latency.model import LatencyModel
from fastprune.graph.latency.recording import record
from fastprune.graph.latency.segments import Segment, split_segments
from fastprune.graph.latency.timing import measure

CPU = torch.device("cpu")
Timer = Callable[[Sequence[Call]], list[float]]


def model_of(graph: fp.ChannelGraph, timer: Timer, batch: int = 2, dtype: torch.dtype = torch.float32) -> LatencyModel:
    return measure(graph, CPU, batch, dtype, cache=False, timer=timer, call_ms=0.0)


def no_time(calls: Sequence[Call]) -> list[float]:
    return [0.0] * len(calls)


# --- widths ----------------------------------------------------------------------------------------------------------


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, centred, self.bias, self.stride, self.padding)


class Attention(nn.Module):
    """Efficient channel attention: a kernel runs along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.kernel(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return x * torch.sigmoid(y)[:, :, None, None]


class Mixing(nn.Module):
    """A layer norm over channels, channel attention, and a standardised weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.second, self.attention = Standardised(16, 24, 1), Attention()
        self.head = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))[:, :, None, None]
        return self.head(torch.tanh(self.attention(self.second(x))))


def axes_of(graph: fp.ChannelGraph) -> list[tuple[str, list[tuple[int, tuple[tuple[int, int], ...]]]]]:
    """Return channels and groups of each operator that has axes."""
    recording = record(graph, CPU, 2, torch.float32, channels_last=False)
    return [(o.operator, [(axis.size, axis.counts) for axis in o.axes]) for o in recording.operations if o.axes]


def test_operators_behind_a_mixing_operator_shrink_with_their_channels() -> None:
    images = torch.zeros(2, 6)
    first, second = (16, ((0, 1),)), (24, ((1, 1),))
    assert axes_of(fp.trace(Mixing(), images, exact=False)) == [
        ("linear", [(6, ()), first]),
        ("layer_norm", [first]), ("relu", [first]), ("conv2d", [first, second]),
        ("mean", [second]), ("conv1d", [second]), ("sigmoid", [second]), ("mul", [second]), ("tanh", [second]),
        ("conv2d", [second, (5, ())]),
    ]  # fmt: skip
    exact = fp.trace(Mixing(), images)
    assert exact.num_units == 0
    assert [axes for _, axes in axes_of(exact)] == [[(6, ()), (16, ())], [(1, ()), (1, ())], [(24, ()), (5, ())]]


@torch.library.custom_op("fastprune_latency::product", mutates_args=())
def product(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = (x + before) @ weight
    return y if bias is None else y + bias


@product.register_fake
def _(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("fastprune_latency::of_width", mutates_args=())
def of_width(x: Tensor, weight: Tensor, width: int) -> Tensor:
    assert x.shape[1] == width
    return x @ weight


@of_width.register_fake
def _(x: Tensor, weight: Tensor, width: int) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@pytest.fixture
def own_rules() -> Iterator[None]:
    def product_channels(op: Operator, x: Any, before: Any, weight: Any, bias: Any = None) -> Any:
        made = op.layer(x, weight, dim=1, reads=0, makes=1)
        op.goes_with(before, 0, op.channels(x, 1))
        op.goes_with(bias, 0, made)
        return op.result(made, dim=1)

    def of_width_channels(op: Operator, x: Any, weight: Any, width: int) -> Any:
        return op.result(op.layer(x, weight, dim=1, reads=0, makes=1), dim=1)

    known = dict(RULES)
    rule("fastprune_latency::product")(product_channels)
    rule("fastprune_latency::of_width")(of_width_channels)
    yield
    RULES.clear()
    RULES.update(known)


class OwnLayer(nn.Module):
    """A custom operator between linear layers; its weight is transposed in comparison with theirs."""

    def __init__(self, operator: Callable[[OwnLayer, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.operator = nn.Linear(6, 16), nn.Linear(24, 3), operator
        self.weight = nn.Parameter(torch.randn(16, 24))
        self.before, self.bias = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(24))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.operator(self, torch.relu(self.first(x)))))


@pytest.mark.usefixtures("own_rules")
def test_layers_with_custom_rules_shrink_by_their_rules() -> None:
    network = OwnLayer(lambda m, x: product(x, m.before, m.weight, bias=m.bias)).eval()
    graph = fp.trace(network, torch.zeros(2, 6))
    seen = set()

    def times(calls: Sequence[Call]) -> list[float]:
        time_on_host(calls)  # it runs
        own = [call for call in calls if "product" in call.operation.operator]
        seen.update(tuple(call.shapes) for call in own)
        return [call.shapes[0][1] * call.shapes[2][1] / 1000 if call in own else 0.0 for call in calls]

    model = model_of(graph, times)
    widths = torch.tensor([[16.0, 24], [5, 24], [16, 7], [5, 7]], dtype=torch.float64)
    torch.testing.assert_close(model.of_widths(widths), widths.prod(1))
    assert len(seen) > 9
    assert all(shapes == ((2, i), (i,), (i, j), (j,)) for shapes in seen for i, j in [shapes[2]])


@pytest.mark.usefixtures("own_rules")
def test_layers_that_hold_their_width_are_scaled() -> None:
    graph = fp.trace(OwnLayer(lambda m, x: of_width(x, m.weight, 16)).eval(), torch.zeros(2, 6))
    model = model_of(graph, lambda calls: [0.384 * ("of_width" in call.operation.operator) for call in calls])
    widths = torch.tensor([[16.0, 24], [5, 24], [16, 7], [5, 7]], dtype=torch.float64)
    torch.testing.assert_close(model.of_widths(widths), widths.prod(1))


# --- dtypes and modes ------------------------------------------------------------------------------------------------


class InFloat32(nn.Module):
    """Its code makes a float32 tensor for its head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x)).to(x.dtype).mean((2, 3))
        return self.head(x + torch.ones(8, dtype=torch.float32))


def test_networks_that_convert_dtypes_are_measured_in_other_dtypes() -> None:
    graph = fp.trace(InFloat32(), torch.zeros(2, 3, 8, 8))
    recording = record(graph, CPU, 2, torch.bfloat16, channels_last=False)
    assert {x.dtype for o in recording.operations for x in o.operands} == {torch.bfloat16}
    assert model_of(graph, time_on_host, dtype=torch.bfloat16).dtype == torch.bfloat16


class Regions(nn.Module):
    """A convolution under autocast, one in a region inside that switches it off, and two outside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, last = self.layers
        x = first(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = second(x)
            with torch.autocast("cpu", enabled=False):
                x = third(x.float())
        return last(x)


def test_operators_of_a_region_are_timed_in_its_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fp.trace(Regions(), torch.zeros(2, 3, 8, 8))
    seen: list[bool] = []
    results: dict[str, set[torch.dtype]] = {}

    def clock() -> float:
        seen.append(torch.is_autocast_enabled("cpu"))
        return 0.0

    def times(calls: Sequence[Call]) -> list[float]:
        made: list[Tensor] = []
        for call in calls:
            made.append(call.run(made, int, int))
            if call.operation.layer:
                results.setdefault(call.operation.module, set()).add(made[-1].dtype)
        return time_on_host(calls, clock)

    model_of(graph, times)
    expected = [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    assert results == {f"layers.{number}": {dtype} for number, dtype in enumerate(expected)}
    modes = {
        o.module: o.modes for m in model_of(graph, no_time).measured for o in [m.operation] if o.operator == "conv2d"
    }
    enabled = Autocast("cpu", torch.bfloat16, enabled=True)
    assert (modes["layers.0"], modes["layers.1"], modes["layers.3"]) == ((), (enabled,), ())
    assert modes["layers.2"][0] == enabled
    assert not modes["layers.2"][1].enabled
    assert True in seen
    assert False in seen
    assert not torch.is_autocast_enabled("cpu")


def test_measurements_in_a_region_differ_from_those_outside() -> None:
    graph = fp.trace(Regions(), torch.zeros(2, 3, 8, 8))
    part = split_segments(record(graph, CPU, 2, torch.float32, channels_last=False).operations)[1]
    outside = Segment(tuple(replace(operation, modes=()) for operation in part.operations))
    assert part.key != outside.key


# --- errors ----------------------------------------------------------------------------------------------------------


class OfTwo(nn.Module):
    """Works for two samples only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.reshape(2, 3, 8, 8)).mean((2, 3))


def test_a_batch_that_the_code_does_not_allow_is_refused() -> None:
    graph = fp.trace(OfTwo(), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="batch 3: the code of this network depends on the batch size"):
        model_of(graph, no_time, 3)
    with pytest.raises(ValueError, match=r"it was traced with 2; give batch=2$"):
        model_of(graph, no_time, 1)
    assert model_of(graph, no_time).batch == 2


class InFloat64(nn.Module):
    """Its head has another dtype than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)).mean((2, 3)).double())


@pytest.mark.parametrize("batch", [1, 2])
def test_a_dtype_in_which_a_network_cannot_run_is_not_taken_for_a_batch(batch: int) -> None:
    graph = fp.trace(InFloat64(), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=rf"cannot run in torch.bfloat16 on 'cpu' with a batch of {batch}: ") as caught:
        model_of(graph, no_time, batch, torch.bfloat16)
    assert str(caught.value).endswith(str(caught.value.__cause__))
    assert "dtype" in str(caught.value)
    assert "While executing" not in str(caught.value)
