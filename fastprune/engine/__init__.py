"""The engine: data, device, the loop with its checkpoints, training and evaluation. It knows no method by name."""

from fastprune.engine.checkpoint import CheckpointError, Checkpoints, load_state, save_state
from fastprune.engine.data import Data, SourceData, Split
from fastprune.engine.device import Placement, choose_device, seed_everything
from fastprune.engine.evaluate import Evaluation, HeldOut, evaluate
from fastprune.engine.interruption import Interrupted
from fastprune.engine.latency import measure_latencies, measure_latency
from fastprune.engine.load import load_data
from fastprune.engine.loop import LoopOptions, run_phases
from fastprune.engine.meter import NonFiniteError
from fastprune.engine.run import RunDirectory, RunError
from fastprune.engine.training import TrainConfig, train
from fastprune.engine.user_data import UserData
from fastprune.schedule import learning_rate

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Data",
    "Evaluation",
    "HeldOut",
    "Interrupted",
    "LoopOptions",
    "NonFiniteError",
    "Placement",
    "RunDirectory",
    "RunError",
    "SourceData",
    "Split",
    "TrainConfig",
    "UserData",
    "choose_device",
    "evaluate",
    "learning_rate",
    "load_data",
    "load_state",
    "measure_latencies",
    "measure_latency",
    "run_phases",
    "save_state",
    "seed_everything",
    "train",
]
