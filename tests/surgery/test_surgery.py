"""Surgery: compact equals masked, predicted cost equals counted cost, and nothing else changes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastprune as fp
from fastprune.graph.structure import Role

ARCHITECTURES = [
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            *("resnet50", "efficientnet_b0", "densenet121", "shufflenet_v2_x1_0", "regnet_y_400mf"),
            *("googlenet", "vgg11_bn"),
        )
    ),
]


def random_mask(graph: fp.ChannelGraph, seed: int) -> Tensor:
    """Keep half of the units of each group at random; one group keeps a single unit."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(graph.num_units, generator=generator) < 0.5
    single = int(torch.randint(len(graph.groups), (), generator=generator))
    for index, group in enumerate(graph.groups):
        if index == single:
            mask[group.units] = False
        if not mask[group.units].any():
            mask[group.start + int(torch.randint(group.size, (), generator=generator))] = True
    return mask


def count(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Let torch count the MACs and parameters of a model."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_random_plans_are_exact(name: str, randomised: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    arguments = {"init_weights": False} if name == "googlenet" else {}
    model = randomised(getattr(torchvision.models, name)(**arguments)).double().eval()
    images = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    graph = fp.trace(model, images)
    for seed in range(2):
        mask = random_mask(graph, seed)
        plan = graph.plan(mask)
        assert min(kept for kept, _ in plan.widths.values()) == 1
        compact = fp.apply(plan, model)
        assert fp.verify(plan, model, compact, dtype=torch.float64) <= 1e-9
        assert count(compact, images) == (plan.macs[1], plan.params[1])
        assert plan.macs[1] < plan.macs[0]


@pytest.mark.parametrize("name", [pytest.param("googlenet", marks=pytest.mark.slow), "resnet18"])
def test_a_compact_model_trains(name: str) -> None:
    torch.manual_seed(0)
    arguments = {"init_weights": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(**arguments)
    graph = fp.trace(model, torch.zeros(1, 3, 64, 64))
    compact = fp.apply(graph.plan(random_mask(graph, 0)), model)
    assert compact.training
    outputs = compact(torch.randn(2, 3, 64, 64))
    loss = sum(output.square().mean() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))
    loss.backward()
    assert all(parameter.grad is not None for parameter in compact.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "deeplabv3_resnet50", "fcn_resnet50"])
def test_train_only_heads_train_after_surgery(name: str) -> None:
    torch.manual_seed(0)
    arguments: dict[str, object] = {"weights": None, "aux_logits": True, "init_weights": False}
    if "resnet" in name:
        arguments = {"weights": None, "weights_backbone": None, "aux_loss": True}
    model = torchvision.models.get_model(name, **arguments).train()
    frozen = next(iter(model.parameters())).requires_grad_(False)
    size = 299 if name == "inception_v3" else 96  # auxiliary heads need more pixels than the rest
    graph = fp.trace(model, torch.zeros(1, 3, size, size))
    compact = fp.apply(graph.plan(random_mask(graph, 0)), model)
    assert type(compact) is type(model)
    assert model.training
    assert compact.training
    assert not frozen.requires_grad
    assert not next(iter(compact.parameters())).requires_grad
    result = compact(torch.randn(2, 3, size, size))
    outputs = list(result.values()) if isinstance(result, dict) else list(result)
    assert len(outputs) == (3 if name == "googlenet" else 2)
    sum(output.square().mean() for output in outputs).backward()
    assert all(p.grad is not None for p in compact.parameters() if p.requires_grad)


def test_full_mask_is_the_identity(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    compact = fp.apply(graph.plan(torch.ones(graph.num_units)), tiny)
    assert all(
        torch.equal(a, b) for a, b in zip(tiny.state_dict().values(), compact.state_dict().values(), strict=True)
    )


def test_the_model_itself_does_not_change(tiny: nn.Module) -> None:
    tiny.head.weight.requires_grad_(False)
    tiny.train()
    before = copy.deepcopy(tiny.state_dict())
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    compact = fp.apply(graph.plan(random_mask(graph, 1)), tiny)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.state_dict().items())
    assert not compact.head.weight.requires_grad
    assert compact.training


def test_stored_sizes_are_corrected(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    compact = fp.apply(graph.plan(random_mask(graph, 2)), tiny)
    for module in compact.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.running_mean)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
    assert compact.depthwise.groups == compact.depthwise.in_channels == compact.expand.out_channels < 16


def test_grouped_and_flattened_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.PReLU(8), nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(12, 6, 2, stride=2), nn.Flatten(), nn.Linear(6 * 36, 4),
    ).double()  # fmt: skip
    graph = fp.trace(model, torch.zeros(1, 3, 5, 5, dtype=torch.float64))
    plan = graph.plan(random_mask(graph, 3))
    compact = fp.apply(plan, model)
    assert compact[2].groups == 2
    assert compact[1].num_parameters == compact[0].out_channels
    assert sum(p.numel() for p in compact.parameters()) == plan.params[1]


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 6, 1)
            self.a, self.b = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
            self.b.weight = self.a.weight
            self.last = nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.b(torch.relu(self.a(self.first(x))))))

    model = Tied().double()
    graph = fp.trace(model, torch.zeros(1, 3, 4, 4, dtype=torch.float64))
    plan = graph.plan(random_mask(graph, 0))
    compact = fp.apply(plan, model)
    assert compact.a.weight is compact.b.weight
    assert sum(p.numel() for p in compact.parameters()) == plan.params[1]


def test_channels_last_and_buffers_survive(tiny: nn.Module) -> None:
    tiny.to(memory_format=torch.channels_last)
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    compact = fp.apply(graph.plan(random_mask(graph, 4)), tiny)
    assert compact.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert list(compact.state_dict()) == list(tiny.state_dict())


def test_channels_of_hard_coded_widths_stay_or_need_the_rewritten_graph() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.shape[0], 6, -1)

    model = nn.Sequential(nn.Conv2d(3, 6, 1), Fixed(), nn.Flatten(), nn.Linear(6 * 16, 2))
    graph = fp.trace(model, torch.zeros(1, 3, 4, 4), rewrite=False)
    assert graph.num_units == 0
    assert dict(graph.unprunable)["0"] == "the code of 1 (needs all channels)"
    graph = fp.trace(model, torch.zeros(1, 3, 4, 4))
    mask = torch.ones(graph.num_units)
    mask[0] = 0
    with pytest.raises(fp.SurgeryError, match=r"'1' fails"):
        fp.apply(dataclasses.replace(graph.plan(mask), code="own"), model)
    assert isinstance(fp.apply(graph.plan(mask), model), fp.RewrittenNetwork)


def wrong_columns(compact: nn.Module) -> None:
    compact.head.weight.data = compact.head.weight.data.roll(1, 1)


def wrong_statistics(compact: nn.Module) -> None:
    compact.bn2.running_mean.data += 0.001


@pytest.mark.parametrize("spoil", [wrong_columns, wrong_statistics])
def test_verify_finds_a_wrong_compact_model(tiny: nn.Module, spoil: Callable[[nn.Module], None]) -> None:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    plan = graph.plan(random_mask(graph, 5))
    compact = fp.apply(plan, tiny)
    spoil(compact)
    with pytest.raises(fp.SurgeryError, match="differ by"):
        fp.verify(plan, tiny, compact)


def test_a_plan_for_another_model_is_refused(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    plan = graph.plan(torch.ones(graph.num_units))
    with pytest.raises(fp.PlanError, match=r"no tensor 'stem\.0\.weight'"):
        fp.apply(plan, nn.Conv2d(3, 3, 1))
    tiny.conv1 = nn.Conv2d(8, 13, 3)
    with pytest.raises(fp.PlanError, match=r"'conv1\.weight' has shape \(13, 8, 3, 3\)"):
        fp.apply(plan, tiny)


@pytest.mark.parametrize(("layer", "role", "message"), [
    ("depthwise", "out", r"'depthwise' keeps out_channels=\d+, which groups=16 do not divide"),
    ("conv1", "depthwise", r"'conv1' has the role 'depthwise', but its layer has groups=1 and in_channels=8"),
])  # fmt: skip
@pytest.mark.parametrize("check", [True, False])
def test_a_wrong_role_is_refused_with_the_layers_name(
    layer: str, role: Role, message: str, check: bool, tiny: nn.Module
) -> None:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    plan = graph.plan(random_mask(graph, 5))
    slices = [dataclasses.replace(s, role=role) if s.tensor == f"{layer}.weight" else s for s in plan.slices]
    with pytest.raises(fp.PlanError, match=message):
        fp.apply(dataclasses.replace(plan, slices=tuple(slices)), tiny, check=check)


class Two(nn.Module):
    """A network of two inputs, the second by name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, image: Tensor, *, depth: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"map": self.last(torch.relu(self.left(image) + scale * self.right(depth)))}


@pytest.mark.parametrize("rewritten", [False, True])
def test_inputs_by_name(rewritten: bool) -> None:
    torch.manual_seed(0)
    model = Two().double().eval()
    inputs = {name: torch.randn(3, c, 8, 8, dtype=torch.float64) for name, c in (("depth", 2), ("image", 3))}
    graph = fp.trace(model, inputs)
    assert [group.size for group in graph.groups] == [8]
    mask = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0])
    plan = fp.PruningPlan.from_json(graph.plan(mask).to_json())
    plan = dataclasses.replace(plan, code="rewritten") if rewritten else plan
    compact = fp.apply(plan, model)
    assert isinstance(compact, fp.RewrittenNetwork) == rewritten
    with torch.no_grad():
        assert torch.allclose(compact(**inputs)["map"], fp.masked(model, plan)(**inputs)["map"], rtol=1e-12)
    result = fp.prune(model, inputs, method="l1", budget="flops=0.5")
    assert result.plan.widths == {"left": (4, 8)}


def test_inputs_that_the_model_does_not_take_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Two\.forward does not take \['image', 'noise'\]"):
        fp.trace(Two(), {"image": torch.zeros(1, 3, 8, 8), "noise": torch.zeros(1, 2, 8, 8)})


@pytest.mark.parametrize("code", [lambda x: torch.ones(len(x), 3), lambda x: torch.eye(3)[:1].expand(len(x), 3)])
def test_tensors_of_the_default_type_are_compared_in_float64(code: Callable[[Tensor], Tensor]) -> None:
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
            self.w = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x))).mean((2, 3)) + nn.functional.linear(code(x), self.w)

    model = Made().eval()
    graph = fp.trace(model, torch.zeros(1, 3, 8, 8))
    plan = graph.plan(random_mask(graph, 0))
    compact = fp.apply(plan, model)
    assert fp.verify(plan, model, compact, dtype=torch.float64) < 1e-12
    assert torch.get_default_dtype() == torch.float32


def test_a_failure_restores_the_default_type(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    plan = graph.plan(torch.ones(graph.num_units))
    broken = copy.deepcopy(tiny)
    broken.register_forward_pre_hook(lambda module, args: args[0][:, :1])
    with pytest.raises(fp.SurgeryError, match="the compact model does not run"):
        fp.verify(plan, tiny, broken, dtype=torch.float64)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("rewrite", [False, True])
def test_a_model_without_values_is_traced_and_refused_once(tiny: nn.Module, rewrite: bool) -> None:
    example = torch.zeros(1, 3, 16, 16)
    graph = fp.trace(tiny, example, rewrite=rewrite)
    empty = copy.deepcopy(tiny).to("meta")
    assert fp.trace(empty, example, rewrite=rewrite).groups == graph.groups
    plan = graph.plan(random_mask(graph, 0))
    with pytest.raises(fp.SurgeryError, match=r"^[^.]*check=False$") as caught:
        fp.apply(plan, empty)
    assert str(caught.value).count("meta device") == 1
    assert all(p.is_meta for p in fp.apply(plan, empty, check=False).parameters())
