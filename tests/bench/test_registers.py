"""The table of registers: that of a source, in the compiler's own words."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastprune.ops.conv.triton_conv import DEPTHWISE, HALF, TF32, is_here

SCRIPT = Path(__file__).parents[2] / "bench" / "registers.py"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_every_kernel_of_a_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "registers.json"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--only", "topk_mask.cu", "--json", str(file)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 0
    kernels = json.loads(file.read_text())
    assert {kernel["name"] for kernel in kernels} == {"topk_mask_kernel<float>", "topk_mask_kernel<double>"}
    assert all(8 <= kernel["registers"] <= 255 for kernel in kernels)
    assert capsys.readouterr().out.splitlines()[-1] == f"{len(kernels)} kernels, 0 of them spill"


@pytest.mark.slow
@pytest.mark.skipif(not is_here(), reason="needs Triton")
def test_no_choice_of_the_triton_kernel_spills(tmp_path: Path) -> None:
    file = tmp_path / "registers.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--only", "triton_kernel.py", "--json", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = json.loads(file.read_text())
    assert len(kernels) == 2 * 2 * (len(HALF + TF32) + 2 * len(DEPTHWISE))
    most_shared = {"sm_80": 166_912, "sm_90": 232_448}
    for kernel in kernels:
        assert 0 <= kernel["shared"] <= most_shared[kernel["arch"]], kernel


def test_ptxas_is_read() -> None:
    """Also a kernel whose arguments have templates and brackets."""
    script = runpy.run_path(str(SCRIPT))
    text = """ptxas info    : Compiling entry function '_Z6kernelIfEvv' for 'sm_90'
ptxas info    : Function properties for _Z6kernelIfEvv
    24 bytes stack frame, 24 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 2048 bytes smem
"""
    (found,) = script["PATTERN"].finditer(text)
    assert (found["stores"], found["loads"], found["registers"]) == ("24", "16", "80")
    plain = (
        "ptxas info    : Compiling entry function 'void fastprune::cuda::(anonymous namespace)::backward_kernel"
        "<float, 4, true, (fastprune::device::Sums)0>(fastprune::Args<float>, double*)' for 'sm_90'"
    )
    assert script["names_in"](plain) == ["backward_kernel<float, 4, true, (Sums)0>"]
    kernel = script["Kernel"]("a.cu", "kernel", "sm_90", registers=80, spilled=40, shared=0)
    assert kernel.blocks == 3
