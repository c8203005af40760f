#!/usr/bin/env bash
# Writes artifacts/benchmarks/alignment-cpu.json: each network as published, and with its channels
# padded to 8 and to 16, in ONNX Runtime on this machine's CPU. Some ten minutes on two cores.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for network in "1.0" "1.5" "1.0 --lite"; do
    for align in off 8 16; do
        name="rexnet-${network// --/-}-$align"
        # shellcheck disable=SC2086 - the network is a width and perhaps an option
        rexdeploy export --width $network --align "$align" --name "$name" --out "$work" --quiet
        bundles+=("$work/$name")
    done
done
rexdeploy bench "${bundles[@]}" --batch 1,16 --threads 1,2 --rounds "${ROUNDS:-20}" \
    --json "$root/artifacts/benchmarks/alignment-cpu.json"
