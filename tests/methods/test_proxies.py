"""The losses of candidates: each proxy against its formula, written another way, in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune.graph import ChannelGraph, find_stages, trace
from fastprune.methods.sp.fitted_adaptors import FittedAdaptor
from fastprune.methods.sp.proxies import make_candidates, measure_proxies
from fastprune.methods.sp.stage_losses import make_stage_data
from fastprune.methods.sp.supernet import SuperNet
from fastprune.networks.subnetworks import SubNetworks
from fastprune.surgery import apply
from fastprune.testing import network, sample_data
from fastprune.training.objective import Objective


@cache
def prepare() -> tuple[nn.Module, ChannelGraph, SuperNet, Tensor, Tensor]:
    model = network().double()
    images, labels = next(iter(sample_data().batches("train", 24)))
    graph = trace(model, images[:2].double())
    net = SuperNet(graph, model, find_stages(graph))
    generator = torch.Generator().manual_seed(2)
    for adaptor in net.adaptors:  # as if trained
        for parameter in adaptor.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(0.05 * noise)
    return model, graph, net, images.double(), labels


def narrow(graph: ChannelGraph, ratio: float) -> Tensor:
    mask = torch.ones(graph.num_units, dtype=torch.bool)
    for group in graph.groups:
        mask[group.start + max(1, int(ratio * group.size)) : group.start + group.size] = False
    return mask


def groups_of(net: SuperNet) -> tuple[int, ...]:
    return tuple(g for stage in net.stages for g in stage.groups)


def own_features(net: SuperNet, number: int, features: Tensor, mask: Tensor) -> Tensor:
    """Return a candidate's features before any adaptor: those of an identity, without the channels that are gone."""
    wide: Tensor = net.own_features[number](features, mask)
    return wide[:, wide.abs().amax((0, 2, 3)) > 0]


def test_the_fitted_adaptor_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(30, c, 5, 4, generator=generator, dtype=torch.float64) for c in (3, 6))
    y[:, :2] += 2 * x[:, :2] + 1
    found = FittedAdaptor.fit(x, y)
    rows, wanted = (z.movedim(1, -1).reshape(-1, z.shape[1]) for z in (x, y))
    design = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    solution = torch.linalg.lstsq(design, wanted).solution
    assert torch.allclose(found.weight, solution[:-1].mT, atol=1e-5)
    assert torch.allclose(found.bias, solution[-1], atol=1e-5)
    best = float((design @ solution - wanted).square().mean())
    assert float(found.error) == pytest.approx(best, rel=1e-9)
    differences = torch.cat(list(found.differences(x, y)))
    assert float(differences.square().mean()) == pytest.approx(best, rel=1e-9)


def test_dead_and_equal_features_can_be_fitted() -> None:
    y = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    x = torch.stack([y[:, 0], y[:, 0], torch.zeros_like(y[:, 0])], 1)
    found = FittedAdaptor.fit(x, y)
    assert bool(found.weight.isfinite().all())
    assert float(found.error) == pytest.approx(float(y[:, 1:].var((0, 2, 3), unbiased=False).sum()) / 4, rel=0.05)
    assert float(FittedAdaptor.fit(torch.zeros(8, 2, 6, 6), y).error) > 0.9


@pytest.mark.parametrize("adaptor", ["closed_form", "trained"])
def test_losses_of_stages_are_their_formulas(adaptor: str) -> None:
    _, graph, net, images, labels = prepare()
    features, mask = net.features(images), narrow(graph, 0.4)
    gradients = net.gradients(images, labels, Objective())
    measured = measure_proxies(net, groups_of(net), [mask], images, labels)[0]
    ending = "" if adaptor == "closed_form" else "_trained"
    narrower = adaptor == "trained"
    for number in range(len(net.stages)):
        wide = features[number + 1]
        with torch.no_grad():
            if adaptor == "trained":
                difference = net.parts[number](features[number], mask) - wide
            else:
                few = own_features(net, number, features[number], mask)
                narrower |= few.shape[1] < wide.shape[1]
                design = torch.cat([few, torch.ones_like(few[:, :1])], 1).movedim(1, -1).flatten(0, -2)
                wanted = wide.movedim(1, -1).flatten(0, -2)
                fitted = design @ torch.linalg.lstsq(design, wanted).solution - wanted
                difference = fitted.view(len(wide), *wide.shape[2:], -1).movedim(-1, 1)
        mse = float(difference.square().mean())
        pixels = wide.shape[2] * wide.shape[3]
        inner = (difference * gradients[number]).flatten(1).sum(1)
        assert measured[f"mse{ending}"][number] == pytest.approx(mse, rel=1e-5)
        assert measured[f"channel{ending}"][number] == pytest.approx(mse * pixels, rel=1e-5)
        assert measured[f"fisher{ending}"][number] == pytest.approx(float(inner.square().mean()) / 2, rel=1e-4)
    assert narrower


def test_the_fitted_adaptor_is_never_worse_than_the_trained_one() -> None:
    _, graph, net, images, labels = prepare()
    masks = [narrow(graph, ratio) for ratio in (0.2, 0.5, 0.8)]
    for found in measure_proxies(net, groups_of(net), masks, images, labels):
        assert all(a < b for a, b in zip(found["mse"], found["mse_trained"], strict=True))


def test_gradients_are_those_of_each_image_alone() -> None:
    model, _, net, images, labels = prepare()
    before = copy.deepcopy(model.state_dict())
    found = net.gradients(images, labels, Objective())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    caught: list[Tensor] = []
    hooks = [
        model.get_submodule(stage.name).register_forward_hook(lambda _m, _i, output: caught.append(output))
        for stage in net.stages
    ]
    for number in (0, 7, 23):
        caught.clear()
        one = images[number : number + 1].clone().requires_grad_()
        loss = F.cross_entropy(model.eval()(one), labels[number : number + 1])
        for gradient, own in zip(torch.autograd.grad(loss, caught), found, strict=True):
            assert torch.allclose(own[number], gradient[0].float(), rtol=1e-4, atol=1e-8)
    for hook in hooks:
        hook.remove()


def test_the_network_proxy_is_the_cross_entropy_of_the_compact_network() -> None:
    model, graph, net, images, labels = prepare()
    masks = [narrow(graph, 0.3), narrow(graph, 0.7)]
    for mask, found in zip(masks, measure_proxies(net, groups_of(net), masks, images, labels), strict=True):
        kept = mask.clone()
        for g, group in enumerate(graph.groups):
            if g not in groups_of(net):
                kept[group.units] = True
        compact = apply(graph.plan(kept), model, check=False).train()  # with the statistics of the batch
        with torch.no_grad():
            expected = float(F.cross_entropy(compact(images), labels))
        assert found["network"] == [pytest.approx(expected, rel=1e-5)]


def test_the_whole_network_can_be_sent_to_other_processes() -> None:
    _, _, net, images, labels = prepare()
    candidates = make_candidates(net, groups_of(net), images, labels, proxy="network", adaptor="trained")
    sent = pickle.loads(pickle.dumps(candidates.data[0].networks.model))
    assert torch.equal(sent(images), candidates.data[0].networks.model(images))


def test_what_cannot_be_measured_is_refused() -> None:
    _, _, net, images, labels = prepare()
    own = Objective(loss=lambda output, target: output.sum())
    with pytest.raises(ValueError, match="proxy 'network': this needs class labels"):
        make_candidates(net, groups_of(net), images, labels, proxy="network", adaptor="trained", objective=own)
    few: Sequence[Tensor] = net.features(images[:1])
    with pytest.raises(ValueError, match=r"adaptor 'closed_form': stage \d has \d+ features and only \d+ pixels"):
        make_stage_data([SubNetworks(p.slices.graph, p.slices.model) for p in net.parts], few, fitted=True)
