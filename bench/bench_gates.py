"""How fast the stochastic gates are: the same as ``fastprune bench kernels --only gates``,
where jsonargparse is not installed.

python bench/bench_gates.py [--device cpu|cuda] [--json FILE] [--quick] [--seconds SECONDS]
"""

from fastprune.bench.run import main

if __name__ == "__main__":
    main("gates")
