"""A network whose graph is rewritten has the attributes and methods of its model, and says which layers cannot run."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from fastprune.surgery.held_modules import LayerCallError


class Base(nn.Module):
    """What a model inherits."""

    task = "classify"

    def describe(self) -> str:
        return f"{type(self).__name__} of {self.num_classes} classes"


class Labelled(Base):
    """Parts of fixed sizes, which need the rewritten graph; attributes, methods and a loss as detectors have them."""

    default_cfg: ClassVar[dict[str, Any]] = {"input_size": (3, 8, 8)}

    def __init__(self) -> None:
        super().__init__()
        self.names, self.num_classes, self.yaml = {0: "cat", 1: "dog"}, 2, {"depth": [1, 2]}
        self.stride = torch.tensor([8.0, 16.0])
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, stride=2), nn.BatchNorm2d(12), nn.ReLU())
        self.branches = nn.ModuleList([nn.Conv2d(4, 6, 1), nn.Conv2d(8, 6, 1)])
        self.scales = nn.ParameterList([torch.ones(6, 1, 1), torch.ones(6, 1, 1)])
        self.act, self.head, self.criterion = nn.SiLU(), nn.Linear(12, 2), nn.CrossEntropyLoss(torch.tensor([1.0, 2.0]))
        self.unused = nn.Linear(2, 2)
        self.order, self.owner, self.objective = [self.stem, self.criterion], [self], self.loss
        self.calls: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.stem(x), [4, 8], 1)
        parts = [self.act(f(y)) * s for f, y, s in zip(self.branches, parts, self.scales, strict=True)]
        return self.head(torch.cat(parts, 1).mean((2, 3)))

    def train(self, mode: bool = True) -> Labelled:
        self.calls.append("train")
        return super().train(mode)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, target = batch
        return self.criterion(self(x), target) + self.head.weight.square().sum() * 0

    def features(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def adapted(self, x: Tensor) -> Tensor:
        return self.unused(self(x))

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def embedding(self) -> Tensor:
        return self.stem(torch.zeros(1, 3, 8, 8))

    @functools.cached_property
    def first_name(self) -> str:
        return self.names[0]

    @classmethod
    def build(cls) -> Labelled:
        return cls()

    @staticmethod
    def twice(x: int) -> int:
        return 2 * x

    def __deepcopy__(self, memo: Any) -> Labelled:
        new = Labelled()
        new.load_state_dict(self.state_dict())
        return new.eval()

    def __len__(self) -> int:
        return 0


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 1, 0])


@pytest.fixture(scope="module")
def model() -> Labelled:
    torch.manual_seed(0)
    return Labelled().eval()


@pytest.fixture(scope="module")
def made(model: Labelled) -> fp.RewrittenNetwork:
    graph = fp.trace(model, IMAGES)
    mask = (torch.arange(graph.num_units) % 3 > 0).int()
    network = fp.apply(graph.plan(mask), model)
    assert isinstance(network, fp.RewrittenNetwork)
    return network


@pytest.fixture
def network(made: fp.RewrittenNetwork) -> Any:
    return copy.deepcopy(made)


def test_attributes_are_those_of_the_model(network: Any, model: Labelled) -> None:
    assert (network.names, network.num_classes, network.yaml) == (model.names, 2, model.yaml)
    assert torch.equal(network.stride, model.stride)
    network.names["new"] = network.yaml["new"] = 1
    assert "new" not in model.names
    assert "new" not in model.yaml
    network.num_classes = 7
    assert (network.num_classes, network.task, network.default_cfg["input_size"]) == (7, "classify", (3, 8, 8))
    network.task = "other"
    assert (network.task, model.task, Labelled.task) == ("other", "classify", "classify")


class Locked(Labelled):
    """A model that says how it is copied, with an attribute that cannot be."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __deepcopy__(self, copies: dict[int, Any]) -> Locked:
        other = Locked()
        other.load_state_dict(self.state_dict())
        return other.train(self.training)


def test_an_attribute_that_cannot_be_copied_is_taken() -> None:
    network: Any = fp.prune(Locked().eval(), torch.rand(2, 3, 8, 8), method="l1", budget=0.6).model
    assert isinstance(network, fp.RewrittenNetwork)
    assert network.lock.acquire(blocking=False)


def test_methods_run_on_the_network(network: Any, model: Labelled) -> None:
    assert network.describe() == "RewrittenNetwork of 2 classes"
    assert network.size == sum(p.numel() for p in network.parameters()) < model.size
    assert (network.first_name, network.twice(4)) == ("cat", 8)
    assert type(network.build()) is Labelled
    expected = nn.functional.cross_entropy(network(IMAGES), TARGET, torch.tensor([1.0, 2.0]))
    assert torch.equal(network.loss((IMAGES, TARGET)), expected)
    network.train().loss((IMAGES, TARGET)).backward()
    assert network.head.weight.grad is not None
    assert not hasattr(model.head.weight.grad, "shape")


def test_modules_that_the_graph_does_not_run_can_be_called(network: Any, model: Labelled) -> None:
    assert type(network.criterion) is nn.CrossEntropyLoss
    assert torch.equal(network.adapted(IMAGES), network.unused(network(IMAGES)))
    assert network.unused is not model.unused


def test_references_lead_to_the_network(network: Any) -> None:
    assert network.owner[0] is network
    assert network.order[0] is network.stem
    assert network.order[1] is network.criterion
    assert network.objective.__self__ is network
    assert torch.equal(network.objective((IMAGES, TARGET)), network.loss((IMAGES, TARGET)))


@pytest.mark.parametrize(
    ("call", "layer"),
    [
        (lambda net: net.features(IMAGES), r"'stem' \(Sequential\)"),
        (lambda net: net.order[0](IMAGES), r"'stem' \(Sequential\)"),
        (lambda net: net.branches[1](IMAGES), r"'branches\.1' \(Conv2d\)"),
        (lambda net: net.act(IMAGES), r"'act' \(SiLU\)"),
    ],
)
def test_a_layer_that_is_called_is_named(call: Any, layer: str, network: Any) -> None:
    with pytest.raises(LayerCallError, match=rf"^{layer} cannot be called by itself: .*rewrite=False"):
        call(network)


def test_a_property_that_runs_a_layer_is_no_attribute(network: Any) -> None:
    assert not hasattr(network, "embedding")
    with pytest.raises(AttributeError, match=r"'embedding' of Labelled runs a layer: 'stem' \(Sequential\) cannot"):
        _ = network.embedding


def test_what_is_missing_is_named(network: Any) -> None:
    assert not hasattr(network, "absent")
    with pytest.raises(AttributeError, match=r"^'RewrittenNetwork' object has no attribute 'absent'$"):
        _ = network.absent
    with pytest.raises(AttributeError, match=r"^'HeldModule' object has no attribute 'absent'$"):
        _ = network.head.absent
    empty = type(network).__new__(type(network))  # as copies and pickles begin
    with pytest.raises(AttributeError, match="names"):
        _ = empty.names


def test_what_every_module_has_is_torchs_own(network: Any) -> None:
    before = list(network.calls)
    network.train()
    assert network.training
    assert network.calls == before  # the model's own ``train`` is not called
    with pytest.raises(TypeError):
        len(network)  # special methods are not taken over: ``__deepcopy__`` would make a full model
    assert type(network).train is nn.Module.train


def test_layers_keep_their_attributes_and_widths(network: Any) -> None:
    conv, norm, act = network.stem
    assert (conv.stride, conv.kernel_size, conv.out_channels) == ((2, 2), (3, 3), conv.weight.shape[0])
    assert norm.num_features == conv.out_channels < 12
    assert (len(network.stem), network.stem[-1] is act, act.inplace) == (3, True, False)
    assert [branch.in_channels for branch in network.branches] == [b.weight.shape[1] for b in network.branches]
    assert [scale.shape[0] for scale in network.scales] == [b.out_channels for b in network.branches]
    assert network.head.in_features == network.head.weight.shape[1]
    norm.reset_running_stats()
    assert torch.equal(norm.running_mean, torch.zeros(norm.num_features))
    assert "HeldModule(BatchNorm2d)" in repr(network)
    assert {"loss", "names"} <= set(dir(network))


def test_a_second_pruning_and_a_pickle_keep_them(network: Any) -> None:
    graph = fp.trace(network, IMAGES)
    again: Any = fp.apply(graph.plan((torch.arange(graph.num_units) % 4 > 0).int()), network)
    assert again.head.in_features == again.head.weight.shape[1] < network.head.in_features
    for one in (again, pickle.loads(pickle.dumps(network))):
        assert one.names == network.names
        assert one.owner[0] is one
        assert type(one.criterion) is nn.CrossEntropyLoss
        assert torch.isfinite(one.loss((IMAGES, TARGET)))
        with pytest.raises(LayerCallError, match=r"^'stem' \(Sequential\) cannot be called by itself"):
            one.features(IMAGES)


def test_a_tensor_that_is_gone_is_named(network: Any) -> None:
    network.stem[1] = nn.Identity()
    with pytest.raises(RuntimeError, match=r"^'stem\.1\.\w+' is gone, and this network's graph needs it"):
        network(IMAGES)


def test_shared_modules_stay_shared() -> None:
    class Shared(Labelled):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.stem

        __deepcopy__ = None  # type: ignore[assignment]

    torch.manual_seed(0)
    model = Shared().eval()
    graph = fp.trace(model, IMAGES)
    network: Any = fp.apply(graph.plan((torch.arange(graph.num_units) % 3 > 0).int()), model)
    assert isinstance(network, fp.RewrittenNetwork)
    assert network.again is network.stem
    network.double()
    assert network.again[1].running_mean is network.stem[1].running_mean
    assert set(network.state_dict()) == set(model.state_dict())


class Grouped(nn.Module):
    """``self.width`` is written into a size of the code that runs it, next to a part of a fixed size."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.first, self.second, self.last = 6, nn.Conv2d(3, 6, 1), nn.Conv2d(3, 8, 1), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x).view(x.shape[0], self.width, -1).mean(2)
        return self.last(torch.cat([first, self.second(x)[:, [1, 0, 3, 4]].mean((2, 3))], 1))


def test_numbers_of_channels_follow_the_plan() -> None:
    torch.manual_seed(0)
    model = Grouped().eval()
    graph = fp.trace(model, IMAGES)
    mask = torch.ones(graph.num_units)
    for group in graph.groups:
        mask[group.start] = 0
    plan = fp.PruningPlan.from_json(graph.plan(mask).to_json())
    assert plan.attributes == {"width": ((6,), (5,))}
    done = fp.surgery.cut(plan, model)
    for network in (done.model, fp.apply(done.plan, model, check=False)):
        assert isinstance(network, fp.RewrittenNetwork)
        assert (network.width, network.first.out_channels, model.width) == (5, 5, 6)
