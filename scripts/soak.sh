#!/usr/bin/env bash
# Loads `rexdeploy serve` for long while versions are deployed, its processes are killed and stopped,
# the disk is full and bodies are too large; exit code 1 if an answer is wrong or a request is lost
# for no reason. Writes artifacts/limits/soak.json. REQUESTS=N (default 100000).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python "$root/scripts/soak.py" --requests "${REQUESTS:-100000}" \
    --out "${OUT:-$root/artifacts/limits/soak.json}" "$@"
