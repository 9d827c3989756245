"""Steps that train weights, in trainings and methods: the optimiser, its schedule, gradients over all processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.parallel import DistributedDataParallel

from fastprune.host.distributed import Distributed
from fastprune.training.distillation import Distillation, watch
from fastprune.training.objective import Objective
from fastprune.training.options import WeightOptions
from fastprune.training.schedule import learning_rate


class WeightTraining:
    """The training of a model's weights, one update at a time: ``gradients``, then ``update``.

    Args:
        model: the model, trained in place and in its present mode.
        options: the options of the training.
        steps_per_epoch: steps of one epoch, for the schedule.
        device: device of the model.
        peers: this process among its peers; gradients are means over all of them.
        several_passes: whether the gradients of an update come from several passes; the caller then averages them over
            all processes with ``average_gradients``.
        objective: the loss that is minimised.
        distillation: the teacher's part of the loss; None = there is no teacher.

    Raises:
        ValueError: for a model without a parameter that requires gradients, or options that only cross-entropy has.
    """

    def __init__(
        self,
        model: nn.Module,
        options: WeightOptions,
        *,
        steps_per_epoch: int,
        device: torch.device,
        peers: Distributed,
        several_passes: bool = False,
        objective: Objective | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        self.objective, self.distillation = objective or Objective(), distillation
        if options.label_smoothing:
            self.objective.require_classification("label_smoothing")
        self.model, self.options, self.peers = model, options, peers
        self.steps_per_epoch = steps_per_epoch
        self.steps = 0
        self.network: nn.Module = model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError(f"{type(model).__name__} has no parameter with requires_grad: there is nothing to train")
        if peers.world_size > 1 and several_passes:
            self.share(model.parameters())
            self.share_buffers()
        elif peers.world_size > 1:
            self.network = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
        plain = [] if options.decay_norm_and_bias else [parameter for parameter in trained if parameter.dim() <= 1]
        decayed = trained if options.decay_norm_and_bias else [p for p in trained if p.dim() > 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = make_optimizer([group for group in groups if group["params"]], options)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return self.learning_rate_of(self.steps)

    @property
    def remaining_rates(self) -> float:
        """The sum of the learning rates of all updates that are left."""
        return sum(map(self.learning_rate_of, range(self.steps, self.options.epochs * self.steps_per_epoch)))

    def learning_rate_of(self, step: int) -> float:
        """Return the learning rate of an update, counted from 0."""
        options = self.options
        return learning_rate(
            step,
            steps_per_epoch=self.steps_per_epoch,
            epochs=options.epochs,
            lr=options.lr,
            schedule=options.schedule,
            milestones=options.milestones,
            gamma=options.gamma,
            warmup_epochs=options.warmup_epochs,
        )

    def gradients(self, inputs: Any, targets: Any, *, soft: bool = False) -> dict[str, float | Tensor]:
        """Run forward and backward on this rank's share of a batch.

        Args:
            inputs: images [N, C, H, W], or what else the objective takes.
            targets: labels [N], or what else the objective takes.
            soft: whether targets are probabilities of classes [N, K], as mixup makes them.

        Returns:
            The metrics to log: loss, accuracy (of class scores), lr; with a teacher also its terms of the loss.
        """
        teaching = self.distillation
        with watch(self.model, teaching.stage_ends if teaching is not None else ()) as features:
            output, target = self.objective.run(self.network, inputs, targets)
        loss, metrics = self.objective.measure(output, target, label_smoothing=self.options.label_smoothing, soft=soft)
        if teaching is not None:
            loss, terms = teaching.blend(loss, output, features, self.objective, inputs, targets)
            metrics |= terms
        self.optimizer.zero_grad(set_to_none=True)
        # Backward runs outside autocast: each gradient takes the precision of its forward.
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()
        return {"loss": loss.detach(), **metrics, "lr": self.learning_rate}

    def average_gradients(self) -> None:
        """Replace the present gradients by their means over all processes."""
        if self.peers.world_size > 1:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            flat = self.peers.mean_(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def update(self) -> None:
        """Take one step of the optimiser along the present gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        if self.options.clip_gradient:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.options.clip_gradient)
        self.optimizer.step()
        self.steps += 1

    def share_buffers(self) -> None:
        """Give all ranks rank 0's batch-norm statistics; DDP does so only when the next forward begins."""
        if self.peers.world_size > 1:
            self.share(self.model.buffers())

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks rank 0's values."""
        for tensor in tensors:
            self.peers.broadcast_(tensor.detach())
            increment_version(tensor)  # collectives do not, and networks that keep values look at it

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser's state and the number of steps; not the weights."""
        return {"optimizer": self.optimizer.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.optimizer.load_state_dict(dict(state["optimizer"]))
        self.steps = int(state["steps"])


def make_optimizer(groups: list[dict[str, Any]], options: WeightOptions) -> torch.optim.Optimizer:
    """Make the optimiser of ``options`` for groups of parameters."""
    if options.optimizer == "adamw":
        betas = (options.momentum, 0.999)
        return torch.optim.AdamW(groups, lr=options.lr, betas=betas, weight_decay=options.weight_decay)
    return torch.optim.SGD(
        groups,
        lr=options.lr,
        momentum=options.momentum,
        nesterov=options.nesterov,
        weight_decay=options.weight_decay,
    )
