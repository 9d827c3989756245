"""Networks of a user's own, with own data, batches and losses, through ``prune``, ``finetune`` and ``evaluate``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import PlainCNN, TwoInputs, UNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastprune as fp
from fastprune.engine import HeldOut, LoopOptions, Placement
from fastprune.host.distributed import Distributed

QUIET = LoopOptions(progress=False)
EPOCHS: dict[str, dict[str, Any]] = {
    "dmc": {"epochs": 2, "samples": 32, "batch_size": 16, "learning_rate": 0.2, "evaluate_every": 1},
    "ddnp": {"epochs": 2, "samples": 32, "batch_size": 16, "evaluate_every": 1},
    "sanp": {"epochs": 2, "batch_size": 16, "every": 1, "part": 1.0, "lr": 0.01, "evaluate_every": 1},
    "slimming": {"epochs": 1, "batch_size": 16, "lr": 0.01},
    "gcp": {"rounds": 1, "penalties": (0.1,), "batch_size": 16},
    "sp": {"epochs": 1, "batch_size": 16, "images": 16, "population": 4, "iterations": 2, "parents": 2, "levels": 4},
    "l1": {},
}


def images(count: int = 48) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def loader(*tensors: Tensor, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), batch_size=16, **options)


def labels(count: int = 48) -> Tensor:
    """The brightest of four quarters of each image."""
    return F.adaptive_avg_pool2d(images(count).mean(1), 2).flatten(1).argmax(1)


def both(result: fp.PruningResult) -> tuple[float, float]:
    return result.metrics["macs"]["planned"], result.metrics["macs"]["full"]


@pytest.mark.parametrize("method", list(EPOCHS))
def test_a_plain_cnn_with_a_data_loader(method: str) -> None:
    torch.manual_seed(0)
    network, train = PlainCNN(), loader(images(), labels(), shuffle=True)
    result = fp.prune(
        network, images(1), method=method, budget=0.5, data=train, held_out=loader(images(), labels()), loop=QUIET,
        **EPOCHS[method],
    )  # fmt: skip
    planned, full = both(result)
    assert planned <= 0.5 * full
    assert sum(1 for _, kept, size in widths(result) if kept < size) >= 2  # more than one layer is cut
    before = fp.evaluate(result, train)
    metrics = fp.finetune(
        result, train, held_out=loader(images(), labels()), epochs=3, batch_size=16, lr=0.05, loop=QUIET
    )
    assert {"loss", "accuracy", "held_out_accuracy"} <= set(metrics)
    assert fp.evaluate(result.model, train)["loss"] < before["loss"]


def widths(result: fp.PruningResult) -> list[tuple[str, int, int]]:
    return [(g.name, int(result.plan.mask[g.units].sum()), g.size) for g in result.graph.groups]


def segment(model: Callable[..., Any], batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return model(batch["image"])["out"], batch["mask"]


@pytest.mark.parametrize("method", ["dmc", "ddnp", "sanp", "slimming", "gcp"])
def test_a_unet_with_batches_and_outputs_in_dicts(method: str) -> None:
    torch.manual_seed(0)
    masks = (images().mean(1) > 0).long() + (images().mean(1) > 0.5).long()
    samples = [{"image": x, "mask": y, "name": "a.png"} for x, y in zip(images(), masks, strict=True)]
    train: DataLoader[Any] = DataLoader(samples, batch_size=16)  # type: ignore[arg-type]
    result = fp.prune(
        UNet(), images(1), method=method, budget="50%", data=train, held_out=train, forward=segment, loop=QUIET,
        **EPOCHS[method],
    )  # fmt: skip
    planned, full = both(result)
    assert planned <= 0.5 * full
    before = fp.evaluate(result, train, forward=segment)
    fp.finetune(result, train, forward=segment, epochs=4, lr=0.1, loop=QUIET)
    after = fp.evaluate(result, train, forward=segment)
    assert after["loss"] < before["loss"]
    assert 0.4 < after["accuracy"] <= 1  # of pixels
    assert result.model(images(2))["out"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize("method", ["dmc", "ddnp", "sanp", "slimming", "l1"])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_regression_of_two_inputs(method: str, by_name: bool) -> None:
    torch.manual_seed(0)
    numbers = torch.randn(48, 5, generator=torch.Generator().manual_seed(1))
    target = images().mean((1, 2, 3))[:, None] + numbers[:, :1]
    train: Any = loader(images(), numbers, target)
    if by_name:  # in another order than the signature's
        train = [({"numbers": b, "image": a}, y) for a, b, y in train]
    result = fp.prune(
        TwoInputs(), (images(1), numbers[:1]), method=method, budget="macs=0.5", data=train, held_out=train,
        loss=nn.MSELoss(), loop=QUIET, **EPOCHS[method],
    )  # fmt: skip
    planned, full = both(result)
    assert planned <= 0.5 * full
    assert not any("accuracy" in name for name in result.metrics["search"])
    before = fp.evaluate(result, train, loss=nn.MSELoss())
    assert set(before) == {"loss", "samples"}
    fp.finetune(result, train, loss=nn.MSELoss(), epochs=3, batch_size=16, lr=0.05, loop=QUIET)
    assert fp.evaluate(result, train, loss=nn.MSELoss())["loss"] < before["loss"]


def test_several_labels_per_image() -> None:
    targets = (F.adaptive_avg_pool2d(images().mean(1), 2).flatten(1) > 0).float()
    result = fp.prune(
        PlainCNN(), images(1), method="dmc", data=loader(images(), targets), loss=nn.BCEWithLogitsLoss(), loop=QUIET,
        **EPOCHS["dmc"],
    )  # fmt: skip
    planned, full = both(result)
    assert planned <= 0.5 * full
    assert 0 < result.metrics["search"]["task_loss"] < 2


def test_the_release_of_ddnp_measures_energies_through_forward() -> None:
    train = [{"x": x, "y": y} for x, y in loader(images(), labels())]
    options = {"epochs": 1, "samples": 32, "variant": "release", "evaluate_every": 0, "groups": "all"}
    plans = [
        fp.prune(PlainCNN().eval(), images(1), method="ddnp", data=data, forward=forward, loop=QUIET, **options)
        for data, forward in (
            (train, lambda model, batch: (model(batch["x"]), batch["y"])),
            (loader(images(), labels()), None),
        )
        if torch.manual_seed(0)
    ]
    assert torch.equal(plans[0].plan.mask, plans[1].plan.mask)


def test_a_loss_of_ones_own_is_the_built_in_one_if_it_computes_the_same() -> None:
    train = loader(images(), labels())
    results = []
    for loss in (None, nn.CrossEntropyLoss()):
        torch.manual_seed(0)
        network = PlainCNN()
        result = fp.prune(network, images(1), data=train, loss=loss, loop=QUIET, **EPOCHS["dmc"])
        metrics = fp.finetune(result, train, loss=loss, epochs=2, loop=QUIET)
        results.append((result.plan.mask, metrics["loss"], fp.evaluate(result, train, loss=loss)["loss"]))
    (mask, loss_1, mean_1), (other, loss_2, mean_2) = results
    assert torch.equal(mask, other)
    assert loss_1 == loss_2
    assert mean_1 == pytest.approx(mean_2, rel=1e-6)


FLOATS = [(images(8), torch.rand(8, 4))]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "probabilities": ({"data": FLOATS}, r"target of float32 and shape \[8, 4\].*loss="),
    "regression": ({"data": [(images(8), torch.rand(8))]}, r"whole numbers.*nn\.MSELoss\(\)"),
    "one-hot": ({"data": [(images(8), torch.ones(8, 4).long())]}, r"labels\.argmax\(1\)"),
    "label out of range": ({"data": [(images(8), torch.full((8,), 7))]}, "label 7 is none of the network's 4"),
    "dict": ({"data": [{"pixels": images(8), "class": labels(8)}]}, r"batch\['pixels'\].*batch\['class'\]"),
    "images only": ({"data": [images(8)]}, "pair"),
    "no scalar": ({"data": FLOATS, "loss": nn.MSELoss(reduction="none")}, "tensor of one number.*mean over the batch"),
    "class of a loss": ({"data": FLOATS, "loss": nn.MSELoss}, r"MSELoss\(\)"),
    "forward without target": (
        {"data": FLOATS, "forward": lambda model, batch: model(batch[0])},
        r"\(output, target\)",
    ),
    "dataset": ({"data": TensorDataset(images(8), labels(8))}, r"DataLoader\(dataset"),
    "tensor": ({"data": images(8)}, "DataLoader"),
    "unknown name": ({"data": "cifar"}, "cifar10:FOLDER"),
    "held out alone": ({"method": "l1", "held_out": FLOATS}, "data="),
    "another shape": ({"data": [(torch.rand(8, 3, 16), labels(8))]}, "first batch does not go through"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_with_the_way_out(case: str) -> None:
    arguments, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=message):
        fp.prune(PlainCNN(), images(1), loop=QUIET, **arguments)


@pytest.mark.parametrize("options", [{"mixup": 0.2}, {"label_smoothing": 0.1}])
def test_options_of_classification_are_refused_with_another_loss(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="cross-entropy"):
        fp.finetune(PlainCNN(), FLOATS, loss=nn.MSELoss(), epochs=1, loop=QUIET, **options)


def test_mixup_makes_probabilities_within_a_training() -> None:
    data = fp.UserData(loader(images(), labels()), num_classes=4)
    metrics = fp.finetune(PlainCNN(), data, epochs=1, mixup=0.4, loop=QUIET)
    assert 0 < metrics["loss"] < 5


def test_autoslim_and_sp_say_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="autoslim: this needs class labels"):
        fp.prune(PlainCNN(), images(1), method="autoslim", data=FLOATS, held_out=FLOATS, loss=nn.MSELoss())
    with pytest.raises(ValueError, match=r"sp: .*forward="):
        fp.prune(
            PlainCNN(), images(1), method="sp", data=FLOATS, held_out=FLOATS, forward=lambda m, b: (m(b[0]), labels(8))
        )


def test_a_batch_is_shared_among_processes_whatever_it_holds() -> None:
    batch = {"image": images(6), "mask": labels(6), "name": [str(n) for n in range(6)], "scale": torch.tensor(2.0)}
    data = fp.UserData([batch])
    shares = [next(data.batches("train", 6, distributed=Distributed(rank, 2)))[0] for rank in range(2)]
    assert [share["name"] for share in shares] == [["0", "1", "2"], ["3", "4", "5"]]
    assert torch.equal(torch.cat([share["image"] for share in shares]), batch["image"])
    assert all(float(share["scale"]) == 2 for share in shares)
    assert next(data.batches("train", 6, samples=2))[0]["name"] == ["0", "1"]


def test_pixels_without_a_label_count_for_nothing() -> None:
    scores = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    target = torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(1))
    target[:, :2] = -100
    held_out = HeldOut(fp.UserData([(scores, target)], held_out=[(scores, target)]), Placement(), Distributed())
    known = target != -100
    assert held_out.accuracy(nn.Identity()) == pytest.approx(float((scores.argmax(1) == target)[known].float().mean()))
    assert held_out.loss(nn.Identity()) == pytest.approx(float(F.cross_entropy(scores, target)), rel=1e-6)


def test_the_page_about_own_networks_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[1] / "docs" / "own_networks.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    torch.manual_seed(0)
    exec("\n".join(blocks), {"__name__": "page"})
    accuracy, distillation, taught, width = map(float, capsys.readouterr().out.split())
    assert min(accuracy, taught) >= 0
    assert max(accuracy, taught) <= 1
    assert distillation > 0
    assert width < 12
