#!/usr/bin/env bash
# Lint, types and all tests, in an environment of its own and in two processes. Arguments go to
# pytest (`-n 0`: one process). Says what of the C++ runtime is left out on this machine;
# TENSORRT_INCLUDE_DIR=... builds its TensorRT part too.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
ruff check .
ruff format --check .
mypy & # the work of one core, beside the compilers
types=$!
./scripts/cpp_build.sh || [ $? -eq 3 ] # 3: cannot be built here; then its tests are skipped
wait $types
# What is freed is kept for the next tensor, up to 1 GB: Linux clears each page that it gives anew,
# a fifth of the time of a verification of large images.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
