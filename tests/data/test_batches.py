"""Batches: the same for any start and any number of ranks; augmentation by value; users' own loaders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fastprune.data import BatchRequest, Data, Split, UserData, load_data
from fastprune.data.augment import ShiftAndFlip
from fastprune.data.batches import BatchPlan, hashed, permutation
from fastprune.engine import evaluate
from fastprune.host.distributed import Distributed

DATA = load_data("synthetic:1x4x4:3:103", held_out=0)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_hash_depends_on_seed_and_keys_alone() -> None:
    # Other values would change every resumed run.
    assert hashed(0, np.arange(3)).tolist() == hashed(0, np.arange(5)).tolist()[:3]
    assert len(set(hashed(7, 1, np.arange(100_000)).tolist())) == 100_000
    bits = hashed(3, np.arange(20_000))
    ones = ((bits[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).mean(0)
    assert np.abs(ones - 0.5).max() < 0.02
    assert hashed(1, 2) != hashed(2, 1)


def test_permutation() -> None:
    assert sorted(permutation(1000, 4, 2)) == list(range(1000))
    assert not np.array_equal(permutation(1000, 4, 2), permutation(1000, 4, 3))
    assert abs(np.corrcoef(np.arange(1000), permutation(1000, 4, 2))[0, 1]) < 0.1


@pytest.mark.parametrize("start", [0, 1, 6, 7])
def test_any_start_gives_the_same_batches(start: int) -> None:
    pytest.importorskip("sklearn")
    digits = load_data("digits")
    options = {"seed": 3, "epoch": 5, "samples": 100, "augment": True}
    whole = list(digits.batches("train", 16, **options))
    rest = list(digits.batches("train", 16, start=start, **options))
    assert len(whole) == 7 == digits.steps("train", 16, samples=100)
    assert len(rest) == 7 - start
    assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [8, 17, 51])
def test_ranks_together_see_what_one_process_sees(ranks: int, batch_size: int) -> None:
    one = list(DATA.batches("train", batch_size, seed=1, augment=True))
    many = [
        list(DATA.batches("train", batch_size, seed=1, augment=True, distributed=Distributed(rank, ranks)))
        for rank in range(ranks)
    ]
    steps = DATA.steps("train", batch_size, distributed=Distributed(0, ranks))
    assert {len(batches) for batches in many} == {steps}
    assert steps >= len(one) - 1
    for step in range(steps):
        union = tuple(torch.cat([batches[step][part] for batches in many]) for part in (0, 1))
        assert same(union, one[step])
        assert all(len(batches[step][1]) for batches in many)


def test_last_batch_is_dropped_only_if_a_rank_would_be_empty() -> None:
    order = np.arange(10)
    assert len(BatchPlan(order, 4, Distributed(0, 2))) == 3
    assert len(BatchPlan(order, 4, Distributed(0, 3))) == 2
    plans = [BatchPlan(order, 4, Distributed(rank, 3), complete=True) for rank in range(3)]
    seen = [sample for plan in plans for step in range(len(plan)) for sample in plan[step]]
    assert sorted(seen) == order.tolist()


def test_plan_errors() -> None:
    with pytest.raises(ValueError, match="batch_size 2"):
        BatchPlan(np.arange(10), 2, Distributed(0, 3))
    with pytest.raises(ValueError, match="2 samples are too few for 3"):
        BatchPlan(np.arange(2), 4, Distributed(0, 3))


def test_subset_is_fixed_and_epochs_differ() -> None:
    epochs = [
        torch.cat([x.flatten(1) for x, _ in DATA.batches("train", 8, seed=2, epoch=epoch, samples=30)])
        for epoch in (0, 1)
    ]
    assert len(epochs[0]) == 30
    assert not torch.equal(epochs[0], epochs[1])
    assert {tuple(row) for row in epochs[0].tolist()} == {tuple(row) for row in epochs[1].tolist()}
    other = torch.cat([x.flatten(1) for x, _ in DATA.batches("train", 8, seed=3, samples=30)])
    assert {tuple(row) for row in other.tolist()} != {tuple(row) for row in epochs[0].tolist()}


@pytest.mark.parametrize("flip", [False, True])
def test_shift_and_flip_values(flip: bool) -> None:
    images = torch.randint(1, 255, (500, 2, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    result = ShiftAndFlip(2, flip)(images, hashed(0, np.arange(500)))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    found = torch.zeros(2, 5, 5, dtype=torch.int64)
    for image, margin in zip(result, padded, strict=True):
        matches = [
            (mirrored, down, right)
            for mirrored in (0, 1)
            for down in range(5)
            for right in range(5)
            if torch.equal(
                image,
                _crop(margin.flip(2) if mirrored else margin, down, right),
            )
        ]
        assert len(matches) == 1
        found[matches[0]] += 1
    assert (found.sum(0) > 0).all()
    assert 200 < int(found[1].sum()) < 300 if flip else not found[1].any()


def _crop(image: Tensor, down: int, right: int) -> Tensor:
    return image[:, down : down + 5, right : right + 6]


class Jittered(TensorDataset):
    """A data set with augmentation by torch's default generator, as torchvision's transforms use it."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(index)
        return image + torch.rand(()), label


def loader(**options: object) -> DataLoader[tuple[Tensor, Tensor]]:
    images = torch.arange(20.0).reshape(20, 1, 1, 1).expand(20, 1, 2, 2).clone()
    return DataLoader(Jittered(images, torch.arange(20)), batch_size=6, shuffle=True, **options)


WORKERS = [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("generator", [False, True])
def test_user_loader_resumes(workers: dict[str, object], generator: bool) -> None:
    data = UserData(loader(**workers, generator=torch.Generator() if generator else None))
    whole = list(data.batches("train", 99, seed=1, epoch=3))
    torch.rand(5)  # other draws from the global generator do not matter
    rest = list(data.batches("train", 99, seed=1, epoch=3, start=2))
    assert len(whole) == 4 == data.steps("train", 99)
    assert len(rest) == 2
    assert all(same(a, b) for a, b in zip(whole[2:], rest, strict=True))
    assert not same(whole[0], next(data.batches("train", 99, seed=1, epoch=4)))


@pytest.mark.parametrize("workers", WORKERS)
def test_a_pass_during_another_pass(workers: dict[str, object]) -> None:
    """Both give the same batches as alone; the inner one gives the same samples in every epoch."""
    data = UserData(loader(**workers))
    whole = list(data.batches("train", 99, seed=1, epoch=2))
    few = list(data.batches("train", 99, seed=1, epoch=0, samples=9))
    outer = data.batches("train", 99, seed=1, epoch=2)
    begun = [next(outer)]
    inner = list(data.batches("train", 99, seed=1, epoch=7, samples=9))
    assert all(same(a, b) for a, b in zip(inner, few, strict=True))
    assert all(same(a, b) for a, b in zip([*begun, *outer], whole, strict=True))


def test_user_loader_is_shared_among_ranks() -> None:
    data = UserData(loader(), num_classes=20)
    one = list(data.batches("train", 6, seed=1))
    many = [list(data.batches("train", 6, seed=1, distributed=Distributed(rank, 3))) for rank in range(3)]
    assert [len(batches) for batches in many] == [3, 3, 3]  # the last batch of 2 would leave a rank empty
    for step in range(3):
        assert torch.equal(torch.cat([batches[step][1] for batches in many]), one[step][1])
    assert sum(len(labels) for _, labels in data.batches("train", 6, samples=8)) == 8
    assert data.num_classes == 20
    assert data.size("train") == 20
    assert data.size("test") == 0


def test_user_data_errors() -> None:
    batches = [(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(ValueError, match="iterator"):
        UserData(iter(batches))
    with pytest.raises(ValueError, match="empty"):
        UserData([])
    with pytest.raises(ValueError, match="dimension of samples"):
        UserData([("cat.jpg", "cat")])
    data = UserData(batches)
    with pytest.raises(ValueError, match="num_classes="):
        _ = data.num_classes
    with pytest.raises(ValueError, match="no held_out data"):
        next(data.batches("held_out", 1))


class OwnData(Data):
    """A user's subclass, with all that is abstract."""

    name = "own"
    shape = (1, 2, 2)
    num_classes = 3

    def size(self, split: Split) -> int:
        return 5

    def steps(self, split: Split, batch_size: int, **options: Any) -> int:
        return 1


BATCH = (torch.zeros(5, 1, 2, 2), torch.zeros(5, dtype=torch.int64))


def test_a_subclass_reads_requests() -> None:
    class Reads(OwnData):
        def read(self, request: BatchRequest) -> Iterator[tuple[Tensor, Tensor]]:
            requests.append(request)
            yield BATCH

    requests: list[BatchRequest] = []
    assert list(Reads().batches("held_out", 4, seed=1, epoch=2, start=3, samples=6, augment=True)) == [BATCH]
    assert requests == [BatchRequest("held_out", 4, 1, 2, 3, 6, augment=True)]
    with pytest.raises(NotImplementedError, match="OwnData has no way to read batches"):
        OwnData().batches("train", 4)


def test_a_subclass_may_override_batches() -> None:
    class Overrides(OwnData):
        def batches(self, split: Split, batch_size: int, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
            yield BATCH

    assert evaluate(lambda images: torch.eye(3)[:1].expand(5, 3), Overrides())["accuracy"] == 1
