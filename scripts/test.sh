#!/usr/bin/env bash
# Lint, types and all tests, in an environment of its own. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
ruff check .
ruff format --check .
mypy
python -m pytest "$@"
