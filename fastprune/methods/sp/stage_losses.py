"""The distillation losses of sub-networks of stages: measured here, shared out among ranks, or in other processes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.fx import GraphModule

from fastprune.graph import trace
from fastprune.graph.model_state import state_of
from fastprune.host.distributed import Distributed
from fastprune.networks.subnetworks import SubNetworks
from fastprune.ops.layout import layout_of

log = logging.getLogger(__name__)

CHUNK = 8  # sub-networks that one task of an executor measures
ATTEMPTS = 5  # at a round in which processes die, each with an executor of its own

Query = tuple[int, Tensor]  # a stage's number, and a mask over its own units, bool


@dataclass(frozen=True)
class StageData:
    """One stage, what the full network feeds it, and what it makes of that.

    Args:
        networks: the stage's sub-networks, with its adaptor.
        features: [N, C, H, W].
        target: [N, C', H', W'].
    """

    networks: SubNetworks
    features: Tensor
    target: Tensor

    @staticmethod
    def of(networks: Sequence[SubNetworks], features: Sequence[Tensor]) -> list[StageData]:
        """Stages one after the other, whose weights stay as they are; on the CPU in channels_last, which is faster.

        Args:
            networks: of each stage.
            features: what the first stage reads, and what each one makes.
        """
        laid = [
            x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" and x.dim() == 4 else x
            for x in features
        ]
        return [StageData(n.freeze(), x, y) for n, (x, y) in zip(networks, pairwise(laid), strict=True)]

    @torch.no_grad()
    def loss(self, mask: Tensor) -> float:
        """Eq. 7 for the sub-network of a mask over the stage's own units, as a float32.

        It is summed in float64, so that the number of threads does not show.
        """
        difference = self.networks(self.features, mask=mask).float() - self.target.float()
        return float((difference.double().square_().sum() / difference.numel()).float())


class Here:
    """Measures in this process, or in all processes of a ``torchrun`` job, which all call it."""

    def __init__(self, stages: Sequence[StageData], peers: Distributed) -> None:
        self.stages, self.peers = stages, peers
        self.device = stages[0].features.device

    def __call__(self, queries: Sequence[Query]) -> list[float]:
        """The losses."""
        losses = torch.zeros(len(queries), dtype=torch.float64, device=self.device)
        for number in range(self.peers.rank, len(queries), self.peers.world_size):
            stage, mask = queries[number]
            losses[number] = self.stages[stage].loss(mask)
        found: list[float] = self.peers.sum_(losses).tolist()
        return found

    def close(self) -> None:
        """There is nothing to close."""


@dataclass(frozen=True)
class SavedStage:
    """A stage in a file, for processes that see the same files.

    Args:
        structure: its graph, without values.
        path: of the file with tensors and features (.safetensors).
        device: where it is measured.
        rewrite: how it was traced, see ``trace``.
        exact: the same.
        autocast: to which type it is measured.
        channels_last: names of the tensors in the file that are.
    """

    structure: GraphModule
    path: str
    device: str
    rewrite: bool
    exact: bool
    autocast: torch.dtype | None
    channels_last: tuple[str, ...]

    @staticmethod
    def save(stage: StageData, path: Path) -> SavedStage:
        """Write a stage."""
        module = stage.networks.model
        assert isinstance(module, GraphModule)
        tensors = {f"tensor.{name}": tensor for name, tensor in state_of(module).items()}
        tensors |= {"features": stage.features, "target": stage.target}
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
        graph = stage.networks.graph
        structure, device = copy.deepcopy(module).to("meta"), stage.features.device
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        images = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 4}
        last = tuple(name for name, tensor in images.items() if layout_of(tensor) == torch.channels_last)
        return SavedStage(structure, str(path), str(device), graph.rewrites, graph.exact, autocast, last)

    def load(self) -> StageData:
        """Read it."""
        tensors = load_file(self.path, device=self.device)
        tensors |= {name: tensors[name].to(memory_format=torch.channels_last) for name in self.channels_last}
        for name in state_of(self.structure):
            owner, _, last = name.rpartition(".")
            holder, value = self.structure.get_submodule(owner), tensors[f"tensor.{name}"]
            setattr(holder, last, nn.Parameter(value) if last in holder._parameters else value)
        example = tensors["features"][:2].to(next(self.structure.parameters()).dtype)
        graph = trace(self.structure, example, rewrite=self.rewrite, exact=self.exact)
        (stage,) = StageData.of([SubNetworks(graph, self.structure)], [tensors["features"], tensors["target"]])
        return stage


_loaded: dict[str, StageData] = {}  # in a worker process, by the file


def measure(stage: SavedStage, masks: Sequence[Tensor]) -> list[float]:
    """The losses of sub-networks of a stage, in a worker process."""
    if stage.path not in _loaded:
        for path in [path for path in _loaded if Path(path).parent != Path(stage.path).parent]:
            del _loaded[path]  # of a search that is over
        _loaded[stage.path] = stage.load()
    with torch.autocast(torch.device(stage.device).type, stage.autocast, enabled=stage.autocast is not None):
        return [_loaded[stage.path].loss(mask) for mask in masks]


class Elsewhere:
    """Measures by an executor; where its processes die, what they had is measured again by a new one.

    Args:
        stages: of the network.
        folder: for their files, which the executor's processes have to see.
        start: makes an executor.
    """

    def __init__(self, stages: Sequence[StageData], folder: Path, start: Callable[[], Executor]) -> None:
        self.stages = [SavedStage.save(stage, folder / f"stage-{n}.safetensors") for n, stage in enumerate(stages)]
        self.start, self.executor = start, start()

    def __call__(self, queries: Sequence[Query]) -> list[float]:
        """The losses.

        Raises:
            BrokenExecutor: where processes die again and again.
        """
        numbers: dict[int, list[int]] = {}
        for number, (stage, _) in enumerate(queries):
            numbers.setdefault(stage, []).append(number)
        chunks = [(stage, of[i : i + CHUNK]) for stage, of in numbers.items() for i in range(0, len(of), CHUNK)]
        losses = [0.0] * len(queries)
        for attempt in range(ATTEMPTS):
            chunks, error = self.try_all(chunks, queries, losses)
            if error is None:
                return losses
            log.warning("a process that measures sub-networks has died; %d tasks are done again", len(chunks))
            self.close()
            if attempt + 1 == ATTEMPTS:
                raise error
            self.executor = self.start()
        return losses

    def try_all(
        self, chunks: Sequence[tuple[int, list[int]]], queries: Sequence[Query], losses: list[float]
    ) -> tuple[list[tuple[int, list[int]]], BrokenExecutor | None]:
        """Measure chunks into ``losses``; those that were lost, and why."""
        futures: list[Future[list[float]]] = []
        lost: list[tuple[int, list[int]]] = []
        reason: BrokenExecutor | None = None
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
        """Let the processes go."""
        self.executor.shutdown(cancel_futures=True)
