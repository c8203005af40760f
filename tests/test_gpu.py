"""Finding the GPU: what nvidia-smi prints on odd machines, and machines without one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rexdeploy import machine


def _nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvidia-smi of that name on the PATH, and no cuda-bindings to ask first."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("NVIDIA GB10, 12.1, 580.95.05", "sm121"),
        ("NVIDIA A100-SXM4-80GB, 8.0, 550.54.15", "sm80"),
        ("Odd, Name, 8.9, 1.0", "sm89"),
    ],
)
def test_what_nvidia_smi_prints_is_read(
    line: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _nvidia_smi(tmp_path, f"echo '{line}'", monkeypatch)
    found = machine.detect()
    assert found is not None
    assert found.target == target
    assert line.startswith(found.name)


@pytest.mark.parametrize("script", ["exit 9", "echo No devices were found", "true"])
def test_no_answer_means_no_gpu(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _nvidia_smi(tmp_path, script, monkeypatch)
    assert machine.detect() is None
