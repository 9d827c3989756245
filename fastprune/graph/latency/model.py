"""How long a network takes when only some channels stay: measured operators, added up, interpolated in the widths."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from fastprune.graph.latency.axes import Axis
from fastprune.graph.latency.measurements import Measurements
from fastprune.graph.latency.operations import Operation, record
from fastprune.graph.latency.stopwatch import Call, Segment, Stopwatch, Table, Timer, pool_bytes, segments
from fastprune.graph.structure import GraphStructure
from fastprune.host.cache import cache_folder
from fastprune.host.distributed import Distributed
from fastprune.host.machine import machine

ALWAYS = Axis(1, 1, ())
ALONE = Distributed()


@dataclass(frozen=True)
class LatencyRow:
    """What one operator of the full network takes.

    Args:
        layer: the module in whose code it is.
        operator: its name.
        ms: milliseconds.
    """

    layer: str
    operator: str
    ms: float


@dataclass(frozen=True)
class Measured:
    """An operation and its times on a grid of widths."""

    operation: Operation
    table: Table

    @property
    def full_ms(self) -> float:
        """Milliseconds in the full network."""
        first, second = ([0, 0] + [axis.knots.index(axis.size) for axis in self.operation.axes])[-2:]
        return self.table[first][second]


@dataclass
class LatencyModel:
    """Milliseconds of a forward pass, as a sum over operators, interpolated (bi)linearly between measured widths.

    Widths that are whole blocks of channels lie on a line (or plane) of their own; from it to the next width on either
    side, time is linear, too.

    Args:
        offsets: where each group's units start in the flat vector, int64 [G+1].
        measured: every operation of the network.
        overhead: milliseconds that the calls of the network's modules take, whatever their widths.
        device: the name of the processor or GPU.
        batch: samples in a pass.
        dtype: of parameters and inputs.
        channels_last: their memory layout.
        threads: of the CPU.
    """

    offsets: Tensor
    measured: Sequence[Measured] = field(repr=False)
    overhead: float
    device: str
    batch: int
    dtype: torch.dtype
    channels_last: bool
    threads: int
    _on_device: dict[torch.device, _Tables] = field(default_factory=dict, repr=False)

    def __call__(self, mask: Tensor) -> Tensor:
        """Milliseconds under a flat mask.

        Args:
            mask: [U], 0/1 or soft, any real or boolean dtype.

        Returns:
            float64 scalar, differentiable in the mask.

        Raises:
            ValueError: if the mask has another shape.
        """
        units = int(self.offsets[-1])
        if mask.shape != (units,):
            raise ValueError(f"mask: a vector of {units} units is needed, got shape {tuple(mask.shape)}")
        groups = self._tables(mask.device).groups
        kept = torch.zeros(len(self.offsets) - 1, dtype=torch.float64, device=mask.device)
        return self.of_widths(kept.index_add(0, groups, mask.to(torch.float64)))

    def of_widths(self, kept: Tensor) -> Tensor:
        """Milliseconds [...] for numbers of kept units per group, float64 [..., G].

        Widths beyond the measured ones (a group without units, say) cost what the nearest measured one costs.

        Raises:
            ValueError: if the last dimension is not one number per group.
        """
        if kept.shape[-1:] != (len(self.offsets) - 1,):
            raise ValueError(
                f"kept: numbers for {len(self.offsets) - 1} groups are needed, got shape {tuple(kept.shape)}"
            )
        return self._tables(kept.device).milliseconds(kept)

    def table(self) -> list[LatencyRow]:
        """What each operator of the full network takes, in the order of execution."""
        return [LatencyRow(m.operation.module, m.operation.operator, m.full_ms) for m in self.measured]

    def times(self) -> Tensor:
        """All that was measured, as one float64 vector."""
        flat = [ms for m in self.measured for row in m.table for ms in row]
        return torch.tensor([*flat, self.overhead], dtype=torch.float64)

    def with_times(self, times: Tensor) -> LatencyModel:
        """The same model with other times, a vector as ``times`` gives it for the same network."""
        values = iter(times.tolist())
        measured = [replace(m, table=[[next(values) for _ in row] for row in m.table]) for m in self.measured]
        return replace(self, measured=measured, overhead=next(values), _on_device={})

    def _tables(self, device: torch.device) -> _Tables:
        if device not in self._on_device:
            self._on_device[device] = _Tables.of(self.offsets, self.measured, self.overhead, device)
        return self._on_device[device]


@dataclass(frozen=True)
class _Kind:
    """The measured widths of one kind of A axes.

    Args:
        knots: ascending [A, k]; those missing lie behind the last one.
        places: of each knot among all knots of the axis, int64 [A, k].
        last: number of the last interval, int64 [A, 1].
        ends: the smallest and the largest knot [A, 1] each.
        any: whether there are knots at all, 0 or 1 [A, 1].
    """

    knots: Tensor
    places: Tensor
    last: Tensor
    ends: tuple[Tensor, Tensor]
    any: Tensor

    @staticmethod
    def of(knots: Sequence[tuple[int, ...]], places: Sequence[int], device: torch.device) -> _Kind:
        """From the knots of each axis and the place of the first one."""
        counts = torch.tensor([[len(own)] for own in knots], device=device)
        most = max(2, int(counts.max()) + 1)
        behind = [max(own, default=0) + 1 for own in knots]
        rows = [[*own, *range(end, end + most - len(own))] for own, end in zip(knots, behind, strict=True)]
        table = torch.tensor(rows, dtype=torch.float64, device=device)
        numbers = torch.arange(most, device=device).minimum((counts - 1).clamp(min=0))  # those missing weigh nothing
        return _Kind(
            knots=table,
            places=numbers + torch.tensor(places, device=device)[:, None],
            last=(counts - 2).clamp(min=0),
            ends=(table[:, :1], table.gather(1, (counts - 1).clamp(min=0))),
            any=(counts > 0).to(torch.float64),
        )

    def add_to(self, weights: Tensor, widths: Tensor, share: Tensor) -> Tensor:
        """``weights`` [A, R, K] with those of this kind's knots for widths [A, R], times ``share`` [A, R]."""
        interval = (torch.searchsorted(self.knots, widths.detach(), right=True) - 1).clamp(min=0).minimum(self.last)
        low, high = self.knots.gather(1, interval), self.knots.gather(1, interval + 1)
        along = (widths.clamp(*self.ends) - low) / (high - low)
        for number, part in ((interval, 1 - along), (interval + 1, along)):
            places = self.places.gather(1, number)
            weights = weights.scatter_add(2, places[..., None], (share * part)[..., None])
        return weights


@dataclass(frozen=True)
class _Tables:
    """Everything as tensors: A axes with K knots at most, L pairs of axes that times depend on.

    Args:
        groups: of each unit, int64 [U].
        incidence: channels of an axis for a unit of a group, float64 [A, G].
        fixed: its channels that always stay [A].
        block: channels of a block [A, 1].
        broken: measured widths that are no whole blocks.
        whole: those that are.
        pairs: two axes each, int64 [L, 2].
        ms: times by knots [L, K, K].
        overhead: added to all.
    """

    groups: Tensor
    incidence: Tensor
    fixed: Tensor
    block: Tensor
    broken: _Kind
    whole: _Kind
    pairs: Tensor
    ms: Tensor
    overhead: float

    @staticmethod
    def of(offsets: Tensor, measured: Sequence[Measured], overhead: float, device: torch.device) -> _Tables:
        """Operations that depend on the same widths are added up."""
        summed: dict[tuple[Axis, Axis], Tensor] = {}
        for m in measured:
            first, second = [ALWAYS, ALWAYS, *(axis if axis.counts else ALWAYS for axis in m.operation.axes)][-2:]
            ms = torch.tensor(m.table, dtype=torch.float64)
            summed[first, second] = summed[first, second] + ms if (first, second) in summed else ms
        axes = list(dict.fromkeys(axis for pair in summed for axis in pair))
        most = max((len(axis.knots) for axis in axes), default=1)
        incidence = torch.zeros(len(axes), len(offsets) - 1, dtype=torch.float64)
        for row, axis in enumerate(axes):
            for group, count in axis.counts:
                incidence[row, group] = count
        ms = torch.zeros(len(summed), most, most, dtype=torch.float64)
        for row, values in enumerate(summed.values()):
            ms[row, : values.shape[0], : values.shape[1]] = values
        place = {axis: number for number, axis in enumerate(axes)}
        first_whole = [len(axis.broken) if axis.whole else 0 for axis in axes]
        return _Tables(
            groups=torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff()).to(device),
            incidence=incidence.to(device),
            fixed=torch.tensor([float(axis.fixed) for axis in axes], dtype=torch.float64, device=device),
            block=torch.tensor([[float(axis.block)] for axis in axes], dtype=torch.float64, device=device),
            broken=_Kind.of([axis.broken for axis in axes], [0] * len(axes), device),
            whole=_Kind.of([axis.whole for axis in axes], first_whole, device),
            pairs=torch.tensor([[place[a], place[b]] for a, b in summed], device=device).reshape(-1, 2),
            ms=ms.to(device),
            overhead=overhead,
        )

    def milliseconds(self, kept: Tensor) -> Tensor:
        """Interpolated and added up; see ``LatencyModel.of_widths``."""
        widths = kept.to(torch.float64) @ self.incidence.T + self.fixed
        weights = self.weights(widths.reshape(-1, len(self.fixed)).T.contiguous())
        first, second = weights[self.pairs[:, 0]], weights[self.pairs[:, 1]]
        return (torch.bmm(first, self.ms) * second).sum((0, 2)).reshape(widths.shape[:-1]) + self.overhead

    def weights(self, widths: Tensor) -> Tensor:
        """How much each knot counts [A, R, K], for widths [A, R]."""
        nearest = (widths.detach() / self.block).round().clamp(min=1) * self.block
        whole = torch.relu(1 - (widths - nearest).abs()) * self.whole.any
        weights = widths.new_zeros(*widths.shape, self.ms.shape[-1])
        return self.whole.add_to(self.broken.add_to(weights, widths, 1 - whole), widths, whole)


def measure(
    graph: GraphStructure,
    device: torch.device,
    batch: int,
    dtype: torch.dtype,
    *,
    channels_last: bool = False,
    cache: bool = True,
    timer: Timer | None = None,
    call_ms: float | None = None,
    peers: Distributed = ALONE,
) -> LatencyModel:
    """Measure a network's operators, or take what was measured before.

    Args:
        graph: the network.
        device: where it runs.
        batch: samples in a pass.
        dtype: of parameters and inputs.
        channels_last: their memory layout.
        cache: whether times are kept on disk, and taken from there.
        timer: what times calls; the device's usual one where None.
        call_ms: what the call of a module takes; measured where None.
        peers: processes that take the times of the first one.
    """
    if not peers.is_main:
        timer, call_ms, cache = without_clock, 0.0, False
    recording = record(graph, device, batch, dtype, channels_last=channels_last)
    known = Measurements(cache_folder("latency"), facts(device, dtype, channels_last, pool_bytes(recording.footprint)))
    parts = segments(recording.operations)
    found: dict[str, list[Table]] = {}
    missing: dict[str, Segment] = {}
    for part in parts:
        name = str(part.key)
        if name not in found and name not in missing:
            tables = known.get(part.key, part.shapes) if cache else None
            if tables is None:
                missing[name] = part
            else:
                found[name] = tables
    if missing:
        stopwatch = Stopwatch(device, recording.footprint, timer)
        for name, part in _shown(missing):
            found[name] = stopwatch.tables(part)
            if cache:
                known.put(part.key, found[name])
    measured = [
        Measured(operation, table)
        for part in parts
        for operation, table in zip(part.operations, found[str(part.key)], strict=True)
    ]
    modules = {name for operation in recording.operations for name in operation.modules}
    overhead = len(modules) * (module_call_ms() if call_ms is None else call_ms)
    model = LatencyModel(
        graph.offsets, measured, overhead, machine(device), batch, dtype, channels_last, torch.get_num_threads()
    )
    return model if peers.world_size == 1 else model.with_times(peers.broadcast_(model.times()))


def without_clock(calls: Sequence[Call]) -> list[float]:
    """In place of a timer, where somebody else measures."""
    return [0.0] * len(calls)


def facts(device: torch.device, dtype: torch.dtype, channels_last: bool, pool: int) -> dict[str, str]:
    """What all times depend on, besides shapes."""
    found = {
        "device": machine(device),
        "torch": torch.__version__,
        "dtype": str(dtype),
        "layout": "channels_last" if channels_last else "contiguous",
        "touched": str(pool),
    }
    if device.type == "cuda":
        return found | {
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "tf32": str((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)),
            "tuned": str(torch.backends.cudnn.benchmark),
        }
    return found | {
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def module_call_ms(calls: int = 2000, repeats: int = 7) -> float:
    """What calling a module takes beyond its operators."""
    module, x = nn.Identity(), torch.zeros(1)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            module(x)
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times) / calls


def _shown(missing: dict[str, Segment]) -> Iterator[tuple[str, Segment]]:
    """The segments one after the other, with a bar on a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[layer]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("measuring layers", total=len(missing), layer="")
        for name, segment in missing.items():
            progress.update(task, layer=segment.operations[0].module)
            yield name, segment
            progress.advance(task)
