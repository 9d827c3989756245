"""Runs of benchmarks: from cases to tables and a JSON document."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastprune.bench import KERNELS, SEARCH, STEP, report
from fastprune.bench.case import OURS, Case, check_agreement
from fastprune.bench.ceilings import Ceilings
from fastprune.bench.search import METHODS
from fastprune.bench.settings import PROCESSOR_TIME, check_folder, check_processor_time
from fastprune.bench.step import NETWORKS as STEP_NETWORKS
from fastprune.bench.timing import Clock, Timing, rotate_inputs, time_in_turns
from fastprune.engine import choose_device
from fastprune.host import atomic
from fastprune.options import LARGEST_SEED, SEVERAL, SWITCH, check, option

QUICK_ROUNDS = 5


@dataclass
class BenchSettings:
    """The options of all benchmarks."""

    device: str = option("cpu", "device to measure on: auto, cpu, cuda or cuda:N")
    quick: bool = option(False, "run a few rounds of a small case as a check; the numbers mean little", flag=SWITCH)
    seconds: float | None = option(
        None, "begin no further case of a benchmark after this time, and name the cases left out", above=0.0
    )
    compile_seconds: float | None = option(
        None, "drop torch.compile from later cases after this time of compiling", above=0.0
    )
    no_compile: bool = option(False, "leave torch.compile out", flag=SWITCH)
    seed: int = option(0, "seed of the inputs", minimum=0, maximum=LARGEST_SEED)
    json: str | None = option(None, "file for the numbers")

    def __post_init__(self) -> None:
        check(self)
        check_folder("json", self.json)


@dataclass
class KernelBenchSettings(BenchSettings):
    """Time the kernels."""

    only: tuple[str, ...] = option((), "kernels to time; default: all", choices=KERNELS, flag=SEVERAL)


@dataclass
class StepBenchSettings(BenchSettings):
    """Time a step of gate training."""

    only: tuple[str, ...] = option(
        (), "networks to time; default: all; quick has its own", choices=STEP_NETWORKS, flag=SEVERAL
    )


@dataclass
class SearchBenchSettings(BenchSettings):
    """Time the search steps of DMC and DDNP."""

    only: tuple[str, ...] = option((), "methods to time; default: all", choices=METHODS, flag=SEVERAL)
    processor_time: bool = option(False, PROCESSOR_TIME, flag=SWITCH)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.processor_time:
            check_processor_time(self.device)


def bench_kernels(settings: KernelBenchSettings) -> dict[str, Any]:
    """Time kernels with ``bench``."""
    return bench(settings, {name: KERNELS[name] for name in settings.only or KERNELS})


def bench_step(settings: StepBenchSettings) -> dict[str, Any]:
    """Time a step of gate training with ``bench``."""
    return bench(settings, {name: partial(cases, only=settings.only) for name, cases in STEP.items()})


def bench_search(settings: SearchBenchSettings) -> dict[str, Any]:
    """Time search steps with ``bench``."""
    only = settings.only or tuple(METHODS)
    return bench(
        settings,
        {name: partial(cases, only=only, processor_time=settings.processor_time) for name, cases in SEARCH.items()},
    )


def bench(settings: BenchSettings, benchmarks: Mapping[str, Callable[..., Iterable[Case]]]) -> dict[str, Any]:
    """Time benchmarks, print a table for each, and write the document to ``settings.json`` after every case.

    Returns:
        The document of ``report.document``.

    Raises:
        ValueError: if the device is missing.
        BenchmarkError: if variants of a case disagree.
    """
    device = choose_device(settings.device)
    torch.manual_seed(settings.seed)
    ceilings = Ceilings.measure(device, quick=settings.quick)
    results: dict[str, Any] = {}
    document: dict[str, Any] = {}
    generators = [device] if device.type == "cuda" else []
    for name, cases in benchmarks.items():
        with torch.random.fork_rng(devices=generators):  # inputs do not depend on earlier benchmarks
            for results[name] in bench_cases(
                cases(device, quick=settings.quick),
                ceilings,
                quick=settings.quick,
                seconds=settings.seconds,
                compile_seconds=0.0 if settings.no_compile else settings.compile_seconds,
            ):
                document = report.document(results, ceilings, quick=settings.quick)
                if settings.json is not None:  # a later case may fail, or the time may be over
                    atomic.write_text(Path(settings.json), json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        report.show(name, document)
    return document


def bench_cases(
    cases: Iterable[Case],
    ceilings: Ceilings,
    *,
    quick: bool = False,
    seconds: float | None = None,
    compile_seconds: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Time the cases of one benchmark; yield the results so far after each case, and once more at the end.

    Args:
        cases: cases to time.
        ceilings: ceilings of the device that the cases run on.
        quick: whether to run only a few rounds.
        seconds: time after which no further case begins.
        compile_seconds: time of compiling after which later cases drop torch.compile; 0 = all do.

    Yields:
        ``cases``, ``geometric_means`` of the ratios by peer, the means of each of the cases' ``groups``, and
        ``left_out`` with the reasons.
    """
    begin, compiling = time.perf_counter(), 0.0
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []

    def results() -> dict[str, Any]:
        means = {"geometric_means": report.geometric_means(rows), "groups": report.grouped_means(rows)}
        return {"cases": rows, **means, "left_out": left_out}

    try:
        for case in cases:
            if seconds is not None and time.perf_counter() - begin > seconds:
                left_out.append(f"{case.name}: the {seconds:g} seconds are over")
                continue
            if compile_seconds is not None and case.compiled and compiling >= compile_seconds:
                over = f"the {compile_seconds:g} seconds of compiling are over" if compile_seconds else "not wanted"
                left_out.append(f"{case.name}, compiled: {over}")
                case = case.drop_compiled()
            rows.append(bench_case(case, ceilings, quick=quick))
            compiling += sum(variant.seconds or 0.0 for variant in case.compiled)
            yield results()
    except ModuleNotFoundError as error:  # networks of the remaining cases need another package
        left_out.append(str(error))
    yield results()


def bench_case(case: Case, ceilings: Ceilings, *, quick: bool = False) -> dict[str, Any]:
    """Check that the variants of a case agree, time them, and describe the times."""
    if case.compiled:
        # Otherwise torch.compile takes this case for a new size of the last one and stops compiling after eight.
        torch.compiler.reset()
    failures = check_agreement(case)
    variants = {name: variant for name, variant in case.variants.items() if name not in failures}
    cache = ceilings.cache_bytes
    timings = time_in_turns(
        variants,
        case.draw if case.fresh else rotate_inputs(case.draw, cache),
        Clock(
            ceilings.device,
            events=case.clock == "events",
            processor=case.clock == "processor",
            flush=2 * cache if case.cold else 0,
        ),
        rounds=QUICK_ROUNDS if quick else case.rounds,
        seconds=case.seconds,
    )
    return describe(case, ceilings, timings, failures)


def describe(case: Case, ceilings: Ceilings, timings: dict[str, Timing], failures: dict[str, str]) -> dict[str, Any]:
    """Return the row of one case for programs."""
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
            name: {"ratio": timing.median / ours.median, "quartiles": timing.ratio_quartiles(ours)}
            for name, timing in timings.items()
            if name != OURS
        },
        "failures": failures,
        "more": dict(case.more()) if case.more is not None else {},
    }


def run_program(
    benchmarks: Mapping[str, Callable[..., Iterable[Case]]], arguments: Sequence[str] | None = None
) -> dict[str, Any]:
    """Run benchmarks as a program with plain argparse, since a bare GPU machine has little more than torch.

    Args:
        benchmarks: functions that yield cases, by name.
        arguments: command line without the program's name; None = that of the process.

    Returns:
        The document of ``bench``.
    """
    parser = argparse.ArgumentParser(description=f"Time {', '.join(benchmarks)} beside their peers.")
    for f in fields(BenchSettings):
        flag = f.metadata["flag"] or {
            "type": {"seed": int, "seconds": float, "compile_seconds": float}.get(f.name, str)
        }
        parser.add_argument(f"--{f.name}", default=f.default, help=f.metadata["help"], **flag)
    return bench(BenchSettings(**vars(parser.parse_args(arguments))), benchmarks)
