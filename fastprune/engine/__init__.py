"""The engine: device, the loop with its checkpoints, training and evaluation. It knows no method by name."""

from fastprune.engine.checkpoint import CheckpointError, Checkpoints, load_state, save_state
from fastprune.engine.device import Placement, choose_device, seed_everything
from fastprune.engine.evaluate import Evaluation, HeldOut, evaluate
from fastprune.engine.latency import measure_latencies, measure_latency
from fastprune.engine.loggers import Logger
from fastprune.engine.loop import LoopOptions, run_phases
from fastprune.engine.meter import NonFiniteError
from fastprune.engine.run import RunDirectory, RunError
from fastprune.engine.teacher import prepare_teacher
from fastprune.engine.training import train
from fastprune.host.errors import Interrupted
from fastprune.training.options import TrainConfig

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Evaluation",
    "HeldOut",
    "Interrupted",
    "Logger",
    "LoopOptions",
    "NonFiniteError",
    "Placement",
    "RunDirectory",
    "RunError",
    "TrainConfig",
    "choose_device",
    "evaluate",
    "load_state",
    "measure_latencies",
    "measure_latency",
    "prepare_teacher",
    "run_phases",
    "save_state",
    "seed_everything",
    "train",
]
