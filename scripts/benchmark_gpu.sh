#!/usr/bin/env bash
# Writes artifacts/benchmarks/gpu-*.json on a machine with an NVIDIA GPU: what TensorRT-RTX says of
# each engine, whether all files agree, then FP16 latencies of aligned and plain networks at batch 1
# and 64. Expects an environment with the extras gpu and rtx or tensorrt (docs/install.md), as $VENV or on
# the path. It stops at the first file that is wrong (exit code 3), before anything is timed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="${VENV:+$VENV/bin:}$PATH"
out=${OUT:-$root/artifacts/benchmarks}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

networks=()
for width in 1.0 1.5; do
    for align in auto off; do
        network=$work/rexnet_$width-$align
        name=${network##*/}
        rexdeploy export --width "$width" --align "$align" --name "$name" --out "$work" --quiet
        rexdeploy build-trt "$network" --fp16 --batch 1:64:64 --quiet
        for engine in "$network"/*.engine; do
            # For TensorRT-RTX: what get_engine_validity says of it on this GPU.
            rexdeploy inspect "$engine" --quiet --json "$out/gpu-inspect-$name.json"
        done
        # An engine that is for another machine is 'skipped' in the file, with the reason.
        rexdeploy verify "$network" --quiet --json "$out/gpu-verify-$name.json"
        networks+=("$network")
    done
done
rexdeploy bench "${networks[@]}" --fp16 --batch 1,64 --rounds "${ROUNDS:-50}" \
    --backend pytorch-cuda --backend pytorch-cuda-compile --backend onnxruntime-cuda \
    --backend tensorrt --backend tensorrt-rtx \
    --json "$out/gpu-fp16.json" --plot "$out/gpu-fp16.svg"
