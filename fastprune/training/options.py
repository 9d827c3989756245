"""Options of a training: the optimiser, its schedule, precision and augmentation."""

from __future__ import annotations

from dataclasses import dataclass

from fastprune.options import check, option
from fastprune.training.schedule import SCHEDULES

OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("float32", "bf16")


@dataclass(frozen=True)
class WeightOptions:
    """How weights are trained. The defaults are the papers' CIFAR fine-tuning."""

    epochs: int = option(160, "passes over the training set", minimum=0)
    batch_size: int = option(128, "samples per step over all processes together", minimum=1)
    optimizer: str = option("sgd", "optimiser of the weights", choices=OPTIMIZERS)
    lr: float = option(0.1, "largest learning rate", minimum=0.0)
    momentum: float = option(0.9, "momentum of SGD, β₁ of AdamW", minimum=0.0, below=1.0)
    nesterov: bool = option(False, "Nesterov's momentum")
    weight_decay: float = option(1e-4, "L2 penalty of SGD, decoupled decay of AdamW", minimum=0.0)
    decay_norm_and_bias: bool = option(True, "apply weight decay to batch-norm parameters and biases too")
    schedule: str = option("milestones", "shape of the learning rate over the epochs", choices=SCHEDULES)
    milestones: tuple[float, ...] = option(
        (0.5, 0.75), "epochs of the drops, or fractions of all epochs if below 1", minimum=0.0
    )
    gamma: float = option(0.1, "factor of each drop", above=0.0)
    warmup_epochs: float = option(0.0, "epochs over which the learning rate rises from 0", minimum=0.0)
    label_smoothing: float = option(0.0, "share of the target that is spread over all classes", minimum=0.0, below=1.0)
    clip_gradient: float = option(0.0, "largest norm of the whole gradient; 0 = no clipping", minimum=0.0)
    augment: bool = option(True, "apply the data set's training augmentation")
    evaluate_every: int = option(1, "epochs between two accuracies on the held-out part; 0 = never", minimum=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))  # YAML gives a list
        check(self)
        if self.nesterov and (not self.momentum or self.optimizer != "sgd"):
            raise ValueError("nesterov: it needs optimizer 'sgd' and a momentum above 0; set it to false otherwise")


@dataclass(frozen=True)
class TrainConfig(WeightOptions):
    """Recipe of a training. The defaults are the papers' CIFAR fine-tuning."""

    precision: str = option("float32", "precision of the training; bf16 is autocast to bfloat16", choices=PRECISIONS)
    channels_last: bool = option(False, "NHWC memory layout")
    cutout: int = option(0, "side in pixels of a square that is cut out of each image; 0 = none", minimum=0)
    lighting: float = option(
        0.0,
        "strength of random changes of colour along ImageNet's principal components (0.1); 0 = none",
        minimum=0.0,
    )
    mixup: float = option(0.0, "α of mixup, which blends images and their targets; 0 = none", minimum=0.0)
    sync_bn: bool = option(False, "batch statistics over all processes (CUDA only)")
    deterministic: bool = option(
        False, "the same bits in every run on CUDA, at some cost in speed; runs on the CPU always give the same bits"
    )


@dataclass(frozen=True)
class FinetuneRecipe(TrainConfig):
    """Recipe of a fine-tuning: as a training, with a cosine schedule from a lower learning rate."""

    lr: float = option(0.02, "largest learning rate", minimum=0.0)
    schedule: str = option("cosine", "shape of the learning rate over the epochs", choices=SCHEDULES)
    temperature: float = option(4.0, "temperature T at which class scores are compared with the teacher's", above=0.0)
    distill: float = option(
        0.5, "weight α of the teacher: (1 − α) × loss + α × distance of the outputs", minimum=0.0, maximum=1.0
    )
    distill_features: float = option(
        0.0, "weight of the distance of the features at the ends of stages from the teacher's", minimum=0.0
    )
    ema: float = option(
        0.0,
        "decay of a moving average of the weights, which becomes the result (0.999); 0 = none",
        minimum=0.0,
        below=1.0,
    )
