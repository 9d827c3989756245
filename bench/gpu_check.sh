#!/usr/bin/env bash
# Build fastprune on a CUDA machine without a network connection, test it and time it:
#
#     bench/gpu_check.sh OUTDIR
#
# Needs nvcc, a CUDA build of torch, pybind11, scikit-build-core, cmake, ninja, pytest and hypothesis. Leaves gpu_check.log
# and <device>.json (a document per kernel) in OUTDIR; exits with the number of failed steps. Takes under 9 minutes: no
# step gets more than the rest of this time.
set -uo pipefail

out=$(mkdir -p "${1:?usage: bench/gpu_check.sh OUTDIR}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
exec > >(tee "$out/gpu_check.log") 2>&1

# PYTHONSAFEPATH: otherwise `python -m pytest` finds ./fastprune, which has no _C, before the installed package.
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
deadline=$((SECONDS + 520))
failed=0

step() { # step NAME SECONDS COMMAND...: run the command for at most SECONDS, and count a failure
    local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS code
    shift 2
    echo "=== $name: $*"
    if ((left < 5)); then
        echo "=== $name: SKIPPED, out of time"
        failed=$((failed + 1))
        return
    fi
    timeout --kill-after=10 "$((limit < left ? limit : left))" "$@"
    code=$?
    if ((code == 0)); then
        echo "=== $name: ok, $((SECONDS - start)) s"
    else
        echo "=== $name: FAILED ($code), $((SECONDS - start)) s"
        failed=$((failed + 1))
    fi
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
step build 180 env FASTPRUNE_CUDA=ON "$python" -m pip install -v --no-index --no-build-isolation --no-deps \
    --target "$work/site" .
step doctor 60 "$python" -c "from fastprune import _C; print(_C.build_info()); assert _C.cuda_available()"
step tests 200 "$python" -m pytest -m gpu -q -p no:cacheprovider tests/ops

# Sizes that fit in shared memory and sizes that do not. Without torch's caching allocator every tensor has its own bounds.
selection="test_values_of_every_size and (normal or ties) and (33 or 2049 or 16385)"
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
for tool in memcheck racecheck; do
    step "$tool" 80 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 \
        "$python" -m pytest -m gpu -q -p no:cacheprovider tests/ops/test_topk_mask.py -k "$selection"
done

# One dtype of each other kernel; for group_prox units of one element, of runs, of columns and for many blocks.
others="test_values_of_every_layout and (shape1- or shape3- or shape8- or shape9- or shape10-)"
others+=" or test_masked_act and test_values and dtype0 or test_values_are_rounded_once and dtype0"
others+=" or test_same_bits_everywhere and (5-dtype0 or 40001-dtype0)"
for tool in memcheck racecheck; do
    step "others_$tool" 30 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 \
        "$python" -m pytest -m gpu -q -p no:cacheprovider tests/ops/test_group_prox.py tests/ops/test_masked_act.py \
        tests/ops/test_channel_moments.py tests/ops/test_bernoulli_gate.py tests/ops/test_gumbel_gate.py -k "$others"
done

# Every fused convolution, if the build has them, on the cases of one seed.
step fused_conv_memcheck 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck --error-exitcode 9 \
    "$python" -m pytest -m gpu -q -p no:cacheprovider tests/ops/conv/test_fused_cuda.py -k "test_values and seed0"

# Benchmarks share the remaining time. Each begins no case after half of its share and names the cases left out; the
# other half is for the case that runs then (torch.compile with max-autotune is slow). search also measures memory, and
# fails if a search step under autocast disagrees with plain PyTorch's.
benches=(align gates group_prox masked_bn_act masked_conv_bn_act search step subnets topk_mask)
for index in "${!benches[@]}"; do
    name=${benches[index]}
    case $name in
        align | subnets) program=("bench/$name.py") ;;
        *) program=(-m fastprune.bench "$name") ;;
    esac
    share=$(((deadline - 15 - SECONDS) / (${#benches[@]} - index)))
    step "$name" "$share" "$python" "${program[@]}" --device cuda --seconds "$((share > 2 ? share / 2 : 1))" \
        --compile_seconds "$((share > 4 ? share / 4 : 1))" --json "$work/bench_$name.json"
done

step report 60 "$python" - "$work" "$out" <<'PYTHON'
import json, re, sys
from pathlib import Path
import torch

work, out = map(Path, sys.argv[1:])
device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
results = {
    path.stem.removeprefix("bench_"): json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(work.glob("bench_*.json"))
}
(out / f"{device}.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
print(out / f"{device}.json")
PYTHON

echo "=== $failed step(s) failed"
exit "$failed"
