"""``network.json``: what a run knows of its full network beside weights and plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastprune.data import Data, load_data
from fastprune.engine import RunDirectory, RunError
from fastprune.graph.export.inputs import InputSpec
from fastprune.graph.plan import PruningPlan
from fastprune.graph.plan_json import decode_input, encode_input, require_choice
from fastprune.host import atomic
from fastprune.models import Source, count_classes

FORMAT = "fastprune-network-1"

Weights = Literal["file", "seed", "missing"]
"""Where the full network's weights are: in ``baseline.safetensors``, drawn from a seed, or not in the run."""


@dataclass(frozen=True)
class NetworkRecord:
    """What a run knows of its full network.

    Args:
        class_name: the name of its class, for messages.
        source: what builds it; None if only the user's code can.
        inputs: shapes and dtypes of its example.
        weights: where its weights are.
        seed: the seed of random weights.
        classes: number of classes of the compact network, if a fine-tuning from scratch has changed it.
    """

    class_name: str
    source: Source | None
    inputs: tuple[InputSpec, ...]
    weights: Weights = "missing"
    seed: int | None = None
    classes: int | None = None

    @property
    def name(self) -> str:
        """The name of the network for messages."""
        return self.class_name if self.source is None else self.source.model

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {
            "format": FORMAT,
            "class": self.class_name,
            "source": None if self.source is None else self.source.to_json(),
            "inputs": [encode_input(spec) for spec in self.inputs],
            "weights": self.weights,
            "seed": self.seed,
            "classes": self.classes,
        }

    @staticmethod
    def from_json(values: Any) -> NetworkRecord:
        """Return the record that ``to_json`` described.

        Raises:
            ValueError: if anything is missing or of the wrong type.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise ValueError(f"this is no record of a network; format {FORMAT!r} is needed")
        source, weights = values.get("source"), require_choice(Weights, values.get("weights"), "weights")
        for name in ("seed", "classes"):
            if values.get(name) is not None and not isinstance(values[name], int):
                raise ValueError(f"{name}: got {values[name]!r}; a whole number is needed")
        try:
            inputs = tuple(map(decode_input, values["inputs"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"inputs: not a list of shapes and dtypes ({error})") from error
        return NetworkRecord(
            str(values.get("class")),
            None if source is None else Source.from_json(source),
            inputs,
            weights,
            values.get("seed"),
            values.get("classes"),
        )

    def save(self, run: RunDirectory) -> None:
        """Write the record into a run's directory."""
        atomic.write_text(run.network_path, json.dumps(self.to_json(), indent=2) + "\n")

    @staticmethod
    def read(run: RunDirectory, data: Data | None = None) -> NetworkRecord:
        """Read the record of a run; derive it for a run of an earlier version, which has none.

        Args:
            run: the run.
            data: the data set of a run without a record; None = found by the run's settings.

        Raises:
            RunError: if the file is broken; names it.
        """
        if not run.network_path.is_file():
            return derive_record(run, data)
        try:
            return NetworkRecord.from_json(json.loads(run.network_path.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:  # of JSON and of UTF-8, too
            raise RunError(f"{str(run.network_path)!r}: {error}") from error

    def with_classes(self, classes: int) -> NetworkRecord:
        """Return the record of a run whose compact network has been trained for other classes."""
        return replace(self, classes=classes)


def derive_record(run: RunDirectory, data: Data | None) -> NetworkRecord:
    """Return what the settings, the plan and the data of a run say of its full network."""
    config = run.config
    plan = PruningPlan.load(run.plan_path) if run.plan_path.is_file() else None
    name, weights = config.get("model"), config.get("weights")
    if not isinstance(name, str) or not name:
        return NetworkRecord("network", None, plan.inputs if plan is not None else ())
    if data is None:
        data = find_data(config)
    inputs = plan.inputs if plan is not None else ()
    if not inputs and data is not None:
        inputs = (InputSpec((2, *data.shape), "float32"),)
    channels = inputs[0].shape[1] if inputs and len(inputs[0].shape) == 4 else 3
    if data is not None and data.knows_classes:
        classes: int | None = data.num_classes
    else:
        file = Path(str(weights)) if weights else run.model_path
        classes = count_classes(file if file.is_file() else run.model_path)
    # Every factory makes networks for 3 channels; only some can be asked for another number.
    source = Source(name, classes, None if channels == 3 else channels)
    if config.get("command") == "prune" and not weights and source.is_known:
        seed = config.get("seed")
        return NetworkRecord(name, source, inputs, "seed", seed if isinstance(seed, int) else 0)
    return NetworkRecord(name, source, inputs)


def find_data(config: Mapping[str, Any]) -> Data | None:
    """Return the data set that a run names, None if it is not on this machine."""
    if not isinstance(config.get("data"), str):
        return None
    size = config.get("image_size")
    try:
        return load_data(config["data"], image_size=size if isinstance(size, int) else None)
    except (ValueError, OSError):
        return None
