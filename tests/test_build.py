"""The extension module: its contents, its dependencies, and torch in the same process."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from fastprune import _C

ROOT = Path(__file__).parents[1]


def run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# Load the module by its path, since `import fastprune` needs torch.
LOAD = f"""
import importlib.util, sys
def load():
    spec = importlib.util.spec_from_file_location("fastprune._C", {_C.__file__!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""


def test_build_info():
    info = _C.build_info()
    assert info["version"] == version("fastprune")
    assert info["cpp_standard"] >= 202002
    assert info["openmp"] >= 201511
    assert (info["cuda"] is None) == (info["cuda_architectures"] == [])
    assert info["sanitizers"] == []
    if info["cuda"] is None:
        assert not _C.cuda_available()
        assert info["cutlass"] is None
    assert _C.cuda_available() == (_C.cuda_device_count() > 0)


def test_runs_without_torch():
    code = (
        LOAD
        + """
import numpy as np
mask = np.empty(4, np.float32)
load().topk_mask(np.float32([1, 3, 2, 0]), np.float32([0.5]), np.array([0, 4]), None, mask)
assert "torch" not in sys.modules
print(mask.tolist())
"""
    )
    assert run(code) == "[0.0, 1.0, 1.0, 0.0]"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_links_neither_torch_nor_python_nor_the_cuda_runtime():
    libraries = run(LOAD + "load(); print(open('/proc/self/maps').read())")
    assert "libtorch" not in libraries
    assert "libc10" not in libraries
    assert "libcudart" not in libraries


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("order", ["import torch; _C = load()", "_C = load(); import torch"])
def test_one_openmp_runtime_in_either_import_order(order):
    code = (
        LOAD
        + order
        + """
torch.set_num_threads(3)
scores, mask = torch.randn(200_000), torch.empty(200_000)
arguments = (scores, torch.tensor([0.3]), torch.tensor([0, 200_000]), None)
masks = []
for threads in (1, 2, 4):
    _C.topk_mask(*arguments, mask, threads)
    masks.append(mask.clone())
assert all(torch.equal(mask, masks[0]) for mask in masks)
assert scores.exp().isfinite().all() and _C.build_info()["openmp_max_threads"] == 3
print(len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}))
"""
    )
    assert run(code) == "1"


def test_default_thread_count_is_that_of_openmp():
    code = LOAD + "print(load().build_info()['openmp_max_threads'])"
    assert run(code, OMP_NUM_THREADS="3") == "3"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_survives_a_fork_like_a_data_loader_worker():
    code = """
import os, torch
from fastprune import ops
def mask(): return ops.topk_mask(torch.arange(100_000.0), torch.tensor([0.5]), torch.tensor([0, 100_000])).sum()
torch.set_num_threads(2)
mask()  # starts the parent's thread pool, which the child does not have
if (child := os.fork()) == 0:
    torch.set_num_threads(1)
    os._exit(0 if mask() == 50_000 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code) == "0"


def configure(build: Path, choice: str, **environment: str) -> subprocess.CompletedProcess[str]:
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    command = ["cmake", "-S", str(ROOT), "-B", str(build), f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    settings = os.environ | {"FASTPRUNE_CUDA": choice} | environment
    return subprocess.run(command, capture_output=True, text=True, env=settings, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "succeeds", "message"),
    [
        ("OFF", True, "Build files have been written"),
        ("AUTO", True, "no working nvcc, building the CPU kernels alone"),
        ("ON", False, "FASTPRUNE_CUDA=ON, but no working nvcc was found"),
        ("maybe", False, "FASTPRUNE_CUDA='maybe': needs ON, OFF or AUTO"),
    ],
)
def test_a_build_with_a_broken_nvcc(tmp_path, choice, succeeds, message):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    result = configure(tmp_path / "build", choice, CUDACXX=str(nvcc))
    assert (result.returncode == 0) == succeeds
    assert message in " ".join((result.stdout + result.stderr).split())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(
    ("version", "message"),
    [(None, "needs a folder with include/cutlass/version.h"), ("4 1 9", "got CUTLASS 4.1.9, needs 4.2 or newer")],
)
def test_a_wrong_folder_for_cutlass_is_refused(tmp_path, version, message):
    headers = tmp_path / "cutlass"
    if version is not None:
        names = ("MAJOR", "MINOR", "PATCH")
        lines = [f"#define CUTLASS_{name} {part}\n" for name, part in zip(names, version.split(), strict=True)]
        for name in ("include/cutlass/version.h", "tools/util/include/cutlass/util/packed_stride.hpp"):
            (headers / name).parent.mkdir(parents=True)
            (headers / name).write_text("".join(lines))
    result = configure(tmp_path / "build", "ON", FASTPRUNE_CUTLASS_DIR=str(headers))
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())
