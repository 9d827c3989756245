"""``python -m fastprune.bench NAME`` runs one benchmark on a machine that has little more than torch.

    python -m fastprune.bench topk_mask --device cuda --json numbers.json

``fastprune bench`` has the same benchmarks with more options.
"""

from __future__ import annotations

import sys

from fastprune.bench import KERNELS, SEARCH, STEP
from fastprune.bench.run import run_program

BENCHMARKS = {**KERNELS, **STEP, **SEARCH}


def main() -> None:
    """Run the benchmark that the first argument names."""
    name, *arguments = sys.argv[1:] or [""]
    if name not in BENCHMARKS:
        sys.exit(f"benchmark {name!r}: there is no such benchmark; give one of {', '.join(BENCHMARKS)}")
    run_program({name: BENCHMARKS[name]}, arguments)


if __name__ == "__main__":
    main()
