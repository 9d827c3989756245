#!/usr/bin/env bash
# Put CUTLASS's headers from the nvidia-cutlass wheel into a folder and print the path that a build needs:
#
#     FASTPRUNE_CUTLASS_DIR=$(bench/cutlass_headers.sh FOLDER) pip install .
#
# Needs python3 with pip, and a network connection unless the folder has the headers.
set -euo pipefail

folder=$(mkdir -p "${1:?usage: bench/cutlass_headers.sh FOLDER}" && cd "$1" && pwd)
headers=$folder/cutlass_library/source
if [ ! -f "$headers/include/cutlass/version.h" ]; then
    python3 -m pip download --quiet --no-deps --dest "$folder" nvidia-cutlass==4.2.0.0 >&2
    python3 -m zipfile --extract "$folder"/nvidia_cutlass-4.2.0.0-*.whl "$folder"
fi
echo "$headers"
