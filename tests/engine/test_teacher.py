"""Trainings with a teacher and a moving average: values by hand, exact resume, refusals."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune import models
from fastprune.data import load_data
from fastprune.data.given import as_data
from fastprune.engine import LoopOptions, RunDirectory, evaluate, prepare_teacher, train
from fastprune.engine.averaging import WeightAverage
from fastprune.training.distillation import Distillation
from fastprune.training.objective import Objective
from fastprune.training.options import FinetuneRecipe
from fastprune.training.weight_training import WeightTraining

DATA = load_data("synthetic:1x8x8:4:90")
CPU = torch.device("cpu")
RECIPE = FinetuneRecipe(epochs=3, batch_size=16, lr=0.1, label_smoothing=0.1, temperature=3.0, distill=0.6)


class Net(nn.Module):
    """A small network with state, random draws and an index as a buffer."""

    def __init__(self, wide: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, wide, 3), nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, 6, 1))
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(6, 4)
        self.register_buffer("order", torch.tensor([5, 3, 1, 0, 2, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.body(x).mean((2, 3))[:, self.get_buffer("order")]))


def make_net(wide: int = 8, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(wide)


def teach(network: nn.Module, recipe: FinetuneRecipe, teacher: nn.Module | None = None) -> Distillation:
    found = make_net(12, seed=1) if teacher is None else teacher
    return prepare_teacher(found, network, DATA, recipe, device=CPU, objective=Objective())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class PowerCutError(Exception):
    pass


@pytest.mark.parametrize(("precision", "steps"), [("float32", 3), ("float32", 14), ("bf16", 9)])
def test_kill_and_resume_gives_the_same_weights(
    tmp_path: Path, precision: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, precision=precision, mixup=0.2, distill_features=0.5)

    def run_it(net: Net, **more: object) -> dict[str, float]:
        return train(net, DATA, recipe, device="cpu", seed=3, distillation=teach(net, recipe), ema=0.9, **more)

    whole = make_net()
    metrics = run_it(whole)
    assert {"distillation", "features", "held_out_accuracy"} <= set(metrics)
    count, kl_div, options = 0, F.kl_div, LoopOptions(checkpoint_steps=4, checkpoint_epochs=0)

    def pull_the_plug(*arguments: object, **given: object) -> Tensor:
        nonlocal count
        count += 1
        if count > steps:
            raise PowerCutError
        return kl_div(*arguments, **given)

    run = RunDirectory.create(tmp_path / "run", {})
    monkeypatch.setattr(F, "kl_div", pull_the_plug)
    with pytest.raises(PowerCutError):
        run_it(make_net(), run=run, options=options)
    monkeypatch.undo()
    resumed = make_net(seed=7)  # other weights: all must come from the checkpoint
    assert run_it(resumed, run=run, resume=True, options=options) == metrics
    assert same(whole, resumed)
    saved = Net()
    models.load_weights(saved, run.model_path)
    assert same(saved, whole)
    with pytest.raises(ValueError, match="ema: got 0, but the run was begun with a moving average"):
        train(make_net(), DATA, recipe, device="cpu", run=run, resume=True)


def test_the_average_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[dict[str, Tensor]] = []
    update = WeightTraining.update

    def record(self: WeightTraining) -> None:
        update(self)
        steps.append({name: tensor.clone().double() for name, tensor in self.model.state_dict().items()})

    monkeypatch.setattr(WeightTraining, "update", record)
    plain, averaged = make_net(), make_net()
    train(plain, DATA, RECIPE, device="cpu")
    trail = steps.copy()
    steps.clear()
    metrics = train(averaged, DATA, RECIPE, device="cpu", ema=0.5)
    for one, other in zip(trail, steps, strict=True):  # the average does not touch the training
        assert all(torch.equal(one[name], other[name]) for name in one)
    by_hand = trail[0]
    for n, weights in enumerate(trail[1:], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        by_hand = {name: decay * by_hand[name] + (1 - decay) * weights[name] for name in by_hand}
    found = averaged.state_dict()
    for name, tensor in by_hand.items():
        if found[name].is_floating_point():
            assert torch.allclose(found[name].double(), tensor, atol=1e-6), name
    assert not same(averaged, plain)
    assert torch.equal(averaged.get_buffer("order"), Net().get_buffer("order"))
    assert averaged.body[1].num_batches_tracked == len(trail)
    assert metrics["held_out_loss"] == evaluate(averaged, DATA, "held_out")["loss"]


def test_no_average_before_the_first_step() -> None:
    net = make_net()
    average = WeightAverage(net, 0.999)
    average.update()
    assert same(average.network, net)
    train(net, DATA, replace(RECIPE, epochs=0), device="cpu", ema=0.9)
    assert same(net, make_net())


def test_one_step_follows_the_gradient_of_the_blend() -> None:
    data = load_data("synthetic:1x8x8:4:16", held_out=0)
    recipe = FinetuneRecipe(epochs=1, batch_size=16, lr=0.5, weight_decay=0.0, distill=0.4, temperature=2.0)
    net, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(64, 4)) for _ in range(2))
    own = copy.deepcopy(net)
    ((images, labels),) = data.batches("train", 16, augment=True)
    scores, p = own(images), torch.softmax(teacher(images) / 2, 1)
    kl = 4 * (p * (p.log() - torch.log_softmax(scores / 2, 1))).sum(1).mean()
    (0.6 * F.cross_entropy(scores, labels) + 0.4 * kl).backward()
    taught = prepare_teacher(teacher, net, data, recipe, device=CPU, objective=Objective())
    train(net, data, recipe, device="cpu", distillation=taught)
    assert torch.allclose(net[1].weight, own[1].weight - 0.5 * own[1].weight.grad, atol=1e-6)


def test_the_teacher_stays_as_it_is() -> None:
    teacher, net = make_net(12, seed=1), make_net()
    before = copy.deepcopy(teacher.state_dict())
    teacher.body.eval()  # its modes come back, too
    train(net, DATA, RECIPE, device="cpu", distillation=teach(net, RECIPE, teacher))
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert teacher.training
    assert not teacher.body.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


def test_a_network_learns_its_teacher_without_labels() -> None:
    """With α = 1 the labels do not matter."""
    recipe = replace(RECIPE, epochs=6, distill=1.0, label_smoothing=0.0)
    net, teacher = make_net(), make_net(12, seed=1)
    taught = teach(net, recipe, teacher)
    ((images, labels),) = DATA.batches("train", 1000)
    before = taught.distance(net.eval()(images), teacher.eval()(images), Objective())
    train(net, DATA, recipe, device="cpu", distillation=taught)
    after = taught.distance(net(images), teacher(images), Objective())
    assert after < 0.5 * before
    assert labels.dim() == 1


def test_a_teacher_that_does_not_fit_is_refused() -> None:
    net = make_net()
    more = make_net()
    more.fc = nn.Linear(6, 5)
    colour = make_net()
    colour.body[0] = nn.Conv2d(3, 8, 3)
    narrow = Net()
    narrow.body[3], narrow.fc = nn.Conv2d(8, 7, 1), nn.Linear(6, 4)
    for teacher, recipe, message in (
        (more, RECIPE, r"scores are of shape \[2, 5\], the network's of \[2, 4\]"),
        (colour, RECIPE, "a Net cannot take a batch of the data: .*give a teacher for the same data"),
        (net, RECIPE, "it shares weights with the network"),
        (narrow.body, RECIPE, "class scores|are of shape"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), replace(RECIPE, distill_features=1.0), "distill_features: the"),
    ):
        with pytest.raises(ValueError, match=message):
            teach(net, recipe, teacher)


def test_a_loss_of_ones_own_with_outputs_in_a_dict() -> None:
    class Two(nn.Module):
        def __init__(self, wide: int) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, wide), nn.Linear(wide, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.b(self.a(x).relu())
            return {"left": y[:, 0], "right": y[:, 1]}

    torch.manual_seed(0)
    batch = {"x": torch.randn(8, 5), "y": torch.randn(8)}
    objective = Objective(
        loss=lambda output, target: F.mse_loss(output["left"], target),
        forward=lambda model, batch: (model(batch["x"]), batch["y"]),
    )
    data = as_data([batch])
    assert data is not None
    net, teacher = Two(4), Two(9)
    recipe = FinetuneRecipe(epochs=1, lr=0.0, distill=0.25)
    taught = prepare_teacher(teacher, net, data, recipe, device=CPU, objective=objective)
    metrics = train(net, data, recipe, device="cpu", objective=objective, distillation=taught)
    own, wanted = net(batch["x"]), teacher(batch["x"])
    distance = (F.mse_loss(own["left"], wanted["left"]) + F.mse_loss(own["right"], wanted["right"])) / 2
    assert metrics["distillation"] == pytest.approx(distance.item(), rel=1e-5)
    by_hand = 0.75 * F.mse_loss(own["left"], batch["y"]) + 0.25 * distance
    assert metrics["loss"] == pytest.approx(by_hand.item(), rel=1e-5)
