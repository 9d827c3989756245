"""How fast the search steps of DMC and DDNP are: the same as ``fastprune bench search``,
where jsonargparse is not installed.

python bench/bench_search.py [--device cpu|cuda] [--json FILE] [--quick] [--seconds SECONDS]
"""

from fastprune.bench.run import main

if __name__ == "__main__":
    main("search")
