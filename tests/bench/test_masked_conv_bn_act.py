"""The convolutions that are timed, their inputs, and their least work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastprune.bench import masked_conv_bn_act as bench
from fastprune.bench.case import OURS, check_agreement
from fastprune.bench.shapes import NETWORKS, ConvShape, convolutions

CPU = torch.device("cpu")
SHAPE = ConvShape(6, 10, (3, 3), (2, 2), (1, 1), (1, 1), 1, 7, 9, "relu")  # the output has 4 x 5 pixels


def small(shape: ConvShape, workload: str) -> Any:
    return bench.case("test", shape, workload, CPU, batch=2, compiled=False)


def test_every_convolution_in_every_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "case", lambda network, shape, workload, device: (network, shape, workload))
    found = list(bench.cases(CPU))
    expected = {(name, shape, work) for name in NETWORKS for shape in convolutions(name) for work in bench.WORKLOADS}
    assert len(found) == len(expected)
    assert set(found) == expected  # type: ignore[comparison-overlap]


def test_the_first_shapes_are_spread_over_the_network() -> None:
    places = list(range(30))
    first = [places.index(place) for place in bench.spread(places)[:6]]  # type: ignore[arg-type]
    assert [sum(low <= place < low + 10 for place in first) for low in (0, 10, 20)] == [2, 3, 1]


@pytest.mark.parametrize("workload", bench.WORKLOADS)
@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        ConvShape(3, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1, 6, 6, "relu6"),  # an image, an odd number of outputs
        ConvShape(32, 48, (3, 3), (1, 1), (1, 1), (1, 1), 1, 5, 6),  # Winograd's algorithm
        ConvShape(12, 12, (3, 3), (1, 1), (1, 1), (1, 1), 12, 6, 5, "relu6"),
    ],
    ids=str,
)
def test_variants_agree(shape: ConvShape, workload: str) -> None:
    case = small(shape, workload)
    assert check_agreement(case) == {}
    assert list(case.variants) == ["eager", "eager channels_last", "one call", OURS]


def test_half_of_the_channels_are_closed() -> None:
    case = small(SHAPE, "half closed")
    x, x_last, mask, *rest = case.draw()
    assert torch.equal(x, x_last)
    assert x.is_contiguous()
    assert x_last.is_contiguous(memory_format=torch.channels_last)
    assert mask.tolist() == [1.0] * 5 + [0.0] * 5
    assert (x[:, :3] != 0).all()
    assert (x[:, 3:] == 0).all()
    y = case.variants[OURS](x, x_last, mask, *rest)
    assert (y[:, :5] > 0).any()
    assert (y[:, 5:] == 0).all()


def test_each_workload_has_its_gradients() -> None:
    wanted = {work: tuple(t.requires_grad for t in small(SHAPE, work).draw()[:3]) for work in bench.WORKLOADS}
    assert wanted == {
        "forward": (False, False, True),
        "half closed": (False, False, False),
        "forward + backward": (True, True, True),
    }
    case = small(SHAPE, "forward + backward")
    for variant in case.variants.values():
        y, dx, dmask = variant(*case.draw())
        assert (y.shape, dx.shape, dmask.shape) == ((2, 10, 4, 5), (2, 6, 7, 9), (10,))


def test_least_work() -> None:
    x, weight, y = 2 * 6 * 7 * 9, 10 * 6 * 9, 2 * 10 * 4 * 5
    macs = 2 * 10 * 4 * 5 * 6 * 9
    found = {work: (small(SHAPE, work).bytes, small(SHAPE, work).flops) for work in bench.WORKLOADS}
    assert found == {
        "forward": (4 * (x + weight + y), 2 * macs),
        "half closed": (4 * (x / 2 + weight / 4 + y), 2 * macs / 4),
        "forward + backward": (4 * (2 * x + 2 * weight + 3 * y), 4 * macs),
    }


@pytest.mark.slow
def test_compiled_peers_agree() -> None:
    for workload in ("forward", "half closed"):
        case = bench.case("test", SHAPE, workload, CPU, batch=2)
        assert check_agreement(case) == {}
        assert len(case.compiled) == 2
