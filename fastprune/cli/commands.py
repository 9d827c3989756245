"""The commands by name. Naming them imports none: each is imported when it is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

Run = Callable[[dict[str, Any], set[str]], int]
"""What a command does with its settings and the names of those that were given; returns the exit code."""

SETTINGS = "fastprune.cli.settings"


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    Args:
        help: one line for ``--help``.
        run: the function that does it, as "module:name".
        settings: the dataclasses whose fields become its flags, as "module:name".
        takes_method: whether it has the options of a pruning method and reads ``--config`` and ``--recipe``.
        resumes: whether an interrupted run can be continued with ``--resume``.
    """

    help: str
    run: str
    settings: tuple[str, ...] = ()
    takes_method: bool = False
    resumes: bool = False

    def load_run(self) -> Run:
        """Import the function."""
        run: Run = resolve_name(self.run)
        return run

    def load_settings(self) -> list[type[Any]]:
        """Import the settings."""
        return [resolve_name(name) for name in self.settings]


FAMILIES = {
    "recipes": "List, show and copy the settings of papers' rows.",
    "bench": "Measure how fast kernels, search steps and networks are.",
}
"""First words of commands that have two, and their help."""

COMMANDS: dict[str, Command] = {
    "train": Command(
        "Train a network from scratch, or from weights.",
        "fastprune.cli.train:run_train",
        (f"{SETTINGS}:TrainSettings", "fastprune.training.options:TrainConfig"),
        resumes=True,
    ),
    "methods": Command(
        "List the installed pruning methods, or the options of one.",
        "fastprune.cli.methods:run_methods",
        (f"{SETTINGS}:MethodsSettings",),
    ),
    "inspect": Command(
        "Show a network's channel groups and what stands in the way of pruning.",
        "fastprune.cli.inspection:run_inspect",
        (f"{SETTINGS}:InspectSettings",),
    ),
    "sensitivity": Command(
        "Measure how much accuracy each group of channels costs, without training.",
        "fastprune.cli.sensitivity:run_sensitivity",
        (f"{SETTINGS}:SensitivitySettings",),
    ),
    "prune": Command(
        "Prune a trained network.",
        "fastprune.cli.prune:run_prune",
        (f"{SETTINGS}:PruneSettings",),
        takes_method=True,
        resumes=True,
    ),
    "finetune": Command(
        "Train the compact network of a run; its weights replace the run's at the end.",
        "fastprune.cli.finetune:run_finetune",
        (f"{SETTINGS}:FinetuneSettings", f"{SETTINGS}:FinetuneConfig"),
        resumes=True,
    ),
    "calibrate": Command(
        "Fit the layers of a run anew on a few images, without training, into a new run.",
        "fastprune.cli.calibrate:run_calibrate",
        (f"{SETTINGS}:CalibrateSettings",),
    ),
    "evaluate": Command(
        "Measure the networks of a run, or a network with weights, on the test set.",
        "fastprune.cli.evaluate:run_evaluate",
        (f"{SETTINGS}:EvaluateSettings",),
    ),
    "report": Command(
        "Draw the searches and widths of pruning runs, as a page with figures.",
        "fastprune.cli.report:run_report",
        (f"{SETTINGS}:ReportSettings",),
    ),
    "compare": Command(
        "Compare pruning runs: a table, and a chart of accuracy over cost.",
        "fastprune.cli.compare:run_compare",
        (f"{SETTINGS}:CompareSettings",),
    ),
    "export": Command(
        "Write the network of a run as a file for other runtimes: safetensors, pt2 or ONNX.",
        "fastprune.cli.export:run_export",
        (f"{SETTINGS}:ExportSettings",),
    ),
    "recipes ls": Command("List the recipes: the settings of papers' rows.", "fastprune.cli.shelf:run_ls"),
    "recipes show": Command("Print a recipe.", "fastprune.cli.shelf:run_show", ("fastprune.cli.shelf:RecipeSettings",)),
    "recipes cp": Command(
        "Copy a recipe into a file of your own.", "fastprune.cli.shelf:run_cp", ("fastprune.cli.shelf:CopySettings",)
    ),
    "completion": Command(
        "Print the script that lets a shell complete commands and options.",
        "fastprune.cli.completion:run_completion",
        ("fastprune.cli.completion:CompletionSettings",),
    ),
    "bench kernels": Command(
        "Time the kernels beside their peers.",
        "fastprune.cli.bench:run_kernels",
        ("fastprune.bench.run:KernelBenchSettings",),
    ),
    "bench step": Command(
        "Time a step of gate training beside the same in plain PyTorch.",
        "fastprune.cli.bench:run_step",
        ("fastprune.bench.run:StepBenchSettings",),
    ),
    "bench search": Command(
        "Time the search steps of DMC and DDNP beside the same in plain PyTorch.",
        "fastprune.cli.bench:run_search",
        ("fastprune.bench.run:SearchBenchSettings",),
    ),
    "bench latency": Command(
        "Compare modelled latencies of random plans with measured ones.",
        "fastprune.cli.bench:run_latency",
        ("fastprune.bench.latency:LatencyBenchSettings",),
    ),
    "bench passes": Command(
        "Count how often a search passes over activations on CUDA; needs no GPU.",
        "fastprune.cli.bench:run_passes",
        ("fastprune.bench.passes:PassesBenchSettings",),
    ),
    "doctor": Command("Say what is installed and whether it works.", "fastprune.cli.doctor:run_doctor"),
    "demo": Command(
        "Train, prune and fine-tune a small network on real data, offline.",
        "fastprune.cli.demo:run_demo",
        (f"{SETTINGS}:DemoSettings",),
    ),
}
