#!/usr/bin/env bash
# Writes artifacts/benchmarks/cpu-*.json and their pictures: each network in every form on every CPU
# backend, torch.compile, and the published comparison tables. Some twenty minutes on two cores,
# which nothing else should use meanwhile. ROUNDS=N sets the rounds (default 10).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
out=$root/artifacts/benchmarks
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rounds=${ROUNDS:-10}

bench() { # NAME ARGUMENT...: one result and its picture
    rexdeploy bench "${@:2}" --rounds "$rounds" --json "$out/$1.json" --plot "$out/$1.svg"
}

for network in "1.0" "1.5" "1.0 --lite"; do
    # shellcheck disable=SC2086 - the network is a width and perhaps an option
    rexdeploy export --width $network --out "$work" --quiet
    forms=(--compare 8 --compare plain --compare published)
    name=rexnet_lite_${network% --lite}
    if [[ $network != *lite ]]; then
        name=rexnet_$network
        forms+=(--compare timm)
    fi
    bench "cpu-$name" "$work/$name" "${forms[@]}" --batch 1,16 --threads 1,2 \
        --backend onnxruntime --backend openvino --backend pytorch
done
bench cpu-compile "$work/rexnet_1.0" --threads 1 \
    --backend onnxruntime --backend pytorch --backend pytorch-compile
bench cpu-paper --table paper --threads 2 --backend onnxruntime --backend pytorch
