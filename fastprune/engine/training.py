"""Training a network: from scratch, or after pruning (fine-tuning). One recipe, driven by the one loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastprune.distributed import Distributed
from fastprune.engine.data import Data
from fastprune.engine.device import Placement, choose_device, seed_everything
from fastprune.engine.evaluate import evaluate
from fastprune.engine.loop import LoopOptions, run_phases
from fastprune.engine.run import RunDirectory
from fastprune.engine.schedule import SCHEDULES, learning_rate
from fastprune.models.weights import save_weights

if TYPE_CHECKING:
    from fastprune.methods.contract import Phase

AUXILIARY_WEIGHT = 0.3  # of the losses of auxiliary heads (Szegedy et al., CVPR 2015, §5)


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """Recipe of a training: SGD with momentum. The defaults are the papers' CIFAR fine-tuning."""

    epochs: int = _option(160, "passes over the training set")
    batch_size: int = _option(128, "samples per step over all processes together")
    lr: float = _option(0.1, "largest learning rate")
    momentum: float = _option(0.9, "momentum of SGD")
    nesterov: bool = _option(False, "Nesterov's momentum")
    weight_decay: float = _option(1e-4, "L2 penalty")
    decay_norm_and_bias: bool = _option(True, "apply weight decay to batch-norm parameters and biases too")
    schedule: str = _option("milestones", f"shape of the learning rate: {', '.join(SCHEDULES)}")
    milestones: tuple[float, ...] = _option((0.5, 0.75), "epochs of the drops, or fractions of all epochs if below 1")
    gamma: float = _option(0.1, "factor of each drop")
    warmup_epochs: float = _option(0.0, "epochs in which the learning rate rises from 0")
    label_smoothing: float = _option(0.0, "share of the target that is spread over all classes")
    clip_gradient: float = _option(0.0, "largest norm of the whole gradient; 0 = no clipping")
    augment: bool = _option(True, "apply the data set's training augmentation")
    evaluate_every: int = _option(1, "epochs between two accuracies on the held-out part; 0 = never")
    precision: str = _option("float32", "float32, or bf16 for autocast to bfloat16")
    channels_last: bool = _option(False, "NHWC memory layout")
    sync_bn: bool = _option(False, "batch statistics over all processes (CUDA only)")
    deterministic: bool = _option(False, "the same bits in every run on CUDA, at some cost; on the CPU always so")

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))  # YAML gives a list
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r}: give one of {', '.join(SCHEDULES)}")
        for name in ("epochs", "lr", "weight_decay", "warmup_epochs", "clip_gradient", "evaluate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: it cannot be negative")
        if self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size}: it must be at least 1")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing {self.label_smoothing}: it must be in [0, 1)")


@dataclass
class TrainTask:
    """The task of a training, as the loop needs it; fields as in ``fastprune.methods.contract.Task``."""

    model: nn.Module
    device: torch.device
    seed: int
    distributed: Distributed
    rng: torch.Generator


class Trainer:
    """The worker of a training: one phase, whose step is one step of SGD.

    Args:
        config: the recipe.
        data: the data set.
        placement: device, precision and layout.
    """

    trains_weights = True

    def __init__(self, config: TrainConfig, data: Data, placement: Placement) -> None:
        self.config = config
        self.data = data
        self.placement = placement
        self.steps = 0

    def setup(self, task: TrainTask) -> None:
        """Wrap the model for many processes and make the optimiser."""
        config, model = self.config, task.model
        self.task = task
        self.network: nn.Module = model
        if task.distributed.world_size > 1:
            self.network = DistributedDataParallel(model, [task.device] if task.device.type == "cuda" else None)
        self.steps_per_epoch = self.data.steps("train", config.batch_size, distributed=task.distributed)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError(f"{type(model).__name__} has no parameter with requires_grad: there is nothing to train")
        plain = [] if config.decay_norm_and_bias else [parameter for parameter in trained if parameter.dim() <= 1]
        decayed = trained if config.decay_norm_and_bias else [p for p in trained if p.dim() > 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(
            [group for group in groups if group["params"]],
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )

    def phases(self, task: TrainTask) -> Iterator[Phase]:
        """The one phase."""
        from fastprune.methods.contract import Phase

        config = self.config
        yield Phase(
            "train",
            config.epochs,
            self.step,
            batch_size=config.batch_size,
            augment=config.augment,
            end_epoch=self.end_epoch,
        )

    def step(self, images: Tensor, labels: Tensor) -> dict[str, float | Tensor]:
        """One step of SGD on this rank's share of the batch: images [N, C, H, W], labels [N]."""
        config = self.config
        lr = learning_rate(
            self.steps,
            steps_per_epoch=self.steps_per_epoch,
            epochs=config.epochs,
            lr=config.lr,
            schedule=config.schedule,
            milestones=config.milestones,
            gamma=config.gamma,
            warmup_epochs=config.warmup_epochs,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        outputs = self.network(images)
        # torchvision's GoogLeNet and Inception return (scores, auxiliary scores…) in training mode.
        scores, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = self._loss(scores, labels)
        for other in auxiliary:
            if other is not None:
                loss = loss + AUXILIARY_WEIGHT * self._loss(other, labels)
        self.optimizer.zero_grad(set_to_none=True)
        # Backward runs outside autocast: each gradient takes the precision of its forward.
        with torch.autocast(images.device.type, enabled=False):
            loss.backward()
        if config.clip_gradient:
            nn.utils.clip_grad_norm_(self.network.parameters(), config.clip_gradient)
        self.optimizer.step()
        self.steps += 1
        return {"loss": loss, "accuracy": (scores.argmax(1) == labels).float().mean(), "lr": lr}

    def _loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores.float(), labels, label_smoothing=self.config.label_smoothing)

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Accuracy and loss on the held-out part, when due."""
        every = self.config.evaluate_every
        if not every or (epoch + 1) % every or not self.data.size("held_out"):
            return {}
        self.share_buffers()
        result = evaluate(
            self.task.model, self.data, "held_out", placement=self.placement, distributed=self.task.distributed
        )
        return {"held_out_accuracy": result["accuracy"], "held_out_loss": result["loss"]}

    def share_buffers(self) -> None:
        """Give all ranks rank 0's batch-norm statistics; DDP does so only when the next forward begins."""
        for buffer in self.task.model.buffers():
            self.task.distributed.broadcast_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state and the number of steps; the loop saves the weights."""
        return {"optimizer": self.optimizer.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]


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
) -> dict[str, float]:
    """Train ``model`` in place and leave it in eval mode, with the weights of the last step.

    No weights are chosen by their accuracy on anything, least of all on the test set. Under N processes the gradient is
    the mean over processes; where a batch does not divide by N, the shares differ by one sample and weigh the same.

    Args:
        model: the network; moved to the device.
        data: the data set.
        config: the recipe; the defaults where None.
        run: where log, checkpoints and, at the end, ``model.safetensors`` go; nothing is written where None.
        seed: of order, augmentation and dropout.
        device: as in ``choose_device``.
        distributed: this process among its peers.
        resume: continue from the newest checkpoint in ``run``, if there is one.
        options: how often to write.
        stage: names the checkpoints and the lines of the log.

    Returns:
        The last value of every metric: loss, accuracy, lr, held_out_accuracy, held_out_loss.

    Raises:
        Interrupted: see ``run_phases``.
        NonFiniteError: see ``run_phases``.
        ValueError: for a recipe that does not fit the machine or the model.
    """
    config = config or TrainConfig()
    peers = distributed or Distributed()
    device = choose_device(device) if isinstance(device, str) else device
    if config.sync_bn and device.type != "cuda":
        raise ValueError("sync_bn: torch synchronises batch statistics on CUDA only; leave it out on the CPU")
    seed_everything(seed, config.deterministic)
    placement = Placement(device, config.precision, config.channels_last)
    placement.model(model)
    task = TrainTask(model, device, seed, peers, torch.Generator().manual_seed(seed))
    trainer = Trainer(config, data.to(device), placement)
    with _synchronised_batch_norm(model, config.sync_bn and peers.world_size > 1):
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
            )
            trainer.share_buffers()
        finally:
            model.eval()
    if run is not None and peers.is_main:
        save_weights(model, run.model_path)
    peers.barrier()
    return metrics


@contextmanager
def _synchronised_batch_norm(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Exchange every batch norm for a synchronised one that shares its tensors, and put the plain ones back."""
    plain = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    if not wanted or not plain:
        yield
        return
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    try:
        yield
    finally:
        for name, module in plain.items():
            # torch counts batches in a new tensor where it cannot add in place; the rest is shared.
            module.load_state_dict(model.get_submodule(name).state_dict())
            model.set_submodule(name, module)
