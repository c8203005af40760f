#!/usr/bin/env bash
# Fuzzes everything that reads files of strangers, in Python and (under the sanitizers) in C++, for
# MINUTES in all, and leaves the inputs that fall in FOLDER (fuzz-found). Python's by atheris, which
# follows the code that is reached, where it is installed (pip install atheris); else, as C++'s, by
# damage to the structure and to bytes. Exit code 1: something fell.
set -euo pipefail
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: scripts/fuzz.sh MINUTES [FOLDER]" >&2
    exit 2
fi
minutes=$1
found=$(realpath -m "${2:-fuzz-found}")
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
targets="manifest graph engine labels weights image cpp-manifest cpp-image"
seconds=$((minutes * 60 / $(wc -w <<<"$targets")))
fallen=0
for target in $targets; do
    program=(-m tests.fuzz_targets)
    if [[ $target != cpp-* ]] && python -c "import atheris" 2>/dev/null; then
        program=(scripts/fuzz_atheris.py)
    fi
    echo "$target: $seconds s"
    PYTHONPATH=$root python "${program[@]}" "$target" "$seconds" "$found" || fallen=1
done
exit $fallen
