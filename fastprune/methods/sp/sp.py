"""Stage-wise channel pruning (SP; Zhang and Ou): a super-net trained stage by stage, then a search over its widths.

The network is cut into stages by the resolution of its features. Its weights train as a super-net: in each step

    the full network                              cross-entropy, and the features x_i → y_i of each stage, detached
    a random sub-network of each stage            mean |A_i(stage_i(x_i)) − y_i|²                            (eq. 7)
    the smallest one of each stage                the same

and one update with the gradients of all three. Sub-networks are the first channels of the shared weights, and A_i is a
1×1 convolution that brings their features to full width. All of them read the full network's features, so stages are
independent, also in the search (``stage_search``): one evolution over the quota of each stage's cost, and one over the
widths of a stage for each quota. They minimise a proxy on held-out images (``stage_losses``), by default eq. 7 with the
best adaptor of each candidate (``fitted_adaptors``), summed over stages. With ``relative`` each loss is divided by the
variance of the stage's features. The proxy ``network`` has no stages: one evolution searches all widths.

``variant=paper`` starts the adaptors random, keeps the trained ones in the search, sums the paper's losses per channel
there and drops the learning rate at fifths of the training. The training itself takes the mean over pixels in both
variants: with sums over pixels its first steps diverge at the paper's learning rate.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastprune.graph import ChannelGraph
from fastprune.graph.interior import GROUPS, gated_units
from fastprune.graph.plan import PruningPlan
from fastprune.graph.stages import Stage, find_stages
from fastprune.methods.contract import Task
from fastprune.methods.sp.evolution import EvolutionSettings
from fastprune.methods.sp.proxies import Adaptor, make_candidates
from fastprune.methods.sp.spaces import StageWidths
from fastprune.methods.sp.stage_losses import LocalLosses, Proxy, Query, check_pixels
from fastprune.methods.sp.stage_search import StageSearch
from fastprune.methods.sp.stage_workers import ExecutorLosses, prepare_worker
from fastprune.methods.sp.supernet import Start, SuperNet
from fastprune.methods.sp.weight_sharing import WeightSharing, WeightSharingConfig, backward
from fastprune.methods.sp.widths import (
    Widths,
    first_units,
    fit_widths,
    group_units,
    random_widths,
    smallest_widths,
    width_choices,
)
from fastprune.options import option, settle
from fastprune.planning.budget import TOLERANCE
from fastprune.planning.resources import Meter
from fastprune.training.phases import Metrics, Phase, Rounds

if TYPE_CHECKING:
    from typing_extensions import Self

FINE_LEVELS = 2**16  # of the quota of a search without stages, of which only the last one that fits is searched


@dataclass(frozen=True)
class SPConfig(WeightSharingConfig):
    """Options of SP; those of the training have the paper's defaults for CIFAR-10, except for the schedule."""

    variant: Literal["ours", "paper"] = option(
        "ours", "what auto stands for in other options; paper also starts the adaptors random, not as the identity"
    )
    adaptor: Literal["auto", "closed_form", "trained"] = option(
        "auto",
        "adaptors of the search: the best one of each candidate, or those of the training; auto = closed_form, in the "
        "paper's variant trained",
    )
    proxy: Literal["auto", "mse", "channel", "fisher", "network"] = option(
        "auto",
        "loss of a candidate: mse, channel (the paper's sum over pixels), fisher (½⟨∂CE/∂y, Δy⟩²), network (the "
        "cross-entropy of the whole sub-network); auto = mse, in the paper's variant channel",
    )
    stages: tuple[str, ...] = option((), "modules that end stages; none = where the resolution changes")
    groups: Literal["all", "interior", "auto"] = option("all", GROUPS)
    last_features: bool = option(True, "prune the features of the last stage too")
    relative: bool = option(False, "divide losses by the variance of the stage's features")
    population: int = option(128, "genes per generation of every evolution", minimum=2)
    iterations: int = option(10, "generations of every evolution", minimum=1)
    mutation: float = option(0.1, "probability of a position to move to another choice", minimum=0.0, maximum=1.0)
    parents: int = option(10, "number of the best genes that have children", minimum=1)
    levels: int = option(64, "quota levels of a stage", minimum=2)
    workers: int = option(0, "processes that measure sub-networks; 0 = this one, or all of a torchrun job", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relative and self.proxy in ("fisher", "network"):
            raise ValueError(
                f"relative: losses of the proxy {self.proxy!r} have one unit already; leave it out, or give proxy mse"
            )

    def resolve(self) -> Self:
        """Return these options with what ``auto`` and no milestones stand for."""
        return super(SPConfig, settle(self, VARIANTS[self.variant])).resolve()


VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {"adaptor": "closed_form", "proxy": "mse"},
    "paper": {"adaptor": "trained", "proxy": "channel", "schedule": "milestones"},
}
"""What ``auto`` stands for in each variant."""


class SP(WeightSharing):
    """Search the widths of each stage by the distance of its features from the full network's."""

    name = "sp"
    paper = "Zhang and Ou, Stage-wise Channel Pruning for Model Compression"
    Config: ClassVar[type[Any]] = SPConfig
    config: SPConfig

    def setup(self, task: Task) -> None:
        """Find the stages; create the super-net and its optimiser.

        Raises:
            BudgetError: if the budget is out of reach with the channels of stages; says what is in reach.
            ValueError: if the network has no stages, or too few images are held out to measure losses on.
        """
        config, graph = self.config, task.graph
        if config.workers and task.distributed.world_size > 1:
            raise ValueError(f"sp: workers {config.workers}: under torchrun its own processes measure; give workers 0")
        self.stages = find_stages(graph, config.stages)
        self.groups = [self.select_groups(task, stage) for stage in self.stages]
        self.prunable_units = group_units(graph, sum(self.groups, ()))
        self.check_task(task)
        self.choices = [width_choices(task, groups) for groups in self.groups]
        self.smallest = [smallest_widths(choices) for choices in self.choices]
        if config.proxy == "network":
            task.objective.require_classification("proxy 'network'")
        start: Start = "random" if config.variant == "paper" else "identity"
        self.net = SuperNet(graph, task.model, self.stages, task.seed, start)
        if config.adaptor == "closed_form" and not self.is_whole:
            self.check_images(task)
        self.training = self.make_training(task, nn.ModuleList([task.model, self.net.adaptors]))
        self.search = self.make_search(task)
        self.measure: Callable[[Sequence[Query]], list[float]] | None = None
        self.scales = [1.0] * len(self.stages)  # divisors of the losses

    @torch.no_grad()
    def check_images(self, task: Task) -> None:
        """Check before the training that its held-out images will be enough to fit adaptors on."""
        assert task.data is not None
        images, _ = task.data.held_out_batch(2)
        check_pixels(self.net.features(images)[1:], min(self.config.images, task.data.held_out))

    def select_groups(self, task: Task, stage: Stage) -> tuple[int, ...]:
        """Return the groups of a stage whose widths are searched."""
        graph, config = task.graph, self.config
        gated = gated_units(graph, config.groups)
        selected = [g for g in stage.groups if bool(gated[graph.groups[g].units].all())]
        if stage is self.stages[-1] and not config.last_features:
            behind = {layer.name for layer in graph.layers} - {layer.name for s in self.stages for layer in s.layers}
            selected = [g for g in selected if not behind & set(graph.groups[g].consumers)]
        return tuple(selected)

    # --- the super-net ------------------------------------------------------------------------------------------------

    def phases(self, task: Task) -> Iterator[Phase | Rounds]:
        """Yield the training of the super-net, then the search."""
        yield from self.train(task, "supernet")
        with ExitStack() as stack:
            yield Rounds("search", lambda: self.run_round(task, stack), self.search.progress)
        self.measure = None

    def learn(self, task: Task, features: Sequence[Tensor], scores: Any) -> Metrics:
        """Learn eq. 7 with random widths and with the smallest ones."""
        random = self.mask([random_widths(choices, task.rng) for choices in self.choices], task)
        smallest = self.mask(self.smallest, task)
        return {"random_loss": self.distil(features, random), "smallest_loss": self.distil(features, smallest)}

    def distil(self, features: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Run eq. 7 forward and backward for the sub-network of a mask, stage by stage; return the summed loss."""
        total = torch.zeros((), device=features[0].device)
        for number in range(len(self.stages)):
            loss = self.net.distance(number, features[number], features[number + 1], mask)
            backward(loss)
            total += loss.detach()
        return total

    def mask(self, widths: Sequence[Widths], task: Task) -> Tensor:
        """Return the mask [U] of the sub-network with these widths of each stage."""
        return first_units(task.graph, sum(self.groups, ()), sum(widths, ()))

    # --- the search ---------------------------------------------------------------------------------------------------

    def make_search(self, task: Task) -> StageSearch:
        """Create the search over widths under the budget."""
        budget, config = task.budget, self.config
        meter = budget.meter(task.graph)
        parts = list(zip(self.groups, self.choices, self.smallest, strict=True))
        whole = self.is_whole
        if whole:  # one part, whose cost is exact
            parts = [(sum(self.groups, ()), sum(self.choices, ()), sum(self.smallest, ()))]
        stages = [
            StageWidths(choices, make_stage_cost(meter, task.graph, groups, smallest))
            for groups, choices, smallest in parts
        ]
        total = float(meter(torch.ones(task.graph.num_units)))
        least = total - sum(stage.full_cost for stage in stages)  # if savings of stages added up

        def exact_cost(widths: Sequence[Widths]) -> float:
            return float(meter(self.mask(widths, task).double())) - least

        return StageSearch(
            stages,
            budget.limit(task.graph) - least,
            exact_cost,
            math.inf if whole else TOLERANCE * total,
            lambda queries: self.losses(task, queries),
            EvolutionSettings(config.population, config.iterations, config.mutation, config.parents),
            levels=FINE_LEVELS if whole else config.levels,
            seed=task.seed,
        )

    def run_round(self, task: Task, stack: ExitStack) -> Metrics:
        """Run one round of the search."""
        if self.measure is None:
            self.measure = self.make_measure(task, stack)
        return self.search.run_round()

    def losses(self, task: Task, queries: Sequence[tuple[int, Widths]]) -> Sequence[float]:
        """Measure the losses of sub-networks of stages, or of the whole network."""
        assert self.measure is not None
        masks = []
        for part, widths in queries:
            whole = [*self.smallest[:part], widths, *self.smallest[part + 1 :]]
            masks.append(self.candidates.query(part, self.mask([widths] if self.is_whole else whole, task)))
        measured = zip(masks, self.measure(masks), strict=True)
        return [loss / self.scales[stage] for (stage, _), loss in measured]

    @property
    def is_whole(self) -> bool:
        """Whether the search is one over the whole network."""
        return bool(self.config.proxy == "network")

    @torch.no_grad()
    def make_measure(self, task: Task, stack: ExitStack) -> LocalLosses | ExecutorLosses:
        """Compute the full network's features on one batch, with its statistics; start the workers."""
        assert task.data is not None
        images, targets = task.data.held_out_batch(self.config.images)
        features = self.net.features(images)
        if self.config.relative:
            self.scales = task.distributed.mean_(torch.stack([variance(y) for y in features[1:]])).tolist()
            for stage, scale in zip(self.stages, self.scales, strict=True):
                if not scale > 0:
                    raise ValueError(
                        f"sp: the features of stage {stage.name!r} have variance {scale:g}, which cannot divide "
                        "losses; give relative false"
                    )
        self.candidates = make_candidates(
            self.net,
            sum(self.groups, ()),
            images,
            targets,
            proxy=cast("Proxy", self.config.proxy),
            adaptor=cast("Adaptor", self.config.adaptor),
            objective=task.objective,
            features=features,
        )
        data = self.candidates.data
        if not self.config.workers:
            return LocalLosses(data, task.distributed)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastprune-")))
        measure = ExecutorLosses(data, folder, self.make_executor)
        stack.callback(measure.close)
        return measure

    def make_executor(self) -> Executor:
        """Start the executor of ``workers`` processes. Override it for executors of Ray, Dask and others.

        Its processes must be able to read the temporary folder of this process (set ``TMPDIR`` to change it).
        """
        threads = max(1, torch.get_num_threads() // self.config.workers)
        return ProcessPoolExecutor(
            self.config.workers, get_context("spawn"), initializer=prepare_worker, initargs=(threads,)
        )

    def plan(self, task: Task) -> PruningPlan:
        """Keep the widths of the search; if they miss the budget, add or remove some channels in their order."""
        mask = self.mask(self.search.best, task)
        kept = fit_widths(task, mask, self.prunable_units)
        self._changed = int((kept != mask).sum())
        return task.graph.plan(kept)

    def results(self) -> Metrics:
        """Report the search's number of measurements, its least loss, and how many channels the budget changed."""
        return {**self.search.metrics(), "changed_by_budget": float(self._changed)}

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return adaptors, optimiser and search; the engine saves the weights."""
        adaptors = {name: tensor.detach().clone() for name, tensor in self.net.adaptors.state_dict().items()}
        return {"adaptors": adaptors, "training": self.training.state_dict(), "search": self.search.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: if the state is for other stages.
        """
        try:
            self.net.adaptors.load_state_dict(dict(state["adaptors"]))
        except RuntimeError as error:
            raise ValueError(
                f"sp: the state is for other stages; resume with the model and options of the first run ({error})"
            ) from error
        self.training.load_state_dict(state["training"])
        self.search.load_state_dict(state["search"])


def make_stage_cost(
    meter: Meter, graph: ChannelGraph, groups: Sequence[int], smallest: Widths
) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]:
    """Return the function from a stage's widths [P, G] to costs [P]: the network's, minus that at its smallest widths.

    All other groups have full width.

    Args:
        meter: the costs of the network.
        graph: the channels of the network.
        groups: the groups of the stage.
        smallest: their smallest widths.
    """
    full = graph.offsets.diff().double()

    def costs(widths: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        kept = full.repeat(len(widths) + 1, 1)
        rows = np.concatenate([widths, np.array([smallest], dtype=np.int64)])
        kept[:, list(groups)] = torch.from_numpy(rows).double()
        values = meter.of_widths(kept).numpy()
        return np.asarray(values[:-1] - values[-1], dtype=np.float64)

    return costs


def variance(features: Tensor) -> Tensor:
    """Compute the variance of features [N, C, ...] over batch and pixels, its mean over channels, float64."""
    return torch.stack([channel.double().var() for channel in features.unbind(1)]).mean()
