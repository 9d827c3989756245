"""Pruning in steps: plans for compact networks combine into plans for the full network."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import fastprune as fp
from fastprune.cli.main import main
from fastprune.graph.plan import PlanError

EXAMPLE = torch.zeros(1, 3, 32, 32)


def random_plan(graph: fp.ChannelGraph, seed: int, part: float = 0.6) -> fp.PruningPlan:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(graph.num_units)
    for group in graph.groups:
        order = torch.randperm(group.size, generator=generator)
        mask[group.start + order[: max(1, round(part * group.size))]] = 1
    return graph.plan(mask)


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in (
    "mobilenet_v3_small", "shufflenet_v2_x0_5", "googlenet", "regnet_y_400mf",
)]  # fmt: skip


@pytest.mark.parametrize("name", ["resnet18", *LARGE])
def test_two_plans_combine_into_one(name: str) -> None:
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(**options).eval()
    images = torch.randn(2, 3, 64, 64)
    first = fp.surgery.cut(random_plan(fp.trace(model, images), 0), model)
    second = fp.surgery.cut(random_plan(fp.trace(first.model, images), 1), first.model)
    both = first.plan.then(second.plan)
    direct = fp.apply(both, model)
    with torch.no_grad():
        assert torch.equal(direct(images), second.model(images))
    assert both.macs == (first.plan.macs[0], second.plan.macs[1])
    assert both.params[1] == sum(p.numel() for p in direct.parameters())
    # The composed plan is a plan of the full network's graph, with the same cost.
    cost = fp.trace(model, images).cost(both.mask)
    assert (int(cost.macs), int(cost.params)) == (both.macs[1], both.params[1])


def test_a_plan_for_another_network_is_refused(tiny: nn.Module) -> None:
    plan = random_plan(fp.trace(tiny, torch.zeros(1, 3, 16, 16)), 0)
    with pytest.raises(PlanError, match="not for what the first one makes"):
        plan.then(plan)  # the second was made for the full network
    other = random_plan(fp.trace(torchvision.models.resnet18(), EXAMPLE), 0)
    with pytest.raises(PlanError, match="not for what the first one makes"):
        plan.then(other)


def test_a_plan_that_parts_units_is_refused() -> None:
    """The stream of a residual network is cut in one of its layers only."""
    model = torchvision.models.resnet18()
    graph = fp.trace(model, EXAMPLE)
    plan = random_plan(graph, 0)
    compact = fp.apply(plan, model)
    following = random_plan(fp.trace(compact, EXAMPLE), 1)
    stream = next(s for s in following.slices if s.tensor == "conv1.weight")
    fewer = tuple(s for s in following.slices if s is not stream)
    broken = fp.PruningPlan(following.mask, following.groups, fewer, following.inputs, following.macs, following.params)
    with pytest.raises(PlanError, match=r"parts channels of 'conv1\.weight'"):
        plan.then(broken)


def test_steps_end_at_the_budget_and_use_the_trained_weights() -> None:
    torch.manual_seed(0)
    model = fp.models.create("resnet20").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parts, results = [], []
    for result in fp.prune_in_steps(model, EXAMPLE, steps=3, budget="flops=0.4", method="l1", ranking="global"):
        parts.append(result.plan.macs[1] / result.plan.macs[0])
        results.append(result)
        with torch.no_grad():  # "training": other filters are the small ones now
            for parameter in result.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parts))))
    assert parts == pytest.approx([0.8, 0.6, 0.4], abs=0.01)
    assert all(part <= limit for part, limit in zip(parts, (0.8, 0.6, 0.4), strict=True))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    first, second, third = (result.plan.mask for result in results)
    assert bool((third <= second).all())
    assert bool((second <= first).all())
    compact = fp.apply(results[-1].plan, model)
    assert [p.shape for p in compact.parameters()] == [p.shape for p in results[-1].model.parameters()]
    # With the first weights in every step, other channels would have gone.
    at_once = fp.prune(model, EXAMPLE, budget="flops=0.4", method="l1", ranking="global")
    assert not torch.equal(at_once.plan.mask, third)


@pytest.mark.slow
def test_limits_of_steps_are_relative_to_the_first_network() -> None:
    model = fp.models.create("resnet20")
    limits = fp.Limits(round_to=2, keep_ratios={"layer1": (0.75, 1.0), "layer3.0.conv1": (0.0, 0.5)})
    for result in fp.prune_in_steps(model, EXAMPLE, steps=3, budget="flops=0.4", method="l1", limits=limits):
        widths = result.plan.widths
        assert widths["layer1.0.conv1"][0] >= 12
        assert widths["layer3.0.conv1"][0] <= 32
        assert all(kept % 2 == 0 for kept, _ in widths.values())
    assert widths["layer1.0.conv1"][0] == 12


@pytest.mark.parametrize(("extra", "message"), [({"steps": 0}, "steps 0"), ({"steps": 2, "resume": True}, "resume")])
def test_arguments_of_steps(extra: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(fp.prune_in_steps(fp.models.create("resnet20"), EXAMPLE, method="l1", **extra))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_is_pruned_further(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = "synthetic:3x16x16:4:128"
    for line in (
        f"prune --model resnet20 --data {data} --method l1 --budget flops=0.7 --out {tmp_path}/a",
        f"finetune --run {tmp_path}/a --epochs 1 --batch_size 32",
        f"prune --from_run {tmp_path}/a --method l1 --budget flops=0.6 --out {tmp_path}/b",
    ):
        assert main(shlex.split(line)) == 0
    capsys.readouterr()
    first, second = (fp.PruningPlan.load(tmp_path / name / "plan.json") for name in "ab")
    assert bool((second.mask <= first.mask).all())
    assert second.macs[0] == first.macs[0]
    assert 0.40 < second.macs[1] / second.macs[0] <= 0.42
    assert main(shlex.split(f"evaluate --run {tmp_path}/b --json")) == 0
    assert json.loads(capsys.readouterr().out)["compact"]["macs"] == second.macs[1]
    assert main(shlex.split(f"finetune --run {tmp_path}/b --epochs 1 --batch_size 32")) == 0


def test_a_run_without_data_is_pruned_further(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights give the number of classes; the network before this run is compared with the one after it."""
    torch.manual_seed(0)
    fp.models.save_weights(fp.models.create("resnet20", num_classes=7), tmp_path / "seven.safetensors")
    weights = f"--weights {tmp_path}/seven.safetensors --input 3x16x16"
    line = f"prune --model resnet20 {weights} --method l1 --ignore layer1 --out {tmp_path}/a --json"
    assert main(shlex.split(line)) == 0
    first = json.loads(capsys.readouterr().out)
    line = f"prune --from_run {tmp_path}/a --method l1 --budget flops=0.7 --out {tmp_path}/b --json"
    assert main(shlex.split(line)) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["baseline"] == first["compact"]
    assert second["compact"]["macs"] <= 0.7 * second["baseline"]["macs"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--from_run a --model resnet20", "leave out --model"),
        ("--from_run nowhere", "nowhere"),
        ("--from_run t", "'fastprune train'"),
    ],
)
def test_runs_that_cannot_be_pruned_further(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split("prune --model resnet20 --input 3x16x16 --method l1 --out a")) == 0
    assert main(shlex.split("train --model resnet20 --data synthetic:3x8x8:4:64 --epochs 1 --out t")) == 0
    capsys.readouterr()
    assert main(shlex.split(f"prune --method l1 --out b {options}")) == 2
    assert message in capsys.readouterr().err
    assert not Path("b").exists()


@pytest.mark.slow
def test_a_second_plan_may_prune_what_the_first_left_alone() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    first = fp.prune(model, EXAMPLE, method="l1", budget="flops=0.8", ignore=["layer1"])
    second = fp.prune(first.model, EXAMPLE, method="l1", budget="flops=0.5", after=first.plan)
    assert len(second.plan.groups) > len(first.plan.groups)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(fp.apply(second.plan, model)(images), second.model(images))
    assert second.plan.widths["layer1.0.conv1"][0] < 64
    again = fp.PruningPlan.from_json(second.plan.to_json())
    assert torch.equal(again.mask, second.plan.mask)


@pytest.mark.slow
def test_steps_whose_cost_is_reached_already_are_left_out() -> None:
    model = fp.models.create("resnet20")
    results = list(
        fp.prune_in_steps(model, EXAMPLE, steps=20, budget="flops=0.65", method="l1", limits=fp.Limits(round_to=16))
    )
    assert 1 <= len(results) < 20
    assert results[-1].plan.macs[1] <= 0.65 * results[-1].plan.macs[0]


@pytest.mark.parametrize("budget", ["eq8=0.4", pytest.param("auth=0.6", marks=pytest.mark.slow)])
def test_steps_count_costs_in_the_first_network(budget: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 64, 1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1),
    )  # fmt: skip
    graph, example = fp.trace(model, EXAMPLE), EXAMPLE
    *_, last = fp.prune_in_steps(model, example, steps=4, budget=budget, method="l1")
    flops, _, part = budget.partition("=")
    left = graph.cost(last.plan.mask, flops=flops).macs / graph.cost(flops=flops).macs  # type: ignore[arg-type]
    assert float(part) - 0.02 < float(left) <= float(part)


class Split(nn.Module):
    """A network in which one layer makes the channels of two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 32, 1), nn.Conv2d(24, 40, 1), nn.Conv2d(8, 40, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.a(x).relu().split([24, 8], 1)
        return self.b(x), self.c(y)


def test_limits_of_steps_if_a_layer_makes_several_groups() -> None:
    torch.manual_seed(0)
    limits = fp.Limits(keep_ratios={"a": (0.5, 1.0)})
    model = Split()
    for result in fp.prune_in_steps(
        model, torch.zeros(1, 3, 8, 8), steps=4, budget="flops=0.55", method="l1", limits=limits, ranking="global"
    ):
        assert result.plan.widths["a"][0] >= 12
        assert result.plan.widths["a#2"][0] >= 4
