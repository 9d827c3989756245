"""The evaluations of SP's search: the same as ``fastprune bench subnets``, where jsonargparse is not installed.

python bench/bench_subnets.py [--device cpu|cuda] [--json FILE] [--quick] [--seconds SECONDS]
"""

from fastprune.bench.run import main

if __name__ == "__main__":
    main("subnets")
