# Sourced by the other scripts: a virtual environment (.venv, or $VENV) with rexdeploy in it.
# Installs only if pyproject.toml has changed since the last time.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
stamp=$venv/.rexdeploy-installed

if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: got $(python3 --version 2>&1), expected Python 3.10 or later as python3" >&2
    exit 2
fi
if [ ! -x "$venv/bin/python" ] && ! python3 -m venv "$venv"; then
    echo "error: python3 cannot make virtual environments; on Debian: apt install python3-venv" >&2
    exit 2
fi
if ! cmp -s "$root/pyproject.toml" "$stamp"; then
    echo "installing rexdeploy into $venv (torch and the rest: some minutes, 6 GB) ..."
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        -e "$root[cpu,rtx,dev]"
    # The extra "serve" without what it asks for its own Python API (an old numpy): the server that
    # is in it needs none of that. Where there is no such wheel, its tests are skipped.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
        nvidia-pytriton || echo "no Triton server for this platform: its tests will be skipped"
    cp "$root/pyproject.toml" "$stamp"
fi
export PATH="$venv/bin:$PATH"
