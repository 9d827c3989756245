"""Stage-wise channel pruning (SP; Zhang and Ou): a super-net trained stage by stage, then a search over their quotas.

The network is cut into stages by the resolution of its features. Its weights train as a super-net: in each step

    the full network                              cross-entropy, and the features x_i → y_i of each stage, detached
    a random sub-network of each stage            mean |A_i(stage_i(x_i)) − y_i|²                            (eq. 7)
    the smallest one of each stage                the same

and one update with the gradients of all three. Sub-networks are the first channels of the shared weights, and A_i is a
1×1 convolution that brings their features to full width. All read the full network's features, so that stages are
independent, and so is the search (``stage_search``): an evolution over what each stage may cost, and one over the
widths of a stage for each such quota; what is minimised is eq. 7, summed over stages, on held-out images. The sum asks
more of a stage whose features are large; with ``relative`` each loss counts as a part of its features' variance.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastprune.graph.interior import gated_units
from fastprune.graph.plan import PruningPlan
from fastprune.graph.stages import Stage, find_stages
from fastprune.methods.contract import Task
from fastprune.methods.sp.evolution import EvolutionSettings
from fastprune.methods.sp.stage_losses import Elsewhere, Here, StageData
from fastprune.methods.sp.stage_search import StageSearch, StageWidths
from fastprune.methods.sp.supernet import SuperNet
from fastprune.methods.sp.weight_sharing import WeightSharing, WeightSharingConfig, backward
from fastprune.methods.sp.widths import Widths, choices_of, first_units, fitted, random_widths, units_of
from fastprune.options import option
from fastprune.planning.budget import TOLERANCE
from fastprune.training.phases import Metrics, Phase, Rounds


@dataclass(frozen=True)
class SPConfig(WeightSharingConfig):
    """Options of SP; the training's are those of the paper for CIFAR-10."""

    stages: tuple[str, ...] = option((), "modules at the ends of stages; none = where the resolution changes")
    groups: Literal["all", "interior"] = option(
        "all", "search the widths of all channels that a stage makes, with its features, or only of those inside blocks"
    )
    last_features: bool = option(True, "let the features of the last stage lose channels")
    relative: bool = option(False, "compare losses as parts of the variance of the stage's features")
    population: int = option(128, "genes per generation, of every evolution", minimum=2)
    iterations: int = option(10, "generations", minimum=1)
    mutation: float = option(0.1, "probability that a position moves to another choice", minimum=0.0, maximum=1.0)
    parents: int = option(10, "number of the best genes that have children", minimum=1)
    levels: int = option(64, "number of quotas that each stage is searched for", minimum=2)
    workers: int = option(0, "processes that measure sub-networks; 0 = this one, or all of a torchrun job", minimum=0)


class SP(WeightSharing):
    """Search the widths of each stage by how well it imitates the full network's."""

    name = "sp"
    paper = "Zhang and Ou, Stage-wise Channel Pruning for Model Compression"
    Config: ClassVar[type[Any]] = SPConfig
    config: SPConfig

    def setup(self, task: Task) -> None:
        """Find the stages, make the super-net and its optimiser.

        Raises:
            BudgetError: if the budget is out of reach with the channels of stages; says what is in reach.
            ValueError: for a network without stages, or nothing held out to measure losses on.
        """
        config, graph = self.config, task.graph
        if config.workers and task.distributed.world_size > 1:
            raise ValueError("sp: under torchrun all of its processes measure; give workers 0")
        self.stages = find_stages(graph, config.stages)
        self.groups = [self.groups_of(task, stage) for stage in self.stages]
        self.may_go = units_of(graph, sum(self.groups, ()))
        self.require(task)
        self.choices = [choices_of(task, groups) for groups in self.groups]
        self.net = SuperNet(graph, task.model, self.stages, task.seed)
        self.training = self.make_training(task, nn.ModuleList([task.model, self.net.adaptors]))
        self.search = self.make_search(task)
        self.measure: Here | Elsewhere | None = None
        self.scales = [1.0] * len(self.stages)  # what losses are divided by

    def groups_of(self, task: Task, stage: Stage) -> tuple[int, ...]:
        """The groups of a stage whose widths are searched."""
        graph, config = task.graph, self.config
        gated = gated_units(graph, config.groups)
        chosen = [g for g in stage.groups if bool(gated[graph.groups[g].units].all())]
        if stage is self.stages[-1] and not config.last_features:
            behind = {layer.name for layer in graph.layers} - {layer.name for s in self.stages for layer in s.layers}
            chosen = [g for g in chosen if not behind & set(graph.groups[g].consumers)]
        return tuple(chosen)

    # --- the super-net ------------------------------------------------------------------------------------------------

    def phases(self, task: Task) -> Iterator[Phase | Rounds]:
        """The training of the super-net, and the search."""
        yield from self.train(task, "supernet")
        with ExitStack() as stack:
            yield Rounds("search", lambda: self.round(task, stack), self.search.progress)
        self.measure = None

    def learn(self, task: Task, features: Sequence[Tensor], scores: Tensor) -> Metrics:
        """Eq. 7 for random widths, and for the smallest ones."""
        random = self.mask([random_widths(choices, task.rng) for choices in self.choices], task)
        smallest = self.mask([tuple(c[0] for c in choices) for choices in self.choices], task)
        return {"random_loss": self.distil(features, random), "smallest_loss": self.distil(features, smallest)}

    def distil(self, features: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Backward of eq. 7 for the sub-network of a mask, a stage at a time; the sum of the losses."""
        total = torch.zeros((), device=features[0].device)
        for number in range(len(self.stages)):
            loss = self.net.distance(number, features[number], features[number + 1], mask)
            backward(loss)
            total += loss.detach()
        return total

    def mask(self, widths: Sequence[Widths], task: Task) -> Tensor:
        """The mask [U] of the sub-network of these widths, by stage."""
        return first_units(task.graph, sum(self.groups, ()), sum(widths, ()))

    # --- the search ---------------------------------------------------------------------------------------------------

    def make_search(self, task: Task) -> StageSearch:
        """The search over widths under the budget.

        A stage's cost is what the whole network costs with its widths, all others full, above that with its smallest.
        """
        graph, budget, config = task.graph, task.budget, self.config
        meter = budget.meter(graph)
        full = graph.offsets.diff().double()

        def cost_of(groups: Sequence[int], choices: Sequence[Widths]) -> StageWidths:
            def costs(widths: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
                kept = full.repeat(len(widths) + 1, 1)
                smallest = np.array([[c[0] for c in choices]], dtype=np.int64)
                kept[:, list(groups)] = torch.from_numpy(np.concatenate([widths, smallest])).double()
                found = meter.of_widths(kept).numpy()
                return np.asarray(found[:-1] - found[-1], dtype=np.float64)

            return StageWidths(tuple(choices), costs)

        stages = [cost_of(groups, choices) for groups, choices in zip(self.groups, self.choices, strict=True)]

        def exact(widths: Sequence[Widths]) -> float:
            return float(meter(self.mask(widths, task).double())) - least

        total = float(meter(torch.ones(graph.num_units)))
        least = total - sum(stage.most for stage in stages)  # if savings of stages added up
        settings = EvolutionSettings(config.population, config.iterations, config.mutation, config.parents)
        return StageSearch(
            stages,
            budget.limit(graph) - least,
            exact,
            TOLERANCE * total,
            lambda queries: self.losses(task, queries),
            settings,
            levels=config.levels,
            seed=task.seed,
        )

    def round(self, task: Task, stack: ExitStack) -> Metrics:
        """One round of the search."""
        if self.measure is None:
            self.measure = self.make_measure(task, stack)
        return self.search.round()

    def losses(self, task: Task, queries: Sequence[tuple[int, Widths]]) -> Sequence[float]:
        """The losses of sub-networks of stages."""
        smallest = [tuple(c[0] for c in choices) for choices in self.choices]
        masks = []
        for stage, widths in queries:
            whole = self.mask([*smallest[:stage], widths, *smallest[stage + 1 :]], task)
            masks.append((stage, self.net.parts[stage].own_mask(whole)))
        assert self.measure is not None
        found = zip(masks, self.measure(masks), strict=True)
        return [loss / self.scales[stage] for (stage, _), loss in found]

    @torch.no_grad()
    def make_measure(self, task: Task, stack: ExitStack) -> Here | Elsewhere:
        """Save the full network's features, on one batch and with its statistics, and start the workers."""
        assert task.data is not None
        features = self.net.features(task.data.held_out_batch(self.config.images)[0])
        if self.config.relative:
            self.scales = task.distributed.mean_(torch.stack([variance(y) for y in features[1:]])).tolist()
            for stage, scale in zip(self.stages, self.scales, strict=True):
                if not scale > 0:
                    raise ValueError(
                        f"sp: the features of stage {stage.name!r} have variance {scale:g}, so that losses have no "
                        "relative size; give relative false"
                    )
        data = StageData.of([part.slices for part in self.net.parts], features)
        if not self.config.workers:
            return Here(data, task.distributed)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastprune-")))
        measure = Elsewhere(data, folder, self.make_executor)
        stack.callback(measure.close)
        return measure

    def make_executor(self) -> Executor:
        """What measures sub-networks where there are ``workers``. Override it for executors of Ray, Dask and others.

        Its processes have to see the files of this one's temporary folder (``TMPDIR`` names another one).
        """
        threads = max(1, torch.get_num_threads() // self.config.workers)
        return ProcessPoolExecutor(
            self.config.workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
        )

    def plan(self, task: Task) -> PruningPlan:
        """The widths that were found; where they miss the budget, some more or fewer channels in their order."""
        mask = self.mask(self.search.best, task)
        kept = fitted(task, mask, self.may_go)
        self._changed = int((kept != mask).sum())
        return task.graph.plan(kept)

    def results(self) -> Metrics:
        """What the search has measured, its least loss, and how many channels the budget changed afterwards."""
        return {**self.search.metrics(), "changed_by_budget": float(self._changed)}

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Adaptors, optimiser and search; the weights are saved by themselves."""
        adaptors = {name: tensor.detach().clone() for name, tensor in self.net.adaptors.state_dict().items()}
        return {"adaptors": adaptors, "training": self.training.state_dict(), "search": self.search.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: if the state is of another network.
        """
        try:
            self.net.adaptors.load_state_dict(dict(state["adaptors"]))
        except RuntimeError as error:
            raise ValueError(f"sp: the state is of other stages ({error})") from error
        self.training.load_state_dict(state["training"])
        self.search.load_state_dict(state["search"])


def variance(features: Tensor) -> Tensor:
    """The variance of each channel of features [N, C, ...] over batch and pixels, its mean over channels, float64."""
    return torch.stack([channel.double().var() for channel in features.unbind(1)]).mean()
