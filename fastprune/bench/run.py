"""Benchmarks from their cases to tables and a JSON document."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastprune.bench import EVALUATIONS, KERNELS, SEARCH, STEP, TRAINING, report
from fastprune.bench.align import overheads
from fastprune.bench.case import OURS, Case, check_agreement
from fastprune.bench.ceilings import Ceilings
from fastprune.bench.search import METHODS
from fastprune.bench.settings import PROCESSOR_TIME, check_folder, check_processor_time
from fastprune.bench.timing import Clock, Timing, interleaved, rotating
from fastprune.engine import choose_device
from fastprune.host import atomic
from fastprune.options import LARGEST_SEED, SEVERAL, SWITCH, check, option

QUICK_ROUNDS = 5


@dataclass
class BenchSettings:
    """What all benchmarks may be told."""

    device: str = option("cpu", "device to measure on: auto, cpu, cuda or cuda:N")
    quick: bool = option(False, "time a few rounds of a small case, to see that it runs; not to compare", flag=SWITCH)
    seconds: float | None = option(
        None, "begin no case after a benchmark has taken this many seconds; name the cases left out", above=0.0
    )
    compile_seconds: float | None = option(
        None, "once torch.compile has taken this many seconds, time the later cases without it", above=0.0
    )
    seed: int = option(0, "seed of the inputs", minimum=0, maximum=LARGEST_SEED)
    json: str | None = option(None, "file to write the numbers to as well")

    def __post_init__(self) -> None:
        check(self)
        check_folder("json", self.json)


@dataclass
class KernelBenchSettings(BenchSettings):
    """Time the kernels."""

    only: tuple[str, ...] = option((), "kernels to time; all without it", choices=KERNELS, flag=SEVERAL)


@dataclass
class StepBenchSettings(BenchSettings):
    """Time a step of gate training."""


@dataclass
class SearchBenchSettings(BenchSettings):
    """Time the search steps of DMC and DDNP."""

    only: tuple[str, ...] = option((), "methods to time; all without it", choices=METHODS, flag=SEVERAL)
    processor_time: bool = option(False, PROCESSOR_TIME, flag=SWITCH)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.processor_time:
            check_processor_time(self.device)


@dataclass
class AlignBenchSettings(BenchSettings):
    """Time what SANP adds to a step of training."""


@dataclass
class SubnetsBenchSettings(BenchSettings):
    """Time the evaluations of SP's search."""


def bench_kernels(settings: KernelBenchSettings) -> dict[str, Any]:
    """Time kernels; see ``bench``."""
    return bench(settings, {name: KERNELS[name] for name in settings.only or KERNELS})


def bench_step(settings: StepBenchSettings) -> dict[str, Any]:
    """Time a step of gate training; see ``bench``."""
    return bench(settings, STEP)


def bench_search(settings: SearchBenchSettings) -> dict[str, Any]:
    """Time search steps; see ``bench``."""
    only = settings.only or tuple(METHODS)
    return bench(
        settings,
        {name: partial(cases, only=only, processor_time=settings.processor_time) for name, cases in SEARCH.items()},
    )


def bench_align(settings: AlignBenchSettings) -> dict[str, Any]:
    """Time what SANP adds to a step of training; see ``bench``. The document says the ``overheads``, too."""
    return bench(settings, TRAINING)


def bench_subnets(settings: SubnetsBenchSettings) -> dict[str, Any]:
    """Time the evaluations of SP's search; see ``bench``."""
    return bench(settings, EVALUATIONS)


def bench(settings: BenchSettings, benchmarks: Mapping[str, Callable[..., Iterable[Case]]]) -> dict[str, Any]:
    """Time benchmarks, print a table for each, and write the document where one is asked for.

    Returns:
        The document, see ``report.document``.

    Raises:
        ValueError: for a device that is not there.
        BenchmarkError: where variants of a case do not agree.
    """
    device = choose_device(settings.device)
    torch.manual_seed(settings.seed)
    ceilings = Ceilings.measured(device, quick=settings.quick)
    results = {}
    generators = [device] if device.type == "cuda" else []
    for name, cases in benchmarks.items():
        with torch.random.fork_rng(devices=generators):  # the same inputs, whichever benchmarks ran before
            results[name] = bench_kernel(
                cases(device, quick=settings.quick),
                ceilings,
                quick=settings.quick,
                seconds=settings.seconds,
                compile_seconds=settings.compile_seconds,
            )
        document = report.document(results, ceilings, quick=settings.quick)
        if "align" in results:
            document["overheads"] = overheads(results["align"]["cases"])
        if settings.json is not None:  # after each: what is measured is not lost where the next one fails
            atomic.write_text(Path(settings.json), json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        report.show(name, document)
        for title, overhead in document.get("overheads", {}).items():
            Console(highlight=False).print(f"{title}: {overhead:+.1%} of the time of training alone")
    return document


def bench_kernel(
    cases: Iterable[Case],
    ceilings: Ceilings,
    *,
    quick: bool = False,
    seconds: float | None = None,
    compile_seconds: float | None = None,
) -> dict[str, Any]:
    """Time one kernel's cases.

    Args:
        cases: what to time.
        ceilings: of the device that the cases are on.
        quick: a few rounds only.
        seconds: no case begins after these.
        compile_seconds: when torch.compile has taken these, later cases do without it.

    Returns:
        ``cases``, ``geometric_means`` of the ratios by peer, the same for each of the cases' ``groups``, and what is
        ``left_out`` with the reason.
    """
    begin, compiling = time.perf_counter(), 0.0
    measured: list[dict[str, Any]] = []
    left_out = []
    try:
        for case in cases:
            if seconds is not None and time.perf_counter() - begin > seconds:
                left_out.append(f"{case.name}: {seconds:g} seconds were over")
                continue
            if compile_seconds is not None and case.compiled and compiling > compile_seconds:
                left_out.append(f"{case.name}, compiled: {compile_seconds:g} seconds of compiling were over")
                case = case.without_compiled()
            measured.append(bench_case(case, ceilings, quick=quick))
            compiling += sum(variant.seconds or 0.0 for variant in case.compiled)
    except ModuleNotFoundError as error:  # the rest's networks are another package's
        left_out.append(str(error))
    return {
        "cases": measured,
        "geometric_means": report.geometric_means(measured),
        "groups": report.grouped_means(measured),
        "left_out": left_out,
    }


def bench_case(case: Case, ceilings: Ceilings, *, quick: bool = False) -> dict[str, Any]:
    """Check that the variants of a case agree, time them, and say what the times mean."""
    if case.compiled:
        # Or else torch.compile would take this case for a new size of the last one and, after eight, stop compiling.
        torch.compiler.reset()
    failures = check_agreement(case)
    variants = {name: variant for name, variant in case.variants.items() if name not in failures}
    cache = ceilings.cache_bytes
    timings = interleaved(
        variants,
        case.draw if case.fresh else rotating(case.draw, cache),
        Clock(
            ceilings.device,
            events=case.clock == "events",
            processor=case.clock == "processor",
            flush=2 * cache if case.cold else 0,
        ),
        rounds=QUICK_ROUNDS if quick else case.rounds,
        seconds=case.seconds,
    )
    return described(case, ceilings, timings, failures)


def described(case: Case, ceilings: Ceilings, timings: dict[str, Timing], failures: dict[str, str]) -> dict[str, Any]:
    """One case for programs."""
    least = ceilings.least_seconds(case.bytes, case.flops, case.precision)
    ours = timings[OURS]
    return {
        "name": case.name,
        "shape": dict(case.shape),
        "precision": case.precision,
        "clock": "wall" if case.clock == "events" and ceilings.device.type != "cuda" else case.clock,
        "cache": "cold" if case.cold else "fresh inputs" if case.fresh else "rotating inputs",
        "bytes": case.bytes,
        "flops": case.flops,
        "units": case.units,
        "samples": case.samples,
        "groups": list(case.groups),
        "roofline_seconds": least,
        "rounds": len(ours.seconds),
        "variants": {
            name: {
                "median_seconds": timing.median,
                "quartiles_seconds": timing.quartiles,
                "share_of_roofline": least / timing.median,
                **({} if case.samples is None else {"samples_per_second": case.samples / timing.median}),
            }
            for name, timing in timings.items()
        },
        "ratios": {
            name: {"ratio": timing.median / ours.median, "quartiles": timing.spread_over(ours)}
            for name, timing in timings.items()
            if name != OURS
        },
        "failures": failures,
        "more": dict(case.more()) if case.more is not None else {},
    }


def main(name: str) -> None:
    """One benchmark as a program. Plain argparse: on a bare GPU machine there is little more than torch."""
    parser = argparse.ArgumentParser(description=f"Time {name} beside its peers.")
    for f in fields(BenchSettings):
        flag = f.metadata["flag"] or {
            "type": {"seed": int, "seconds": float, "compile_seconds": float}.get(f.name, str)
        }
        parser.add_argument(f"--{f.name}", default=f.default, help=f.metadata["help"], **flag)
    bench(
        BenchSettings(**vars(parser.parse_args())),
        {name: {**KERNELS, **STEP, **SEARCH, **TRAINING, **EVALUATIONS}[name]},
    )
