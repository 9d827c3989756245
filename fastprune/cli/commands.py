"""What each command of the command line does."""

from __future__ import annotations

import copy
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from fastprune import models
from fastprune.bench.case import BenchmarkError
from fastprune.bench.latency import LatencyBenchSettings, bench_latency
from fastprune.bench.run import (
    KernelBenchSettings,
    SearchBenchSettings,
    StepBenchSettings,
    bench_kernels,
    bench_search,
    bench_step,
)
from fastprune.cli.demo import DemoSettings, demo
from fastprune.cli.doctor import doctor
from fastprune.cli.recipes import read_recipe
from fastprune.cli.settings import (
    EvaluateSettings,
    FinetuneConfig,
    FinetuneSettings,
    InspectSettings,
    ModelSettings,
    NetworkSettings,
    PruneSettings,
    ReportSettings,
    needed,
    only_resumed,
    pick,
    resumed,
    save_config,
)
from fastprune.data import SourceData, load_data
from fastprune.engine import Placement, RunDirectory, TrainConfig, choose_device, evaluate, train
from fastprune.engine.run import plain, run_directory, took_steps
from fastprune.graph import ChannelGraph, trace
from fastprune.graph.plan import PruningPlan
from fastprune.host import atomic
from fastprune.host.distributed import Distributed
from fastprune.methods import registry
from fastprune.methods.contract import Method
from fastprune.planning.budget import Budget
from fastprune.pruning import prune
from fastprune.report import tables
from fastprune.report.log import read_runs
from fastprune.report.page import summary, write_report
from fastprune.surgery import apply

FINETUNE_CONFIG = "finetune.yaml"  # in the run's directory, beside its config.yaml


def open_data(spec: str, settings: Any) -> SourceData:
    """The data set of a run."""
    return load_data(spec, seed=settings.seed, held_out=settings.held_out, image_size=settings.image_size)


def input_shape(settings: ModelSettings, data: SourceData | None) -> tuple[int, int, int]:
    """(C, H, W) of the images that the network is traced and costed with."""
    if settings.input is not None:
        sizes = settings.input.split("x")
        if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise ValueError(f"--input {settings.input!r}: write CxHxW, 3x224x224 say")
        channels, height, width = map(int, sizes)
        if data is not None and data.shape != (channels, height, width):
            raise ValueError(
                f"--input {settings.input!r}: the images of {data.name!r} are {'x'.join(map(str, data.shape))}; "
                "leave --input out, or resize the images with --image_size"
            )
        return channels, height, width
    if data is not None:
        return data.shape
    return (3, 32, 32) if settings.model in models.available() else (3, 224, 224)


def build_model(settings: ModelSettings, data: SourceData | None, *, classes_of: str | None = None) -> nn.Module:
    """The network with its weights, sized for the data; without data for its weights, or those of another file."""
    needed(model=settings.model)
    channels = input_shape(settings, data)[0]
    if data is not None:
        classes: int | None = data.num_classes
    else:
        weights = settings.weights or classes_of
        classes = classes_in(weights) if weights is not None else None
    # Every factory makes networks for 3 channels; only some can be asked for another number.
    in_channels = None if channels == 3 else channels
    try:
        return models.create(settings.model, num_classes=classes, in_channels=in_channels, weights=settings.weights)
    except RuntimeError as error:  # torch's, where the sizes are absurd
        raise ValueError(f"model {settings.model!r} cannot be made for {channels} channels: {error}") from error


def check_fit(model: nn.Module, name: str, shape: tuple[int, int, int], *, training: bool = False) -> None:
    """Refuse a network that cannot take the images, before anything is written or traced.

    Args:
        model: the network; not changed.
        name: what the user calls it.
        shape: (C, H, W) of the images.
        training: try it in train mode, in which auxiliary heads run too.

    Raises:
        ValueError: with the network's own words.
    """
    trial = copy.deepcopy(model).train(training)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trial(torch.zeros(2, *shape, device=next((p.device for p in model.parameters()), None)))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # whatever the model's own code raises
        raise ValueError(
            f"model {name!r} cannot take images of {'x'.join(map(str, shape))}: {error}; give images of another "
            "size (--input, --image_size) or another model"
        ) from error


def check_recipe(config: TrainConfig, device: torch.device) -> None:
    """Refuse a recipe that no training can follow, before anything is written."""
    Placement(device, config.precision, config.channels_last)
    if config.sync_bn and device.type != "cuda":
        raise ValueError("sync_bn: torch synchronises batch statistics on CUDA only; leave it out on the CPU")


def classes_in(weights: str) -> int | None:
    """The number of classes that the last linear layer in a weights file has."""
    matrices = [tensor for tensor in models.read_weights(weights).values() if tensor.dim() == 2]
    return matrices[-1].shape[0] if matrices else None


def example_of(shape: tuple[int, int, int]) -> Tensor:
    """A random batch of one image."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


# --- the commands ---------------------------------------------------------------------------------------------------


def run_train(values: dict[str, Any], given: set[str]) -> int:
    """Train a network from scratch, or from weights."""
    if values["resume"]:
        values = resumed(values, given, "train")
    settings, config = pick(NetworkSettings, values), pick(TrainConfig, values)
    needed(model=settings.model, data=settings.data, out=settings.out)
    check_recipe(config, choose_device(settings.device))
    peers = Distributed.from_environment()
    data = open_data(str(settings.data), settings)
    torch.manual_seed(settings.seed)
    model = build_model(settings, data)
    check_fit(model, settings.model, data.shape, training=True)
    written = save_config(settings, "train", plain(asdict(config)))
    with run_directory(settings.out, written, peers, resume=values["resume"]) as run:
        train(
            model,
            data,
            config,
            run=run,
            seed=settings.seed,
            device=settings.device,
            distributed=peers,
            resume=values["resume"],
        )
    result = measure({"model": model}, data, settings.device, peers)
    report(result, values["json"], peers, Path(str(settings.out)))
    return 0


def run_prune(values: dict[str, Any], given: set[str]) -> int:
    """Prune a trained network."""
    if values["resume"]:
        values = resumed(values, given, "prune")
        if (Path(values["out"]) / FINETUNE_CONFIG).exists():
            raise ValueError(
                f"{values['out']!r} is pruned, and its weights have been fine-tuned since: "
                f"go on with fastprune finetune --run {values['out']} --resume"
            )
    settings = pick(PruneSettings, continued(values, given))
    needed(model=settings.model, out=settings.out)
    method = registry.load(settings.method)
    options = method_options(method, values.get(settings.method))
    if method.needs_data and not settings.data:
        raise ValueError(f"--data is needed: method {settings.method!r} searches on training data")
    Budget.parse(settings.budget)
    limits, conditions = settings.limits, settings.conditions
    recipe = None if settings.recipe is None or values["resume"] else read_recipe(settings.recipe)
    peers = Distributed.from_environment()
    data = open_data(settings.data, settings) if settings.data else None
    torch.manual_seed(settings.seed)
    shape, before = input_shape(settings, data), None
    if settings.from_run is None:
        model = build_model(settings, data)
    else:
        base = RunDirectory.open(settings.from_run, peers)
        model, before = compact_of(base, settings, data), PruningPlan.load(base.plan_path)
    check_fit(model, settings.model, shape)
    result = prune(
        model,
        example_of(shape),
        method=method,
        budget=settings.budget,
        data=data,
        out=settings.out,
        resume=values["resume"],
        seed=settings.seed,
        device=settings.device,
        precision=settings.precision,
        channels_last=settings.channels_last,
        rewrite=not settings.keep_class,
        ignore=settings.ignore,
        limits=limits,
        conditions=conditions,
        after=before,
        exact=not settings.inexact,
        run_config=save_config(settings, "prune", {} if recipe is None else recipe.sections),
        **options,
    )
    compared = measure({"baseline": model, "compact": result.model}, data, settings.device, peers)
    begun_with = result.graph.cost()  # with --from_run that of a compact network already
    compared["baseline"] |= {"macs": round(float(begun_with.macs)), "params": round(float(begun_with.params))}
    compared["compact"] |= {what: result.metrics[what]["planned"] for what in ("macs", "params")}
    for name, column in (("baseline", "full"), ("compact", "planned")):
        times = {"ms", "measured_ms"} & result.metrics.keys()
        compared[name] |= {what: result.metrics[what][column] for what in times}
    run = RunDirectory.open(str(settings.out), peers)
    run.log({"stage": "result", "method": settings.method, "budget": settings.budget, **compared})
    if not result.plan.exact:
        difference, operators = result.metrics["difference"], list(result.graph.inexact)
        if values["json"]:
            compared["inexact"] = {"difference": difference, "operators": operators}
        elif peers.is_main:
            tables.print_difference(difference, operators)
    report(compared, values["json"], peers, run.path)
    return 0


def run_finetune(values: dict[str, Any], given: set[str]) -> int:
    """Train the compact network of a run; its weights replace the run's at the end."""
    settings = pick(FinetuneSettings, values)
    needed(run=settings.run)
    peers = Distributed.from_environment()
    run = RunDirectory.open(settings.run, peers)
    config = pick(FinetuneConfig, {**values, **fine_tuning_of(run, given)})
    recipe = run.path / FINETUNE_CONFIG
    if values["resume"]:
        only_resumed(given, "run", recipe)
        written = read_yaml(recipe)
        anew = {name: values[name] for name in ("run", *({"device"} & given))}
        settings, config = pick(FinetuneSettings, {**written, **anew}), pick(FinetuneConfig, written)
    check_recipe(config, choose_device(settings.device))
    origin = pick(NetworkSettings, run.config)
    data = data_of(origin, settings.data)
    torch.manual_seed(settings.seed)
    compact = compact_of(run, origin, data, trained=not config.from_scratch)
    check_fit(compact, origin.model, data.shape, training=True)
    if peers.is_main and not values["resume"]:
        # An earlier fine-tuning's checkpoints must not outlive its recipe: a resumed run would take up the wrong one.
        shutil.rmtree(run.checkpoints_path("finetune"), ignore_errors=True)
        atomic.write_text(recipe, yaml.safe_dump(save_config(settings, "finetune", plain(asdict(config)))))
    try:
        train(
            compact, data, config, run=run, seed=settings.seed, device=settings.device, distributed=peers,
            resume=values["resume"], stage="finetune",
        )  # fmt: skip
    except Exception:
        if peers.is_main and not values["resume"] and not took_steps(run, "finetune"):
            recipe.unlink()
            shutil.rmtree(run.checkpoints_path("finetune"), ignore_errors=True)
        raise
    result = measure({"compact": compact}, data, settings.device, peers)
    run.log({"stage": "result", "method": "finetune", **result})
    report(result, values["json"], peers, run.path)
    return 0


def run_evaluate(values: dict[str, Any], given: set[str]) -> int:
    """Measure networks on the test set."""
    settings = pick(EvaluateSettings, values)
    peers = Distributed.from_environment()
    if settings.run is None:
        needed(model=settings.model, data=settings.data)
        data = load_data(str(settings.data))
        networks = {"model": build_model(settings, data)}
        name = settings.model
    else:
        own = sorted({"model", "weights", "input"} & given)
        if own:
            raise ValueError(f"--run {settings.run} has a network of its own: leave out --{own[0]}, or --run")
        run = RunDirectory.open(settings.run, peers)
        origin = pick(NetworkSettings, run.config)
        data = data_of(origin, settings.data)
        name = origin.model
        if run.config.get("command") == "train":
            origin.weights = str(run.model_path)
            networks = {"model": build_model(origin, data)}
        else:
            networks = {"baseline": build_model(origin, data), "compact": compact_of(run, origin, data)}
    for network in networks.values():
        check_fit(network, name, data.shape)
    results = measure(networks, data, settings.device, peers)
    for name, network in networks.items():
        results[name] |= size_of(network, data.shape)
    report(results, values["json"], peers, None)
    return 0


def run_report(values: dict[str, Any], given: set[str]) -> int:
    """Draw the searches and widths of pruning runs, as a page with figures."""
    settings = pick(ReportSettings, values)
    needed(run=settings.run)
    places = settings.run or ()
    runs = read_runs(places)
    if len(runs) > 1:
        needed(out=settings.out)
    folder = Path(settings.out) if settings.out else RunDirectory.open(places[0]).report_path
    made = summary(write_report(runs, folder))
    if values["json"]:
        print(json.dumps({**made, "report": str(folder / "index.html")}))
    else:
        for name, why in made["left_out"].items():
            print(f"not drawn: {name}. {why}")
        print(f"report: {folder / 'index.html'}")
    return 0


def run_inspect(values: dict[str, Any], given: set[str]) -> int:
    """Show a network's channel groups and what stands in the way of pruning."""
    settings = pick(InspectSettings, values)
    model, shape = build_model(settings, None), input_shape(settings, None)
    check_fit(model, settings.model, shape)
    begun = time.monotonic()
    graph = trace(
        model, example_of(shape), rewrite=not settings.keep_class, ignore=settings.ignore, exact=not settings.inexact
    )
    seconds = time.monotonic() - begun
    if values["json"]:
        print(json.dumps(described(graph, seconds)))
    else:
        tables.print_graph(settings.model, graph)
    return 0


def run_methods(values: dict[str, Any], given: set[str]) -> int:
    """List the methods that are installed."""
    found = registry.available()
    if values["json"]:
        print(json.dumps([asdict(info) for info in found.values()], default=str))
    else:
        tables.print_methods(found.values(), registry.broken())
    return 0


def run_doctor(values: dict[str, Any], given: set[str]) -> int:
    """Say what is installed and whether it works."""
    checks = doctor()
    if values["json"]:
        print(json.dumps(checks))
    else:
        tables.print_checks(checks)
    return 0 if checks["healthy"] else 1


def run_demo(values: dict[str, Any], given: set[str]) -> int:
    """Train, prune and fine-tune a small network on real data, offline."""
    result = demo(pick(DemoSettings, values))
    if values["json"]:
        print(json.dumps(result))
    else:
        tables.print_demo(result)
    return 0


def run_bench_kernels(values: dict[str, Any], given: set[str]) -> int:
    """Time the kernels beside their peers."""
    return timed(lambda: bench_kernels(pick(KernelBenchSettings, values)))


def run_bench_step(values: dict[str, Any], given: set[str]) -> int:
    """Time a step of gate training beside the same in plain PyTorch."""
    return timed(lambda: bench_step(pick(StepBenchSettings, values)))


def run_bench_search(values: dict[str, Any], given: set[str]) -> int:
    """Time the search steps of DMC and DDNP beside the same in plain PyTorch."""
    return timed(lambda: bench_search(pick(SearchBenchSettings, values)))


def run_bench_latency(values: dict[str, Any], given: set[str]) -> int:
    """Compare modelled latencies of random plans with measured ones."""
    settings = pick(LatencyBenchSettings, values)
    model, shape = build_model(settings, None), input_shape(settings, None)
    check_fit(model, settings.model, shape)
    bench_latency(settings, model, shape)
    return 0


def timed(benchmark: Callable[[], object]) -> int:
    """Run a benchmark; the exit code says whether all agreed."""
    try:
        benchmark()
    except BenchmarkError as error:
        print(f"fastprune: error: {error}", file=sys.stderr)
        return 1
    return 0


# --- shared pieces --------------------------------------------------------------------------------------------------


def continued(values: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """The settings of ``prune``; with ``--from_run`` network, input and data are those of the earlier run."""
    if values.get("from_run") is None or values["resume"]:
        return values
    own = sorted({"model", "weights", "recipe"} & given)
    if own:
        raise ValueError(f"--from_run {values['from_run']} has a network of its own: leave out --{own[0]}")
    earlier = RunDirectory.open(values["from_run"]).config
    if earlier.get("command") != "prune":
        raise ValueError(f"--from_run {values['from_run']}: this is a run of 'fastprune {earlier.get('command')}'")
    # The held-out part stays what it was: the earlier run has trained on the rest.
    inherited = {"data", "image_size", "held_out", "seed"} - given
    if not values["data"]:
        inherited.add("input")  # the size that was told for want of images
    return {**values, **{name: earlier.get(name) for name in ("model", "weights", *(inherited - given))}}


def method_options(method: type[Method], values: Any) -> dict[str, Any]:
    """The options of a method as a command line or a file has them, checked."""
    if not isinstance(values or {}, Mapping):
        raise ValueError(f"{method.name}: its options are needed by name, got {values!r}")
    options = dict(values or {})
    try:
        registry.configure(method, options)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return options


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a file of a run."""
    if not path.is_file():
        raise ValueError(f"--resume takes its settings from {path}; there is none, so there is nothing to resume")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{str(path)!r} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} holds no mapping")
    return values


def data_of(origin: NetworkSettings, other: str | None) -> SourceData:
    """The data set of a run, or another one."""
    spec = other or origin.data
    if not spec:
        raise ValueError("--data is needed: the run was made without data")
    if origin.data is None:
        origin.input = None  # the run was told a size because it had no images; these images have their own
    return open_data(spec, origin)


def fine_tuning_of(run: RunDirectory, given: set[str]) -> dict[str, Any]:
    """What the recipe of a run says of its fine-tuning, but for the options in ``given``."""
    section = run.config.get("finetune", {})
    if not isinstance(section, dict):
        raise ValueError(f"{str(run.path / 'config.yaml')!r}: finetune {section!r}: settings by name are needed")
    return {name: value for name, value in section.items() if name not in given}


def compact_of(
    run: RunDirectory, origin: NetworkSettings, data: SourceData | None, *, trained: bool = True
) -> nn.Module:
    """The compact network of a pruning run, with its current weights, or cut out of a random full network."""
    if not run.plan_path.is_file():
        raise ValueError(f"{str(run.path)!r} holds no plan: it is no finished pruning run")
    full = build_model(ModelSettings(origin.model, None, origin.input), data, classes_of=str(run.model_path))
    compact = apply(PruningPlan.load(run.plan_path), full, check=False)  # verified when the run was made
    if trained:
        models.load_weights(compact, run.model_path)
    return compact.eval()


def size_of(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, int]:
    """MACs and parameters of a network, counted on itself."""
    cost = trace(model, example_of(shape)).cost()
    return {"macs": round(float(cost.macs)), "params": round(float(cost.params))}


def measure(
    networks: Mapping[str, nn.Module], data: SourceData | None, device: str, peers: Distributed
) -> dict[str, dict[str, Any]]:
    """Top-1 accuracy of each network on the test set; nothing where there are no data."""
    if data is None:
        return {name: {} for name in networks}
    placement = Placement(choose_device(device))
    return {
        name: {"accuracy": evaluate(placement.model(network), data, placement=placement, distributed=peers)["accuracy"]}
        for name, network in networks.items()
    }


def report(results: Mapping[str, Mapping[str, Any]], as_json: bool, peers: Distributed, path: Path | None) -> None:
    """Print results once, for people or for programs."""
    if not peers.is_main:
        return
    if as_json:
        print(json.dumps({**results, **({"run": str(path)} if path else {})}))
    else:
        tables.print_results(results)
        if path is not None:
            print(f"run directory: {path}")


def described(graph: ChannelGraph, seconds: float) -> dict[str, Any]:
    """A channel graph as JSON values."""
    cost = graph.cost()
    return {
        "macs": round(float(cost.macs)),
        "params": round(float(cost.params)),
        "units": graph.num_units,
        "groups": [{k: v for k, v in asdict(group).items() if k != "start"} for group in graph.groups],
        "layers": [
            {"layer": row.layer, "kind": row.kind, "macs": row.macs, "groups": list(row.groups), "kept": row.reason}
            for row in graph.table()
        ],
        "exact": graph.exact,
        "inexact": list(graph.inexact),
        "unprunable": [{"layer": layer, "reason": reason} for layer, reason in graph.unprunable],
        "seconds": round(seconds, 3),
    }


@dataclass(frozen=True)
class Command:
    """One command; its settings become flags."""

    run: Callable[[dict[str, Any], set[str]], int]
    settings: tuple[type[Any], ...] = ()
    takes_method: bool = False
    resumes: bool = False

    @property
    def help(self) -> str:
        """The first line of what it does."""
        return str(self.run.__doc__).strip()


FAMILIES = {"bench": "Measure how fast kernels, search steps and networks are."}
"""First words of commands that have two."""

COMMANDS: dict[str, Command] = {
    "train": Command(run_train, (NetworkSettings, TrainConfig), resumes=True),
    "methods": Command(run_methods),
    "inspect": Command(run_inspect, (InspectSettings,)),
    "prune": Command(run_prune, (PruneSettings,), takes_method=True, resumes=True),
    "finetune": Command(run_finetune, (FinetuneSettings, FinetuneConfig), resumes=True),
    "evaluate": Command(run_evaluate, (EvaluateSettings,)),
    "report": Command(run_report, (ReportSettings,)),
    "bench kernels": Command(run_bench_kernels, (KernelBenchSettings,)),
    "bench step": Command(run_bench_step, (StepBenchSettings,)),
    "bench search": Command(run_bench_search, (SearchBenchSettings,)),
    "bench latency": Command(run_bench_latency, (LatencyBenchSettings,)),
    "doctor": Command(run_doctor),
    "demo": Command(run_demo, (DemoSettings,)),
}
