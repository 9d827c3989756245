"""Latency: measured operators, interpolated. Times are computed from shapes, so that no test depends on noise."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fastprune as fp
from fastprune.graph.latency.axes import Axis
from fastprune.graph.latency.calls import Call, time_on_host
from fastprune.graph.latency.measurements import Measurements
from fastprune.graph.latency.model import LatencyModel
from fastprune.graph.latency.recording import record
from fastprune.graph.latency.segments import split_segments
from fastprune.graph.latency.stopwatch import Stopwatch
from fastprune.graph.latency.timing import measure

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latency"


def milliseconds(operator: str, shapes: Sequence[Sequence[int]]) -> float:
    """Return a time: a product of widths for layers, a multiple of the width for other operators."""
    width = shapes[0][1] if len(shapes[0]) > 1 else 0
    if operator == "conv2d" and shapes[1][1] == 1 and width > 1:
        return 0.2 + 1e-2 * width  # depthwise
    if operator in ("conv2d", "linear"):
        return 0.1 + 1e-3 * width * shapes[1][0]
    return 0.05 if operator == "cat" else 0.01 + 1e-2 * width


def compute_times(calls: Sequence[Call]) -> list[float]:
    return [milliseconds(call.operation.operator, call.shapes) / 1000 for call in calls]


def sum_of_times(model: nn.Module, images: Tensor) -> float:
    """Return the computed time of all operators that a network really runs."""
    recording = record(fp.trace(model, images), CPU, 2, torch.float32, channels_last=False)
    return sum(milliseconds(o.operator, [x.shape for x in o.operands]) for o in recording.operations)


def model_of(graph: fp.ChannelGraph, timer: Callable[[Sequence[Call]], list[float]] = compute_times) -> LatencyModel:
    return measure(graph, CPU, 2, torch.float32, cache=False, timer=timer, call_ms=0.0)


def random_mask(graph: fp.ChannelGraph, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(graph.num_units, generator=generator) < 0.5).double()
    mask[[group.start for group in graph.groups]] = 1
    return mask


class Concatenated(nn.Module):
    """Layers of whole blocks, a concatenation, a depthwise and a grouped convolution, in-place operators."""

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
def test_times_that_are_products_of_widths_equal_those_of_the_compact_network(
    tiny: nn.Module, wide: nn.Module, seed: int
) -> None:
    images = torch.zeros(2, 3, 16, 16)
    for network in (tiny, wide):
        graph = fp.trace(network, images)
        mask = random_mask(graph, seed)
        compact = fp.apply(graph.plan(mask), network)
        assert float(model_of(graph)(mask)) == pytest.approx(sum_of_times(compact, images), rel=1e-12)


def test_the_full_network_takes_the_sum_of_its_table(wide: nn.Module) -> None:
    graph = fp.trace(wide, torch.zeros(2, 3, 16, 16))
    model = measure(graph, CPU, 2, torch.float32, cache=False, timer=compute_times, call_ms=0.5)
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


def time_blocks(calls: Sequence[Call]) -> list[float]:
    """Return twice the time for depthwise convolutions that are no whole blocks, and no time for other operators."""
    seconds = []
    for call in calls:
        axes = call.operation.axes
        depthwise = call.operation.layer and len(axes) == 1 and axes[0].counts
        width = call.shapes[0][1] if depthwise else 0
        seconds.append(width * (1 if depthwise and width % axes[0].block == 0 else 2) / 1000)
    return seconds


def test_whole_blocks_lie_on_a_line_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastprune.graph.latency.widths.block_of", lambda device: 16)
    network = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 2, 1)).eval()
    graph = fp.trace(network, torch.zeros(2, 3, 8, 8))
    assert len(graph.groups) == 1
    model = model_of(graph, time_blocks)
    widths = torch.tensor([[1.0], [15], [16], [17], [40], [47.5], [48], [63], [64]], dtype=torch.float64)
    expected = torch.tensor([2.0, 30, 16, 34, 80, (95 + 47.5) / 2, 48, 126, 64], dtype=torch.float64)
    torch.testing.assert_close(model.of_widths(widths), expected)
    beyond = model.of_widths(torch.tensor([[0.0], [70.0]], dtype=torch.float64))
    torch.testing.assert_close(beyond, torch.tensor([2.0, 126], dtype=torch.float64))  # the times of 1 and of 63


def test_gradients_are_difference_quotients(wide: nn.Module) -> None:
    graph = fp.trace(wide, torch.zeros(2, 3, 16, 16))

    def bent(calls: Sequence[Call]) -> list[float]:  # not linear between knots
        return [seconds**1.5 for seconds in compute_times(calls)]

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


# --- operators that are run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_point_of_the_grid_can_be_run_and_does_not_change_the_pool(wide: nn.Module, channels_last: bool) -> None:
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
    for segment in split_segments(recording.operations):
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
    parts = split_segments(record(graph, CPU, 2, torch.float32, channels_last=False).operations)
    stem = parts[0]
    assert [operation.operator for operation in stem.operations] == ["conv2d", "batch_norm", "relu"]
    calls = Stopwatch(CPU, 1 << 20).calls(stem, stem.points()[-1])
    made_by_conv = torch.zeros(calls[1].shapes[0])
    args, _ = calls[1].arguments([made_by_conv])
    assert args[0] is made_by_conv
    args, _ = calls[1].arguments([torch.zeros(1, 1, 1, 1)])  # of another shape
    assert args[0].shape == made_by_conv.shape


def test_operators_that_cannot_run_on_fewer_channels_are_scaled() -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "densenet121"])
def test_networks_that_cut_and_concatenate_are_measured(name: str) -> None:
    graph = fp.trace(getattr(torchvision.models, name)(), torch.zeros(2, 3, 32, 32))
    model = measure(graph, CPU, 1, torch.bfloat16, cache=False, timer=compute_times, call_ms=0.0)
    full = model(torch.ones(graph.num_units))
    half = model(torch.arange(graph.num_units) % 2)
    assert 0.1 * full < half < full


# --- the cache ------------------------------------------------------------------------------------------------------


class Counting:
    """A timer that counts the calls that it times."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, calls: Sequence[Call]) -> list[float]:
        self.calls += len(calls)
        return compute_times(calls)


def count_timed(graph: fp.ChannelGraph, dtype: torch.dtype = torch.float32, **options: object) -> int:
    timer = Counting()
    measure(graph, CPU, 2, dtype, timer=timer, call_ms=0.0, **options)  # type: ignore[arg-type]
    return timer.calls


@pytest.mark.slow
def test_known_measurements_are_not_made_again(tiny: nn.Module, own_cache: Path) -> None:
    graph = fp.trace(tiny, torch.zeros(2, 3, 16, 16))
    assert count_timed(graph, cache=False) > 0
    assert not own_cache.exists()
    first = count_timed(graph)
    assert first > 0
    assert count_timed(graph) == 0
    assert count_timed(fp.trace(tiny, torch.zeros(2, 3, 16, 16))) == 0
    assert count_timed(graph, cache=False) == first
    assert count_timed(graph, torch.bfloat16) > 0
    assert count_timed(graph, channels_last=True) > 0
    assert 0 < count_timed(fp.trace(tiny, torch.zeros(2, 3, 20, 20))) <= first
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert count_timed(graph) == first
    finally:
        torch.set_num_threads(threads)


def test_a_graph_remembers_its_models(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fp.trace(tiny, torch.zeros(2, 3, 16, 16))
    timed = []

    def fake(*args: object, **options: object) -> object:
        timed.append(args[1:])
        return object()

    monkeypatch.setattr("fastprune.graph.channel_graph.measure", fake)
    assert graph.latency() is graph.latency(torch.device("cpu"), 1, torch.float32)
    assert graph.latency(batch=2) is not graph.latency()
    assert graph.latency(cache=False) is graph.latency()
    assert len(timed) == 3


def test_a_damaged_file_is_measured_again_with_a_warning(tiny: nn.Module, own_cache: Path) -> None:
    graph = fp.trace(tiny, torch.zeros(2, 3, 16, 16))
    count_timed(graph)
    files = sorted(own_cache.iterdir())
    files[0].write_text(files[0].read_text(encoding="utf-8")[:-20], encoding="utf-8")
    other = json.loads(files[1].read_text(encoding="utf-8"))
    files[1].write_text(json.dumps(other | {"key": []}), encoding="utf-8")
    third = json.loads(files[2].read_text(encoding="utf-8"))
    files[2].write_text(json.dumps(third | {"ms": third["ms"][:-1]}), encoding="utf-8")
    with pytest.warns(UserWarning, match="is no measurement") as caught:
        again = count_timed(graph)
    assert sorted(str(w.message).split("'")[1] for w in caught) == [str(path) for path in files[:3]]
    assert again > 0
    assert count_timed(graph) == 0


def test_files_that_cannot_be_written_only_warn(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    known = Measurements(tmp_path / "file" / "latency", {})
    with pytest.warns(UserWarning, match="cannot be kept"):
        known.put([1], [[1.0]])


def write(folder: Path, process: int) -> None:
    known = Measurements(folder, {"device": "d"})
    for number in range(60):
        known.put([number, process * (number % 2)], [[[float(number)]]])  # both processes write the even ones


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


def test_a_real_clock_and_the_cache_on_disk(tiny: nn.Module, own_cache: Path) -> None:
    state = torch.random.get_rng_state()
    graph = fp.trace(tiny, torch.zeros(2, 3, 16, 16))
    full = float(graph.latency()(torch.ones(graph.num_units)))
    assert 0 < full < 1000
    assert any(own_cache.iterdir())
    assert torch.equal(torch.random.get_rng_state(), state)
    ticks = iter(range(1000))
    parts = split_segments(record(graph, CPU, 1, torch.float32, channels_last=False).operations)
    calls = Stopwatch(CPU, 1 << 20).calls(parts[0], parts[0].points()[0])
    assert time_on_host(calls, clock=lambda: float(next(ticks))) == [1.0, 1.0, 1.0]
