"""Training a network: from scratch, or after pruning (fine-tuning). One recipe, driven by the one loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastprune.data.augment import cutout, lighting, mixup
from fastprune.data.batches import hashed
from fastprune.data.data import Data
from fastprune.engine.averaging import WeightAverage
from fastprune.engine.device import Placement, choose_device, seed_everything
from fastprune.engine.evaluate import evaluate
from fastprune.engine.loggers import Callback, Logger, MakeLogger, load_loggers, open_records
from fastprune.engine.loop import LoopOptions, run_phases
from fastprune.engine.run import RunDirectory
from fastprune.graph.model_state import in_eval_mode
from fastprune.host.distributed import Distributed
from fastprune.models.weights import save_weights
from fastprune.training.distillation import Distillation
from fastprune.training.objective import Objective
from fastprune.training.options import TrainConfig
from fastprune.training.phases import Phase
from fastprune.training.weight_training import WeightTraining

_ALTER = 4  # a key of ``hashed``; those before it are in data.py


@dataclass
class TrainTask:
    """The task of a training, for the loop; fields as in ``fastprune.methods.contract.Task``."""

    model: nn.Module
    device: torch.device
    seed: int
    distributed: Distributed
    rng: torch.Generator


class Trainer:
    """The worker of a training: one phase, whose step is one step of the optimiser.

    Args:
        config: the recipe.
        data: the data set.
        placement: device, precision and layout.
        objective: the loss that is minimised; None = cross-entropy.
        distillation: the teacher's part of the loss; None = there is no teacher.
        ema: decay of the moving average of the weights; 0 = none.
    """

    trains_weights = True

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        placement: Placement,
        objective: Objective | None = None,
        distillation: Distillation | None = None,
        ema: float = 0.0,
    ) -> None:
        self.config = config
        self.data = data
        self.placement = placement
        self.objective = objective or Objective()
        self.distillation, self.ema = distillation, ema
        self.average: WeightAverage | None = None

    def setup(self, task: TrainTask) -> None:
        """Make the optimiser.

        Raises:
            ValueError: for options that the objective does not have.
        """
        self.task = task
        if self.config.mixup:
            self.objective.require_classification("mixup")
        if self.config.lighting and self.data.pixel_std is None:
            raise ValueError(
                f"lighting: how the pixels of {self.data.name!r} were scaled is not known; it is for pictures "
                "(imagefolder:FOLDER, hf:NAME); leave it out"
            )
        self.classes = self.data.num_classes if self.config.mixup else 0
        steps = self.data.steps("train", self.config.batch_size, distributed=task.distributed)
        self.weights = WeightTraining(
            task.model, self.config, steps_per_epoch=steps, device=task.device, peers=task.distributed,
            objective=self.objective, distillation=self.distillation,
        )  # fmt: skip
        self.average = WeightAverage(task.model, self.ema) if self.ema else None

    def phases(self, task: TrainTask) -> Iterator[Phase]:
        """Yield the only phase."""
        config = self.config
        yield Phase(
            "train",
            config.epochs,
            self.step,
            batch_size=config.batch_size,
            augment=config.augment,
            end_epoch=self.end_epoch,
        )

    def step(self, inputs: Any, targets: Any) -> dict[str, float | Tensor]:
        """Take one step of the optimiser on this rank's share of the batch: images [N, C, H, W], labels [N]."""
        metrics = self.weights.gradients(*self.augment(inputs, targets), soft=bool(self.config.mixup))
        self.weights.update()
        if self.average is not None:
            self.average.update()
        return metrics

    def augment(self, images: Any, labels: Any) -> tuple[Any, Any]:
        """Apply lighting, cutout and mixup: random numbers differ from rank to rank, and are the same in a resumed run.

        Raises:
            ValueError: if a batch is no pair of images [N, C, H, W] and labels [N].
        """
        config, task = self.config, self.task
        if not (config.cutout or config.mixup or config.lighting):
            return images, labels
        if not (isinstance(images, Tensor) and images.dim() == 4 and isinstance(labels, Tensor)):
            raise ValueError(
                "lighting, cutout and mixup: batches of images [N, C, H, W] and labels are needed; leave them out"
            )
        rng = np.random.default_rng(int(hashed(task.seed, _ALTER, self.weights.steps, task.distributed.rank)))
        if config.lighting:
            assert self.data.pixel_std is not None
            images = lighting(images, config.lighting, self.data.pixel_std, rng)
        if config.cutout:
            images = cutout(images, config.cutout, rng)
        if config.mixup:
            images, labels = mixup(images, labels, self.classes, config.mixup, rng)
        return images, labels

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Return accuracy and loss on the held-out part, when due; with an average those of the average."""
        every = self.config.evaluate_every
        if not every or (epoch + 1) % every or not self.data.size("held_out"):
            return {}
        self.share_buffers()
        network = self.average.network if self.average is not None else self.task.model
        result = evaluate(
            network, self.data, "held_out", placement=self.placement, distributed=self.task.distributed,
            objective=self.objective,
        )  # fmt: skip
        names = [name for name in ("accuracy", "top5") if name in result]
        return {**{f"held_out_{name}": result[name] for name in names}, "held_out_loss": result["loss"]}

    def share_buffers(self) -> None:
        """Give all ranks rank 0's batch-norm statistics, and their averages."""
        self.weights.share_buffers()
        if self.average is not None and self.task.distributed.world_size > 1:
            self.weights.share(self.average.network.buffers())

    def finish(self) -> None:
        """Make the network what the training results in: the same on all ranks, the average if there is one."""
        self.share_buffers()
        if self.average is not None:
            self.average.write_back()

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser's state, the number of steps and the averages; the loop saves the weights."""
        average = {} if self.average is None else {"average": self.average.state_dict()}
        return {**self.weights.state_dict(), **average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: if only one of the run and its checkpoint has an average.
        """
        if (self.average is not None) != ("average" in state):
            begun = "with a moving average" if "average" in state else "without one"
            raise ValueError(f"ema: got {self.ema:g}, but the run was begun {begun}; resume it with what it began with")
        self.weights.load_state_dict(state)
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def train(
    model: nn.Module,
    data: Data,
    config: TrainConfig | None = None,
    *,
    run: RunDirectory | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    distributed: Distributed | None = None,
    resume: bool = False,
    options: LoopOptions | None = None,
    stage: str = "training",
    log: Sequence[str | MakeLogger | Logger] = (),
    callbacks: Sequence[Callback] = (),
    objective: Objective | None = None,
    distillation: Distillation | None = None,
    ema: float = 0.0,
) -> dict[str, float]:
    """Train ``model`` in place and leave it in eval mode, with the weights of the last step, or their average.

    No weights are chosen by their accuracy on any data. Under N processes the gradient is the mean over processes; if a
    batch does not divide by N, the shares differ by one sample and weigh the same.

    Args:
        model: the network; it is moved to the device.
        data: the data set.
        config: the recipe; None = the defaults.
        run: directory for log, checkpoints and, at the end, ``model.safetensors``; None = nothing is written.
        seed: seed of order, augmentation and dropout.
        device: as in ``choose_device``.
        distributed: this process among its peers.
        resume: whether to continue from the newest checkpoint in ``run``, if there is one.
        options: how often to write.
        stage: name of the checkpoints' folder, and of the stage in the log.
        log: loggers, by name, as objects, or what makes them; see ``fastprune.engine.loggers``.
        callbacks: functions that get every record of the log.
        objective: the loss that is minimised, and how the model runs on a batch; None = cross-entropy.
        distillation: the teacher's part of the loss, as ``prepare_teacher`` makes it; None = there is no teacher.
        ema: decay of a moving average of weights and buffers, which is measured and is the result; 0 = none.

    Returns:
        The last value of every metric: loss, accuracy, lr, held_out_accuracy, held_out_loss; of 10 classes or more also
        top5 and held_out_top5; no accuracies under a loss of the user's own; with a teacher also its terms of the loss,
        distillation and features.

    Raises:
        Interrupted: see ``run_phases``.
        NonFiniteError: see ``run_phases``.
        ValueError: for a recipe that does not fit the machine or the model.
    """
    config, makers = config or TrainConfig(), load_loggers(log)
    peers = distributed or Distributed()
    device = choose_device(device) if isinstance(device, str) else device
    if config.sync_bn and device.type != "cuda":
        raise ValueError("sync_bn: torch synchronises batch statistics on CUDA only; leave it out on the CPU")
    seed_everything(seed, config.deterministic)
    placement = Placement(device, config.precision, config.channels_last)
    placement.model(model)
    task = TrainTask(model, device, seed, peers, torch.Generator().manual_seed(seed))
    trainer = Trainer(config, data.to(device), placement, objective, distillation, ema)
    teachers = [distillation.teacher] if distillation is not None else []
    folder, settings = (run.path, run.config) if run is not None else (None, {})
    with (
        _synchronise_batch_norm(model, config.sync_bn and peers.world_size > 1),
        open_records(makers, callbacks, folder, settings, wanted=peers.is_main) as records,
        in_eval_mode(*teachers),
    ):
        trainer.setup(task)
        model.train()
        try:
            metrics = run_phases(
                trainer,
                task,
                trainer.data,
                run=run,
                stage=stage,
                resume=resume,
                placement=placement,
                options=options,
                records=records,
            )
            trainer.finish()
        finally:
            model.eval()
    if run is not None and peers.is_main:
        save_weights(model, run.model_path)
    peers.barrier()
    return metrics


@contextmanager
def _synchronise_batch_norm(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Replace every batch norm by a synchronised one that shares its tensors, and put the plain ones back."""
    plain = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    if not wanted or not plain:
        yield
        return
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    try:
        yield
    finally:
        for name, module in plain.items():
            # torch counts batches in a new tensor if it cannot add in place; the rest is shared.
            module.load_state_dict(model.get_submodule(name).state_dict())
            model.set_submodule(name, module)
