"""Options: declared once, checked whether they come as text, from a file or from Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from fastprune.bench.run import KernelBenchSettings, SearchBenchSettings
from fastprune.cli.settings import FinetuneConfig, PruneSettings
from fastprune.engine import LoopOptions, TrainConfig
from fastprune.methods.gcp.gcp import GCPConfig
from fastprune.options import build, check, describe, option


@dataclass(frozen=True)
class Config:
    count: int = option(3, "a number", minimum=1, maximum=9)
    part: float = option(0.5, "a part", minimum=0.0, below=1.0)
    factor: float | None = option(None, "a factor, or none", above=0.0)
    shape: str = option("flat", "a shape", choices=("flat", "round"))
    drops: tuple[float, ...] = option((0.5,), "some numbers", minimum=0.0)
    names: tuple[str, ...] = option((), "some names", choices=("a", "b"))
    kind: Literal["x", "y"] = option("x", "a kind")
    free: float = option(0.0, "any number")

    def __post_init__(self) -> None:
        check(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count 0: must be at least 1 and at most 9"),
        ({"count": 10}, "count 10: must be at least 1 and at most 9"),
        ({"part": 1.0}, "part 1.0: must be at least 0 and below 1"),
        ({"part": float("nan")}, "part nan: must be "),
        ({"factor": 0.0}, "factor 0.0: must be above 0"),
        ({"shape": "square"}, "shape 'square': must be one of 'flat', 'round'"),
        ({"drops": (0.5, -1.0)}, "drops -1.0: must be at least 0"),
        ({"names": ("a", "c")}, "names 'c': must be one of 'a', 'b'"),
    ],
)
def test_the_same_check_everywhere(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"method 'mine': {message}"):
        build(Config, values, owner="method 'mine'")


def test_limits_themselves_and_none_are_allowed() -> None:
    values = {"count": "9", "part": "0", "factor": "none", "shape": "round", "drops": [0, 1], "names": "a,b"}
    expected = Config(count=9, part=0.0, factor=None, shape="round", drops=(0.0, 1.0), names=("a", "b"))
    assert build(Config, values) == expected


def test_numbers_from_users_are_finite() -> None:
    assert Config(free=float("inf")).free == float("inf")  # a programmer may mean "never"
    with pytest.raises(ValueError, match="free 'inf': must be finite"):
        build(Config, {"free": "inf"})


def test_choices_are_described() -> None:
    types = {info.name: info.type for info in describe(Config)}
    assert types["shape"] == "'flat' | 'round'"
    assert types["kind"] == "'x' | 'y'"
    assert types["factor"] == "float | None"


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainConfig, {"epochs": -1}, "epochs -1: must be at least 0"),
        (TrainConfig, {"optimizer": "lion"}, "optimizer 'lion': must be one of 'sgd', 'adamw'"),
        (TrainConfig, {"precision": "fp16"}, "precision 'fp16': must be one of 'float32', 'bf16'"),
        (TrainConfig, {"mixup": -1.0}, "mixup -1.0: must be at least 0"),
        (TrainConfig, {"nesterov": True, "optimizer": "adamw"}, "nesterov: it needs optimizer 'sgd'"),
        (FinetuneConfig, {"schedule": "steep"}, "schedule 'steep': must be one of"),
        (LoopOptions, {"log_every": 0}, "log_every 0: must be at least 1"),
        (PruneSettings, {"round_to": 0}, "round_to 0: must be at least 1"),
        (
            PruneSettings,
            {"seed": 2**63},
            "seed 9223372036854775808: must be at least 0 and at most 9223372036854775807",
        ),
        (KernelBenchSettings, {"only": ("conv",)}, "only 'conv': must be one of 'gates'"),
        (SearchBenchSettings, {"seconds": 0.0}, "seconds 0.0: must be above 0"),
        (GCPConfig, {"penalties": ()}, "penalties: give at least one value"),
        (GCPConfig, {"learning_rates": (-1.0,)}, "learning_rates -1.0: must be at least 0"),
    ],
)
def test_settings_are_checked_when_they_are_made(kind: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)
