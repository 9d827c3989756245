#!/usr/bin/env bash
# Print a checksum of everything that fastprune._C is built from: bench/gpu_check.sh installs no wheel of other sources.
set -euo pipefail
cd "$(dirname "$0")/.."
find CMakeLists.txt pyproject.toml csrc -type f | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -d ' ' -f 1
