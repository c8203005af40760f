#!/usr/bin/env bash
# Fetches header-only packages that the C++ runtime is built with into FOLDER (default
# cpp/build/headers): ONNX Runtime's, nlohmann-json and doctest, from this machine's own Debian
# mirror, without root and without installing anything. Prints the folder to give to CMake.
# Nothing is fetched twice. CMake uses headers that are installed instead where it finds them.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$(realpath -m "${1:-$root/cpp/build/headers}")
suite=trixie # the first Debian release that has libonnxruntime-dev
packages=(libonnxruntime-dev nlohmann-json3-dev doctest-dev)
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

by_hand="install the headers of ONNX Runtime, nlohmann-json and doctest, or name their folders in \
the environment variables ONNXRUNTIME_INCLUDE_DIR and CMAKE_INCLUDE_PATH"

if [ -f "$folder/complete" ]; then
    echo "$folder/usr/include"
    exit
fi
if [ -e "$folder" ] && ! rmdir "$folder" 2>/dev/null; then
    echo "error: $folder holds something else: give a folder that is empty or not there" >&2
    exit 2
fi
mirror=
if command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then
    mirror=$(apt-get indextargets --format '$(REPO_URI)' "Label: Debian" 2>/dev/null | head -n 1)
fi
if [ -z "$mirror" ] || [ ! -f "$keyring" ]; then
    echo "error: this machine has no Debian mirror configured in apt: $by_hand" >&2
    exit 2
fi

mkdir -p "$(dirname "$folder")"
work=$(mktemp -d "$(dirname "$folder")/headers.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists/partial,cache/archives/partial,packages,tree}
echo "deb [signed-by=$keyring] $mirror $suite main" >"$work/sources.list"
options=(
    -qq
    -o "Dir::State=$work" -o "Dir::State::status=$work/status" -o "Dir::Cache=$work/cache"
    -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o APT::Sandbox::User= -o Acquire::Languages=none
)
: >"$work/status"
if ! log=$(cd "$work/packages" && apt-get "${options[@]}" update 2>&1 &&
    apt-get "${options[@]}" download "${packages[@]}" 2>&1); then
    echo "error: the Debian mirror does not give ${packages[*]} (${log##*$'\n'}): $by_hand" >&2
    exit 2
fi
for package in "$work"/packages/*.deb; do
    dpkg-deb -x "$package" "$work/tree"
done
touch "$work/tree/complete"
mv "$work/tree" "$folder"
echo "$folder/usr/include"
