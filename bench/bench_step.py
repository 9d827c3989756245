"""How fast a step of gate training is: the same as ``fastprune bench step``,
where jsonargparse is not installed.

python bench/bench_step.py [--device cpu|cuda] [--json FILE] [--quick] [--seconds SECONDS]
"""

from fastprune.bench.run import main

if __name__ == "__main__":
    main("step")
