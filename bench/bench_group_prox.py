"""How fast group_prox is: ``fastprune bench kernels --only group_prox``, where jsonargparse is not installed.

python bench/bench_group_prox.py [--device cpu|cuda] [--json FILE] [--quick] [--seconds SECONDS]
"""

from fastprune.bench.run import main

if __name__ == "__main__":
    main("group_prox")
