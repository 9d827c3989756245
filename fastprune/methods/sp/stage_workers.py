"""The losses of sub-networks, measured in worker processes of an executor."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.fx import GraphModule

from fastprune.graph import trace
from fastprune.graph.model_state import state_of
from fastprune.host.signals import follow_parent, interrupts_wait
from fastprune.methods.sp.stage_losses import Proxy, Query, StageData
from fastprune.networks.subnetworks import SubNetworks
from fastprune.ops.layout import layout_of

log = logging.getLogger(__name__)

CHUNK = 8  # sub-networks in one task of an executor
ATTEMPTS = 5  # executors that a round may use up when processes die

Chunk = tuple[int, list[int]]
"""The number of a stage, and the numbers of some queries about it."""


@dataclass(frozen=True)
class SavedStage:
    """A stage in a file, for processes that share the file system.

    Args:
        structure: the graph of the stage, without values.
        path: the path of the file with tensors and features (.safetensors).
        device: the device of the measurement.
        exact: the argument of ``trace`` for the stage.
        autocast: the autocast type of the measurement; None = off.
        channels_last: names of the tensors in the file that are channels_last.
        proxy: the loss.
        fitted: whether each candidate gets its own adaptor.
    """

    structure: GraphModule
    path: str
    device: str
    exact: bool
    autocast: torch.dtype | None
    channels_last: tuple[str, ...]
    proxy: Proxy = "mse"
    fitted: bool = False

    @staticmethod
    def save(stage: StageData, path: Path) -> SavedStage:
        """Write a stage to a file."""
        module = stage.networks.model
        assert isinstance(module, GraphModule)
        tensors = {f"tensor.{name}": tensor for name, tensor in state_of(module).items()}
        tensors |= {"features": stage.features, "target": stage.target}
        tensors |= {} if stage.gradient is None else {"gradient": stage.gradient}
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
        graph = stage.networks.graph
        structure, device = copy.deepcopy(module).to("meta"), stage.features.device
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        images = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 4}
        last = tuple(name for name, tensor in images.items() if layout_of(tensor) == torch.channels_last)
        return SavedStage(structure, str(path), str(device), graph.exact, autocast, last, stage.proxy, stage.fitted)

    def load(self) -> StageData:
        """Read the stage from its file."""
        tensors = load_file(self.path, device=self.device)
        tensors |= {name: tensors[name].to(memory_format=torch.channels_last) for name in self.channels_last}
        for name in state_of(self.structure):
            owner, _, last = name.rpartition(".")
            holder, value = self.structure.get_submodule(owner), tensors[f"tensor.{name}"]
            setattr(holder, last, nn.Parameter(value) if last in holder._parameters else value)
        example = tensors["features"][:2].to(next(self.structure.parameters()).dtype)
        graph = trace(self.structure, example, exact=self.exact)
        networks = SubNetworks(graph, self.structure).freeze()
        features, target, gradient = tensors["features"], tensors["target"], tensors.get("gradient")
        return StageData(networks, features, target, self.proxy, self.fitted, gradient)


def prepare_worker(threads: int) -> None:
    """Prepare a new worker process: its number of threads, and its end with the process that started it."""
    follow_parent()
    torch.set_num_threads(threads)


_loaded: dict[str, StageData] = {}  # stages of a worker process, by file


def measure(stage: SavedStage, masks: Sequence[Tensor]) -> list[float]:
    """Measure the losses of sub-networks of a stage, in a worker process."""
    if stage.path not in _loaded:
        for path in [path for path in _loaded if Path(path).parent != Path(stage.path).parent]:
            del _loaded[path]  # stages of an earlier search
        _loaded[stage.path] = stage.load()
    with torch.autocast(torch.device(stage.device).type, stage.autocast, enabled=stage.autocast is not None):
        return [_loaded[stage.path].loss(mask) for mask in masks]


class ExecutorLosses:
    """Losses measured by an executor; if its processes die, a new executor repeats their tasks.

    Args:
        stages: the stages of the network.
        folder: the folder for their files, visible to the executor's processes.
        start: function that starts an executor.
    """

    def __init__(self, stages: Sequence[StageData], folder: Path, start: Callable[[], Executor]) -> None:
        self.stages = [SavedStage.save(stage, folder / f"stage-{n}.safetensors") for n, stage in enumerate(stages)]
        self.start, self.executor = start, start()

    def __call__(self, queries: Sequence[Query]) -> list[float]:
        """Measure the losses of sub-networks.

        Raises:
            BrokenExecutor: if processes die in every attempt.
        """
        numbers: dict[int, list[int]] = {}
        for number, (stage, _) in enumerate(queries):
            numbers.setdefault(stage, []).append(number)
        chunks = [(stage, own[i : i + CHUNK]) for stage, own in numbers.items() for i in range(0, len(own), CHUNK)]
        losses = [0.0] * len(queries)
        for attempt in range(ATTEMPTS):
            chunks, error = self.try_all(chunks, queries, losses)
            if error is None:
                return losses
            log.warning("a process that measures sub-networks has died; %d tasks are repeated", len(chunks))
            self.close()
            if attempt + 1 == ATTEMPTS:
                raise error
            self.executor = self.start()
        return losses

    def try_all(
        self, chunks: Sequence[Chunk], queries: Sequence[Query], losses: list[float]
    ) -> tuple[list[Chunk], BrokenExecutor | None]:
        """Measure chunks into ``losses``; return the chunks that were lost, and the reason."""
        futures: list[Future[list[float]]] = []
        lost: list[Chunk] = []
        reason: BrokenExecutor | None = None
        with interrupts_wait():  # the first task starts the processes
            for stage, numbers in chunks:
                try:
                    futures.append(self.executor.submit(measure, self.stages[stage], [queries[n][1] for n in numbers]))
                except BrokenExecutor as error:
                    reason = error
                    break
        lost += chunks[len(futures) :]
        for chunk, future in zip(chunks, futures, strict=False):
            try:
                for number, loss in zip(chunk[1], future.result(), strict=True):
                    losses[number] = loss
            except BrokenExecutor as error:
                lost.append(chunk)
                reason = error
        return lost, reason

    def close(self) -> None:
        """Shut the executor down."""
        self.executor.shutdown(cancel_futures=True)
