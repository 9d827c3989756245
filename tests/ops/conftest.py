"""Cases for the operators on ragged channel groups and on tables of units; the emulated device bodies."""

import fcntl
import importlib.util
import os
import random
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Protocol

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from fastprune import _C, ops, reference


@dataclass(frozen=True)
class TopkCase:
    scores: Tensor  # [U]
    keep: Tensor  # [G]
    offsets: Tensor  # [G + 1]
    window: Tensor | None  # [G]

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.scores, self.keep, self.offsets, self.window

    def to(self, target: torch.dtype | str) -> "TopkCase":
        """To a dtype, or (offsets included) to a device."""
        offsets = self.offsets.to(target) if isinstance(target, str) else self.offsets
        window = None if self.window is None else self.window.to(target)
        return TopkCase(self.scores.to(target), self.keep.to(target), offsets, window)

    def hard(self) -> "TopkCase":
        return replace(self, window=None)

    def reference(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return reference.topk_mask(*self.to(dtype).args)

    def check(self, mask: Tensor) -> None:
        """The error against float64 is at most twice what plain torch makes in the dtype of the case.

        Or half a unit in the last place below 1, where torch happens to make none; 4 units of float64 itself.
        """
        exact = self.reference()
        error = (mask.double() - exact).abs().max().item() if mask.numel() else 0.0
        plain = (self.reference(self.scores.dtype).double() - exact).abs().max().item() if mask.numel() else 0.0
        floor = 2.0**-25 if self.scores.dtype == torch.float32 else 2.0**-50
        assert not mask.isnan().any()
        assert error <= max(2 * plain, floor)


class MakeTopkCase(Protocol):
    def __call__(self, sizes: list[int], seed: int, kind: str = ..., dtype: torch.dtype = ...) -> TopkCase: ...


def _scores(kind: str, count: int, random: torch.Generator) -> Tensor:
    if kind == "normal":
        return torch.randn(count, generator=random)
    if kind == "sigmoid":
        return torch.randn(count, generator=random).sigmoid()
    if kind == "ties":
        return torch.randint(-2, 3, (count,), generator=random) * 0.5
    if kind == "equal":
        return torch.full((count,), 0.25)
    if kind == "zeros":  # of both signs, which tie
        return torch.where(torch.rand(count, generator=random) < 0.5, 0.0, -0.0)
    if kind == "infinite":
        picks = torch.randint(0, 4, (count,), generator=random)
        return torch.tensor([-torch.inf, torch.inf, 0.5, 1.5])[picks]
    assert kind == "bits"  # every exponent, subnormals included
    patterns = torch.randint(-(2**31), 2**31, (count,), generator=random).to(torch.int32)
    return patterns.view(torch.float32).nan_to_num(nan=1.0, posinf=torch.inf, neginf=-torch.inf)


@pytest.fixture(scope="session")
def make_topk_case() -> MakeTopkCase:
    def make(sizes: list[int], seed: int, kind: str = "normal", dtype: torch.dtype = torch.float32) -> TopkCase:
        random = torch.Generator().manual_seed(seed)
        groups = len(sizes)
        channels = torch.tensor(sizes, dtype=torch.float32)
        keep = torch.rand(groups, generator=random)
        keep = torch.where(torch.rand(groups, generator=random) < 0.2, keep.round(), keep)  # the edges 0 and 1, too
        window = torch.rand(groups, generator=random) * channels
        window = torch.where(torch.rand(groups, generator=random) < 0.5, (0.1 * channels).round(), window)
        offsets = torch.tensor([0, *sizes]).cumsum(0)
        return TopkCase(_scores(kind, sum(sizes), random), keep, offsets, window).to(dtype)

    return make


@pytest.fixture
def count_programs() -> Callable[[Callable[..., Tensor]], tuple[Callable[..., Tensor], list[torch.fx.GraphModule]]]:
    """A function that compiles another one, and a list that gets a graph whenever that happens."""

    def compile_counted(
        function: Callable[..., Tensor],
    ) -> tuple[Callable[..., Tensor], list[torch.fx.GraphModule]]:
        torch._dynamo.reset()
        programs: list[torch.fx.GraphModule] = []

        def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
            programs.append(module)
            return aot_eager(module, inputs)

        return torch.compile(function, fullgraph=True, backend=backend), programs

    return compile_counted


@dataclass(frozen=True)
class ProxCase:
    slices: list[tuple[Tensor, int, Tensor]]
    threshold: Tensor  # [U]

    @property
    def num_units(self) -> int:
        return self.threshold.numel()

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor, _, _ in self.slices]

    def table(self) -> ops.UnitTable:
        return ops.UnitTable(self.slices, self.num_units)

    def to(self, target: torch.dtype | str) -> "ProxCase":
        """Copies in the same layouts, in a dtype or on a device."""
        slices = [(tensor.clone().to(target), dim, units) for tensor, dim, units in self.slices]
        return ProxCase(slices, self.threshold.to(target))

    def copy(self) -> "ProxCase":
        return self.to(self.threshold.dtype)

    def reference(self, dtype: torch.dtype = torch.float64) -> tuple["ProxCase", Tensor]:
        """A copy after the step, and the norms before."""
        case = self.to(dtype)
        table = reference.UnitTable(case.slices, case.num_units)
        return case, reference.group_prox_(table, case.threshold)

    def check(self, after: "ProxCase", norms: Tensor) -> None:
        """`after` and `norms` are this case's results: at most twice as far from float64 as plain torch in its dtype.

        Or one unit in the last place of the largest element, where torch happens to be closer. In float64 itself what
        the n squares of a norm may lose in whatever order they are added, n / 2 roundings, is allowed.
        """
        exact_case, exact_norms = self.reference()
        plain_case, plain_norms = self.reference(self.threshold.dtype)
        most_squares = int(reference.UnitTable(self.slices, self.num_units).sizes.max())
        spacing = 2.0**-23 if self.threshold.dtype == torch.float32 else max(8, most_squares // 2) * 2.0**-52
        results = zip(
            [*after.tensors, norms],
            [*plain_case.tensors, plain_norms],
            [*exact_case.tensors, exact_norms],
            [*self.tensors, exact_norms],
            strict=True,
        )
        for ours, plain, exact, before in results:
            if exact.numel() == 0:
                continue
            allowed = 2 * (plain.double() - exact).abs().max().item()
            error = (ours.cpu().double() - exact).abs().max().item()
            assert error <= max(allowed, spacing * before.double().abs().max().item())


class MakeProxCase(Protocol):
    def __call__(self, seed: int, num_units: int = ..., dtype: torch.dtype = ...) -> ProxCase: ...


def _random_units(choose: random.Random, size: int, num_units: int) -> Tensor:
    start = choose.randrange(num_units)
    units = {
        "neighbours": lambda: (start + torch.arange(size)) % num_units,
        "jumping": lambda: torch.randint(-1, num_units, (size,)),
        "repeated": lambda: torch.div(torch.arange(size), choose.randint(1, 4), rounding_mode="floor") % num_units,
        "alternating": lambda: torch.arange(size) % min(num_units, 2),
        "one": lambda: torch.full((size,), start),
        "none": lambda: torch.full((size,), -1),
    }[choose.choice(["neighbours"] * 3 + ["jumping", "repeated", "alternating", "one", "none"])]()
    holes = torch.rand(size) < choose.choice([0.0, 0.0, 0.3])
    return torch.where(holes, -1, units)


@pytest.fixture(scope="session")
def make_prox_case() -> MakeProxCase:
    """Random tensors in random dense layouts, along random dimensions."""

    def make(seed: int, num_units: int = 12, dtype: torch.dtype = torch.float32) -> ProxCase:
        choose = random.Random(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            slices = []
            for _ in range(choose.randint(1, 5)):
                rank = choose.randint(1, 5)
                shape = [choose.choice([1, 1, 2, 3, 5, 17]) for _ in range(rank)]
                shape[choose.randrange(rank)] = choose.choice([0, 1, num_units, 40])
                order = sorted(range(rank), key=lambda _: choose.random()) if choose.random() < 0.5 else [*range(rank)]
                tensor = torch.randn([shape[d] for d in order]).to(dtype)
                tensor = tensor.permute([order.index(d) for d in range(rank)])
                dim = choose.randrange(-rank, rank)
                slices.append((tensor, dim, _random_units(choose, tensor.size(dim), num_units)))
            norms = reference.UnitTable(slices, num_units).norms()
            factor = torch.tensor([choose.choice([0.0, 0.01, 0.5, 0.999, 1.0, 1.5, torch.inf]) for _ in norms])
            threshold = torch.where(norms > 0, norms * factor.to(dtype), factor.to(dtype))
        return ProxCase(slices, threshold)

    return make


def build_emulated() -> Path:
    """Build the target _emulated of CMakeLists.txt, unless it is up to date, and return the module's path.

    One process at a time: the workers of pytest-xdist wait for the first, and find nothing left to do.

    Raises:
        RuntimeError: The build failed; with the whole output of the tools.
    """
    sources = Path(__file__).parents[2]
    folder = sources / "build" / "emulated"
    needs = f"a C++20 compiler, and cmake, ninja and pybind11 for {sys.executable} (pip install '.[test]')"
    programs = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])

    def run(*command: str | Path) -> None:
        try:
            subprocess.run(
                command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env=os.environ | {"PATH": programs},
            )  # fmt: skip
        except subprocess.CalledProcessError as error:
            text = " ".join(map(str, command))
            raise RuntimeError(f"csrc/emulated: got a failing build, needs {needs}\n{text}\n{error.stdout}") from None
        except FileNotFoundError as error:
            raise RuntimeError(f"csrc/emulated: got no {error.filename}, needs {needs}") from error

    try:
        import pybind11
    except ImportError as error:
        raise RuntimeError(f"csrc/emulated: got no pybind11, needs {needs}") from error
    configure = [
        *("cmake", "--fresh", "-S", sources, "-B", folder, "-G", "Ninja", "-DFASTPRUNE_CUDA=OFF"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configured = folder / "configured"  # by which command
        if not configured.exists() or configured.read_text() != str(configure):
            run(*configure)
            configured.write_text(str(configure))
        run("cmake", "--build", folder, "--target", "_emulated")
    (module,) = folder.glob("_emulated*.so")
    return module


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The device bodies on host threads, built now, or before by whoever names the module in FASTPRUNE_EMULATED."""
    path = os.environ.get("FASTPRUNE_EMULATED") or build_emulated()
    spec = importlib.util.spec_from_file_location("_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if "FASTPRUNE_EMULATED" not in os.environ:
        assert module.sanitizers.split() == _C.build_info()["sanitizers"]
    return module
