#!/usr/bin/env bash
# The oldest version of everything that pyproject.toml allows, in an environment of its own, and the
# core of the tests in it: export, build-trt, verify, predict, load, bundles, signatures.
# Usage: scripts/lowest_versions.sh [FOLDER] (the environment, 7 GB; without one, a temporary folder
# that is removed at the end). $PYTHON is the Python that makes it; give the oldest, 3.10.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${1:-$(mktemp -d)}
[ $# -gt 0 ] || trap 'rm -rf "$venv"' EXIT

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
python=$venv/bin/python
# "name>=1.2" becomes "name==1.2" for pip, so a floor must be a version that exists.
# What those need in turn is the newest that fits, as `uv --resolution lowest-direct` has it.
"$python" - "$root/pyproject.toml" >"$venv/oldest.txt" <<'PYTHON'
import re
import sys

for name, version in re.findall(
    r'"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)"', open(sys.argv[1]).read().split("[project.scripts]")[0]
):
    if name not in ("setuptools", "nvidia-pytriton", "onnxruntime-gpu", "tensorrt"):
        print(f"{name}=={version}")
PYTHON
cat "$venv/oldest.txt"
"$python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$venv/oldest.txt" --editable "$root[cpu,rtx,dev]"
"$python" -m pip list --disable-pip-version-check --format freeze |
    grep -iE "^($(sed 's/=.*//' "$venv/oldest.txt" | paste -sd '|'))="
export PATH="$venv/bin:$PATH"
cd "$root"
python -m pytest -q tests/test_manifest.py tests/test_bundle.py tests/test_checkpoints.py \
    tests/test_export.py tests/test_build.py tests/test_classify.py tests/test_images.py \
    tests/test_layer_types.py tests/test_signing.py tests/test_precision.py
# And what README shows, as a user would type it.
folder=$(mktemp -d "$venv/artifacts.XXXX")
photo=$(python -c 'import sklearn.datasets as d; print(*d.__path__)')/images/flower.jpg
cd "$folder"
rexdeploy export --width 0.5 --image-size 64
rexdeploy build-trt --fp16
rexdeploy verify | tee verify.txt
! grep "not walked" verify.txt # its blocks were not found: no verdict depends on it
rexdeploy predict "$photo"
