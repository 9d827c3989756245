#!/usr/bin/env bash
# Install fastprune on a CUDA machine without a network connection, then test it or time it:
#
#     bench/gpu_check.sh tests OUTDIR            # at most 280 seconds
#     bench/gpu_check.sh speed OUTDIR            # at most 420 seconds
#     bench/gpu_check.sh triton OUTDIR           # at most 240 seconds
#
# The wheels come from wheelhouse/ (made by bench/gpu_wheelhouse.sh) if they were built from these sources. Otherwise the
# package is built here, without CUTLASS's kernels, which needs nvcc, pybind11, scikit-build-core, cmake and ninja.
# Leaves a log and a JSON document of that name in OUTDIR; exits with the number of failed steps.
# DEVICE=cpu tries the script out on a machine without a GPU.
set -uo pipefail

part=${1:?usage: bench/gpu_check.sh tests|speed|triton OUTDIR}
out=$(mkdir -p "${2:?usage: bench/gpu_check.sh tests|speed|triton OUTDIR}" && cd "$2" && pwd)
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
exec > >(tee "$out/$part.log") 2>&1

began=$SECONDS
python=${PYTHON:-python3} device=${DEVICE:-cuda} pip=(-m pip install --quiet --no-index --no-deps --target "$work/site")
if [[ -f wheelhouse/sources && $(<wheelhouse/sources) == "$(bench/sources.sh)" ]]; then
    "$python" "${pip[@]}" wheelhouse/*.whl || exit
    cp -r fastprune/. "$work/site/fastprune/" # Python files may be newer than the wheel
else
    echo "no wheel of these sources: the package is built here, without CUTLASS's kernels"
    FASTPRUNE_CUDA=$([[ $device == cpu ]] && echo AUTO || echo ON) "$python" "${pip[@]}" --no-build-isolation . || exit
    if compgen -G "wheelhouse/*.whl" >/dev/null; then
        find wheelhouse -name '*.whl' ! -name 'fastprune-*' -print0 | xargs -0 "$python" "${pip[@]}" || exit
    fi
fi

# PYTHONSAFEPATH: otherwise `python -m pytest` finds ./fastprune, which has no _C, before the installed package.
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
"$python" bench/gpu_steps.py "$part" --device "$device" --json "$out/$part.json" --used $((SECONDS - began))
