"""The rewritten graph is a network like any other: it trains, saves, copies, exports and is pruned again."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import fastprune as fp
from fastprune.graph import Slice, TraceError
from fastprune.graph.export.open_sizes import export_for_sizes
from fastprune.surgery import cut
from fastprune.surgery.verification import masked


class Shuffled(nn.Module):
    """A channel shuffle, parts of fixed sizes, dropout, and an auxiliary head in train mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.left, self.right = nn.Conv2d(4, 6, 1), nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.last, self.auxiliary = nn.Linear(12, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        x = torch.relu(self.norm(self.first(x)))
        n, c, h, w = x.shape
        x = x.view(n, 3, 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        a, b = torch.split(x, [4, 8], 1)
        a, b = self.left(a), self.right(b)
        y = self.last(F.dropout(torch.cat([a, b], 1).mean((2, 3)), 0.2, self.training))
        return {"y": y, "auxiliary": self.auxiliary(a.mean((2, 3)))} if self.training else y


@pytest.fixture
def model() -> nn.Module:
    return Shuffled().double().eval()


@pytest.fixture
def plan(model: nn.Module) -> fp.PruningPlan:
    graph = fp.trace(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert [group.size for group in graph.groups] == [4, 4, 6, 3]
    mask = torch.tensor([1, 0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 1, 0, 1])
    return graph.plan(mask)


@pytest.fixture
def compact(model: nn.Module, plan: fp.PruningPlan) -> fp.RewrittenNetwork:
    network = fp.apply(plan, model)
    assert isinstance(network, fp.RewrittenNetwork)
    return network


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_it_takes_any_batch(batch: int, model: nn.Module, plan: fp.PruningPlan, compact: nn.Module) -> None:
    with torch.no_grad():
        assert torch.allclose(compact(images(batch)), masked(model, plan)(images(batch)), rtol=1e-12)


def test_train_mode_computes_what_the_masked_model_computes(
    model: nn.Module, plan: fp.PruningPlan, compact: nn.Module
) -> None:
    full = masked(model, plan).train()
    compact.train()
    for network in (full, compact):
        torch.manual_seed(3)
        result = network(images(4))
        assert list(result) == ["y", "auxiliary"]
        (result["y"].sum() + result["auxiliary"].square().sum()).backward()
    # Dropout hits other positions, so what follows it differs; statistics and the auxiliary head must agree.
    kept = plan.kept_indices(next(s for s in plan.slices if s.tensor == "norm.weight"))
    assert torch.allclose(compact.norm.running_mean, full.norm.running_mean[kept], rtol=1e-12)
    assert int(compact.norm.num_batches_tracked) == int(full.norm.num_batches_tracked) == 1
    kept = plan.kept_indices(next(s for s in plan.slices if s.tensor == "auxiliary.weight"))
    assert torch.allclose(compact.auxiliary.weight.grad, full.auxiliary.weight.grad[:, kept], rtol=1e-9)


def test_it_is_saved_and_loaded_by_the_names_of_the_model(
    model: nn.Module, plan: fp.PruningPlan, compact: nn.Module, tmp_path: Path
) -> None:
    assert set(compact.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        for parameter in compact.parameters():
            parameter.add_(0.1)
    save_file(compact.state_dict(), tmp_path / "model.safetensors")
    again = fp.apply(dataclasses.replace(plan, code="rewritten"), model, check=False)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(images(2)), compact(images(2)))


def test_a_copy_is_independent_and_keeps_its_mode(compact: nn.Module) -> None:
    before = compact(images(2)).detach()
    other = copy.deepcopy(compact)
    assert not other.training
    with torch.no_grad():
        other.first.weight.zero_()
    assert torch.equal(compact(images(2)), before)
    assert not torch.equal(other(images(2)), before)


def test_it_is_exported(compact: nn.Module) -> None:
    program = torch.export.export(compact, (images(2),))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    assert torch.allclose(torch.export.load(buffer).module()(images(2)), compact(images(2)), rtol=1e-12)


def test_it_is_pruned_again(compact: nn.Module) -> None:
    graph = fp.trace(compact, images(1))
    assert graph.num_units == 10
    mask = torch.ones(graph.num_units)
    mask[::3] = 0
    smaller = fp.apply(graph.plan(mask), compact)
    assert fp.verify(graph.plan(mask), compact, smaller, dtype=torch.float64) < 1e-12
    assert sum(p.numel() for p in smaller.parameters()) == graph.plan(mask).params[1]


@pytest.mark.parametrize("shape", [(1, 3, 12, 9), (3, 3, 2, 2), (2, 3, 32, 8)])
def test_it_takes_images_of_other_sizes(
    shape: tuple[int, ...], model: nn.Module, plan: fp.PruningPlan, compact: nn.Module
) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    for network in (compact, copy.deepcopy(compact)):
        with torch.no_grad():
            assert torch.allclose(network(x), masked(model, plan)(x), rtol=1e-12)
    compact.train()(torch.cat([x, x]))["y"].sum().backward()
    assert compact.first.weight.grad is not None


def test_a_second_cut_exports_nothing(
    model: nn.Module, plan: fp.PruningPlan, compact: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Further graphs are kept with the channel graph; weights are those of the model that is cut."""
    calls: list[bool] = []

    def export_and_count(*arguments: Any, training: bool) -> Any:
        calls.append(training)
        return export_for_sizes(*arguments, training=training)

    monkeypatch.setattr("fastprune.surgery.rewritten.export_for_sizes", export_and_count)
    graph = fp.trace(model, images(2))
    first = cut(plan, model, graph.traced).model
    assert calls == [False, True]
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    second = cut(plan, other, graph.traced).model
    assert calls == [False, True]
    for network, full in ((first, model), (second, other)):
        torch.testing.assert_close(network.eval()(images(3)), masked(full, plan)(images(3)))
    assert not torch.equal(first(images(3)), second(images(3)))


def test_sizes_that_the_code_does_not_take_are_refused() -> None:
    class Even(Shuffled):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[2] % 2 == 0
            return super().forward(x)

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Linear(4 * 64, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x)[:, [4, 1, 0, 3]].flatten(1))

    for model, condition in ((Even(), r"x\.size\(\)\[2\] % 2 == 0"), (Flat(), r"== 256")):
        graph = fp.trace(model.double().eval(), images(1))
        compact = fp.apply(graph.plan((torch.arange(graph.num_units) % 3 > 0).int()), model)
        assert isinstance(compact, fp.RewrittenNetwork)
        shapes = r"got an input of shape \(5, 3, 9, 9\); this network was traced with \(2, 3, 8, 8\)"
        with pytest.raises(ValueError, match=f"{shapes}; {condition}|{shapes}; .*{condition} is needed"):
            compact(torch.zeros(5, 3, 9, 9, dtype=torch.float64))


def test_sizes_that_become_long_formulas_stay_fixed() -> None:
    class Padded(Shuffled):
        def forward(self, x: Tensor) -> Tensor:
            for kernel in (3, 5, 3):  # each pads to fit, by a formula of the sizes of the layer before
                lack = [max((math.ceil(size / 2) - 1) * 2 + kernel - size, 0) for size in x.shape[-2:]]
                x = F.avg_pool2d(F.pad(x, [0, lack[1], 0, lack[0]]), kernel, 2)
            return super().forward(x)

    model, x = Padded().double().eval(), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    graph = fp.trace(model, x)
    with pytest.raises(TraceError, match="the sizes are no short formulas of those of the inputs"):
        export_for_sizes(model, graph.traced.inputs, training=False)
    plan = graph.plan((torch.arange(graph.num_units) % 3 > 0).int())
    compact = fp.apply(plan, model)
    assert isinstance(compact, fp.RewrittenNetwork)
    with torch.no_grad():
        assert torch.allclose(compact(x), masked(model, plan)(x), rtol=1e-12)
    with pytest.raises(ValueError, match=r"shape \(1, 3, 48, 64\); .*; its graph holds for these sizes"):
        compact(x[:, :, :48])


def test_a_pickled_network_takes_the_traced_size_only(compact: nn.Module) -> None:
    again = pickle.loads(pickle.dumps(compact))
    assert torch.equal(again(images(2)), compact(images(2)))
    with pytest.raises(ValueError, match=r"shape \(2, 3, 9, 9\); .*; its graph holds for these sizes"):
        again(torch.zeros(2, 3, 9, 9, dtype=torch.float64))


def test_a_plan_for_another_model_is_refused(plan: fp.PruningPlan) -> None:
    class Other(Shuffled):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.first(x)))
            return self.last(torch.cat([self.left(x[:, :4]), self.right(x[:, 4:])], 1).mean((2, 3)))

    with pytest.raises(fp.PlanError, match=r"channels of 'first\.weight' that the plan removes cannot leave: others"):
        fp.apply(dataclasses.replace(plan, code="rewritten"), Other().double().eval())


def test_ignored_layers_are_no_obstacle(model: nn.Module) -> None:
    graph = fp.trace(model, images(1), ignore=["left"])
    assert [group.producers for group in graph.groups] == [("first",), ("first",), ("right",)]
    plan = fp.PruningPlan.from_json(graph.plan(torch.arange(graph.num_units) % 3 > 0).to_json())
    compact = fp.apply(plan, model)
    assert isinstance(compact, fp.RewrittenNetwork)
    assert compact.left.weight.shape[0] == 6


def test_a_plan_that_removes_what_must_stay_is_refused(model: nn.Module) -> None:
    graph = fp.trace(model, images(1))
    head = Slice("last.bias", 0, torch.arange(5), "channel")
    plan = dataclasses.replace(graph.plan(torch.arange(graph.num_units) % 3 > 0), code="rewritten")
    with pytest.raises(fp.PlanError, match=r"channels of 'last\.bias' .* cannot leave: output of the network"):
        fp.apply(dataclasses.replace(plan, slices=(*plan.slices, head)), model)


def test_without_a_graph_for_train_mode_it_is_refused_there() -> None:
    class Untraceable(Shuffled):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and float(x.sum()) > 0:
                x = x + 1
            y = super().forward(x)
            return y["y"] if isinstance(y, dict) else y

    model = Untraceable().double().eval()
    with pytest.warns(UserWarning, match="auxiliary"):
        graph = fp.trace(model, images(1))
    plan = graph.plan(torch.arange(graph.num_units) % 2 == 0)
    with pytest.warns(UserWarning, match="auxiliary"):
        compact = fp.apply(plan, model)
    compact(images(2))
    with pytest.raises(RuntimeError, match="cannot run in train mode"):
        compact.train()(images(2))


def test_a_plan_that_train_mode_does_not_allow_is_refused_there() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b = torch.split(self.first(x), [4, 4], 1)
            return self.second(a * (b.softmax(1) if self.training else b))

    model = Mixing().double().eval()
    graph = fp.trace(model, images(1))
    compact = fp.apply(graph.plan(torch.tensor([1, 0, 1, 1])), model)
    assert isinstance(compact, fp.RewrittenNetwork)
    with pytest.raises(RuntimeError, match=r"cannot run in train mode: channels .* cannot leave: softmax"):
        compact.train()(images(2))
