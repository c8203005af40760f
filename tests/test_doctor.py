"""The doctor: what it finds on this machine, and planted conflicts."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from rexdeploy.backends.doctor import doctor
from tests.helpers import run_cli, run_python

DOCTOR = "from rexdeploy.cli import main; main()"


def _plant(folder: Path, package: str, version: str) -> None:
    """The metadata of a package, as pip would leave it."""
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def test_it_reports_the_installed_versions() -> None:
    findings = {finding.item: finding for finding in doctor()}
    assert findings["torch"].detail == metadata.version("torch")
    for finding in findings.values():
        if finding.status == "missing" and finding.item != "NVIDIA GPU":
            assert finding.fix.startswith("pip install 'rexdeploy["), finding
            assert finding.detail.startswith("for "), finding


def test_both_onnxruntimes_at_once_are_a_conflict_with_a_way_out(tmp_path: Path) -> None:
    for package in ("onnxruntime", "onnxruntime-gpu"):
        _plant(tmp_path, package, "1.30.0")
    env = {"PYTHONPATH": str(tmp_path)}
    answer = run_python(
        DOCTOR.replace("main()", "import sys; sys.argv.append('doctor'); main()"), env=env
    )
    assert answer.returncode == 2
    assert "onnxruntime + onnxruntime-gpu: both are installed into one folder" in answer.stderr
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install" in answer.stderr


@pytest.mark.parametrize(("package", "version"), [("onnx", "1.10.0"), ("torch", "1.13.1")])
def test_a_version_that_does_not_fit_is_a_conflict(
    package: str, version: str, tmp_path: Path
) -> None:
    _plant(tmp_path, package, version)
    code = (
        "from rexdeploy.backends.doctor import _packages\n"
        "print([(f.item, f.detail, f.fix) for f in _packages() if f.status == 'conflict'])"
    )
    answer = run_python(code, env={"PYTHONPATH": str(tmp_path)})
    assert f"('{package}', 'got {version}, expected >=" in answer.stdout, answer.stderr
    assert "--upgrade" in answer.stdout


def test_json_has_every_finding(tmp_path: Path) -> None:
    result = run_cli("doctor", "--json", "-", cwd=tmp_path)
    items = [finding["item"] for finding in json.loads(result.out)]
    assert {"python", "torch", "onnx", "onnxruntime", "tensorrt-rtx", "NVIDIA GPU"} <= set(items)
