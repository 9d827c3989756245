"""Two processes: equal weights, the single process' gradient, exact evaluation, one checkpoint for both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastprune.data import load_data
from fastprune.engine import LoopOptions, RunDirectory, RunError, TrainConfig, evaluate, prepare_teacher, train
from fastprune.host.distributed import Distributed
from fastprune.training.objective import Objective
from fastprune.training.options import FinetuneRecipe
from fastprune.training.weight_training import WeightTraining

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")

CONFIG = TrainConfig(epochs=2, batch_size=16, lr=0.05, evaluate_every=1)


class Net(nn.Module):
    """A network; without batch norm, whose statistics differ between shares, one process and two compute the same."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm: nn.Module = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


def make_net(norm: bool, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(norm)


def work(folder: str) -> None:
    """Do the work of one process; torchrun starts this file as a script."""
    peers = Distributed.from_environment()
    rank = peers.rank
    data = load_data("synthetic:1x6x6:3:71", held_out=7)  # 64 to train on, 17 in the test set
    results = {}
    plain = make_net(norm=False, seed=rank)  # rank 0's weights win
    train(plain, data, CONFIG, device="cpu", distributed=peers)
    results["plain"] = plain.state_dict()
    several = make_net(norm=True, seed=rank)  # as in methods that average gradients themselves
    several.norm.get_buffer("running_mean").fill_(rank + 1)
    options = {"steps_per_epoch": 1, "device": torch.device("cpu"), "peers": peers}
    training = WeightTraining(several, CONFIG, several_passes=True, **options)
    several(torch.full((4, 1, 6, 6), rank + 1.0) + torch.arange(6)).square().mean().backward()
    training.average_gradients()
    results["gradients"] = {name: p.grad.clone() for name, p in several.named_parameters() if p.grad is not None}
    training.update()
    results["several"] = {name: p.detach().clone() for name, p in several.named_parameters()}
    training.share_buffers()
    results["buffers"] = dict(several.named_buffers())
    normed = make_net(norm=True)
    run = RunDirectory.create(f"{folder}/run", {}, peers)
    metrics = train(normed, data, CONFIG, device="cpu", distributed=peers, run=run, options=LoopOptions(log_every=3))
    results["normed"] = normed.state_dict()
    results["metrics"] = metrics
    results["evaluation"] = evaluate(normed, data, batch_size=8, distributed=peers)
    # The last checkpoint is damaged: both ranks continue from the one before, and end with the same weights.
    newest = max((run.path / "checkpoints" / "training").iterdir())
    peers.barrier()
    if peers.is_main:
        newest.write_bytes(b"")
    resumed = make_net(norm=True, seed=5)
    train(
        resumed, data, CONFIG, device="cpu", distributed=peers, run=run, resume=True, options=LoopOptions(log_every=3)
    )
    results["resumed"] = resumed.state_dict()
    taught = make_net(norm=True, seed=rank)
    recipe = FinetuneRecipe(epochs=2, batch_size=16, lr=0.05, distill_features=0.5)
    distillation = prepare_teacher(
        make_net(norm=True, seed=9), taught, data, recipe, device=torch.device("cpu"), objective=Objective()
    )
    results["taught metrics"] = train(
        taught, data, recipe, device="cpu", distributed=peers, distillation=distillation, ema=0.8
    )
    results["taught"] = taught.state_dict()
    try:
        RunDirectory.create(run.path, {}, peers)
    except RunError as error:
        results["refused"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    peers.barrier()  # no rank closes its connections while the other still uses them
    Distributed.leave()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run([*command, __file__, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[:4000]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for kind in ("plain", "normed", "resumed", "gradients", "several", "buffers", "taught"):
        for name, tensor in first[kind].items():
            assert torch.equal(tensor, second[kind][name]), (kind, name)
    assert bool(first["gradients"]["conv.weight"].any())
    assert not torch.equal(first["several"]["conv.weight"], make_net(norm=True).conv.weight)
    for name, tensor in first["normed"].items():
        assert torch.equal(tensor, first["resumed"][name]), name
    assert first["metrics"] == second["metrics"]
    assert first["taught metrics"] == second["taught metrics"]
    assert first["taught metrics"]["distillation"] > 0
    assert first["evaluation"] == second["evaluation"]
    assert "--resume" in first["refused"]
    assert "rank 0" in second["refused"]

    data = load_data("synthetic:1x6x6:3:71", held_out=7)
    alone = make_net(norm=False)
    train(alone, data, CONFIG, device="cpu")
    for name, tensor in alone.state_dict().items():
        assert torch.allclose(tensor, first["plain"][name], atol=1e-6), name
    normed = make_net(norm=True)
    normed.load_state_dict(first["normed"])
    evaluation = evaluate(normed, data)
    assert evaluation["samples"] == first["evaluation"]["samples"] == 17
    assert evaluation["accuracy"] == first["evaluation"]["accuracy"]
    assert evaluation["loss"] == pytest.approx(first["evaluation"]["loss"], rel=1e-6)


if __name__ == "__main__":
    work(sys.argv[1])
