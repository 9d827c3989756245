"""Values that find no room in memory lie in files, and change nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from fastprune.host.memory import is_in_file
from fastprune.recovery import compensate_weights
from fastprune.recovery.compensation import How
from fastprune.recovery.room import Room
from fastprune.recovery.walk import Walk

CPU = torch.device("cpu")
LARGE = torch.zeros(4, 64, 64, 4)  # 256 KiB


def batches() -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 32, 32, generator=generator),) for _ in range(4)]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fastprune.recovery.room"]


def test_views_and_values_in_files_count_once() -> None:
    room, values = Room(CPU, 600 / 2**20), [LARGE.clone(), LARGE.clone()]
    room.count([[values[0], values[0][1:]], (values[1],)])
    assert room.used == 2 * LARGE.nbytes
    stored = room.place((LARGE.clone(), values[0].view(-1), torch.zeros(3)))
    assert [is_in_file(x) for x in stored] == [True, False, False]
    room.count([values, stored])
    assert room.used == 2 * LARGE.nbytes + 12
    room.count([[]])
    assert not is_in_file(room.place(LARGE.clone()))


def test_by_default_half_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastprune.recovery.room.free_memory", lambda device: 3000)
    assert Room(CPU).limit == 1500
    with pytest.raises(ValueError, match=r"memory: got -1; a number of GiB from 0 on is needed"):
        Room(CPU, -1)


@pytest.mark.parametrize("how", ["sequential", "one_pass"])
def test_files_change_no_bit(tiny: nn.Module, how: How, caplog: pytest.LogCaptureFixture) -> None:
    graph = fp.trace(tiny, torch.zeros(2, 3, 32, 32))
    mask = torch.ones(graph.num_units)
    for group in graph.groups:
        mask[group.start + 1 : group.start + group.size : 2] = 0
    plan = graph.plan(mask)
    roomy, _ = compensate_weights(graph, tiny, plan, batches(), how)
    assert not warnings(caplog)
    narrow, _ = compensate_weights(graph, tiny, plan, batches(), how, memory=0)
    (told,) = warnings(caplog)
    assert told.startswith("compensate: the values between layers take more than 0.0 GiB (memory=); the others go to")
    assert all(torch.equal(tensor, narrow.state_dict()[name]) for name, tensor in roomy.state_dict().items())


def test_the_bound_holds(tiny: nn.Module) -> None:
    graph = fp.trace(tiny, torch.zeros(2, 3, 32, 32))
    images = [x for (x,) in batches()]
    for memory in (None, 0.001):
        walk, most = Walk(graph, tiny, tiny, [(x,) for x in images], memory), 0
        for _ in walk.steps():
            held = {
                x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                for values in walk.full.at.values() for x in values if isinstance(x, Tensor) and not is_in_file(x)
            }  # fmt: skip
            most = max(most, sum(held.values()))
        assert (most <= 0.001 * 2**30) == (memory is not None)


def test_what_is_written_in_place_stays(caplog: pytest.LogCaptureFixture, randomised: Callable[..., nn.Module]) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 16, 3), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(torch.relu(self.a(x)))
            alias = x.view(x.shape)
            torch.nn.functional.relu(x, inplace=True)
            return self.c(alias)

    net = randomised(InPlace()).eval()
    graph = fp.trace(net, torch.zeros(2, 3, 32, 32))
    mask = torch.ones(graph.num_units)
    mask[1 : graph.groups[0].size : 2] = 0
    plan = graph.plan(mask)
    roomy, _ = compensate_weights(graph, net, plan, batches())
    narrow, _ = compensate_weights(graph, net, plan, batches(), memory=0)
    assert all(torch.equal(tensor, narrow.state_dict()[name]) for name, tensor in roomy.state_dict().items())
    assert "operators that write in place keep them there" in warnings(caplog)[0]
