"""Cases for the operators on ragged channel groups."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from fastprune import reference


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
