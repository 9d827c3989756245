"""Norms that count removed channels as zeros: channels leave them exactly."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from timm.layers import LayerNorm2d, RmsNorm, RmsNorm2d
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastprune as fp
from fastprune.graph.norms import FullCount, FullCountLayerNorm, recognise
from fastprune.networks.masked import MaskedNetwork
from fastprune.networks.subnetworks import SubNetworks
from fastprune.surgery import cut

IMAGE = torch.zeros(2, 3, 8, 8, dtype=torch.float64)


class OwnLayerNorm(nn.Module):
    """A layer norm over channels in front, by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.epsilon)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Block(nn.Module):
    """A residual block whose norm reads the stream."""

    def __init__(self, width: int, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm, self.expand, self.project = make(width), nn.Conv2d(width, 12, 1), nn.Conv2d(12, width, 1)
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.project(F.gelu(self.expand(self.norm(x))))


class Stream(nn.Module):
    """A ConvNeXt in small: blocks on a stream, and norms in the stream and at its end."""

    def __init__(self, make: Callable[[int], nn.Module], width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 2, 2), make(width)
        self.blocks = nn.Sequential(Block(width, make), Block(width, make))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.norm(self.stem(x))).mean((2, 3)))


class Attention(nn.Module):
    """Attention of two heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """A vision transformer in small."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(1, 5, width))
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 12), nn.Linear(12, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        x = x + self.attention(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm(x)[:, 0])


def last(make: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    """Return what makes a norm of the last dimension for images."""

    class Last(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.inner = make(width)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return Last


NORMS: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "layer norm": (last(nn.LayerNorm), "layer_norm"),
    "layer norm without weights": (last(lambda n: nn.LayerNorm(n, elementwise_affine=False)), "layer_norm"),
    "layer norm without a shift": (last(lambda n: nn.LayerNorm(n, bias=False)), "layer_norm"),
    "layer norm 2d": (LayerNorm2d, "layer_norm"),
    "by hand": (OwnLayerNorm, "layer_norm"),
    "rms norm": (last(nn.RMSNorm), "rms_norm"),
    "timm's rms norm": (last(RmsNorm), "rms_norm"),
    "rms norm 2d": (RmsNorm2d, "rms_norm"),
    "one group": (lambda n: nn.GroupNorm(1, n), "group_norm"),
}


def randomise(model: nn.Module) -> nn.Module:
    """Give a network random parameters of float64, and eval mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def half(graph: fp.ChannelGraph) -> Tensor:
    """Return a mask that keeps a random part of each group."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.zeros(graph.num_units)
    for group in graph.groups:
        mask[group.start + torch.randperm(group.size, generator=generator)[: max(1, group.size * 5 // 8)]] = 1
    return mask


def prunable(graph: fp.ChannelGraph) -> float:
    """Return the share of MACs that goes if every group keeps one unit."""
    mask = torch.zeros(graph.num_units)
    mask[graph.offsets[:-1]] = 1
    return 1 - float(graph.cost(mask).macs / graph.cost().macs)


def outputs(model: nn.Module, plan: fp.PruningPlan) -> Tensor:
    with torch.no_grad():
        return plan.example(model).run(model)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("rewrite", [True, False])
def test_channels_leave_norms_exactly(name: str, *, rewrite: bool) -> None:
    make, kind = NORMS[name]
    model = randomise(Stream(make))
    assert "stem" not in [group.name for group in fp.trace(model, IMAGE).groups]
    graph = fp.trace(model, IMAGE, replace_norms=True, rewrite=rewrite)
    assert graph.exact
    assert [norm.kind for norm in graph.norms] == [kind] * 3
    assert "stem" in [group.name for group in graph.groups]
    plan = graph.plan(half(graph))
    done = cut(plan, model, graph.traced)
    assert done.plan.exact
    assert done.plan.code == "own"
    assert type(done.model) is Stream
    assert done.difference < 1e-10
    assert float((outputs(model, plan) - outputs(done.model, plan)).abs().max()) > 1e-3
    norms = [module for module in done.model.modules() if isinstance(module, FullCount)]
    assert [(norm.kind, norm.full_count) for norm in norms] == [(kind, 8)] * 3
    assert [type(module) for module in model.modules() if isinstance(module, FullCount)] == []
    with FlopCounterMode(display=False) as counter:
        outputs(done.model, plan)
    assert counter.get_total_flops() // 2 == plan.macs[1] * plan.inputs[0].shape[0]
    assert sum(p.numel() for p in done.model.parameters()) == plan.params[1]


@pytest.mark.parametrize("name", NORMS)
def test_a_rewritten_graph_counts_removed_channels_too(name: str) -> None:
    model = randomise(Stream(NORMS[name][0]))
    graph = fp.trace(model, IMAGE, replace_norms=True)
    plan = graph.plan(half(graph))
    own = cut(plan, model, graph.traced)
    values = plan.to_json() | {"code": "rewritten"}
    rewritten = cut(fp.PruningPlan.from_json(values), model, graph.traced)
    assert isinstance(rewritten.model, fp.RewrittenNetwork)
    assert rewritten.difference < 1e-10
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    assert torch.allclose(own.model(images), rewritten.model(images), rtol=1e-10)
    assert torch.allclose(own.model.train()(images), rewritten.model.train()(images), rtol=1e-10)


def test_a_vision_transformer() -> None:
    model = randomise(Encoder())
    before = fp.trace(model, IMAGE)
    assert prunable(before) < 0.5
    graph = fp.trace(model, IMAGE, replace_norms=True)
    assert {norm.module for norm in graph.norms} == {"norm1", "norm2", "norm"}
    assert {group.name: group.size for group in graph.groups}["patches"] == 8
    assert prunable(graph) > 0.75
    done = cut(graph.plan(half(graph)), model, graph.traced)
    assert done.difference < 1e-10
    assert isinstance(done.model.norm1, nn.LayerNorm)


def test_a_plan_and_its_norms_in_json() -> None:
    model = randomise(Encoder())
    graph = fp.trace(model, IMAGE, replace_norms=True)
    plan = graph.plan(half(graph))
    values = plan.to_json()
    assert values["norms"][0] == {
        "module": "norm1", "kind": "layer_norm", "dim": -1, "count": 8, "eps": 1e-05, "units": [[0, 8, 1]],
    }  # fmt: skip
    again = fp.PruningPlan.from_json(values)
    assert again.to_json() == values
    assert "3 count removed channels as zeros" in repr(plan)
    assert torch.equal(outputs(fp.apply(again, model), plan), outputs(fp.apply(plan, model), plan))
    assert torch.equal(outputs(fp.apply(again, model, check=False), plan), outputs(fp.apply(plan, model), plan))
    del values["norms"]
    with pytest.raises(fp.PlanError, match="that the plan removes cannot leave: layer_norm in norm1"):
        fp.apply(fp.PruningPlan.from_json(values), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 2}, "norm 'norm1': got dim 2 and eps 1e-05; -1 or 1, and a number in"),
        ({"eps": -1.0}, "norm 'norm1': got dim -1 and eps -1.0"),
        ({"count": 7}, "norm 'norm1', count must be an integer of at least 8, got 7"),
        ({"kind": "batch_norm"}, "kind 'batch_norm' is none of layer_norm, rms_norm, group_norm"),
        ({"module": "norm2"}, "one norm is listed twice"),
    ],
)
def test_damaged_norms_in_a_plan_are_refused(change: dict[str, object], message: str) -> None:
    model = randomise(Encoder())
    graph = fp.trace(model, IMAGE, replace_norms=True)
    values = graph.plan(half(graph)).to_json()
    values["norms"][0] |= change
    with pytest.raises(fp.PlanError, match=message):
        fp.PruningPlan.from_json(values)


def test_a_plan_for_other_norms_is_refused() -> None:
    make = NORMS["layer norm without weights"][0]
    model, other = randomise(Stream(make)), randomise(Stream(last(lambda n: nn.Identity())))
    graph = fp.trace(model, IMAGE, replace_norms=True)
    mask = torch.ones(graph.num_units)
    mask[graph.groups[0].units.start : graph.groups[0].units.start + 3] = 0
    plan = graph.plan(mask)
    with pytest.raises(fp.PlanError, match=r"needs a norm over channels 'norm.inner' of 8; this Stream has none"):
        fp.apply(plan, other)
    compact = fp.apply(plan, model)
    second = fp.trace(compact, IMAGE, replace_norms=True)
    with pytest.raises(fp.PlanError, match=r"'norm.inner' of 5, which counts 8; this Stream has one of 5"):
        fp.apply(second.plan(half(second)), randomise(Stream(make, width=5)))


@pytest.mark.parametrize("name", ["layer norm", "layer norm without weights", "rms norm 2d", "one group"])
def test_a_pruned_network_is_pruned_again(name: str) -> None:
    model = randomise(Stream(NORMS[name][0]))
    first = fp.trace(model, IMAGE, replace_norms=True)
    plan = first.plan(half(first))
    compact = fp.apply(plan, model)
    assert "stem" not in [group.name for group in fp.trace(compact, IMAGE).groups]
    second = fp.trace(compact, IMAGE, replace_norms=True)
    assert [(norm.count, len(norm.units)) for norm in second.norms] == [(8, 5)] * 3
    following = second.plan(half(second))
    done = cut(following, compact, second.traced)
    assert done.difference < 1e-10
    assert done.plan.code == "own"
    assert {m.full_count for m in done.model.modules() if isinstance(m, FullCount)} == {8}
    both = plan.then(following)
    assert both.to_json() == fp.PruningPlan.from_json(both.to_json()).to_json()
    assert torch.allclose(outputs(fp.apply(both, model), plan), outputs(done.model, plan), rtol=1e-12)
    rewritten = cut(fp.PruningPlan.from_json(following.to_json() | {"code": "rewritten"}), compact, second.traced)
    assert torch.allclose(outputs(rewritten.model, plan), outputs(done.model, plan), rtol=1e-12)


def test_norms_of_a_rewritten_network_keep_their_channels() -> None:
    model = randomise(Stream(LayerNorm2d))
    graph = fp.trace(model, IMAGE, replace_norms=True)
    plan = fp.PruningPlan.from_json(graph.plan(half(graph)).to_json() | {"code": "rewritten"})
    again = fp.trace(fp.apply(plan, model), IMAGE, replace_norms=True)
    assert again.norms == ()
    assert "stem" not in [group.name for group in again.groups]


def test_plans_with_and_without_replaced_norms_are_joined() -> None:
    model = randomise(Encoder())
    plain = fp.trace(model, IMAGE)
    first = plain.plan(half(plain))
    compact = fp.apply(first, model)
    graph = fp.trace(compact, IMAGE, replace_norms=True)
    following = graph.plan(half(graph))
    expected = outputs(fp.apply(following, compact), first)
    assert torch.allclose(outputs(fp.apply(first.then(following), model), first), expected, rtol=1e-12)
    full = fp.trace(model, IMAGE, replace_norms=True)
    first = full.plan(half(full))
    compact = fp.apply(first, model)
    graph = fp.trace(compact, IMAGE)
    assert graph.norms == ()
    following = graph.plan(half(graph))
    expected = outputs(fp.apply(following, compact), first)
    assert torch.allclose(outputs(fp.apply(first.then(following), model), first), expected, rtol=1e-12)


class Unusual(nn.Module):
    """A stream that is normalised in a way that no class of ours computes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.stem, self.norm = kind, nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8)
        self.response = GlobalResponseNorm(8)
        self.rows = nn.LayerNorm([8, 4])
        self.second = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        if self.kind == "free code":
            x = F.layer_norm(x, [8], self.norm.weight, self.norm.bias)
        elif self.kind == "response norm":
            x = self.response(x)
        elif self.kind == "channels and rows":
            x = self.rows(x.transpose(2, 3)).transpose(2, 3)
        return self.second(x).mean((1, 2))


@pytest.mark.parametrize("kind", ["free code", "response norm", "channels and rows"])
def test_other_norms_keep_their_channels(kind: str) -> None:
    graph = fp.trace(randomise(Unusual(kind)), IMAGE, replace_norms=True)
    assert graph.norms == ()
    assert graph.groups == ()
    assert "norm" in dict(graph.unprunable)["stem"] or "mean in response" in dict(graph.unprunable)["stem"]


def test_what_is_recognised_as_a_norm() -> None:
    class Shifted(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)

    class Unbiased(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            variance, mean = torch.var_mean(x, -1, keepdim=True)
            return (x - mean) / torch.sqrt(variance + self.eps) * self.weight + self.bias

    def find(module: nn.Module, *shape: int) -> tuple[str, int, float | None] | None:
        norm = recognise("norm", module, shape)
        return None if norm is None else (norm.kind, norm.dim, norm.eps)

    assert find(nn.LayerNorm(6, eps=1e-3), 2, 5, 6) == ("layer_norm", -1, 1e-3)
    assert find(nn.LayerNorm(6, device="meta"), 2, 5, 6) == ("layer_norm", -1, 1e-5)
    assert find(LayerNorm2d(6), 2, 6, 6, 6) == ("layer_norm", 1, 1e-6)
    assert find(nn.RMSNorm(6), 2, 5, 6) == ("rms_norm", -1, None)
    assert find(nn.GroupNorm(1, 6), 2, 6, 4, 4) == ("group_norm", 1, 1e-5)
    assert find(nn.GroupNorm(1, 6), 2, 6) == ("layer_norm", -1, 1e-5)
    assert find(nn.GroupNorm(2, 6), 2, 6, 4, 4) is None
    assert find(Shifted(6), 2, 5, 6) is None
    assert find(Unbiased(6), 2, 5, 6) is None
    assert find(nn.BatchNorm2d(6), 2, 6, 4, 4) is None


def test_a_norm_that_two_streams_share_loses_the_same_channels_of_both() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(6, 8), nn.Linear(6, 8), nn.LayerNorm(8, elementwise_affine=False)
            self.c, self.d = nn.Linear(8, 5), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.norm(self.a(x))) + self.d(self.norm(self.b(x)))

    model = randomise(Shared())
    graph = fp.trace(model, torch.zeros(2, 6, dtype=torch.float64), replace_norms=True)
    assert [(group.size, group.producers) for group in graph.groups] == [(8, ("a", "b"))]
    assert cut(graph.plan(half(graph)), model, graph.traced).difference < 1e-10


def test_a_gate_in_front_of_a_norm_closes_channels_as_the_cut_does() -> None:
    model = randomise(Encoder())
    graph = fp.trace(model, IMAGE, replace_norms=True)
    plan = graph.plan(half(graph))
    images = plan.example(model)
    expected = outputs(fp.apply(plan, model), plan)
    with torch.no_grad():
        gated = MaskedNetwork(graph, model)(*images.tensors, plan.mask.double())
        part = SubNetworks(graph, model)(*images.tensors, mask=plan.mask)
    assert torch.allclose(gated, expected, rtol=1e-10)
    assert torch.allclose(part, expected, rtol=1e-10)
    assert torch.allclose(outputs(fp.masked(model, plan), plan), expected, rtol=1e-10)


def test_a_compact_network_is_copied_saved_exported_and_trained() -> None:
    model = randomise(Encoder())
    graph = fp.trace(model, IMAGE, replace_norms=True)
    plan = graph.plan(half(graph))
    compact = fp.apply(plan, model)
    expected = outputs(compact, plan)
    assert list(compact.state_dict()) == list(model.state_dict())
    assert torch.equal(outputs(copy.deepcopy(compact), plan), expected)
    stored = io.BytesIO()
    torch.save(compact, stored)
    stored.seek(0)
    assert torch.equal(outputs(torch.load(stored, weights_only=False), plan), expected)
    fresh = fp.apply(plan, randomise(Encoder()), check=False)
    fresh.load_state_dict(compact.state_dict())
    assert torch.equal(outputs(fresh, plan), expected)
    images = plan.example(model).tensors
    program = torch.export.export(compact, images)
    assert torch.allclose(program.module()(*images), expected, rtol=1e-12)
    compact.train()(*images).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in compact.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = (300 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    plain = nn.LayerNorm(64).to(dtype)
    norm = recognise("norm", plain, (4, 64))
    assert norm is not None
    counted = FullCountLayerNorm(64).to(dtype)
    counted.full_count, counted.channel_dim = 64, -1
    assert counted(x).dtype == dtype
    assert torch.allclose(counted(x).float(), plain(x).float(), atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert counted.float()(x.float()).dtype == plain.float()(x.float()).dtype


def test_far_from_zero_the_variance_keeps_its_digits() -> None:
    x = 1e3 + torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    counted = FullCountLayerNorm(64)
    counted.full_count, counted.channel_dim = 64, -1
    assert torch.allclose(counted(x), nn.LayerNorm(64)(x), atol=1e-3)


def test_compensation_reads_norms_of_the_compact_network() -> None:
    model = randomise(Encoder())
    graph = fp.trace(model, IMAGE, replace_norms=True)
    plan = graph.plan(half(graph))
    images = [torch.randn(32, 3, 8, 8, dtype=torch.float64) for _ in range(4)]
    compensated = fp.compensate(model, plan, images)
    with torch.no_grad():
        wanted = model(images[0])
        before, after = ((net(images[0]) - wanted).square().mean() for net in (fp.apply(plan, model), compensated))
    assert float(after) < 0.5 * float(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least", "before"), [("vit_tiny_patch16_224", 0.95, 0.7), ("convnext_atto", 0.99, 0.9)]
)
def test_networks_of_timm(name: str, least: float, before: float) -> None:
    import timm

    model = randomise(timm.create_model(name))
    image = torch.zeros(1, 3, 224, 224, dtype=torch.float64)
    assert prunable(fp.trace(model, image)) < before
    graph = fp.trace(model, image, replace_norms=True)
    assert prunable(graph) > least
    done = cut(graph.plan(half(graph)), model, graph.traced)
    assert done.plan.code == "own"
    assert done.difference < 1e-10
