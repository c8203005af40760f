#!/usr/bin/env bash
# Writes artifacts/benchmarks/gpu-*.json on a machine with an NVIDIA GPU: whether its engines load
# and agree, then FP16 latencies of aligned and plain networks at batch 1 and 64. Expects an
# environment with the extras gpu and rtx or tensorrt (README), as $VENV or on the path.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="${VENV:+$VENV/bin:}$PATH"
out=$root/artifacts/benchmarks
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

networks=()
for width in 1.0 1.5; do
    for align in auto off; do
        network=$work/rexnet_$width-$align
        rexdeploy export --width "$width" --align "$align" --name "${network##*/}" --out "$work" -q
        rexdeploy build-trt "$network" --fp16 --batch 1:64:64 --quiet
        # An engine that does not run here is 'skipped' in the file, with TensorRT's own reason.
        rexdeploy verify "$network" --quiet --json "$out/gpu-verify-${network##*/}.json" || true
        networks+=("$network")
    done
done
rexdeploy bench "${networks[@]}" --fp16 --batch 1,64 --rounds "${ROUNDS:-50}" \
    --backend pytorch-cuda --backend pytorch-cuda-compile --backend onnxruntime-cuda \
    --backend tensorrt --backend tensorrt-rtx \
    --json "$out/gpu-fp16.json" --plot "$out/gpu-fp16.svg"
