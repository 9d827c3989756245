"""The number of sub-networks that SP's search measures, and the number that the literal algorithm would measure.

The losses are invented (they fall as widths grow, at a rate of its own for each group), so nothing is trained.

    python bench/memoising.py [--model resnet56] [--input 3x32x32] [--budget flops=0.5]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
import torch

from fastprune.data import load_data
from fastprune.engine import HeldOut, Placement
from fastprune.graph import trace
from fastprune.host.distributed import Distributed
from fastprune.methods.contract import Task
from fastprune.methods.registry import configure
from fastprune.methods.sp.sp import SP
from fastprune.methods.sp.widths import Widths
from fastprune.models import create
from fastprune.planning.budget import Budget
from fastprune.planning.limits import Limits


def main() -> None:
    """Run the search and print both numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--input", default="3x32x32")
    parser.add_argument("--budget", default="flops=0.5")
    arguments = parser.parse_args()

    data = load_data(f"synthetic:{arguments.input}:10:4000", held_out=0.1)
    model = create(arguments.model, num_classes=10).eval()
    graph = trace(model, torch.zeros(1, *data.shape))
    held_out = HeldOut(data, Placement(), Distributed())
    task = Task(model, graph, Budget.parse(arguments.budget), Limits(), data=held_out, rng=torch.Generator())
    method = SP(configure(SP, {}))
    method.setup(task)
    rng = np.random.default_rng(0)
    full = [np.array([widths[-1] for widths in choices]) for choices in method.choices]
    rates = [rng.random(len(widths)) for widths in full]

    def losses(queries: Sequence[tuple[int, Widths]]) -> list[float]:
        return [float((rates[stage] * (1 - np.array(widths) / full[stage]) ** 2).sum()) for stage, widths in queries]

    search = method.search
    search.measure = losses
    begin = time.perf_counter()
    while not search.finished:
        search.run_round()
    found = search.metrics()
    print(f"{found['measured']:,.0f} measured, {found['measured_literally']:,.0f} by the literal algorithm")
    print(f"{found['measured_literally'] / found['measured']:.1f} times as many")
    print(f"{time.perf_counter() - begin:.0f} s for everything but the measuring")


if __name__ == "__main__":
    main()
