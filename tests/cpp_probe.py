"""The probe of the C++ runtime (cpp/tests/probe.cpp), built once for every test that asks."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest

from tests.helpers import ROOT


@functools.cache
def _build() -> tuple[int, str]:
    script = ROOT / "scripts" / "cpp_build.sh"
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def probe(
    command: str,
    calls: Sequence[Sequence[str | Path]],
    build: Literal["release", "sanitized"] = "release",
) -> list[str]:
    """One line for each call; skips where it cannot be built.

    A crash or a sanitizer's report fails the test.
    """
    code, said = _build()
    if code == 3:
        pytest.skip(said.strip())
    assert code == 0, said
    arguments = [argument for call in calls for argument in call]
    done = subprocess.run(
        [ROOT / "cpp" / "build" / build / "rexdeploy-probe", command, *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.split("\n")[:-1]  # texts may hold other line breaks
    assert len(lines) == len(calls)
    return lines
