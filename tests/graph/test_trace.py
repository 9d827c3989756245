"""Tracing: the channels that leave together, and the reasons why others stay."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fastprune as fp


def units_by_layer(graph: fp.ChannelGraph) -> dict[str, list[int]]:
    return {layer.name: layer.out_units.tolist() for layer in graph.layers}


def test_resnet50_has_the_groups_of_the_design() -> None:
    graph = fp.trace(torchvision.models.resnet50(), torch.zeros(1, 3, 224, 224))
    cost = graph.cost()
    assert len(graph.groups) == 37
    assert graph.num_units == 11_456
    assert int(cost.macs) == 4_089_184_256
    assert int(cost.params) == 25_557_032
    streams = [group for group in graph.groups if group.kind == "stream"]
    assert [group.size for group in streams] == [256, 512, 1024, 2048]
    assert graph.unprunable == (("fc", "output of the network"),)


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("resnet18", 1814.07),
        pytest.param("resnet34", 3663.76, marks=pytest.mark.slow),
        ("mobilenet_v2", 300.77),
        pytest.param("mobilenet_v3_small", 56.51, marks=pytest.mark.slow),
    ],
)
def test_macs_equal_published_ones(name: str, macs: float) -> None:
    graph = fp.trace(getattr(torchvision.models, name)(), torch.zeros(1, 3, 224, 224))
    assert round(float(graph.cost().macs) / 1e6, 2) == macs


def test_groups_of_a_small_network(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    by_name = {group.name: group for group in graph.groups}
    assert {name: group.size for name, group in by_name.items()} == {
        "stem.0": 8, "conv1": 12, "expand": 16, "squeeze": 4, "project": 10,
    }  # fmt: skip
    assert by_name["stem.0"].kind == "stream"
    assert by_name["stem.0"].producers == ("stem.0", "conv2")
    assert by_name["expand"].producers == ("expand", "excite")
    assert by_name["expand"].consumers == ("squeeze", "project")
    assert "depthwise" in by_name["expand"].layers
    assert graph.offsets.tolist() == [0, 8, 20, 36, 40, 50]
    layers = units_by_layer(graph)
    assert layers["depthwise"] == layers["expand"] == layers["excite"]
    assert layers["head"] == [-1] * 5


def test_share_is_the_fraction_of_macs_that_goes_with_the_group(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    for group in graph.groups:
        mask = torch.ones(graph.num_units)
        mask[group.units] = 0
        assert group.share == pytest.approx(float(1 - graph.cost(mask).macs / graph.cost().macs), abs=1e-12)


def test_tracing_does_not_change_the_model(tiny: nn.Module) -> None:
    tiny.train()
    tiny.bn1.eval()
    tiny.conv1.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    fp.trace(tiny, torch.zeros(1, 3, 16, 16))
    assert tiny.training
    assert not tiny.bn1.training
    assert tiny.bn2.training
    assert not tiny.conv1.weight.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.state_dict().items())


class Net(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between: object, width: int = 6, reads: int | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.second = nn.Conv2d(width if reads is None else reads, 4, 1)
        self.between = between
        self.scale = nn.Parameter(torch.rand(width, 1, 1))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self, self.first(x)))


def group_sizes(between: object, **sizes: int) -> list[int]:
    graph = fp.trace(Net(between, **sizes), torch.zeros(2, 3, 8, 8))
    return [group.size for group in graph.groups]


@pytest.mark.parametrize(
    "between",
    [
        lambda net, x: torch.nn.functional.gelu(x),
        lambda net, x: x * net.scale,
        lambda net, x: net.scale * x + x.mean((2, 3), keepdim=True),
        lambda net, x: torch.nn.functional.pad(x, (1, 1, 1, 1)),
        lambda net, x: torch.nn.functional.interpolate(x, scale_factor=2),
        lambda net, x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        lambda net, x: x[:, :, ::2, 1:],
        lambda net, x: torch.softmax(x.flatten(2), -1).unflatten(2, (8, 8)),
        lambda net, x: torch.max_pool2d(x, 2),
        lambda net, x: x * (x.flatten(2) @ x.new_ones(1, 64, 1)).unsqueeze(-1),
        lambda net, x: x * (x.new_ones(2, 1, 64) @ x.flatten(2).transpose(1, 2)).transpose(1, 2).unsqueeze(-1),
    ],
    ids=[
        "gelu",
        "parameter",
        "pooled",
        "pad",
        "interpolate",
        "permute",
        "slice pixels",
        "spatial softmax",
        "pool",
        "context of rows",
        "context of columns",
    ],
)
def test_channels_flow_through(between: object) -> None:
    assert group_sizes(between) == [6]


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda net, x: net.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), "layer_norm"),
        (lambda net, x: torch.softmax(x, 1), "softmax"),
        (lambda net, x: x.roll(1, 1), "roll"),
        (lambda net, x: x * x.sum(1, keepdim=True), "sum"),
        (lambda net, x: x[:, [5, 4, 3, 2, 1, 0]], "index"),
        (lambda net, x: x.cumsum(1), "cumsum"),
        (lambda net, x: (x.flatten(2).transpose(1, 2) @ x.flatten(2)).unsqueeze(1).expand(2, 6, 64, 64), "matmul"),
        (lambda net, x: (x.flatten(2) @ x.flatten(2).transpose(1, 2)).flatten(1)[:, :6, None, None], "matmul"),
        (lambda net, x: x.view(2, 2, 3, 8, 8).transpose(1, 2).reshape(2, 6, 8, 8) + x, "view"),
    ],
    ids=[
        "layer norm",
        "channel softmax",
        "roll",
        "channel sum",
        "index",
        "cumsum",
        "sum of products",
        "products of channels",
        "shuffle and add",
    ],
)
def test_operators_that_mix_channels_pin_them_and_say_so(between: object, reason: str) -> None:
    graph = fp.trace(Net(between), torch.zeros(2, 3, 8, 8), rewrite=False)
    assert graph.groups == ()
    assert reason in dict(graph.unprunable)["first"]


@pytest.mark.parametrize(
    ("between", "sizes"),
    [
        (lambda net, x: x[:, [5, 4, 3, 2, 1, 0]], [6]),
        (lambda net, x: x.view(2, 2, 3, 8, 8).transpose(1, 2).reshape(2, 6, 8, 8), [6]),
        # The channels 1, 3, 4 and 2 take each other's places in a circle; 0 and 5 keep theirs.
        (lambda net, x: x.view(2, 2, 3, 8, 8).transpose(1, 2).reshape(2, 6, 8, 8) + x, [2]),
        (lambda net, x: torch.cat([x[:, 4:], x[:, :2]], 1).repeat(1, 2, 1, 1)[:, :6], [2, 2]),
    ],
    ids=["index", "shuffle", "shuffle and add", "slices"],
)
def test_a_rewritten_graph_selects_the_rest_of_the_channels(between: object, sizes: list[int]) -> None:
    torch.manual_seed(0)
    model = Net(between).double()
    graph = fp.trace(model, torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    assert [group.size for group in graph.groups][: len(sizes)] == sizes
    mask = torch.ones(graph.num_units)
    mask[0] = 0
    compact = fp.apply(graph.plan(mask), model)
    assert isinstance(compact, fp.RewrittenNetwork)


def test_a_channel_that_scales_all_others_stays() -> None:
    graph = fp.trace(Net(lambda net, x: x[:, 1:] * x[:, :1], reads=5), torch.zeros(2, 3, 8, 8))
    assert [group.size for group in graph.groups] == [5]
    assert graph.layers[0].out_units.tolist() == [-1, 0, 1, 2, 3, 4]
    assert dict(graph.unprunable)["first"] == "slice in the model (takes a single channel)"


def test_chunks_that_are_multiplied_leave_in_pairs() -> None:
    graph = fp.trace(Net(lambda net, x: torch.mul(*x.chunk(2, 1)), reads=3), torch.zeros(2, 3, 8, 8))
    assert [group.size for group in graph.groups] == [3]
    assert graph.layers[0].out_units.tolist() == [0, 1, 2, 0, 1, 2]


def test_grouped_convolution_loses_the_same_channel_of_each_group() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=2), nn.Conv2d(12, 2, 1))
    graph = fp.trace(model, torch.zeros(1, 3, 8, 8))
    assert [group.size for group in graph.groups] == [4, 6]
    assert graph.layers[0].out_units.tolist() == [0, 1, 2, 3] * 2
    assert graph.layers[1].out_units.tolist() == list(range(4, 10)) * 2


def test_flatten_gives_each_pixel_its_channel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 4, 2))
    graph = fp.trace(model, torch.zeros(1, 3, 2, 2))
    assert graph.layers[1].in_units.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_a_layer_that_is_never_reached_is_listed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    model[1].register_module("spare", nn.Conv2d(4, 4, 1))
    graph = fp.trace(model, torch.zeros(1, 3, 8, 8))
    assert "never reached" in dict(graph.unprunable)["1.spare"]


@pytest.mark.slow
def test_train_only_heads_are_traced(tiny: nn.Module) -> None:
    model = torchvision.models.googlenet(init_weights=False)
    graph = fp.trace(model, torch.zeros(1, 3, 64, 64))
    assert graph.traced.training is not None
    assert any(piece.tensor.startswith("aux1.") for piece in graph.slices)
    assert fp.trace(tiny, torch.zeros(1, 3, 16, 16)).traced.training is None


def test_a_model_that_cannot_be_exported_is_refused_by_name() -> None:
    class Branchy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(fp.TraceError, match="Branchy cannot be traced"):
        fp.trace(Branchy(), torch.zeros(1, 3, 8, 8))


def test_layers_in_a_region_without_gradient_are_counted() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.second(self.first(x))
            return self.last(x)

    graph = fp.trace(Frozen(), torch.zeros(1, 3, 8, 8))
    assert int(graph.cost().macs) == 64 * 8 * 27 + 16 * 8 * 72 + 16 * 8 * 4


def test_inputs_of_different_batch_sizes_are_refused(tiny: nn.Module) -> None:
    with pytest.raises(ValueError, match="the same batch size in dimension 0, got 2, 7"):
        fp.trace(tiny, (torch.zeros(2, 3, 16, 16), torch.zeros(7, 5)))


def test_inputs_that_are_no_tensors_are_refused(tiny: nn.Module) -> None:
    with pytest.raises(TypeError, match="example_inputs"):
        fp.trace(tiny, "3x16x16")


def test_results_that_exist_only_in_train_mode_keep_their_channels() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            x = self.first(x)
            return (self.second(x), x) if self.training else self.second(x)

    graph = fp.trace(Features(), torch.zeros(1, 3, 8, 8))
    assert graph.groups == ()
    assert dict(graph.unprunable)["first"] == "output of the network"


def test_ignored_layers_keep_their_outputs(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16), ignore=["stem", "s*ze"])
    assert [group.name for group in graph.groups] == ["conv1", "expand", "project"]
    reasons = dict(graph.unprunable)
    assert reasons["stem.0"] == reasons["conv2"] == "ignored (stem)"
    assert reasons["squeeze"] == "ignored (s*ze)"
    with pytest.raises(ValueError, match=r"ignore 'stam': no layer has such a name; did you mean 'stem'\?"):
        fp.trace(tiny, torch.zeros(1, 3, 16, 16), ignore=["stam"])


def test_every_layer_is_in_the_table(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.zeros(1, 3, 16, 16), ignore=["conv1"])
    rows = {row.layer: row for row in graph.table()}
    assert set(rows) == {n for n, m in tiny.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert rows["conv2"].groups == ("stem.0",)
    assert rows["conv2"].reason is None
    assert rows["depthwise"].groups == ("expand",)
    assert rows["conv1"].groups == ()
    assert rows["conv1"].reason == "ignored (conv1)"
    assert sum(row.macs for row in rows.values()) == int(graph.cost().macs)
