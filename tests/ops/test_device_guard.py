"""Kernels run on the device of their tensors: the guard with a counterfeit runtime, all operators on a second GPU."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from fastprune import ops
from fastprune.ops.examples import Example, examples

# Without the sanitizers that are loaded into the tests.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
CSRC = Path(__file__).parents[2] / "csrc"
RUNTIME = """
#pragma once
enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice };
inline int current = 0, switches = 0;
inline cudaError_t cudaGetDevice(int* device) { *device = current; return cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
    if (device > 1) return cudaErrorInvalidDevice;
    current = device;
    ++switches;
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "invalid device ordinal"; }
"""
PROGRAM = """
#include "cuda/device_guard.h"
#include <cstdio>
#include <cstdlib>

int main(int, char** arguments) {
    cudaSetDevice(std::atoi(arguments[1]));
    switches = 0;
    {
        const fastprune::cuda::DeviceGuard guard(std::atoi(arguments[2]));
        std::printf("%d %s ", current, guard.status().ok() ? "ok" : guard.status().failure);
    }
    std::printf("%d %d", current, switches);
}
"""


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that prints the device inside of a guard, its status, the device after it, and the switches."""
    folder = tmp_path_factory.mktemp("guard")
    (folder / "cuda_runtime_api.h").write_text(RUNTIME)
    (folder / "guard.cpp").write_text(PROGRAM)
    includes = [f"-I{folder}", f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    command = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++20", *includes, "guard.cpp", "-o", "guard"]
    subprocess.run(command, cwd=folder, check=True, env=ENVIRONMENT)
    return folder / "guard"


@pytest.mark.parametrize(
    ("current", "device", "printed"),
    [(0, 0, "0 ok 0 0"), (0, 1, "1 ok 0 2"), (1, 0, "0 ok 1 2"), (1, 2, "1 invalid device ordinal 1 0")],
)
def test_guard_changes_the_device_and_puts_it_back(guard: Path, current: int, device: int, printed: str) -> None:
    found = subprocess.run(
        [guard, str(current), str(device)], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert found.stdout == printed


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("example", examples(), ids=lambda example: example.operator)
def test_operators_run_on_a_device_that_is_not_the_current_one(example: Example) -> None:
    expected = example.results(ops, [tensor.to("cuda:0") for tensor in example.inputs])
    results = example.results(ops, [tensor.to("cuda:1") for tensor in example.inputs])
    assert torch.cuda.current_device() == 0
    for result, same in zip(results, expected, strict=True):
        torch.testing.assert_close(result, same, rtol=0, atol=example.tolerance * max(1, float(same.abs().max())))
