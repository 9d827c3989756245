"""What SANP adds to a step of training: the same as ``fastprune bench align``,
where jsonargparse is not installed.

python bench/bench_align.py [--device cpu|cuda] [--json FILE] [--quick] [--seconds SECONDS]
"""

from fastprune.bench.run import main

if __name__ == "__main__":
    main("align")
