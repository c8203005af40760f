#!/usr/bin/env bash
# From a clone to a verified engine and a prediction. Usage: scripts/quickstart.sh [FOLDER]
# (bundles go to FOLDER/artifacts; FOLDER is the clone unless given).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "${1:-$root}"

# A real photograph, which scikit-learn ships.
photo=$(python -c 'import sklearn.datasets as d; print(*d.__path__)')/images/flower.jpg

set -x
rexdeploy export --width 1.5
rexdeploy build-trt --fp16
rexdeploy verify
rexdeploy predict "$photo"
