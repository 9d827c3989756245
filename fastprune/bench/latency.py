"""Errors of modelled latencies: random plans of a network are cut, and the compact networks timed."""

from __future__ import annotations

import datetime as dt
import json
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastprune.bench.settings import PROCESSOR_TIME, check_folder, check_processor_time
from fastprune.engine import Placement, choose_device, measure_latencies
from fastprune.graph import ChannelGraph, trace
from fastprune.graph.latency.calls import time_on_host
from fastprune.graph.latency.model import LatencyModel
from fastprune.graph.latency.timing import measure
from fastprune.host import atomic
from fastprune.host.machine import machine
from fastprune.options import LARGEST_SEED, SWITCH, check, option
from fastprune.surgery import cut


@dataclass
class LatencyBenchSettings:
    """Compare modelled latencies with measured ones."""

    model: str = option("torchvision:resnet50", "resnet20, torchvision:NAME, timm:NAME or package.module:factory")
    weights: str | None = option(None, "file of trained weights (.safetensors, .pt, .pth); random weights without it")
    input: str | None = option(None, "size of one image, CxHxW; by default the model's usual size")
    batch: int = option(1, "images per pass", minimum=1)
    plans: int = option(5, "number of random plans", minimum=1)
    repeats: int = option(30, "passes of each network, in turns", minimum=1)
    device: str = option("cpu", "device to measure on: auto, cpu, cuda or cuda:N")
    channels_last: bool = option(False, "store weights and images in channels_last", flag=SWITCH)
    processor_time: bool = option(False, PROCESSOR_TIME, flag=SWITCH)
    no_cache: bool = option(False, "measure every layer anew and store nothing", flag=SWITCH)
    seed: int = option(0, "seed of the plans", minimum=0, maximum=LARGEST_SEED)
    json: str | None = option(None, "file for the numbers")

    def __post_init__(self) -> None:
        check(self)
        if self.processor_time:
            check_processor_time(self.device)
        check_folder("json", self.json)


def bench_latency(settings: LatencyBenchSettings, model: nn.Module, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Measure the layers and the whole networks, print the errors, and write the document to ``settings.json``.

    Args:
        settings: the options.
        model: the network.
        shape: (C, H, W) of one image.

    Returns:
        The document: facts, a row for each network, the median error of the plans.

    Raises:
        ValueError: if no channel of the network can go, or the device is missing.
    """
    device = choose_device(settings.device)
    model = model.eval()
    graph = trace(model, torch.zeros(1, *shape))
    if not graph.groups:
        raise ValueError(f"model {settings.model!r}: no channel can go, so there is nothing to model")
    begin = time.perf_counter()
    modelled = latency_model(settings, graph, device)
    seconds = time.perf_counter() - begin
    masks = {"full network": torch.ones(graph.num_units)}
    generator = torch.Generator().manual_seed(settings.seed)
    masks |= {f"plan {number + 1}": random_mask(graph, generator) for number in range(settings.plans)}
    milliseconds = time_networks(settings, model, graph, masks, shape, device)
    rows = [row(name, graph, mask, float(modelled(mask)), milliseconds[name]) for name, mask in masks.items()]
    document = {
        **describe(settings, shape, device),
        "seconds": seconds,
        "overhead_ms": modelled.overhead,
        "rows": rows,
        "median_error": statistics.median(abs(r["error"]) for r in rows[1:]),
    }
    if settings.json is not None:
        atomic.write_text(Path(settings.json), json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    show(document)
    return document


def time_networks(
    settings: LatencyBenchSettings,
    model: nn.Module,
    graph: ChannelGraph,
    masks: Mapping[str, Tensor],
    shape: tuple[int, int, int],
    device: torch.device,
) -> dict[str, float]:
    """Cut the plans and return the milliseconds of all networks."""
    networks = {
        name: cut(graph.plan(mask), model, graph.traced).model if name.startswith("plan") else model
        for name, mask in masks.items()
    }
    placement = Placement(device, channels_last=settings.channels_last)
    networks = {name: placement.model(network) for name, network in networks.items()}
    clock = time.thread_time if settings.processor_time else time.perf_counter
    return measure_latencies(networks, shape, batch=settings.batch, repeats=settings.repeats, clock=clock)


def describe(settings: LatencyBenchSettings, shape: tuple[int, int, int], device: torch.device) -> dict[str, Any]:
    """Return the facts about a run that a reader of its numbers needs."""
    return {
        "model": settings.model,
        "input": list(shape),
        "batch": settings.batch,
        "device": device.type,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "channels_last": settings.channels_last,
        "clock": "processor time" if settings.processor_time else "wall time",
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0],
    }


def latency_model(settings: LatencyBenchSettings, graph: ChannelGraph, device: torch.device) -> LatencyModel:
    """Return the model for the settings' layout and clock."""
    if settings.processor_time:  # measure anew: the cache holds wall time
        timer = partial(time_on_host, clock=time.thread_time)
        layout = settings.channels_last
        return measure(graph, device, settings.batch, torch.float32, channels_last=layout, cache=False, timer=timer)
    return graph.latency(device, settings.batch, channels_last=settings.channels_last, cache=not settings.no_cache)


def random_mask(graph: ChannelGraph, generator: torch.Generator) -> Tensor:
    """Return a mask [U] that keeps a random number of random units in each group, at least one."""
    mask = torch.zeros(graph.num_units)
    for group in graph.groups:
        width = int(torch.randint(1, group.size + 1, (1,), generator=generator))
        mask[group.start + torch.randperm(group.size, generator=generator)[:width]] = 1
    return mask


def row(name: str, graph: ChannelGraph, mask: Tensor, modelled: float, measured: float) -> dict[str, Any]:
    """Return the row of one network for programs."""
    return {
        "name": name,
        "macs": float(graph.cost(mask).macs / graph.cost().macs),
        "modelled_ms": modelled,
        "measured_ms": measured,
        "error": modelled / measured - 1,
    }


def show(document: Mapping[str, Any]) -> None:
    """Print the table, with the machine and the settings above it."""
    console = Console(markup=False, highlight=False)
    threads = f", {document['threads']} thread(s)" if document["device"] == "cpu" else ""
    console.print(
        f"{document['model']}, batch {document['batch']}, on {document['machine']}{threads}, "
        f"torch {document['torch']}, {document['clock']}; load {document['load_average']:.1f}; "
        f"layers measured or read in {document['seconds']:.1f} s",
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("network")
    for heading in ("MACs", "modelled, ms", "measured, ms", "error"):
        table.add_column(heading, justify="right")
    for found in document["rows"]:
        times = f"{found['modelled_ms']:.3g}", f"{found['measured_ms']:.3g}"
        table.add_row(found["name"], f"{100 * found['macs']:.0f} %", *times, f"{100 * found['error']:+.1f} %")
    console.print(table)
    console.print(f"median error of the plans: {100 * document['median_error']:.1f} %")
