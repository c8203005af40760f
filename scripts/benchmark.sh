#!/usr/bin/env bash
# Writes artifacts/benchmarks/cpu-*.json and their pictures: each network in every form on every CPU
# backend at batch 1 and (cpu-*-batch16.json) 16, torch.compile, and the published comparison tables;
# then the figures in README and docs/. Some twenty minutes on two cores, which nothing else should
# use meanwhile. ROUNDS=N sets the rounds at batch 1 (default 30), ROUNDS16=N those at batch 16, where a
# round takes sixteen times as long (default 10); 6 is the least that gives an interval.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
out=$root/artifacts/benchmarks
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rounds=${ROUNDS:-30}
rounds16=${ROUNDS16:-10}
backends=(--backend onnxruntime --backend openvino --backend pytorch)

bench() { # NAME ARGUMENT...: one result and its picture
    rexdeploy bench "${@:2}" --json "$out/$1.json" --plot "$out/$1.svg"
}

for network in "1.0" "1.5" "1.0 --lite"; do
    # shellcheck disable=SC2086 - the network is a width and perhaps an option
    rexdeploy export --width $network --out "$work" --quiet
    forms=(--compare plain --compare published)
    name=rexnet_lite_${network% --lite}
    if [[ $network != *lite ]]; then
        name=rexnet_$network
        forms+=(--compare timm)
    fi
    bench "cpu-$name" "$work/$name" "${forms[@]}" --compare 8 "${backends[@]}" \
        --batch 1 --threads 1,2 --rounds "$rounds"
    bench "cpu-$name-batch16" "$work/$name" "${forms[@]}" "${backends[@]}" \
        --batch 16 --threads 1,2 --rounds "$rounds16"
done
bench cpu-compile "$work/rexnet_1.0" --threads 1 --rounds "$rounds" \
    --backend onnxruntime --backend pytorch --backend pytorch-compile
bench cpu-paper --table paper --threads 2 --rounds "$rounds" \
    --backend onnxruntime --backend pytorch
python "$root/scripts/readme_figures.py"
