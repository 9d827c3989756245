#!/usr/bin/env bash
# Build what bench/gpu_check.sh installs on a GPU machine that has no network connection:
#
#     bench/gpu_wheelhouse.sh [FOLDER]           # by default wheelhouse
#
# Run it on Linux x86-64 with the Python version of that machine and a C library that is not newer than its own. PYTHON
# names the interpreter (python3), CUDAARCHS the GPUs (90-real). Takes ten minutes on two cores: CUTLASS's templates.
set -euo pipefail

cd "$(dirname "$0")/.."
folder=$(mkdir -p "${1:-wheelhouse}" && cd "${1:-wheelhouse}" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

rm -f "$folder"/*.whl "$folder/sources"
FASTPRUNE_CUTLASS_DIR=$(bench/cutlass_headers.sh "${CUTLASS:-$work}")
export FASTPRUNE_CUTLASS_DIR FASTPRUNE_CUDA=ON CUDAARCHS=${CUDAARCHS:-90-real}
"$python" -m pip wheel --no-deps --wheel-dir "$folder" .
# What a machine with torch, torchvision and pytest may lack.
"$python" -m pip download --quiet --no-deps --dest "$folder" \
    docstring-parser importlib-resources jsonargparse lazy_loader platformdirs typeshed-client
bench/sources.sh > "$folder/sources"
du -h "$folder"/*.whl
