"""Latency: measured operators, interpolated. Time is a made function of shapes here: nothing depends on noise."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fastprune as fp
from fastprune.graph import Operator, rule
from fastprune.graph import latency as latency_module
from fastprune.graph.axes import Axis
from fastprune.graph.latency import LatencyModel, measure
from fastprune.graph.measurements import Measurements
from fastprune.graph.operations import record
from fastprune.graph.regions import Autocast
from fastprune.graph.rules import RULES
from fastprune.graph.stopwatch import Call, Segment, Stopwatch, on_host, segments

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latency"


def milliseconds(operator: str, shapes: Sequence[Sequence[int]]) -> float:
    """A made time: a product of widths for layers, a multiple of the width for others."""
    width = shapes[0][1] if shapes and len(shapes[0]) > 1 else 0
    if operator == "conv2d" and shapes[1][1] == 1 and width > 1:
        return 0.2 + 1e-2 * width  # depthwise
    if operator in ("conv2d", "linear"):
        return 0.1 + 1e-3 * width * shapes[1][0]
    return 0.05 if operator == "cat" else 0.01 + 1e-2 * width


def made(calls: Sequence[Call]) -> list[float]:
    return [milliseconds(call.operation.operator, call.shapes) / 1000 for call in calls]


def sum_of_made(model: nn.Module, images: Tensor) -> float:
    """The made time of all operators that a network really runs."""
    recording = record(fp.trace(model, images), CPU, 2, torch.float32, channels_last=False)
    return sum(milliseconds(o.operator, [x.shape for x in o.operands]) for o in recording.operations)


def model_of(graph: fp.ChannelGraph, timer: Callable[[Sequence[Call]], list[float]] = made) -> LatencyModel:
    return measure(graph, CPU, 2, torch.float32, cache=False, timer=timer, call_ms=0.0)


def random_mask(graph: fp.ChannelGraph, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(graph.num_units, generator=generator) < 0.5).double()
    mask[[group.start for group in graph.groups]] = 1
    return mask


class Concatenated(nn.Module):
    """Wide enough for whole blocks; a concatenation, a depthwise and a grouped convolution, in-place operators."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 40, 3, padding=1)
        self.second = nn.Conv2d(40, 24, 3, padding=1)
        self.bn = nn.BatchNorm2d(64)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.narrow = nn.Conv2d(64, 32, 1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.first(x))
        x = torch.cat([x, torch.relu(self.second(x))], 1)
        x = self.depthwise(torch.relu_(self.bn(x)))
        x = torch.nn.functional.hardswish(self.narrow(x), inplace=True)
        x = torch.relu(self.grouped(x)).mul_(2)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def wide() -> nn.Module:
    return Concatenated().eval()


@pytest.mark.parametrize("seed", range(3))
def test_times_that_are_products_of_widths_are_those_of_the_compact_network(
    tiny: nn.Module, wide: nn.Module, seed: int
) -> None:
    images = torch.zeros(2, 3, 16, 16)
    for network in (tiny, wide):
        graph = fp.trace(network, images)
        mask = random_mask(graph, seed)
        compact = fp.apply(graph.plan(mask), network)
        assert float(model_of(graph)(mask)) == pytest.approx(sum_of_made(compact, images), rel=1e-12)


def test_the_full_network_takes_the_sum_of_its_table(wide: nn.Module) -> None:
    graph = fp.trace(wide, torch.zeros(2, 3, 16, 16))
    model = measure(graph, CPU, 2, torch.float32, cache=False, timer=made, call_ms=0.5)
    rows = model.table()
    assert [row.layer for row in rows if row.operator == "conv2d"] == [
        "first", "second", "depthwise", "narrow", "grouped",
    ]  # fmt: skip
    modules = len([name for name, _ in wide.named_modules()])
    assert model.overhead == 0.5 * modules
    full = model(torch.ones(graph.num_units))
    assert full.dtype == torch.float64
    assert full.shape == ()
    assert float(full) == pytest.approx(sum(row.ms for row in rows) + model.overhead, rel=1e-12)
    assert (model.batch, model.dtype, model.channels_last) == (2, torch.float32, False)


def in_blocks(calls: Sequence[Call]) -> list[float]:
    """Twice the time for depthwise convolutions that are no whole blocks, and nothing else."""
    seconds = []
    for call in calls:
        axes = call.operation.axes
        depthwise = call.operation.layer and len(axes) == 1 and axes[0].counts
        width = call.shapes[0][1] if depthwise else 0
        seconds.append(width * (1 if depthwise and width % axes[0].block == 0 else 2) / 1000)
    return seconds


def test_whole_blocks_lie_on_a_line_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastprune.graph.operations.block_of", lambda device: 16)
    network = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 2, 1)).eval()
    graph = fp.trace(network, torch.zeros(2, 3, 8, 8))
    assert len(graph.groups) == 1
    model = model_of(graph, in_blocks)
    widths = torch.tensor([[1.0], [15], [16], [17], [40], [47.5], [48], [63], [64]], dtype=torch.float64)
    expected = torch.tensor([2.0, 30, 16, 34, 80, (95 + 47.5) / 2, 48, 126, 64], dtype=torch.float64)
    torch.testing.assert_close(model.of_widths(widths), expected)
    beyond = model.of_widths(torch.tensor([[0.0], [70.0]], dtype=torch.float64))
    torch.testing.assert_close(beyond, torch.tensor([2.0, 126], dtype=torch.float64))  # that of 1 and of 63


def test_gradients_are_difference_quotients(wide: nn.Module) -> None:
    graph = fp.trace(wide, torch.zeros(2, 3, 16, 16))

    def bent(calls: Sequence[Call]) -> list[float]:  # not linear between knots
        return [seconds**1.5 for seconds in made(calls)]

    model = model_of(graph, bent)
    mask = torch.rand(graph.num_units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(model, mask.requires_grad_())
    assert bool((torch.autograd.grad(model(mask), mask)[0] > 0).all())
    ones = torch.ones(graph.num_units, requires_grad=True)
    assert bool((torch.autograd.grad(model(ones), ones)[0] > 0).all())


def test_rows_of_a_batch_are_single_values(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.zeros(2, 3, 16, 16))
    model = model_of(graph)
    kept = 1 + 9 * torch.rand(2, 3, len(graph.groups), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batched = model.of_widths(kept)
    assert batched.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert float(batched[i, j]) == pytest.approx(float(model.of_widths(kept[i, j])), rel=1e-12)
    mask = random_mask(graph, 4)
    sums = torch.stack([mask[group.units].sum() for group in graph.groups])
    assert float(model(mask.bool())) == pytest.approx(float(model.of_widths(sums)), rel=1e-12)


@pytest.mark.parametrize(
    ("size", "block", "broken", "whole"),
    [
        (1, 8, (1,), ()),
        (6, 8, (1, 3, 4, 6), ()),
        (64, 16, (1, 22, 39, 63), (16, 32, 48, 64)),
        (64, 8, (1, 19, 43, 63), (8, 24, 48, 64)),
        (1000, 16, (1, 327, 663, 1000), (16, 336, 672, 992)),
    ],
)
def test_the_grid_has_its_ends_whole_blocks_and_others(
    size: int, block: int, broken: tuple[int, ...], whole: tuple[int, ...]
) -> None:
    axis = Axis(size, 0, ((0, 1),), block=block)
    assert (axis.broken, axis.whole) == (broken, whole)
    assert {1, size} <= set(axis.knots)
    assert Axis(size, size, ()).knots == (size,)


def test_grouped_convolutions_are_measured_at_whole_groups() -> None:
    knots = Axis(128, 0, ((0, 32),), step=32).knots
    assert knots == (32, 64, 96, 128)


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
    """Of each operator that has some: channels and groups."""
    recording = record(graph, CPU, 2, torch.float32, channels_last=False)
    return [(o.operator, [(axis.size, axis.counts) for axis in o.axes]) for o in recording.operations if o.axes]


def test_operators_behind_what_mixes_channels_shrink_with_them() -> None:
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


# --- what is run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_point_of_the_grid_can_be_run_and_leaves_the_pool_as_it_was(wide: nn.Module, channels_last: bool) -> None:
    graph = fp.trace(wide, torch.zeros(2, 3, 16, 16))
    recording = record(graph, CPU, 3, torch.float32, channels_last=channels_last)
    seen: set[tuple[str, int]] = set()
    strides: set[tuple[int, ...]] = set()

    def spy(calls: Sequence[Call]) -> list[float]:
        results: list[Tensor] = []
        for call in calls:
            args, kwargs = call.arguments(results)
            results.append(call.operation.target(*args, **kwargs))
            assert bool(torch.isfinite(results[-1]).all())
            if call.operation.operator == "conv2d":
                seen.add((call.operation.module, args[0].shape[1]))
                strides.add(args[0].stride())
        return [0.0] * len(calls)

    stopwatch = Stopwatch(CPU, recording.footprint, spy)
    for segment in segments(recording.operations):
        stopwatch.tables(segment)
    assert {width for module, width in seen if module == "depthwise"} >= {1, 63, 64}
    grouped = {width for module, width in seen if module == "grouped"}
    assert {4, 32} < grouped
    assert all(width % 4 == 0 for width in grouped)
    assert any(stride[1] == 1 and stride[3] > 1 for stride in strides) == channels_last
    memory = stopwatch.pool._memory[torch.float32]
    torch.testing.assert_close(memory, torch.linspace(0.5, 1.5, memory.numel()), rtol=0, atol=0)


def test_operators_are_timed_on_the_results_of_those_before_them(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.zeros(2, 3, 16, 16))
    parts = segments(record(graph, CPU, 2, torch.float32, channels_last=False).operations)
    stem = parts[0]
    assert [operation.operator for operation in stem.operations] == ["conv2d", "batch_norm", "relu"]
    calls = Stopwatch(CPU, 1 << 20).calls(stem, stem.points()[-1])
    made_by_conv = torch.zeros(calls[1].shapes[0])
    args, _ = calls[1].arguments([made_by_conv])
    assert args[0] is made_by_conv
    args, _ = calls[1].arguments([torch.zeros(1, 1, 1, 1)])  # of another shape
    assert args[0].shape == made_by_conv.shape


def test_what_cannot_run_on_fewer_channels_is_scaled() -> None:
    network = nn.Sequential(nn.Conv2d(3, 16, 1), nn.GroupNorm(4, 16), nn.Conv2d(16, 2, 1)).eval()
    graph = fp.trace(network, torch.zeros(2, 3, 8, 8))
    assert graph.num_units == 4

    def norms_only(calls: Sequence[Call]) -> list[float]:
        return [call.shapes[0][1] / 1000 if call.operation.operator == "group_norm" else 0.0 for call in calls]

    model = model_of(graph, norms_only)
    torch.testing.assert_close(
        model.of_widths(torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)),
        torch.tensor([4.0, 8, 16], dtype=torch.float64),
    )


class InFloat32(nn.Module):
    """Its code says that its head reads float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x)).to(x.dtype).mean((2, 3))
        return self.head(x + torch.ones(8, dtype=torch.float32))


def test_networks_that_convert_types_are_measured_in_others() -> None:
    graph = fp.trace(InFloat32(), torch.zeros(2, 3, 8, 8))
    recording = record(graph, CPU, 2, torch.bfloat16, channels_last=False)
    assert {x.dtype for o in recording.operations for x in o.operands} == {torch.bfloat16}
    assert measure(graph, CPU, 2, torch.bfloat16, cache=False, timer=made, call_ms=0.0).dtype == torch.bfloat16


class Regions(nn.Module):
    """A convolution under autocast, one in a region in it that switches it off, and one in neither."""

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
            made.append(call.made(made, int, int))
            if call.operation.layer:
                results.setdefault(call.operation.module, set()).add(made[-1].dtype)
        return on_host(calls, clock)

    model_of(graph, times)
    expected = [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    assert results == {f"layers.{number}": {dtype} for number, dtype in enumerate(expected)}
    modes = {o.module: o.modes for m in model_of(graph).measured for o in [m.operation] if o.operator == "conv2d"}
    enabled = Autocast("cpu", torch.bfloat16, enabled=True)
    assert (modes["layers.0"], modes["layers.1"], modes["layers.3"]) == ((), (enabled,), ())
    assert modes["layers.2"][0] == enabled
    assert not modes["layers.2"][1].enabled
    assert True in seen
    assert False in seen
    assert not torch.is_autocast_enabled("cpu")


def test_measurements_in_a_region_are_not_those_outside() -> None:
    graph = fp.trace(Regions(), torch.zeros(2, 3, 8, 8))
    part = segments(record(graph, CPU, 2, torch.float32, channels_last=False).operations)[1]
    outside = Segment(tuple(replace(operation, modes=()) for operation in part.operations))
    assert part.key != outside.key


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
    """A custom operator between linear layers, with its weight the other way round than theirs."""

    def __init__(self, operator: Callable[[OwnLayer, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.operator = nn.Linear(6, 16), nn.Linear(24, 3), operator
        self.weight = nn.Parameter(torch.randn(16, 24))
        self.before, self.bias = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(24))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.operator(self, torch.relu(self.first(x)))))


@pytest.mark.usefixtures("own_rules")
def test_layers_with_rules_of_their_own_shrink_as_these_say() -> None:
    network = OwnLayer(lambda m, x: product(x, m.before, m.weight, bias=m.bias)).eval()
    graph = fp.trace(network, torch.zeros(2, 6))
    seen = set()

    def times(calls: Sequence[Call]) -> list[float]:
        on_host(calls)  # it runs
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


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", pytest.param("densenet121", marks=pytest.mark.slow)])
def test_networks_that_cut_and_concatenate_are_measured(name: str) -> None:
    graph = fp.trace(getattr(torchvision.models, name)(), torch.zeros(2, 3, 32, 32))
    model = measure(graph, CPU, 1, torch.bfloat16, cache=False, timer=made, call_ms=0.0)
    full = model(torch.ones(graph.num_units))
    half = model(torch.arange(graph.num_units) % 2)
    assert 0.1 * full < half < full


# --- the cache ------------------------------------------------------------------------------------------------------


class Counting:
    """A made timer that counts what it times."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, calls: Sequence[Call]) -> list[float]:
        self.calls += len(calls)
        return made(calls)


def counted(graph: fp.ChannelGraph, dtype: torch.dtype = torch.float32, **options: object) -> int:
    timer = Counting()
    measure(graph, CPU, 2, dtype, timer=timer, call_ms=0.0, **options)  # type: ignore[arg-type]
    return timer.calls


def test_what_was_measured_is_not_measured_again(tiny: nn.Module, own_cache: Path) -> None:
    graph = fp.trace(tiny, torch.zeros(2, 3, 16, 16))
    assert counted(graph, cache=False) > 0
    assert not own_cache.exists()
    first = counted(graph)
    assert first > 0
    assert counted(graph) == 0
    assert counted(fp.trace(tiny, torch.zeros(2, 3, 16, 16))) == 0
    assert counted(graph, cache=False) == first
    assert counted(graph, torch.bfloat16) > 0
    assert counted(graph, channels_last=True) > 0
    assert 0 < counted(fp.trace(tiny, torch.zeros(2, 3, 20, 20))) <= first
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert counted(graph) == first
    finally:
        torch.set_num_threads(threads)


def test_a_graph_remembers_its_models(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fp.trace(tiny, torch.zeros(2, 3, 16, 16))
    timed = []

    def fake(*args: object, **options: object) -> object:
        timed.append(args[1:])
        return object()

    monkeypatch.setattr(latency_module, "measure", fake)
    assert graph.latency() is graph.latency(torch.device("cpu"), 1, torch.float32)
    assert graph.latency(batch=2) is not graph.latency()
    assert graph.latency(cache=False) is graph.latency()
    assert len(timed) == 3


def test_a_damaged_file_is_measured_again_with_a_warning(tiny: nn.Module, own_cache: Path) -> None:
    graph = fp.trace(tiny, torch.zeros(2, 3, 16, 16))
    counted(graph)
    files = sorted(own_cache.iterdir())
    files[0].write_text(files[0].read_text(encoding="utf-8")[:-20], encoding="utf-8")
    other = json.loads(files[1].read_text(encoding="utf-8"))
    files[1].write_text(json.dumps(other | {"key": []}), encoding="utf-8")
    third = json.loads(files[2].read_text(encoding="utf-8"))
    files[2].write_text(json.dumps(third | {"ms": third["ms"][:-1]}), encoding="utf-8")
    with pytest.warns(UserWarning, match="is no measurement") as caught:
        again = counted(graph)
    assert sorted(str(w.message).split("'")[1] for w in caught) == [str(path) for path in files[:3]]
    assert again > 0
    assert counted(graph) == 0


def test_files_that_cannot_be_written_only_warn(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    known = Measurements(tmp_path / "file" / "latency", {})
    with pytest.warns(UserWarning, match="cannot be kept"):
        known.put([1], [[1.0]])


def write(folder: Path, process: int) -> None:
    known = Measurements(folder, {"device": "d"})
    for number in range(60):
        known.put([number, process * (number % 2)], [[[float(number)]]])  # the even ones are both processes'


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_may_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # the children write files, and touch nothing of torch
    processes = [context.Process(target=write, args=(tmp_path, number)) for number in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    known = Measurements(tmp_path, {"device": "d"})
    for number in range(60):
        for process_number in (0, 1):
            assert known.get([number, process_number * (number % 2)], [(1, 1)]) == [[[float(number)]]]
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".json"]


# --- errors, and real time ------------------------------------------------------------------------------------------


def test_errors_say_what_is_needed(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.zeros(2, 3, 16, 16))
    model = model_of(graph)
    with pytest.raises(ValueError, match=r"mask: a vector of 50 units is needed, got shape \(49,\)"):
        model(torch.ones(49))
    with pytest.raises(ValueError, match=r"kept: numbers for \d+ groups are needed, got shape \(2, 1\)"):
        model.of_widths(torch.ones(2, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="batch 0: at least 1 sample is needed"):
        graph.latency(batch=0)


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
        measure(graph, CPU, 3, torch.float32, cache=False, timer=made)
    with pytest.raises(ValueError, match=r"it was traced with 2; give batch=2$"):
        measure(graph, CPU, 1, torch.float32, cache=False, timer=made)
    assert measure(graph, CPU, 2, torch.float32, cache=False, timer=made, call_ms=0.0).batch == 2


class InFloat64(nn.Module):
    """Its head has another type than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)).mean((2, 3)).double())


@pytest.mark.parametrize("batch", [1, 2])
def test_a_type_in_which_a_network_cannot_run_is_not_taken_for_a_batch(batch: int) -> None:
    graph = fp.trace(InFloat64(), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=rf"cannot run in torch.bfloat16 on 'cpu' with a batch of {batch}: ") as caught:
        measure(graph, CPU, batch, torch.bfloat16, cache=False, timer=made)
    assert str(caught.value).endswith(str(caught.value.__cause__))
    assert "dtype" in str(caught.value)
    assert "While executing" not in str(caught.value)


def test_a_real_clock_and_the_cache_on_disk(tiny: nn.Module, own_cache: Path) -> None:
    state = torch.random.get_rng_state()
    graph = fp.trace(tiny, torch.zeros(2, 3, 16, 16))
    full = float(graph.latency()(torch.ones(graph.num_units)))
    assert 0 < full < 1000
    assert any(own_cache.iterdir())
    assert torch.equal(torch.random.get_rng_state(), state)
    ticks = iter(range(1000))
    parts = segments(record(graph, CPU, 1, torch.float32, channels_last=False).operations)
    calls = Stopwatch(CPU, 1 << 20).calls(parts[0], parts[0].points()[0])
    assert on_host(calls, clock=lambda: float(next(ticks))) == [1.0, 1.0, 1.0]
