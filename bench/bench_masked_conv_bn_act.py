"""How fast masked_conv_bn_act is: the same as ``fastprune bench kernels --only masked_conv_bn_act``,
where jsonargparse is not installed.

python bench/bench_masked_conv_bn_act.py [--device cpu|cuda] [--json FILE] [--quick] [--seconds SECONDS]
"""

from fastprune.bench.run import main

if __name__ == "__main__":
    main("masked_conv_bn_act")
