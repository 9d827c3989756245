"""What tests of several rooms need: networks, and a check that nothing waits for the device."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from fastprune.host import progress

# Without a GPU Triton's kernels run in its interpreter, which has to be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# On networks this small a second thread costs more than it gains, and ten times as much on a busy machine, where OpenMP
# spins while it waits. The variable is for the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# On a busy machine quick work takes seconds, and progress would then tell of it on standard error.
SHIPPED_PATIENCE, progress.PATIENCE = progress.PATIENCE, 3600.0


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let progress tell of work after the seconds that users know."""
    monkeypatch.setattr(progress, "PATIENCE", SHIPPED_PATIENCE)


BEGUN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a slow machine leave out what it has no time for."""
    parser.addoption("--minutes", type=float, default=math.inf, help="skip the tests whose turn comes later than this")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test if the time is over."""
    minutes = item.config.getoption("--minutes")
    if time.monotonic() - BEGUN > 60 * minutes:
        pytest.skip(f"its turn came after {minutes:g} minutes")


def randomise_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give each channel of a batch norm its own statistics and affine parameters, so that a wrong index shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
            ):
                assert tensor is not None
                tensor.data.uniform_(low, high, generator=generator)
    return model


class TinyNet(nn.Module):
    """A residual block, a depthwise convolution with squeeze-and-excitation, and a linear head; 3x16x16 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.conv1 = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.expand = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.squeeze = nn.Conv2d(16, 4, 1)
        self.excite = nn.Conv2d(4, 16, 1)
        self.project = nn.Conv2d(16, 10, 1)
        self.head = nn.Linear(10, 5)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)  # torch's default makes the output nearly constant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        x = torch.relu(self.depthwise(torch.relu(self.expand(x))))
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(torch.relu(self.project(x)).mean((2, 3)))


@pytest.fixture(autouse=True)
def leave_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the checkout: there a child process finds ./fastprune, which has no _C, before the installed package."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def seed_torch() -> None:
    """Seed torch, so that the random numbers of a test do not depend on earlier tests."""
    torch.manual_seed(0)


@pytest.fixture
def randomised() -> Callable[[nn.Module], nn.Module]:
    return randomise_statistics


@pytest.fixture
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return randomise_statistics(TinyNet()).eval()


@pytest.fixture
def no_synchronisation() -> Callable[[], AbstractContextManager[None]]:
    """A context in which waiting for the device is an error."""

    @contextmanager
    def context() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
            with pytest.raises(RuntimeError, match="synchroniz"):  # or else the mode would prove nothing
                torch.ones(1, device="cuda").item()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return context
