#!/usr/bin/env bash
# Puts the headers of CUTLASS, which the nvidia-cutlass wheel carries, into a folder and prints where a build finds them:
#
#     FASTPRUNE_CUTLASS_DIR=$(bench/cutlass_headers.sh FOLDER) pip install .
#
# needs python3 with pip, and a network unless the headers are there already.
set -euo pipefail

folder=$(mkdir -p "${1:?usage: bench/cutlass_headers.sh FOLDER}" && cd "$1" && pwd)
headers=$folder/cutlass_library/source
if [ ! -f "$headers/include/cutlass/version.h" ]; then
    python3 -m pip download --quiet --no-deps --dest "$folder" nvidia-cutlass==4.2.0.0 >&2
    python3 -m zipfile --extract "$folder"/nvidia_cutlass-4.2.0.0-*.whl "$folder"
fi
echo "$headers"
