"""The command, the program and the document: numbers that are consistent."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastprune import _C
from fastprune.bench import KERNELS, OURS, Case, Compiled, report
from fastprune.bench.ceilings import Ceilings
from fastprune.bench.run import bench_case, bench_cases
from fastprune.cli.main import main

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ceilings() -> Ceilings:
    return Ceilings.measure(CPU, quick=True)


def check(kernel: dict[str, Any]) -> None:
    """Check the properties of every result."""
    assert kernel["cases"]
    for case in kernel["cases"]:
        medians = {name: found["median_seconds"] for name, found in case["variants"].items()}
        assert OURS in medians
        for name, found in case["variants"].items():
            low, high = found["quartiles_seconds"]
            assert 0 < low <= medians[name] <= high
            assert found["share_of_roofline"] > 0
            assert math.isclose(found["share_of_roofline"] * medians[name], case["roofline_seconds"])
        assert set(case["ratios"]) == set(medians) - {OURS}
        for name, found in case["ratios"].items():
            assert math.isclose(found["ratio"], medians[name] / medians[OURS])
            assert 0 < found["quartiles"][0] <= found["quartiles"][1]
        assert case["rounds"] >= 5
    check_means(kernel["geometric_means"], kernel["cases"])
    assert set(kernel["groups"]) == {group for case in kernel["cases"] for group in case["groups"]}
    for group, means in kernel["groups"].items():
        check_means(means, [case for case in kernel["cases"] if group in case["groups"]])


def check_means(means: dict[str, Any], cases: list[dict[str, Any]]) -> None:
    """Check that each mean covers the cases that have the peer."""
    assert set(means) == {name for case in cases for name in case["ratios"]}
    for name, mean in means.items():
        ratios = [case["ratios"][name]["ratio"] for case in cases if name in case["ratios"]]
        assert mean["cases"] == len(ratios)
        assert math.isclose(mean["ratio"] ** len(ratios), math.prod(ratios), rel_tol=1e-6)


class Traffic(TorchDispatchMode):
    """A count of the bytes that operators take and return."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)]
        self.bytes += sum(tensor.nbytes for tensor in tensors)
        return result


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_roofline_is_above_the_work_of_plain_torch(kernel: str) -> None:
    """The work is counted: measured shares depend on other jobs of the machine."""
    for case in KERNELS[kernel](CPU, quick=True):
        plain, inputs = next(iter(case.variants.values())), case.draw()
        with FlopCounterMode(display=False) as counter, Traffic() as traffic:
            plain(*inputs)
        assert case.flops <= counter.get_total_flops()
        assert 0 < case.bytes <= traffic.bytes


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_command_times_every_kernel(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "numbers.json"
    assert main(["bench", "kernels", "--quick", "--device", device, "--json", str(file)]) == 0
    document = json.loads(file.read_text(encoding="utf-8"))
    assert list(document["kernels"]) == list(KERNELS)
    for kernel in document["kernels"].values():
        check(kernel)
        assert kernel["left_out"] == []
    assert document["device"] == device
    assert document["threads"] == torch.get_num_threads()
    assert document["torch"] == torch.__version__
    assert document["build"] == _C.build_info()
    assert document["quick"] is True
    assert min(document["ceilings"]["matmul_flops_per_second"].values()) > 0
    out = capsys.readouterr().out
    for name in KERNELS:
        assert f"{name} on {document['machine']}" in out
    assert "geometric mean" in out
    assert "GFLOP/s float32" in out
    assert "of roofline" in out


def test_the_command_times_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "step on" in out
    for text in ("all gates open", "half of the gates closed"):
        assert f"geometric mean, {text}" in out


def test_only_the_kernels_of_only_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--quick", "--only", "topk_mask"]) == 0
    assert capsys.readouterr().out.count("geometric mean") == 1


@pytest.mark.slow
@pytest.mark.parametrize("program", ["align", "subnets"])
def test_programs_need_little_more_than_torch(program: str, tmp_path: Path) -> None:
    """A bare GPU machine lacks the dependencies of the command line."""
    run = f"runpy.run_path({str(ROOT / 'bench' / f'{program}.py')!r}, run_name='__main__')"
    options = ["--device", "cpu", "--quick", "--seconds", "60", "--json", str(tmp_path / "numbers.json")]
    code = f"import runpy, sys; sys.modules['jsonargparse'] = None; {run}"
    subprocess.run([sys.executable, "-c", code, *options], check=True, capture_output=True)
    document = json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))
    check(document["kernels"][program])
    assert list(document["kernels"]) == [program]


def test_a_case_that_fails_loses_none_before_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cases(device: torch.device, *, quick: bool) -> Iterator[Case]:
        yield copy_case("one")
        raise RuntimeError("the device is gone")

    file = tmp_path / "numbers.json"
    monkeypatch.setitem(KERNELS, "topk_mask", cases)
    with pytest.raises(RuntimeError, match="the device is gone"):
        main(["bench", "kernels", "--quick", "--only", "topk_mask", "--json", str(file)])
    (case,) = json.loads(file.read_text(encoding="utf-8"))["kernels"]["topk_mask"]["cases"]
    assert case["name"] == "one"


def test_torch_compile_can_be_left_out(ceilings: Ceilings) -> None:
    variants = {"eager": torch.clone, "compiled": Compiled(torch.clone, CPU), "fastprune": torch.clone}
    kernel = time_all([copy_case("one", variants=variants)], ceilings, compile_seconds=0)
    assert set(kernel["cases"][0]["variants"]) == {"eager", "fastprune"}


def test_a_variant_that_disagrees_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cases(device: torch.device, *, quick: bool) -> Iterator[Case]:
        yield Case("wrong", lambda: (torch.ones(3),), {"eager": torch.neg, "fastprune": torch.abs}, bytes=24)

    monkeypatch.setitem(KERNELS, "topk_mask", cases)
    assert main(["bench", "kernels", "--quick", "--only", "topk_mask"]) == 1
    assert capsys.readouterr().err.startswith("fastprune: error: wrong: fastprune disagrees with eager")


def time_all(cases: Iterable[Case], ceilings: Ceilings, **options: Any) -> dict[str, Any]:
    """Return the last results, which are those of all cases."""
    return list(bench_cases(cases, ceilings, quick=True, **options))[-1]


def copy_case(name: str, **options: Any) -> Case:
    variants = options.pop("variants", {"eager": lambda x: x + 0, "fastprune": lambda x: x.clone()})
    return Case(name, lambda: (torch.rand(1 << 20),), variants, bytes=8 << 20, rounds=9, **options)


def test_a_copy_is_near_the_ceiling(ceilings: Ceilings) -> None:
    slow = {"eager": lambda x: [x.clone() for _ in range(20)][-1], "fastprune": lambda x: x.clone()}
    for options in ({}, {"fresh": False}, {"cold": True}):
        found = bench_case(copy_case("copy", variants=slow, **options), ceilings)
        assert found["ratios"]["eager"]["ratio"] > 4  # 20 on a quiet machine
        after = Ceilings.measure(CPU, quick=True)  # other jobs may have slowed the first measurement
        best = max(ceilings.bandwidth, after.bandwidth)
        assert 0.001 < (8 << 20) / best / found["variants"][OURS]["median_seconds"] < 1.5


def test_a_compilation_that_fails_is_not_timed_and_is_reported(
    ceilings: Ceilings, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("cannot be compiled")

    variants = {"eager": lambda x: x + 0, "compiled": Compiled(fails, CPU), "fastprune": lambda x: x.clone()}
    kernel = time_all([copy_case("one", variants=variants), copy_case("two")], ceilings)
    check(kernel)
    assert list(kernel["cases"][0]["failures"]) == ["compiled"]
    report.show("copying", report.document({"copying": kernel}, ceilings, quick=True))
    out = capsys.readouterr().out
    assert "fails" in out
    assert "one: compiled fails:" in out
    assert "cannot be compiled" in out


@pytest.mark.slow
def test_a_compiled_peer_is_timed_without_its_compilation(ceilings: Ceilings) -> None:
    variants = {"eager": lambda x: x + 0, "compiled": Compiled(lambda x: x + 0, CPU), "fastprune": lambda x: x.clone()}
    found = bench_case(copy_case("one", variants=variants), ceilings, quick=True)
    assert found["failures"] == {}
    assert found["variants"]["compiled"]["quartiles_seconds"][1] < 0.5  # compiling takes seconds


def test_cases_after_the_time_limit_are_named(ceilings: Ceilings, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = time_all([copy_case("one"), copy_case("two"), copy_case("three")], ceilings, seconds=1e-9)
    assert kernel["cases"] == []
    assert kernel["left_out"] == [f"{name}: the 1e-09 seconds are over" for name in ("one", "two", "three")]
    report.show("copying", report.document({"copying": kernel}, ceilings, quick=True))
    assert "left out: two: the 1e-09 seconds are over" in capsys.readouterr().out


def test_each_group_has_its_means(ceilings: Ceilings, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [copy_case("one", groups=("all, small", "all")), copy_case("two", groups=("all",)), copy_case("three")]
    kernel = time_all(cases, ceilings)
    check(kernel)
    counts = [(group, means["eager"]["cases"]) for group, means in kernel["groups"].items()]
    assert counts == [("all", 2), ("all, small", 1)]
    report.show("copying", report.document({"copying": kernel}, ceilings, quick=True))
    out = capsys.readouterr().out
    assert "geometric mean, all, small" in out
    assert "x of 2" in out
    assert "x of 3" not in out  # a mean over all cases would mix unlike ones


def test_compiling_ends_after_its_time(ceilings: Ceilings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **mode: function)
    peers = [Compiled(lambda x: x + 0, CPU) for _ in range(2)]
    cases = [
        copy_case(f"{number}", variants={"eager": torch.clone, "compiled": peer, "fastprune": torch.clone})
        for number, peer in enumerate(peers)
    ]
    kernel = time_all(cases, ceilings, compile_seconds=1e-9)
    check(kernel)
    assert kernel["geometric_means"]["compiled"]["cases"] == 1
    assert kernel["left_out"] == ["1, compiled: the 1e-09 seconds of compiling are over"]
    assert peers[0].seconds is not None
    assert peers[1].seconds is None


def test_a_package_that_is_missing_is_named(ceilings: Ceilings) -> None:
    def cases() -> Iterator[Case]:
        yield copy_case("one")
        raise ModuleNotFoundError("ResNet-50 needs torchvision: pip install 'fastprune[vision]'")

    kernel = time_all(cases(), ceilings)
    check(kernel)
    assert kernel["left_out"] == ["ResNet-50 needs torchvision: pip install 'fastprune[vision]'"]
