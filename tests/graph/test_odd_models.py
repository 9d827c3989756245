"""Odd models: each is pruned exactly, keeps the channels that are not understood, or is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import fastprune as fp
from fastprune.graph.export.inputs import Inputs
from fastprune.networks.masked import MaskedNetwork

IMAGES = torch.zeros(1, 3, 8, 8, dtype=torch.float64)


def half(graph: fp.ChannelGraph) -> Tensor:
    """Return a mask of a random half of each group's units."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(graph.num_units)
    for group in graph.groups:
        mask[group.start + torch.randperm(group.size, generator=generator)[: max(1, group.size // 2)]] = 1
    return mask


def state(model: nn.Module) -> tuple[Any, ...]:
    """Return everything that pruning must not change."""
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [set(vars(module)) for module in model.modules()],
    )


def prune_half(model: nn.Module, example: Any = IMAGES, sizes: list[int] | None = None) -> nn.Module:
    """Go the whole way: trace, table, plan of a random half and back from JSON, surgery with verification, one step.

    Args:
        model: the network.
        example: its input.
        sizes: the expected sizes of its groups.
    """
    before = state(model)
    graph = fp.trace(model, example)
    if sizes is not None:
        assert [group.size for group in graph.groups] == sizes
    assert {row.layer for row in graph.table()} >= {layer.name for layer in graph.layers}
    mask = half(graph)
    plan = fp.PruningPlan.from_json(graph.plan(mask).to_json())
    compact = fp.apply(plan, model)
    assert sum(p.numel() for p in compact.parameters()) == plan.params[1] < plan.params[0]
    after = state(model)
    torch.testing.assert_close(after[2], before[2], rtol=0, atol=0, equal_nan=True)
    assert (after[0], after[1], after[3]) == (before[0], before[1], before[3])
    if type(compact) is type(model):
        assert state(compact)[:2] == before[:2]
    inputs = plan.example(model)
    with torch.no_grad():
        reference = fp.masked(model, plan).eval()
        expected, got = (pytree.tree_leaves(inputs.run(m)) for m in (reference, compact.eval()))
    for a, b in zip(expected, got, strict=True):
        if isinstance(a, Tensor) and a.dtype == torch.float64:
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)
    train_step(compact, inputs)
    return compact


def train_step(model: nn.Module, inputs: Inputs) -> None:
    """Make one training step, if anything can be trained."""
    results = [x for x in pytree.tree_leaves(inputs.run(model.train())) if isinstance(x, Tensor)]
    trained = [x.square().mean() for x in results if x.requires_grad]
    if trained:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sum(trained).backward()
        optimizer.step()


class Net(nn.Module):
    """Three convolutions; ``code`` replaces ``forward``."""

    def __init__(self, code: Callable[[Any, Tensor], Any] | None = None, **modules: Any) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.code = code
        for name, module in modules.items():
            setattr(self, name, module)
        self.double()

    def forward(self, x: Tensor) -> Any:
        if self.code is not None:
            return self.code(self, x)
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


# --- control flow ---------------------------------------------------------------------------------------------------


def branch(net: Net, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.last(x if x.sum() > 0 else -x)


def count(net: Net, x: Tensor) -> Tensor:
    for _ in range(int(x.abs().sum().item())):
        x = x + 1
    return net.last(net.first(x))


def loop(net: Net, x: Tensor) -> Tensor:
    x = net.first(x)
    for value in x.mean((0, 2, 3)):
        if value > 0:
            x = x + value
    return net.last(x)


@pytest.mark.parametrize("code", [branch, count, loop])
def test_code_that_decides_by_values_is_refused_with_its_place(
    code: Any, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(Net(code))).double()
    model[1].eval()
    before = state(model)
    with pytest.raises(fp.TraceError) as caught:
        fp.trace(model, IMAGES)
    text = str(caught.value)
    assert "by the values of a tensor" in text
    assert f"in '1.0', {__file__}:" in text
    assert "torch.cond" in text
    assert "custom operator" in text
    assert len(text) < 500 + len(__file__)
    assert capfd.readouterr().err == ""  # the exporter prints half a graph
    assert state(model)[0] == before[0]


def test_numpy_is_refused_with_its_place() -> None:
    model = Net(lambda net, x: net.last(torch.from_numpy(net.first(x).detach().numpy())))
    with pytest.raises(fp.TraceError, match=r"it leaves torch for NumPy \(.*test_odd_models\.py:\d+"):
        fp.trace(model, IMAGES)


def test_an_error_in_the_models_code_names_the_module_and_the_line() -> None:
    model = nn.Sequential(Net(lambda net, x: net.last(net.first(x).flatten(1))))
    with pytest.raises(fp.TraceError, match=r"Expected 3D.*\(in '0\.last', .*test_odd_models\.py:\d+: "):
        fp.trace(model, IMAGES)


def test_sizes_that_depend_on_values_are_refused() -> None:
    model = Net(lambda net, x: net.last(net.first(x)).flatten()[net.first(x)[:, :4].flatten() > 0])
    with pytest.raises(fp.TraceError, match="size depends on the values"):
        fp.trace(model, IMAGES)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # within cond
def test_numbers_read_from_values_and_branches_of_a_cond_keep_their_channels() -> None:
    read = fp.trace(Net(lambda net, x: net.last(net.middle(x := net.first(x))) * x.max().item()), IMAGES)
    assert [group.name for group in read.groups] == ["middle"]
    assert dict(read.unprunable)["first"] == "max in the model"

    def both(net: Net, x: Tensor) -> Tensor:
        x = net.first(x)
        return net.last(net.middle(torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x * 3, (x,))))

    model = Net(both)
    assert [group.name for group in fp.trace(model, IMAGES).groups] == ["middle"]
    prune_half(model)


def test_vmap_is_refused() -> None:
    model = Net(lambda net, x: net.last(torch.vmap(lambda image: net.first(image[None])[0])(x)))
    with pytest.raises(fp.TraceError, match=r"calls torch\.vmap"):
        fp.trace(model, IMAGES)


# --- shared modules and tied weights --------------------------------------------------------------------------------


def siamese(net: Net, x: Tensor) -> Tensor:
    halves = [torch.relu(net.first(image)) for image in (x, F.avg_pool2d(x, 2))]
    return net.head(torch.cat([net.middle(half).mean((2, 3)) for half in halves], 1))


def norm_of_two(net: Net, x: Tensor) -> Tensor:
    return net.last(net.norm(net.middle(net.norm(net.first(x)))))


def alias(net: Net, x: Tensor) -> Tensor:
    return net.last(net.again(torch.relu(net.middle(net.first(x)))))


def test_shared_modules() -> None:
    compact = prune_half(Net(siamese, head=nn.Linear(16, 2)), sizes=[8, 8])
    assert compact.head.in_features == 8
    prune_half(Net(norm_of_two, norm=nn.BatchNorm2d(8)), sizes=[8])
    model = Net(alias)
    model.again = model.middle
    compact = prune_half(model, sizes=[8])
    assert compact.again is compact.middle


def test_tied_weights() -> None:
    twins = Net(lambda net, x: net.last(net.twin(torch.relu(net.middle(net.first(x))))), twin=nn.Conv2d(8, 8, 3))
    twins.twin.weight = twins.middle.weight
    compact = prune_half(twins, sizes=[8])
    assert compact.twin.weight is compact.middle.weight

    transposed = Net(
        lambda net, x: net.last(net.back(torch.relu(net.middle(net.first(x))))), back=nn.ConvTranspose2d(8, 8, 3)
    )
    transposed.back.weight = transposed.middle.weight
    graph = fp.trace(transposed, IMAGES)
    assert graph.groups == ()
    assert "uses middle.weight in another way elsewhere" in dict(graph.unprunable)["middle"]

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(10, 8), nn.Linear(8, 12), nn.Linear(12, 8)
            self.out = nn.Linear(8, 10, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.down(torch.relu(self.up(self.embed(x)))))

    compact = prune_half(Words().double(), torch.zeros(2, 5, dtype=torch.int64), [12])
    assert compact.out.weight is compact.embed.weight


# --- computed weights -----------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


COMPUTED: dict[str, tuple[Callable[[nn.Module], Any], str, Callable[[nn.Module], Any]]] = {
    "weight_norm": (parametrizations.weight_norm, r"parametrised \(WeightNorm\); .*remove_parametrizations",
                    lambda m: parametrize.remove_parametrizations(m, "weight")),
    "spectral_norm": (parametrizations.spectral_norm, r"parametrised \(SpectralNorm\)",
                      lambda m: parametrize.remove_parametrizations(m, "weight")),
    "user's own": (lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
                      r"parametrised \(Doubled\)", lambda m: parametrize.remove_parametrizations(m, "weight")),
    "old weight_norm": (torch.nn.utils.weight_norm, r"by a hook; torch\.nn\.utils\.remove_weight_norm\(",
                        torch.nn.utils.remove_weight_norm),
    "old spectral_norm": (torch.nn.utils.spectral_norm, r"by a hook; torch\.nn\.utils\.remove_spectral_norm\(",
                          torch.nn.utils.remove_spectral_norm),
    "prune": (lambda m: prune.random_unstructured(m, "weight", 0.3), r"by a hook; torch\.nn\.utils\.prune\.remove\(",
              lambda m: prune.remove(m, "weight")),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights_stay_and_the_table_says_how_to_make_them_plain(name: str) -> None:
    change, reason, remove = COMPUTED[name]
    model = Net(lambda net, x: net.last(net.middle(net.between(net.first(x)))), between=nn.Conv2d(8, 8, 1))
    change(model.middle)
    model.double()(IMAGES)
    graph = fp.trace(model, IMAGES)
    assert [group.name for group in graph.groups] == ["first"]
    reasons = dict(graph.unprunable)
    assert reasons["between"] == "conv2d in middle (its weight is computed)"
    match = pytest.raises(AssertionError, match=reason)
    with match:
        raise AssertionError(reasons["middle"])
    assert "model.get_submodule('middle'), 'weight')" in reasons["middle"]
    prune_half(model)
    remove(model.middle)
    prune_half(model, sizes=[8, 8, 8])


# --- flags and modes ------------------------------------------------------------------------------------------------


def test_a_frozen_model_is_pruned_and_stays_frozen() -> None:
    model = Net().requires_grad_(False).eval()
    compact = prune_half(model, sizes=[8, 8])
    assert not any(p.requires_grad for p in compact.parameters())
    result = fp.prune(model, IMAGES, method="l1", budget="flops=0.5")
    assert result.metrics["macs"]["planned"] <= 0.5 * result.metrics["macs"]["full"]
    assert not any(p.requires_grad for p in (*result.model.parameters(), *model.parameters()))


def test_flags_and_modes_of_single_modules_stay() -> None:
    model = Net(norm_of_two, norm=nn.BatchNorm2d(8)).train()
    model.norm.eval()
    model.middle.requires_grad_(False)
    compact = fp.apply((graph := fp.trace(model, IMAGES)).plan(half(graph)), model)
    assert [m.training for m in compact.modules()] == [m.training for m in model.modules()]
    assert not compact.middle.weight.requires_grad
    assert compact.first.weight.requires_grad


def test_changes_by_train_and_forward_are_undone() -> None:
    class Keeps(Net):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []
            self.by_name: dict[str, Tensor] = {}

        def train(self, mode: bool = True) -> Keeps:
            super().train(mode)
            return self.requires_grad_(not mode)  # freezes itself, as backbones of detectors do

        def forward(self, x: Tensor) -> Tensor:
            self.result = super().forward(x)
            self.seen.append(self.result)
            self.by_name["result"] = self.result
            return self.result

    model = Keeps().double().eval()
    model.requires_grad_(True)
    result = model(IMAGES)  # has a gradient history; surgery copies it without
    fp.apply((graph := fp.trace(model, IMAGES)).plan(half(graph)), model)
    assert model.result is result
    assert len(model.seen) == 1
    assert model.by_name["result"] is result
    assert all(p.requires_grad for p in model.parameters())


class Merging(nn.Linear):
    """A layer like loralib's: in eval mode its weight includes the product of two small ones."""

    def __init__(self, reads: int, makes: int) -> None:
        super().__init__(reads, makes)
        self.a, self.b = nn.Parameter(torch.randn(2, reads)), nn.Parameter(torch.randn(makes, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.b @ self.a).data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.merged else self.weight + self.b @ self.a, self.bias)


class Moving(Merging):
    """Its ``train`` gives the weight other memory with the same values."""

    def train(self, mode: bool = True) -> Moving:
        if mode == self.merged:
            self.weight.data = self.weight.data.clone()
        super().train(mode)
        return self


@pytest.mark.parametrize("layer", [Merging, Moving])
@pytest.mark.parametrize("training", [True, False, None])
def test_weights_that_train_changes_are_restored(layer: type[Merging], training: bool | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), layer(8, 8), nn.Linear(8, 4))
    model.train(training is not False)
    if training is None:  # a model in train mode with a part in eval mode
        model[4].eval()
    memory = [t.data_ptr() for t in model.state_dict().values()]
    before, example = state(model), torch.randn(2, 6)
    output, merged = model(example), model[4].merged
    graph = fp.trace(model, example)
    assert_same(model, before)
    mask = torch.ones(graph.num_units)
    mask[graph.layers[0].out_units[:5]] = 0
    compact = fp.apply(graph.plan(mask), model)
    assert_same(model, before)
    assert [m.training for m in compact.modules()] == before[0]
    fp.verify(graph.plan(mask), model, compact)
    fp.prune(model, example, method="l1", budget="flops=0.8")
    assert_same(model, before)
    assert model[4].merged == merged
    assert torch.equal(model(example), output)
    assert [t.data_ptr() for t in model.state_dict().values()] == memory


def assert_same(model: nn.Module, before: tuple[Any, ...]) -> None:
    after = state(model)
    torch.testing.assert_close(after[2], before[2], rtol=0, atol=0)
    assert (after[0], after[1], after[3]) == (before[0], before[1], before[3])


@pytest.mark.parametrize("training", [True, False])
def test_modules_that_train_swaps_are_refused_by_name(training: bool) -> None:
    class Swapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.full = nn.Conv2d(3, 8, 3)

        def train(self, mode: bool = True) -> Swapping:
            super().train(mode)
            old, new = ("fused", "full") if mode else ("full", "fused")
            if hasattr(self, old):
                setattr(self, new, getattr(self, old))
                delattr(self, old)
            return self

        def forward(self, x: Tensor) -> Tensor:
            return (self.full if hasattr(self, "full") else self.fused)(x)

    model = nn.Sequential(Swapping(), nn.ReLU(), nn.Conv2d(8, 4, 1)).train(training)
    before = state(model)
    with pytest.raises(fp.TraceError, match=r"'0' \(Swapping\) has other parameters .* 0\.full\.bias"):
        fp.trace(model, torch.zeros(2, 3, 8, 8))
    assert_same(model, before)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 4, 6, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision(dtype: torch.dtype) -> None:
    model = Net(norm_of_two, norm=nn.BatchNorm2d(8)).to(dtype)
    prune_half(model, IMAGES.to(dtype), [8])


def test_mixed_precision() -> None:
    """Half-precision convolutions around a float32 norm, compared in float64 in spite of the casts in the code."""

    def casts(net: Net, x: Tensor) -> Tensor:
        return net.last(net.norm(net.first(x.half()).float()).half()).float()

    model = Net(casts, norm=nn.BatchNorm2d(8)).half()
    model.norm.float()
    graph = fp.trace(model, IMAGES.float())
    plan = graph.plan(half(graph))
    assert fp.verify(plan, model, fp.apply(plan, model)) <= 1e-9

    def autocast(net: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = net.middle(net.first(x))
        return net.last(x.float())

    prune_half(Net(autocast).float(), IMAGES.float(), [8, 8])


def without_gradient(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = net.middle(torch.relu(net.first(x)))
    return net.last(x)


@pytest.mark.parametrize("rewritten", [False, True])
def test_channels_under_no_grad_are_prunable_and_learn_nothing(rewritten: bool) -> None:
    model = Net(without_gradient)
    graph = fp.trace(model, IMAGES)
    assert [group.size for group in graph.groups] == [8, 8]
    mask = half(graph)
    plan = dataclasses.replace(graph.plan(mask), code="rewritten" if rewritten else "either")
    compact = fp.apply(plan, model)
    assert isinstance(compact, fp.RewrittenNetwork) == rewritten
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = fp.masked(model, plan)(images)
        torch.testing.assert_close(compact(images), expected, rtol=1e-9, atol=1e-12)
        assert not torch.is_grad_enabled()
    compact.train()(images).sum().backward()
    assert compact.first.weight.grad is None
    assert compact.last.weight.grad is not None
    gates = mask.double().requires_grad_()
    result = MaskedNetwork(graph, model)(images, gates)
    torch.testing.assert_close(result.detach(), expected, rtol=1e-9, atol=1e-12)
    result.square().sum().backward()
    assert gates.grad is not None
    assert bool((gates.grad[:8] != 0).any())


def test_decorated_and_checkpointed_code() -> None:
    prune_half(Net(torch.no_grad()(lambda net, x: net.last(net.middle(net.first(x))))), sizes=[8, 8])
    prune_half(Net(torch.inference_mode()(lambda net, x: net.last(net.middle(net.first(x))))), sizes=[8, 8])
    for reentrant in (False, True):
        again = Net(lambda net, x, r=reentrant: net.last(checkpoint(net.middle, net.first(x), use_reentrant=r)))
        assert [group.size for group in fp.trace(again, IMAGES).groups] == [8, 8]


def test_random_results_are_not_mistaken_for_a_wrong_plan() -> None:
    model = Net(lambda net, x: net.last(F.dropout(net.first(x), 0.5, training=True)))
    graph = fp.trace(model, IMAGES)
    with pytest.raises(fp.SurgeryError, match="computes something else each time, also in eval mode") as caught:
        fp.apply(graph.plan(half(graph)), model)
    assert str(caught.value).count("each time") == 1
    assert fp.apply(graph.plan(half(graph)), model, check=False).first.out_channels == 4


# --- norms and layers -----------------------------------------------------------------------------------------------

NORMS: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "without affine": (lambda: nn.BatchNorm2d(8, affine=False), [8, 8]),
    "without statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False), [8, 8]),
    "without both": (lambda: nn.BatchNorm2d(8, affine=False, track_running_stats=False), [8, 8]),
    "cumulative": (lambda: nn.BatchNorm2d(8, momentum=None), [8, 8]),
    "instance": (lambda: nn.InstanceNorm2d(8), [8, 8]),
    "instance, affine": (lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True), [8, 8]),
    "group": (lambda: nn.GroupNorm(4, 8), [4, 8]),
    "group, without affine": (lambda: nn.GroupNorm(4, 8, affine=False), [4, 8]),
    "group of each": (lambda: nn.GroupNorm(8, 8), [8, 8]),
    "response": (lambda: nn.LocalResponseNorm(3), [8]),
    "dropout": (lambda: nn.Dropout2d(0.5), [8, 8]),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str) -> None:
    make, sizes = NORMS[name]
    prune_half(Net(lambda net, x: net.last(net.middle(net.norm(net.first(x)))), norm=make()), sizes=sizes)


def test_synchronised_norms_on_a_cpu() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))).append(
        nn.Conv2d(8, 4, 1)
    )
    graph = fp.trace(model.double(), IMAGES)
    assert [group.size for group in graph.groups] == [8]
    assert isinstance(fp.apply(graph.plan(half(graph)), model)[1], nn.SyncBatchNorm)


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_padding_modes(mode: str) -> None:
    prune_half(Net(middle=nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode)), sizes=[8, 8])


@pytest.mark.parametrize(
    ("options", "out", "sizes"),
    [({"output_padding": 1, "stride": 2}, 6, [8, 6]), ({"groups": 2}, 6, [4, 3]), ({"groups": 8}, 16, [8])],
    ids=["strided", "grouped", "depthwise with multiplier"],
)
def test_transposed_convolutions(options: dict[str, int], out: int, sizes: list[int]) -> None:
    compact = prune_half(Net(middle=nn.ConvTranspose2d(8, out, 3, **options), last=nn.Conv2d(out, 4, 1)), sizes=sizes)
    layer = compact.middle
    assert layer.weight.shape[:2] == (layer.in_channels, layer.out_channels // layer.groups)


def test_one_and_three_dimensions() -> None:
    line = nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.MaxPool1d(2), nn.Conv1d(8, 6, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose1d(6, 6, 2), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip
    prune_half(line.double(), torch.zeros(1, 3, 16, dtype=torch.float64), [8, 6, 6])
    volume = nn.Sequential(
        nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.MaxPool3d(2), nn.Conv3d(8, 6, 1), nn.AdaptiveAvgPool3d(1),
        nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    prune_half(volume.double(), torch.zeros(1, 3, 8, 8, 8, dtype=torch.float64), [8, 6])


# --- hooks and tensors of modules -----------------------------------------------------------------------------------

HOOKS: dict[str, tuple[Any, list[int]]] = {
    "scales": (lambda m, i, o: 2 * o, [8, 8]),
    "mixes channels": (lambda m, i, o: o - o.mean(1, keepdim=True), [8]),
    "turns channels": (lambda m, i, o: o.flip(1), [8, 8]),
    "knows the number of channels": (lambda m, i, o: o * torch.arange(8.0, dtype=o.dtype)[:, None, None], [8]),
}


@pytest.mark.parametrize("name", HOOKS)
def test_forward_hooks_are_part_of_the_model(name: str) -> None:
    hook, sizes = HOOKS[name]
    model = Net()
    model.middle.register_forward_hook(hook)
    model.middle.register_forward_pre_hook(lambda m, i: (i[0] + 1,))
    prune_half(model, sizes=sizes)


def test_tensors_of_modules() -> None:
    model = Net(lambda net, x: net.last(net.middle(net.first(x) * net.constant) + net.list[0] * net.shared))
    model.register_buffer("constant", torch.rand(8, 1, 1, dtype=torch.float64), persistent=False)
    model.shared = nn.Parameter(torch.rand(8, 1, 1, dtype=torch.float64))
    model.list = nn.ParameterList([torch.rand(8, 1, 1, dtype=torch.float64)])
    compact = prune_half(model, sizes=[8, 8])
    assert compact.constant.shape == (4, 1, 1)
    assert "constant" not in compact.state_dict()
    both = Net(lambda net, x: net.last(net.middle(net.first(x) * net.shared) * net.shared))
    both.shared = nn.Parameter(torch.rand(8, 1, 1, dtype=torch.float64))
    prune_half(both, sizes=[8])
    plain = Net(lambda net, x: net.last(net.middle(net.first(x) * net.constant)))
    plain.constant = torch.rand(8, 1, 1, dtype=torch.float64)  # no buffer: nothing can shrink it
    prune_half(plain, sizes=[8])


# --- inputs and results ---------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


@dataclasses.dataclass
class Result:
    y: Tensor


@pytest.mark.parametrize(
    "form", [lambda y: {"y": y, "none": None}, lambda y: (y, 3, "text"), lambda y: Pair(y, 2 * y), lambda y: [[y]]]
)
def test_nested_results(form: Any) -> None:
    prune_half(Net(lambda net, x: form(net.last(net.middle(net.first(x))))), sizes=[8, 8])


def test_results_that_are_no_tensors() -> None:
    for nothing in (None, 3):
        with pytest.raises(fp.TraceError, match="Net returns no tensor"):
            fp.trace(Net(lambda net, x, y=nothing: (net.last(net.first(x)), y)[1]), IMAGES)
    with pytest.raises(fp.TraceError, match=r"returns a .*Result, .*torch\.export\.register_dataclass"):
        fp.trace(Net(lambda net, x: Result(net.last(net.first(x)))), IMAGES)


def test_inputs_of_other_types() -> None:
    for dtype in (torch.uint8, torch.int64, torch.bool):
        prune_half(Net(lambda net, x: net.last(net.first(x.double() / 255))), IMAGES.to(dtype), [8])
    prune_half(Net(lambda net, x: net.last(net.first(x.real + x.imag))), IMAGES.to(torch.complex128), [8])
    layers = [nn.Conv2d(3, 8, 1, dtype=torch.complex64), nn.Conv2d(8, 4, 1, dtype=torch.complex64)]
    model = nn.Sequential(*layers)
    graph = fp.trace(model, IMAGES.to(torch.complex64))
    compact = fp.apply(graph.plan(half(graph)), model)
    assert compact[0].out_channels == 4
    assert fp.verify(graph.plan(half(graph)), model, compact) <= 1e-9
    with torch.no_grad():
        compact[1].weight.imag.mul_(1.01)
    with pytest.raises(fp.SurgeryError, match="differ"):
        fp.verify(graph.plan(half(graph)), model, compact)


def test_a_missing_input_is_named() -> None:
    class Needs(Net):
        def forward(self, x: Tensor, *, scale: Tensor) -> Any:
            return super().forward(x * scale[:, None, None, None])

    with pytest.raises(TypeError, match=r"Needs\.forward does not take 1 by position: .*'scale'.*as a dict"):
        fp.trace(Needs(), IMAGES)
    prune_half(Needs(), {"scale": torch.zeros(1, dtype=torch.float64), "x": IMAGES}, [8, 8])


def test_a_model_without_layers() -> None:
    for model in (nn.Identity(), nn.MaxPool2d(2)):
        graph = fp.trace(model, IMAGES)
        assert graph.groups == graph.unprunable == ()
        assert int(graph.cost().macs) == int(graph.cost().params) == 0


# --- models that are refused by name --------------------------------------------------------------------------------


def quantised() -> nn.Module:
    layer = nn.Sequential(nn.Linear(4, 4))
    return torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)


def observed() -> nn.Module:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)))
    model.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    return torch.ao.quantization.prepare(model.eval())


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "DataParallel": (lambda: nn.DataParallel(Net()), r"the model is a DataParallel: .*\(model\.module\)"),
    "compiled": (lambda: torch.compile(Net()), r"OptimizedModule: .*\(model\._orig_mod\)"),
    "compiled part": (
        lambda: nn.Sequential(torch.compile(nn.Conv2d(3, 4, 1))), r"'0' .*\(model\.get_submodule\('0'\)\._orig_mod\)"
    ),
    "wrapped part": (lambda: Net(inner=nn.DataParallel(nn.Conv2d(3, 4, 1))), r"'inner' .*\(model\.inner\.module\)"),
    "scripted": (lambda: nn.Sequential(torch.jit.script(nn.Conv2d(3, 4, 1))), "'0' is a ScriptModule: give the module"),
    "exported": (
        lambda: torch.export.export(Net().eval(), (IMAGES,)).module(), "the model is an exported program: give the"
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 1)), r"'0' is not initialised .* run the model once"),
    "quantised": (quantised, r"'0' is quantised \(Linear\): prune the float model"),
    "observed": (observed, r"'0\.0\.activation_post_process' is quantised"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(fp.TraceError, match=reason):
        fp.trace(make(), IMAGES)


def test_a_module_that_is_compiled_in_place_is_pruned() -> None:
    model = Net()
    model.middle.compile()
    graph = fp.trace(model, IMAGES)
    assert [group.size for group in graph.groups] == [8, 8]
    assert fp.apply(graph.plan(half(graph)), model, check=False).middle.in_channels == 4


def test_weights_in_integers_keep_their_channels() -> None:
    model = Net(lambda net, x: net.last(F.conv2d(net.middle(net.first(x)), net.integers.to(x.dtype) * net.scale)))
    model.register_buffer("integers", torch.randint(-100, 100, (8, 8, 1, 1), dtype=torch.int8))
    model.register_buffer("scale", torch.rand(8, 1, 1, 1, dtype=torch.float64))
    graph = fp.trace(model, IMAGES)
    assert [group.name for group in graph.groups] == ["first"]
    assert dict(graph.unprunable)["middle"] == "conv2d in the model (its weight is computed)"
    prune_half(model)


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = Net()
    model.generator = (n for n in range(3))
    graph = fp.trace(model, IMAGES)
    with pytest.raises(fp.SurgeryError, match=r"Net cannot be copied: .*generator"):
        fp.apply(graph.plan(half(graph)), model)
