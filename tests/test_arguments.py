"""Arguments as people type them, and arguments of wrong types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastprune as fp

EXAMPLE = torch.zeros(1, 3, 16, 16)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3))
        self.head = nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(self.stem(x))).mean((2, 3)))


def network() -> Net:
    torch.manual_seed(0)
    return Net()


def test_budgets_limits_and_layers_as_people_type_them(tmp_path: Path) -> None:
    net = network()
    same = [
        fp.prune(net, EXAMPLE, method="l1", budget=budget) for budget in ("flops=0.5", 0.5, "50%", "macs=0.5", "0.5")
    ]
    assert all(torch.equal(result.plan.mask, same[0].plan.mask) for result in same)
    rounded = fp.prune(net, EXAMPLE, method="l1", limits={"round_to": 8}, device=torch.device("cpu"))
    assert all(group.size % 8 == 0 for group in fp.trace(rounded.model, EXAMPLE).groups)
    kept = {
        str(ignore): fp.prune(net, EXAMPLE, method="l1", ignore=ignore).plan.keep
        for ignore in ([net.stem], ["stem"], "stem", net.stem)
    }
    assert len({str(plan) for plan in kept.values()}) == 1
    assert fp.trace(net, EXAMPLE, ignore=[net.body]).num_units == 16
    by_name = fp.prune(
        fp.models.create("resnet20"), torch.zeros(1, 3, 8, 8), method="dmc", data="synthetic:3x8x8:10:64",
        held_out=0.25, epochs=1, samples=32, batch_size=16, out=tmp_path / "run",
    )  # fmt: skip
    assert by_name.metrics["macs"]["planned"] <= 0.5 * by_name.metrics["macs"]["full"]
    for step in fp.prune_in_steps(net, EXAMPLE, steps=2, method="l1", budget=0.5, ignore=[net.stem]):
        assert step.model.get_submodule("stem").out_channels == 16


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "class": ({"model": Net}, "model: got type; .*not its class"),
    "path": ({"model": "net.pt"}, r"model: got str; a torch\.nn\.Module is needed"),
    "example": ({"example_inputs": (1, 3, 16, 16)}, "example_inputs: got tuple"),
    "method": ({"method": 3}, "method: got 3; the name of a method"),
    "budget": ({"budget": [0.5]}, "budget: got list; a fraction of the FLOPs"),
    "budget out of range": ({"budget": 1.5}, "fraction to keep"),
    "budget in per cent": ({"budget": "150%"}, "more than the whole network"),
    "resource": ({"macs": 0.5}, "write budget='macs=0.5'"),
    "limits": ({"limits": 8}, "limits: got int"),
    "name of a limit": ({"limits": {"round": 8}}, "there is no 'round'; did you mean 'round_to'"),
    "value of a limit": ({"limits": {"round_to": 8.0}}, "a whole number"),
    "ratios": ({"limits": {"keep_ratios": {"stem": 0.5}}}, r"pair \(least, most\)"),
    "conditions": ({"conditions": {"batch": 8}}, "conditions: got dict; Conditions is needed"),
    "ignore": ({"ignore": [3]}, "ignore: got int"),
    "ignore of another network": ({"ignore": [nn.Conv2d(1, 1, 1)]}, "no module inside the model"),
    "ignore everything": ({"ignore": 3}, "ignore: got int"),
    "seed": ({"seed": "1"}, "seed: got str; a whole number"),
    "negative seed": ({"seed": -1}, "seed -1"),
    "device": ({"device": 0}, "device: got int; 'cpu', 'cuda'"),
    "precision": ({"precision": torch.float32}, "precision: got dtype; 'float32' or 'bf16'"),
    "out": ({"out": 3}, "out: got int; the path of a directory"),
    "plan": ({"after": "plan.json"}, "after: got str; PruningPlan is needed"),
    "loop": ({"loop": {"log_every": 1}}, "loop: got dict; LoopOptions is needed"),
    "flag": ({"rewrite": "no"}, "rewrite: got str; True or False"),
    "data": ({"data": 3}, "data: got int; a DataLoader"),
    "loss": ({"loss": "mse"}, r"loss: got str; a function loss\(output, target\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_types_give_one_clear_line(case: str) -> None:
    arguments, message = WRONG[case]
    given: dict[str, Any] = {"model": network(), "example_inputs": EXAMPLE, "method": "l1", **arguments}
    with pytest.raises((TypeError, ValueError), match=message) as error:
        fp.prune(**given)
    assert "\n" not in str(error.value)


def test_finetune_checks_its_arguments() -> None:
    batches = [(EXAMPLE, torch.zeros(1).long())]
    for arguments, message in (
        ({"data": None}, "data: None"),
        ({"epoch": 3}, "finetune has no option 'epoch'.*epochs"),
        ({"epochs": "many"}, "epochs 'many'"),
        ({"resume": True}, "resume: give out="),
        ({"model": "net"}, "model: got str"),
    ):
        given: dict[str, Any] = {"model": network(), "data": batches, **arguments}
        with pytest.raises((TypeError, ValueError), match=message):
            fp.finetune(**given)


def test_finetune_writes_a_run_and_resumes_it(tmp_path: Path) -> None:
    batches = [(torch.randn(8, 3, 16, 16), torch.arange(8) % 4)]
    net = network()
    fp.finetune(net, batches, out=tmp_path / "run", epochs=2)
    other = network()
    fp.finetune(other, batches, out=tmp_path / "run", epochs=2, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert (tmp_path / "run" / "model.safetensors").is_file()
