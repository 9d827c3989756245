"""SP: one update from three passes, and a search with the same result wherever losses are measured."""

from __future__ import annotations

import dataclasses
import os
import signal
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.engine import HeldOut, Placement
from fastprune.graph.model_state import state_of
from fastprune.host.distributed import Distributed
from fastprune.methods import Task
from fastprune.methods.registry import configure
from fastprune.methods.sp.sp import SP, SPConfig
from fastprune.methods.sp.stage_losses import LocalLosses, Query, StageData, make_stage_data
from fastprune.methods.sp.stage_workers import ExecutorLosses, SavedStage
from fastprune.methods.sp.supernet import SuperNet
from fastprune.methods.sp.widths import random_widths
from fastprune.planning.budget import Budget, BudgetError
from fastprune.planning.limits import Limits
from fastprune.testing import check_method, network, sample_data, traced
from fastprune.training.phases import Rounds

QUICK: dict[str, Any] = {
    "epochs": 1, "batch_size": 32, "population": 6, "iterations": 2, "parents": 3, "levels": 5, "images": 16,
}  # fmt: skip


def prepare(budget: str = "flops=0.5", limits: Limits | None = None, **options: Any) -> tuple[SP, Task]:
    task = Task(
        network(),
        traced(),
        Budget.parse(budget),
        limits or Limits(),
        seed=3,
        data=HeldOut(sample_data(), Placement(), Distributed()),
        rng=torch.Generator().manual_seed(3),
    )
    method = SP(configure(SP, {**QUICK, **options}))
    method.setup(task)
    return method, task


def run_search(method: SP, task: Task) -> SP:
    for phase in method.phases(task):
        while isinstance(phase, Rounds) and len(set(phase.progress())) == 2:
            phase.round()
    return method


@pytest.mark.slow
def test_contract() -> None:
    check_method(SP, **QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"proxy": "fisher"}, {"proxy": "network"}, {"variant": "paper"}])
def test_contract_of_other_proxies(options: dict[str, str]) -> None:
    check_method(SP, **QUICK, **options)


@pytest.mark.slow
def test_contract_in_two_processes() -> None:
    check_method(SP, distributed=True, **QUICK)


def test_a_step_is_one_update_with_the_gradients_of_three_passes() -> None:
    method, task = prepare(momentum=0.0, weight_decay=0.0, lr=0.1)
    task.model.train()
    images, labels = next(iter(sample_data().batches("train", 32)))
    state = task.rng.get_state()
    random = method.mask([random_widths(choices, task.rng) for choices in method.choices], task)
    smallest = method.mask(method.smallest, task)
    assert not torch.equal(random, smallest)
    net = SuperNet(task.graph, (model := network().train()), method.stages)
    features, outputs = net.run_full(images)
    loss = nn.functional.cross_entropy(outputs, labels)
    for mask in (random, smallest):
        for number in range(len(method.stages)):
            loss = loss + net.distance(number, features[number], features[number + 1], mask)
    loss.backward()
    expected = {n: p.detach() - 0.1 * p.grad for n, p in model.named_parameters() if p.grad is not None}
    adaptors = [a.weight.detach() - 0.1 * a.weight.grad for a in net.adaptors]  # type: ignore[operator]
    task.rng.set_state(state)
    metrics = method.step(task, images, labels)
    found = dict(task.model.named_parameters())
    assert expected.keys() == {name for name, parameter in found.items() if parameter.requires_grad}
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6), name
    for own, value in zip(method.net.adaptors, adaptors, strict=True):
        assert torch.allclose(own.weight, value, atol=1e-6)  # type: ignore[arg-type]
    assert float(metrics["smallest_loss"]) > 0
    buffers = dict(task.model.named_buffers())
    assert all(torch.allclose(buffers[name], buffer, atol=1e-6) for name, buffer in model.named_buffers())


def test_widths_are_31_fractions_within_the_limits() -> None:
    method, task = prepare()
    pairs = zip(sum(method.groups, ()), sum(method.choices, ()), strict=True)
    by_size = {task.graph.groups[g].size: widths for g, widths in pairs}
    assert len(by_size[128]) == 31
    assert by_size[128][:3] == (12, 16, 20)
    assert by_size[128][-1] == 128
    method, task = prepare(limits=Limits(round_to=8, keep_ratios={"block.0": (0.25, 0.75)}))
    for groups, choices in zip(method.groups, method.choices, strict=True):
        for g, widths in zip(groups, choices, strict=True):
            allowed = task.limits.widths(task.graph)[g]
            assert all(width in allowed for width in widths)
    smallest = method.mask(method.smallest, task)
    block = next(group for group in task.graph.groups if "block.0" in group.producers)
    assert int(smallest[block.units].sum()) == 32


def test_options_restrict_the_prunable_channels() -> None:
    inside, task = prepare("flops=0.7", groups="interior")
    streams = [group.units for group in task.graph.groups if group.kind == "stream"]
    assert streams
    assert not any(bool(inside.prunable_units[units].any()) for units in streams)
    kept, task = prepare(last_features=False)
    last = next(group for group in task.graph.groups if "classifier" in group.consumers)
    assert not bool(kept.prunable_units[last.units].any())
    assert bool(prepare()[0].prunable_units[last.units].all())


def test_options_follow_the_variant() -> None:
    ours, papers = (SP(configure(SP, options)).config for options in ({}, {"variant": "paper"}))
    assert (ours.adaptor, ours.proxy, ours.schedule) == ("closed_form", "mse", "cosine")
    assert (papers.adaptor, papers.proxy, papers.schedule) == ("trained", "channel", "milestones")
    assert papers.milestones == (0.2, 0.4, 0.6, 0.8)
    options = {"variant": "paper", "adaptor": "closed_form", "proxy": "fisher", "schedule": "cosine"}
    given = SP(configure(SP, options)).config
    assert (given.adaptor, given.proxy, given.schedule) == ("closed_form", "fisher", "cosine")
    assert SP(configure(SP, {"milestones": [30, 60]})).config.schedule == "milestones"
    assert SP(configure(SP, {"milestones": [0.2, 0.4, 0.6, 0.8]})).config.schedule == "milestones"  # typed
    assert SP().config.resolve() == SP().config
    everything = {f.name: getattr(SPConfig(), f.name) for f in dataclasses.fields(SPConfig)}  # as command lines do
    assert SP(configure(SP, {**everything, "variant": "paper"})).config == papers
    with pytest.raises(ValueError, match="relative: losses of the proxy 'fisher' have one unit already"):
        configure(SP, {"proxy": "fisher", "relative": True})


def test_adaptors_start_as_the_identity_or_random() -> None:
    method, task = prepare()
    images = next(iter(sample_data().batches("train", 16)))[0]
    everything = torch.ones(task.graph.num_units, dtype=torch.bool)
    for start, net in (("identity", method.net), ("random", prepare(variant="paper")[0].net)):
        features = net.features(images)
        with torch.no_grad():
            losses = [float(net.distance(n, features[n], features[n + 1], everything)) for n in range(len(net.stages))]
        assert (max(losses) < 1e-9) == (start == "identity"), losses


@pytest.mark.slow
@pytest.mark.parametrize("proxy", ["channel", "fisher", "network"])
def test_every_proxy_searches_and_goes_on_where_it_was(proxy: str) -> None:
    """A search by two workers, and one without workers that is stopped and goes on, find the same plan."""
    method, task = prepare(proxy=proxy, workers=2)
    plan = run_search(method, task).plan(task)
    assert 0.48 < float(task.budget.cost(task.graph, plan.mask) / task.budget.cost(task.graph)) <= 0.5
    halved, other = prepare(proxy=proxy)
    *_, rounds = halved.phases(other)
    assert isinstance(rounds, Rounds)
    rounds.round()
    assert not halved.search.finished
    resumed, again = prepare(proxy=proxy)
    resumed.load_state_dict(halved.state_dict())
    assert torch.equal(run_search(resumed, again).plan(again).mask, plan.mask)


def stage_data(*, channels_last: bool = False) -> tuple[list[StageData], list[Query]]:
    method, task = prepare()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    task.model.to(memory_format=layout)
    features = method.net.features(next(iter(sample_data().batches("train", 16)))[0].contiguous(memory_format=layout))
    assert not channels_last or not features[0].is_contiguous()
    data = make_stage_data([part.slices for part in method.net.parts], features)
    generator = torch.Generator().manual_seed(0)
    queries: list[Query] = []
    for number, part in enumerate(method.net.parts):
        for _ in range(10):
            choices = [c if n == number else [] for n, c in enumerate(method.choices)]
            widths = [tuple(w[int(torch.randint(len(w), (), generator=generator))] for w in c) for c in choices]
            widths = [w or tuple(c[-1] for c in own) for w, own in zip(widths, method.choices, strict=True)]
            queries.append((number, part.own_mask(method.mask(widths, task))))
    return data, queries


def pool(workers: int) -> Executor:
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "channels_last"), [("float32", False), ("bf16", True), ("bf16", False)])
def test_processes_measure_the_same_losses_and_may_die(tmp_path: Path, precision: str, channels_last: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        check_processes(tmp_path, channels_last=channels_last)


def check_processes(tmp_path: Path, *, channels_last: bool) -> None:
    data, queries = stage_data(channels_last=channels_last)
    expected = LocalLosses(data, Distributed())(queries)
    assert len(set(expected)) == len(expected)
    executors: list[Executor] = []

    def start() -> Executor:
        executors.append(pool(2))
        return executors[-1]

    losses = ExecutorLosses(data, tmp_path, start)
    try:
        assert losses(queries) == expected
        for process in executors[0]._processes:  # type: ignore[attr-defined]
            os.kill(process, signal.SIGKILL)  # all of them: a survivor might measure everything before the pool notices
        assert losses(queries) == expected
        assert len(executors) == 2
    finally:
        losses.close()


def test_features_are_stored_once_and_layouts_are_saved(tmp_path: Path) -> None:
    data, _ = stage_data()
    for stage, following in pairwise(data):
        assert stage.target.data_ptr() == following.features.data_ptr()
    saved = SavedStage.save(data[0], tmp_path / "stage.safetensors")
    assert {"features", "target"} <= set(saved.channels_last)
    loaded = saved.load()
    assert loaded.features.stride() == data[0].features.stride()
    assert loaded.target.stride() == data[0].target.stride()
    whole, again = state_of(data[0].networks.model), state_of(loaded.networks.model)
    assert all(again[name].stride() == tensor.stride() for name, tensor in whole.items() if tensor.dim() == 4)


class Dying(ThreadPoolExecutor):
    """An executor whose process dies after some tasks."""

    def __init__(self, tasks: int) -> None:
        super().__init__(1)
        self.left = tasks

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise BrokenExecutor("dead")
        return super().submit(fn, *args, **kwargs)


def test_only_lost_tasks_are_repeated_after_a_process_dies(tmp_path: Path) -> None:
    data, queries = stage_data()
    lives = iter([2, 1, 100])
    losses = ExecutorLosses(data, tmp_path, lambda: Dying(next(lives)))
    assert losses(queries) == LocalLosses(data, Distributed())(queries)
    hopeless = ExecutorLosses(data, tmp_path, lambda: Dying(0))
    with pytest.raises(BrokenExecutor, match="dead"):
        hopeless(queries)


@pytest.mark.slow
def test_a_budget_below_the_smallest_widths() -> None:
    """One channel in each group costs less than a tenth of all its channels."""
    method, task = prepare("flops=0.02")
    smallest = method.mask(method.smallest, task)
    plan = run_search(method, task).plan(task)
    assert float(task.budget.cost(task.graph, smallest)) > task.budget.limit(task.graph)
    assert float(task.budget.cost(task.graph, plan.mask)) <= task.budget.limit(task.graph)


@pytest.mark.slow
def test_the_plan_does_not_depend_on_the_number_of_processes() -> None:
    masks = []
    for workers in (0, 1, 4):
        method, task = prepare(workers=workers)
        masks.append(run_search(method, task).plan(task).mask)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_the_search_uses_the_features_of_the_full_network() -> None:
    method, task = prepare(adaptor="trained")
    run_search(method, task)
    assert method.search.finished
    best = method.search.best
    features = method.net.features(task.data.held_out_batch(16)[0])  # type: ignore[union-attr]
    mask = method.mask(best, task)
    total = 0.0
    with torch.no_grad():
        for number in range(len(method.stages)):
            total += float(method.net.distance(number, features[number], features[number + 1], mask))
    assert total == pytest.approx(min(result.loss for result in method.search.passes), rel=1e-5)


def test_relative_losses_are_divided_by_the_variance() -> None:
    losses = {}
    for relative in (False, True):
        method, task = prepare(relative=relative, adaptor="trained")
        with ExitStack() as stack:
            method.measure = method.make_measure(task, stack)
            losses[relative] = method.losses(task, list(enumerate(method.smallest)))
    assert task.data is not None
    features = method.net.features(task.data.held_out_batch(method.config.images)[0])[1:]
    for raw, part, y in zip(losses[False], losses[True], features, strict=True):
        spread = np.mean([np.var(y[:, c].numpy(), ddof=1) for c in range(y.shape[1])])
        assert part == pytest.approx(raw / spread, rel=1e-5)
        assert abs(spread - 1) > 0.1
    for parameter in task.model.parameters():
        nn.init.zeros_(parameter)
    with ExitStack() as stack, pytest.raises(ValueError, match=r"stage '.*' have variance 0, .* give relative false"):
        method.make_measure(task, stack)


def test_infeasible_tasks_are_refused() -> None:
    with pytest.raises(BudgetError, match="remains"):
        prepare("params=0.002")
    with pytest.raises(ValueError, match="stages 'nowhere': no point"):
        prepare(stages=("nowhere",))
    with pytest.raises(ValueError, match=r"closed_form.* pixels of 2 held-out images"):
        prepare(images=2)
    _, task = prepare()
    task.distributed = Distributed(0, 2)
    with pytest.raises(ValueError, match="give workers 0"):
        SP(configure(SP, {**QUICK, "workers": 2})).setup(task)


def test_prune_with_sp() -> None:
    example = torch.zeros(1, 3, 16, 16)
    result = fp.prune(network(), example, method="sp", budget="flops=0.6", data=sample_data(), **QUICK)
    search = result.metrics["search"]
    assert search["measured"] > 0
    assert result.plan.macs[1] <= 0.6 * result.plan.macs[0]
    assert all(list(kept) == list(range(len(kept))) for kept in result.plan.keep.values())  # the first of each group
