"""Moments and their least squares, against float64."""

from __future__ import annotations

import pytest
import torch

from fastprune.host.distributed import Distributed
from fastprune.recovery.moments import Moments, choose_ridge, solve, sum_rows, zero_sums


def make_rows(groups: int, count: int, inputs: int, outputs: int, offset: float = 0.0) -> tuple[torch.Tensor, ...]:
    mixing = torch.randn(groups, inputs, inputs)
    x = torch.randn(groups, count, inputs) @ mixing + offset
    weight = torch.randn(groups, outputs, inputs)
    return x, x @ weight.mT + 3 + 0.1 * torch.randn(groups, count, outputs), weight


def test_sums_over_batches_are_the_sums_over_all_rows() -> None:
    x, y, _ = make_rows(3, 90, 5, 4, offset=100.0)  # a mean of a hundred deviations
    sums = zero_sums(3, 5, 4, x.device)
    for part in range(3):
        rows = slice(30 * part, 30 * part + 30)
        sums += sum_rows(x[:, rows], y[:, rows])
    exact_x, exact_y = x.double(), y.double()
    moments = Moments.of(sums.reduce_(Distributed()), shifted=True)
    centred = exact_x - exact_x.mean(1, keepdim=True)
    torch.testing.assert_close(moments.mean_x, exact_x.mean(1))
    torch.testing.assert_close(moments.mean_y, exact_y.mean(1))
    torch.testing.assert_close(moments.xx, centred.mT @ centred / 90, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        moments.xy, centred.mT @ (exact_y - exact_y.mean(1, keepdim=True)) / 90, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("shifted", [True, False])
def test_the_fit_is_that_of_lstsq(groups: int, shifted: bool) -> None:
    x, y, _ = (tensor.double() for tensor in make_rows(groups, 200, 6, 4))
    chosen = torch.tensor([True, True, False, True, False, True]).repeat(groups, 1)
    prior = torch.zeros(groups, 4, 6, dtype=torch.float64)
    moments = Moments.of(sum_rows(x, y), shifted=shifted)
    weight = solve(moments, prior, chosen, 1e-12)
    assert (weight[:, :, ~chosen[0]] == 0).all()
    a, b = (t - t.mean(1, keepdim=True) for t in (x[:, :, chosen[0]], y)) if shifted else (x[:, :, chosen[0]], y)
    torch.testing.assert_close(weight[:, :, chosen[0]], torch.linalg.lstsq(a, b).solution.mT, rtol=1e-6, atol=1e-8)
    shift = moments.mean_y - (weight @ moments.mean_x.unsqueeze(2)).squeeze(2)
    residuals = y - x @ weight.mT - shift.unsqueeze(1)
    torch.testing.assert_close(moments.errors(weight, shift), residuals.square().mean(1), rtol=1e-6, atol=1e-8)


def test_a_large_ridge_keeps_the_prior() -> None:
    x, y, weight = make_rows(2, 50, 4, 3)
    moments = Moments.of(sum_rows(x, y), shifted=True)
    prior, chosen = weight.double(), torch.ones(2, 4, dtype=torch.bool)
    torch.testing.assert_close(solve(moments, prior, chosen, 1e9), prior, rtol=1e-5, atol=1e-5)


def test_inputs_that_do_not_vary_are_survived() -> None:
    x, y, _ = make_rows(1, 50, 4, 3)
    x[:, :, 1] = 2.0
    x[:, :, 2] = x[:, :, 0]
    weight = solve(Moments.of(sum_rows(x, y), shifted=True), torch.ones(1, 3, 4).double(), torch.ones(1, 4) > 0, 0.0)
    assert weight.isfinite().all()


def test_few_noisy_rows_get_a_larger_ridge_than_many_clean_ones() -> None:
    chosen, ridges = torch.ones(1, 20, dtype=torch.bool), (1e-6, 1e-2, 1e2)
    found = {}
    for rows, noise in ((24, 100.0), (2000, 0.0)):
        x = torch.randn(1, 2 * rows, 20, dtype=torch.float64)
        y = x @ torch.ones(1, 20, 2, dtype=torch.float64) + noise * torch.randn(1, 2 * rows, 2, dtype=torch.float64)
        halves = [Moments.of(sum_rows(a, b), shifted=True) for a, b in zip(x.chunk(2, 1), y.chunk(2, 1), strict=True)]
        found[rows] = choose_ridge(*halves, torch.zeros(1, 2, 20).double(), chosen, ridges)
    assert found == {24: 1e2, 2000: 1e-6}
