#!/usr/bin/env bash
# Builds the C++ runtime twice, cpp/build/release and cpp/build/sanitized (AddressSanitizer and
# UndefinedBehaviorSanitizer), and prints what it was built with. Exit code 3: it cannot be built on
# this machine, and the line says why. TENSORRT_INCLUDE_DIR=... builds it with TensorRT.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$root/cpp/build

left_out() {
    echo "C++: left out: $1"
    exit 3
}

for tool in cmake c++ flock; do
    command -v "$tool" >/dev/null || left_out "$tool is not installed"
done
mkdir -p "$build"
exec 9>"$build/lock" # two test processes may want a build at once
flock 9
generator=$(command -v ninja >/dev/null && echo Ninja || echo "Unix Makefiles")

configure() { # FOLDER OPTION...
    cmake -S "$root/cpp" -B "$build/$1" -G "$generator" -DCMAKE_COMPILE_WARNING_AS_ERROR=ON \
        -DTENSORRT_INCLUDE_DIR="${TENSORRT_INCLUDE_DIR:-}" "${@:2}" 2>&1
}

both() {
    configure release && configure sanitized -DREXDEPLOY_SANITIZE=ON
}

if ! log=$(both) && grep -q cpp_headers.sh <<<"$log"; then # headers that are not installed
    fetched=$("$root/scripts/cpp_headers.sh" "$build/headers" 2>&1) || left_out "${fetched#error: }"
    log=$(both) || true
fi
if ! report=$(grep "^-- C++: " <<<"$log") || grep -q "^CMake Error" <<<"$log"; then
    reason=$(grep -io "could not find .*" <<<"$log") || {
        echo "$log" >&2
        exit 1
    }
    left_out "${reason%%$'\n'*}"
fi

build() { # FOLDER TARGET...
    cmake --build "$build/$1" --parallel "$(nproc)" --target "${@:2}" >"$build/$1.log" 2>&1 || {
        cat "$build/$1.log" >&2
        exit 1
    }
}

build release rexdeploy-run rexdeploy-bench rexdeploy-probe
build sanitized rexdeploy-run rexdeploy-probe rexdeploy-tests
echo "${report##*-- }"
