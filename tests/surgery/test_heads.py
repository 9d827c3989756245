"""Attention whose heads leave as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastprune as fp
from fastprune.graph import Group
from fastprune.networks.masked import MaskedNetwork
from fastprune.networks.subnetworks import SubNetworks
from fastprune.surgery import cut

TOKENS = torch.zeros(2, 5, 12, dtype=torch.float64)
HEADS, WIDTH = 4, 3


class Attention(nn.Module):
    """Attention that reads a stream and adds to it.

    Args:
        kind: "fused"; "plain": by matrix products; "places": with a bias for each head and pair of tokens from a table;
            "normed": queries are normalised; "fixed": the number of heads is a number in the code; "shared": all heads
            have the same keys; "width": the code makes as many channels as it reads.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.num_heads, self.head_dim, self.scale = kind, HEADS, WIDTH, WIDTH**-0.5
        self.qkv, self.proj = nn.Linear(12, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, 12)
        self.norm = nn.LayerNorm(WIDTH) if kind == "normed" else nn.Identity()
        if kind == "places":
            self.table = nn.Parameter(torch.zeros(9, HEADS))
            self.register_buffer("index", torch.arange(5)[:, None] - torch.arange(5) + 4, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        y = self.qkv(x)
        if self.kind == "fixed":
            y = y.reshape(n, t, 3, 4, 3)
        else:
            y = y.reshape(n, t, 3, self.num_heads, self.head_dim)
        q, k, v = y.permute(2, 0, 3, 1, 4).unbind(0)
        q = self.norm(q)
        if self.kind == "shared":
            k = k[:, :1].expand(-1, self.num_heads, -1, -1)
        if self.kind in ("plain", "places"):
            scores = (q * self.scale) @ k.transpose(-2, -1)
            if self.kind == "places":
                scores = scores + self.table[self.index.view(-1)].view(t, t, -1).permute(2, 0, 1).unsqueeze(0)
            y = scores.softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(n, t, c if self.kind == "width" else -1))


class Network(nn.Module):
    """A layer of attention between two linear layers."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(12, 12), attention, nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.attention(x)).mean(1)


class Torchs(nn.Module):
    """Torch's own attention of a value to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(12, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


def make(attention: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    model = Network(attention).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def heads_of(graph: fp.ChannelGraph) -> Group | None:
    """Return the group of the heads."""
    return next((group for group in graph.groups if "attention.proj" in group.consumers), None)


def without_heads(graph: fp.ChannelGraph, *gone: int) -> Tensor:
    """Return a mask that removes heads, and two channels of the stream."""
    mask = torch.ones(graph.num_units)
    for group in graph.groups:
        mask[[group.start + unit for unit in (gone if group.size == HEADS else (1, 5))]] = 0
    return mask


@pytest.mark.parametrize("kind", ["fused", "plain", "places", "normed"])
@pytest.mark.parametrize("rewrite", [True, False])
def test_heads_leave_as_a_whole(kind: str, *, rewrite: bool) -> None:
    model = make(Attention(kind))
    assert heads_of(fp.trace(model, TOKENS)) is None
    graph = fp.trace(model, TOKENS, heads=True, rewrite=rewrite)
    group = heads_of(graph)
    assert group is not None
    assert (group.size, group.producers) == (HEADS, ("attention.qkv",))
    done = cut(graph.plan(without_heads(graph, 0, 2)), model, graph.traced)
    assert done.difference < 1e-10
    assert done.plan.code == "own"
    assert done.plan.attributes["attention.num_heads"] == ((4,), (2,))
    small = done.model.attention
    assert (small.num_heads, small.head_dim, small.scale) == (2, WIDTH, WIDTH**-0.5)
    assert (small.qkv.out_features, small.proj.in_features) == (3 * 2 * WIDTH, 2 * WIDTH)
    kept = model.attention.qkv.weight.view(3, HEADS, WIDTH, 12)[:, [1, 3]].flatten(0, 2)
    assert torch.equal(small.qkv.weight, kept[:, [0, 2, 3, 4, *range(6, 12)]])
    if kind == "places":
        assert torch.equal(small.table, model.attention.table[:, [1, 3]])


@pytest.mark.parametrize("kind", ["fixed", "width", "torch"])
def test_code_that_cannot_follow_is_rewritten_or_keeps_its_heads(kind: str) -> None:
    model = make(Torchs() if kind == "torch" else Attention(kind))
    graph = fp.trace(model, TOKENS, heads=True)
    done = cut(graph.plan(without_heads(graph, 3)), model, graph.traced)
    assert isinstance(done.model, fp.RewrittenNetwork)
    assert done.difference < 1e-10
    tokens = torch.randn(3, 5, 12, dtype=torch.float64)
    masked = fp.masked(model, done.plan)
    assert torch.allclose(done.model(tokens), masked(tokens), rtol=1e-10)
    own = fp.trace(model, TOKENS, heads=True, rewrite=False)
    assert all(group.size != HEADS for group in own.groups)


def test_heads_that_share_their_keys_stay() -> None:
    graph = fp.trace(make(Attention("shared")), TOKENS, heads=True)
    assert all("attention.qkv" not in group.producers for group in graph.groups)


@pytest.mark.parametrize("kind", ["fused", "places"])
def test_gates_close_heads_as_the_cut_does(kind: str) -> None:
    model = make(Attention(kind))
    graph = fp.trace(model, TOKENS, heads=True)
    plan = graph.plan(without_heads(graph, 1))
    tokens = plan.example(model).tensors
    with torch.no_grad():
        expected = fp.apply(plan, model)(*tokens)
        assert torch.allclose(MaskedNetwork(graph, model)(*tokens, plan.mask.double()), expected, rtol=1e-10)
        assert torch.allclose(SubNetworks(graph, model)(*tokens, mask=plan.mask), expected, rtol=1e-10)


def test_heads_leave_a_pruned_network_again() -> None:
    model = make(Attention("places"))
    graph = fp.trace(model, TOKENS, heads=True)
    first = graph.plan(without_heads(graph, 1))
    compact = fp.apply(first, model)
    again = fp.trace(compact, TOKENS, heads=True)
    mask = torch.ones(again.num_units)
    group = heads_of(again)
    assert group is not None
    mask[group.start] = 0
    second = again.plan(mask)
    both = first.then(second)
    assert both.attributes["attention.num_heads"] == ((4,), (2,))
    tokens = first.example(model).tensors
    assert torch.allclose(fp.apply(both, model)(*tokens), fp.apply(second, compact)(*tokens), rtol=1e-12)


@pytest.mark.parametrize("heads", [3, 5])
def test_a_number_of_heads_that_other_sizes_have_too(heads: int) -> None:
    class Three(Attention):
        def __init__(self) -> None:
            super().__init__("fused")
            self.num_heads = heads  # 3 is also the number of queries, keys and values; 5 is that of tokens
            self.head_dim = 2
            self.qkv, self.proj = nn.Linear(12, 3 * heads * 2), nn.Linear(heads * 2, 12)

    model = make(Three())
    graph = fp.trace(model, TOKENS, heads=True)
    mask = torch.ones(graph.num_units)
    group = heads_of(graph)
    assert group is not None
    mask[group.start] = 0
    done = cut(graph.plan(mask), model, graph.traced)
    assert (done.plan.code, done.model.attention.num_heads) == ("own", heads - 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_heads_of_timm(name: str) -> None:
    import timm

    model = timm.create_model(name).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * fan_in**-0.5)
    graph = fp.trace(model, torch.zeros(1, 3, 224, 224, dtype=torch.float64), heads=True, replace_norms=True)
    mask = torch.zeros(graph.num_units)
    for group in graph.groups:
        mask[group.start : group.start + max(1, group.size // 2)] = 1
    done = cut(graph.plan(mask), model, graph.traced)
    assert done.plan.code == "own"
    assert done.difference < 1e-10
    assert {layer for layer, _ in graph.unprunable} in ({"head"}, {"head.fc"})
