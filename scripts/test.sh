#!/usr/bin/env bash
# Lint, types and all tests, in an environment of its own and in two processes. Arguments go to
# pytest (`-n 0`: one process). Says what of the C++ runtime is left out on this machine;
# TENSORRT_INCLUDE_DIR=... builds its TensorRT part too.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
ruff check .
ruff format --check .
mypy
./scripts/cpp_build.sh || [ $? -eq 3 ] # 3: cannot be built here; then its tests are skipped
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
