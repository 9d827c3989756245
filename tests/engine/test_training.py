"""Training and evaluation: accuracy, exact resume, exact evaluation, schedules by value."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune import models
from fastprune.data import load_data
from fastprune.engine import (
    HeldOut,
    LoopOptions,
    NonFiniteError,
    Placement,
    RunDirectory,
    TrainConfig,
    choose_device,
    evaluate,
    measure_latencies,
    measure_latency,
    train,
)
from fastprune.engine.device import warn_of_slow_bf16
from fastprune.engine.training import Trainer, _synchronise_batch_norm
from fastprune.host.distributed import Distributed
from fastprune.training.schedule import learning_rate

DATA = load_data("synthetic:1x8x8:4:90")


class Net(nn.Module):
    """A small network with state and random draws: batch norm, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


def make_net() -> Net:
    torch.manual_seed(0)
    return Net()


CONFIG = TrainConfig(epochs=4, batch_size=16, lr=0.1, schedule="cosine", warmup_epochs=1, nesterov=True)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class PowerCutError(Exception):
    pass


@pytest.mark.parametrize("steps", [1, 6, 13, 23])
@pytest.mark.parametrize("precision", ["float32", "bf16"])  # bf16: with all other random draws
def test_kill_and_resume_gives_the_same_weights(
    tmp_path: Path, steps: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(**{**CONFIG.__dict__, "precision": precision, "channels_last": precision == "bf16"})
    if precision == "bf16":
        config = replace(config, cutout=3, mixup=0.2, label_smoothing=0.1)
    whole = make_net()
    metrics = train(whole, DATA, config, device="cpu", seed=3)
    run = RunDirectory.create(tmp_path / "run", {})
    count = 0

    def pull_the_plug(*arguments: object, **options: object) -> Tensor:
        nonlocal count
        count += 1
        if count > steps:
            raise PowerCutError
        return cross_entropy(*arguments, **options)

    cross_entropy = F.cross_entropy
    options = LoopOptions(checkpoint_steps=4, checkpoint_epochs=0)
    monkeypatch.setattr(F, "cross_entropy", pull_the_plug)
    with pytest.raises(PowerCutError):
        train(make_net(), DATA, config, device="cpu", seed=3, run=run, options=options)
    monkeypatch.undo()
    resumed = Net()  # other weights: all must come from the checkpoint
    again = train(resumed, DATA, config, device="cpu", seed=3, run=run, resume=True, options=options)
    assert same_weights(whole, resumed)
    assert again == metrics
    assert not resumed.training
    assert same_weights(_loaded(run), whole)


def _loaded(run: RunDirectory) -> nn.Module:
    model = Net()
    models.load_weights(model, run.model_path)
    return model


def test_seeds_matter() -> None:
    first, second, third = make_net(), make_net(), make_net()
    for net, seed in ((first, 1), (second, 1), (third, 2)):
        train(net, DATA, CONFIG, device="cpu", seed=seed)
    assert same_weights(first, second)
    assert not same_weights(first, third)


@pytest.mark.slow
def test_resnet20_learns_the_digits() -> None:
    pytest.importorskip("sklearn")
    data = load_data("digits")
    torch.manual_seed(0)
    model = models.create("resnet20", num_classes=10, in_channels=1)
    config = TrainConfig(epochs=8, batch_size=64, schedule="cosine", warmup_epochs=1, weight_decay=5e-4)
    metrics = train(model, data, config, device="cpu")
    assert evaluate(model, data)["accuracy"] >= 0.97
    assert metrics["held_out_accuracy"] >= 0.95


def test_mixup_of_fewer_classes_than_the_network_has() -> None:
    """As without mixup, the data's classes are the network's first ones."""
    model = make_net()
    model.fc = nn.Linear(8, 9)
    metrics = train(model, DATA, TrainConfig(epochs=1, batch_size=30, mixup=0.2, label_smoothing=0.1), device="cpu")
    assert math.isfinite(metrics["loss"])
    model.fc = nn.Linear(8, 3)
    with pytest.raises(ValueError, match="has 3 outputs, the data have 4 classes"):
        train(model, DATA, TrainConfig(epochs=1, mixup=0.2), device="cpu")


def test_lighting_changes_each_step_and_needs_the_scale_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    data, config = load_data("synthetic:3x8x8:4:64"), TrainConfig(epochs=2, batch_size=29, lighting=0.1)
    with pytest.raises(
        ValueError, match=r"lighting: how the pixels of 'synthetic:3x8x8:4:64' were scaled is not known"
    ):
        train(make_net(), data, config, device="cpu")
    monkeypatch.setattr(type(data), "pixel_std", (0.229, 0.224, 0.225))
    seen: list[tuple[Tensor, Tensor]] = []
    augment = Trainer.augment

    def watch(self: Trainer, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        result = augment(self, images, labels)
        seen.append((images, result[0]))
        return result

    monkeypatch.setattr(Trainer, "augment", watch)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    train(net, data, config, device="cpu")
    changes = [after - before for before, after in seen]
    assert all(float(change.abs().amax((1, 2, 3)).min()) > 0 for change in changes)
    assert not torch.allclose(changes[0][:1], changes[2][:1])


def test_one_step_is_sgd() -> None:
    data = load_data("synthetic:1x8x8:4:16", held_out=0)
    config = TrainConfig(epochs=1, batch_size=16, lr=0.5, weight_decay=0.1, decay_norm_and_bias=False, evaluate_every=0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in net.parameters())
    ((images, labels),) = data.batches("train", 16, augment=True)
    F.cross_entropy(F.linear(images.flatten(1), weight, bias), labels).backward()
    train(net, data, config, device="cpu")
    assert torch.allclose(net[1].weight, weight - 0.5 * (weight.grad + 0.1 * weight), atol=1e-7)
    assert torch.allclose(net[1].bias, bias - 0.5 * bias.grad, atol=1e-7)


def test_one_step_is_adamw() -> None:
    """The first step of Adam moves every weight by the learning rate against the sign of its gradient."""
    data = load_data("synthetic:1x8x8:4:16", held_out=0)
    config = TrainConfig(
        epochs=1, batch_size=16, optimizer="adamw", lr=0.01, weight_decay=0.1, decay_norm_and_bias=False
    )
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in net.parameters())
    ((images, labels),) = data.batches("train", 16, augment=True)
    F.cross_entropy(F.linear(images.flatten(1), weight, bias), labels).backward()
    train(net, data, config, device="cpu")
    assert torch.allclose(net[1].weight, weight * (1 - 0.01 * 0.1) - 0.01 * weight.grad.sign(), atol=1e-5)
    assert torch.allclose(net[1].bias, bias - 0.01 * bias.grad.sign(), atol=1e-5)


def test_nesterov_needs_sgd_with_momentum() -> None:
    for options in ({"momentum": 0.0}, {"optimizer": "adamw"}):
        with pytest.raises(ValueError, match="nesterov: it needs optimizer 'sgd' and a momentum above 0"):
            TrainConfig(nesterov=True, **options)


def test_auxiliary_heads_are_trained() -> None:
    class TwoHeads(Net):
        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            y = self.body(x).mean((2, 3))
            return (self.fc(y), self.aux(y)) if self.training else self.fc(y)

    net = TwoHeads()
    before = net.aux.weight.clone()
    train(net, DATA, TrainConfig(epochs=1, batch_size=32), device="cpu")
    assert not torch.equal(net.aux.weight, before)


def test_divergence_stops() -> None:
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        train(make_net(), DATA, TrainConfig(epochs=3, batch_size=16, lr=1e30), device="cpu")


def test_frozen_network_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        train(make_net().requires_grad_(False), DATA, CONFIG, device="cpu")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("schedule", "step"), ("epochs", -1), ("batch_size", 0), ("label_smoothing", 1.0), ("lr", -0.1)),
        *(("optimizer", "adam"), ("momentum", 1.0), ("gamma", 0.0), ("milestones", (-1.0,))),
        *(("cutout", -1), ("mixup", -0.1), ("lighting", -0.1)),
    ],
)
def test_config_errors(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        TrainConfig(**{field: value})


def test_every_option_is_documented() -> None:
    for options in (TrainConfig, LoopOptions):
        for field in options.__dataclass_fields__.values():
            assert field.metadata["help"]


def test_sync_bn_needs_cuda() -> None:
    with pytest.raises(ValueError, match="CUDA only"):
        train(make_net(), DATA, TrainConfig(sync_bn=True), device="cpu")


def test_synchronise_batch_norm_is_undone() -> None:
    net = make_net()
    plain = net.body[1]
    with _synchronise_batch_norm(net, True):
        assert isinstance(net.body[1], nn.SyncBatchNorm)
        net.body[1].running_mean.fill_(2)
        net.body[1].num_batches_tracked = torch.tensor(7)
    assert net.body[1] is plain
    assert plain.running_mean[0] == 2
    assert plain.num_batches_tracked == 7


@pytest.mark.parametrize("batch_size", [1, 7, 22, 100])
def test_evaluation_is_exact(batch_size: int) -> None:
    net = make_net()
    ((images, labels),) = DATA.batches("test", 1000)
    with torch.no_grad():
        scores = net.eval()(images)
    net.train()
    net.fc.eval()
    result = evaluate(net, DATA, batch_size=batch_size)
    assert result["samples"] == len(labels) == 22
    assert result["accuracy"] == (scores.argmax(1) == labels).double().mean().item()
    assert math.isclose(result["loss"], F.cross_entropy(scores.double(), labels).item(), rel_tol=1e-6)
    assert net.training
    assert not net.fc.training


def test_held_out_accuracy_for_methods() -> None:
    net = make_net().eval()
    held_out = HeldOut(DATA, Placement(), Distributed())
    assert held_out.num_classes == 4
    measured = evaluate(net, DATA, "held_out")
    assert (held_out.accuracy(net), held_out.loss(net)) == (measured["accuracy"], measured["loss"])
    assert (held_out.samples, held_out.held_out) == (81, measured["samples"])
    assert (held_out.steps(16), held_out.steps(16, 40)) == (6, 3)
    with pytest.raises(ValueError, match="no held_out samples"):
        evaluate(net, load_data("synthetic:1x8x8:4:90", held_out=0), "held_out")


@pytest.mark.parametrize("batch_size", [2, 256])
def test_held_out_images_for_methods(batch_size: int) -> None:
    """The first ones for any batch size, the same on every rank."""
    whole = next(DATA.batches("held_out", 9, complete=True))
    held_out = HeldOut(DATA, Placement(), Distributed(), batch_size)
    for count in (1, 5, 9, 2048):
        found = held_out.held_out_batch(count)
        assert all(torch.equal(a, b[:count]) for a, b in zip(found, whole, strict=True))
    images, _ = HeldOut(DATA, Placement(), Distributed(1, 2), batch_size).held_out_batch(3)
    assert torch.equal(images, whole[0][:3])
    without = HeldOut(load_data("synthetic:1x8x8:4:90", held_out=0), Placement(), Distributed())
    with pytest.raises(ValueError, match="nothing is held out"):
        without.held_out_batch(3)


def schedule(**options: object) -> list[float]:
    epochs, per_epoch = 4, 5
    return [learning_rate(s, steps_per_epoch=per_epoch, epochs=epochs, lr=1.0, **options) for s in range(20)]


def test_schedules() -> None:
    drops = [1.0] * 10 + [0.1] * 5 + [0.01] * 5
    assert schedule() == pytest.approx(drops)
    assert schedule(milestones=(2, 3)) == pytest.approx(drops)
    assert schedule(schedule="cosine") == pytest.approx([(1 + math.cos(math.pi * s / 20)) / 2 for s in range(20)])
    assert schedule(schedule="linear") == pytest.approx([1 - s / 20 for s in range(20)])
    warm = schedule(schedule="linear", warmup_epochs=1)
    assert warm[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert warm[-1] == pytest.approx(1 / 15)
    assert schedule(schedule="constant", warmup_epochs=2)[9:] == [1.0] * 11
    with pytest.raises(ValueError, match="milestones, cosine, linear, constant"):
        schedule(schedule="steps")


def test_latency() -> None:
    small, large = nn.Conv2d(3, 4, 1), nn.Sequential(*(nn.Conv2d(3, 3, 7) for _ in range(8)))
    times = measure_latencies({"small": small, "large": large}, (3, 64, 64), batch=4, repeats=5)
    assert 0 < times["small"] < times["large"]
    assert small.training
    assert measure_latency(small, (3, 8, 8), repeats=3) > 0
    with pytest.raises(ValueError, match="at least 1"):
        measure_latencies({}, (3, 8, 8))


def test_the_fastest_pass_is_free_of_other_jobs() -> None:
    seconds = iter([0.0, 9.0, 0.0, 3.0, 0.0, 1.0, 0.0, 2.0])  # a pass to warm up, then three that count
    times = measure_latencies(
        {"": nn.Conv2d(3, 4, 1)}, (3, 8, 8), repeats=3, warmup=1, clock=lambda: next(seconds), choose=min
    )
    assert times == {"": 1000.0}


def test_slow_networks_are_timed_in_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr("fastprune.engine.latency.time.monotonic", lambda: next(now))
    passes: list[float] = []
    conv = nn.Conv2d(3, 4, 1)
    conv.register_forward_hook(lambda *_: passes.append(0.0))
    measure_latencies({"": conv}, (3, 8, 8), repeats=30, warmup=2, seconds=1.5)
    assert len(passes) == 4  # two to warm up, two that count


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps:0", "auto:1x"])
def test_device_errors(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
def test_devices_without_cuda() -> None:
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="0 CUDA device"):
        choose_device("cuda:3")


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match="float32 or bf16"):
        Placement(precision="fp8")


@pytest.mark.parametrize(
    ("precision", "fast", "warned"), [("bf16", False, True), ("bf16", True, False), ("float32", False, False)]
)
def test_slow_bf16_is_said(precision: str, fast: bool, warned: bool, monkeypatch, caplog) -> None:
    monkeypatch.setattr("fastprune.engine.device.cpu_computes_bf16", lambda: fast)
    warn_of_slow_bf16.cache_clear()
    for _ in range(2):
        Placement(precision=precision)
    assert caplog.text.count("no fast bfloat16") == warned
    warn_of_slow_bf16.cache_clear()
