"""How fast masked_bn_act is: ``fastprune bench kernels --only masked_bn_act``, where jsonargparse is not installed.

python bench/bench_masked_bn_act.py [--device cpu|cuda] [--json FILE] [--quick] [--seconds SECONDS]
"""

from fastprune.bench.run import main

if __name__ == "__main__":
    main("masked_bn_act")
