"""How fast topk_mask is: the same as ``fastprune bench kernels --only topk_mask``, where jsonargparse is not installed.

python bench/bench_topk_mask.py [--device cpu|cuda] [--json FILE] [--quick] [--seconds SECONDS]
"""

from fastprune.bench.run import main

if __name__ == "__main__":
    main("topk_mask")
