"""What is installed on this machine, what fits together, and what each missing piece would give."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from packaging.requirements import Requirement

from rexdeploy import machine
from rexdeploy.backends import tensorrt_api
from rexdeploy.errors import BackendUnavailable
from rexdeploy.progress import Result

Status = Literal["ok", "missing", "conflict"]
_PURPOSES = {
    "torch": "the reference network: export, verify",
    "onnx": "reading and writing graphs: export, build-trt, verify",
    "onnxscript": "torch's ONNX exporter: export",
    "onnxsim": "simplified graphs: export",
    "onnxruntime": "running graphs on a CPU: export, verify, predict",
    "onnxruntime-gpu": "running graphs on an NVIDIA GPU: verify, predict",
    "openvino": "running graphs on a CPU beside ONNX Runtime: verify, predict, bench",
    "timm": "training, and networks to compare with: finetune, bench --compare",
    "torchvision": "detectors, the reference's own code: export --task detect, verify",
    "matplotlib": "pictures: bench --plot",
    "pyarrow": "results for a table: predict --out FILE.parquet",
    "nvidia-pytriton": "a Triton server where there is no tritonserver: serve",
    "huggingface-hub": "--weights pretrained",
    "tensorrt-rtx": "engines for RTX GPUs, built on any machine: build-trt --flavor rtx",
    "tensorrt": "engines for the GPU in this machine: build-trt --flavor tensorrt",
    "cuda-bindings": "running engines: verify, predict",
}
_EXTRAS = {
    "export": "cpu", "cpu": "cpu", "gpu": "gpu", "rtx": "rtx", "tensorrt": "tensorrt",
    "openvino": "openvino", "bench": "bench", "train": "train", "detect": "detect",
    "parquet": "parquet", "serve": "serve",
}  # fmt: skip
"""Extras by the one to install: `export` comes with `cpu` and with `gpu`."""


@dataclass(frozen=True, repr=False)
class Finding(Result):
    """One thing that was looked at."""

    item: str
    status: Status
    detail: str
    fix: str  # a command, or empty

    def __repr__(self) -> str:
        return f"<Finding {self.item}: {self.status}, {self.detail}>"


def doctor() -> list[Finding]:
    """Everything that rexdeploy can use on this machine, in the order of a deployment.

    Example: `[one.fix for one in rexdeploy.doctor() if one.status == "missing"]`
    """
    findings = [
        Finding("python", "ok", f"{sys.version.split()[0]} at {sys.executable}", ""),
        *_packages(),
        _gpu(),
        *_flavors(),
    ]
    trtexec = shutil.which("trtexec")
    if trtexec:
        findings.append(Finding("trtexec", "ok", trtexec, ""))
    return findings


def _packages() -> list[Finding]:
    """Every package that an extra names, against the versions that the extra asks for."""
    wanted: dict[str, tuple[Requirement, str]] = {}
    for text in metadata.requires("rexdeploy") or []:
        requirement = Requirement(text)
        for extra, to_install in _EXTRAS.items():
            if requirement.marker and requirement.marker.evaluate({"extra": extra}):
                wanted.setdefault(requirement.name, (requirement, to_install))
    findings = [_package(name, *wanted[name]) for name in _PURPOSES if name in wanted]
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        findings.append(
            Finding(
                "onnxruntime + onnxruntime-gpu",
                "conflict",
                "both are installed into one folder and break each other",
                "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'rexdeploy[gpu]'",
            )
        )
    return findings


def _package(name: str, requirement: Requirement, extra: str) -> Finding:
    version = _version(name)
    install = f"pip install 'rexdeploy[{extra}]'"
    if version is None:
        return Finding(name, "missing", f"for {_PURPOSES[name]}", install)
    if not requirement.specifier.contains(version, prereleases=True):
        detail = f"got {version}, expected {requirement.specifier}"
        return Finding(name, "conflict", detail, f"{install} --upgrade")
    return Finding(name, "ok", version, "")


def _gpu() -> Finding:
    found = machine.detect()
    if found is None:
        return Finding(
            "NVIDIA GPU",
            "missing",
            "for running engines; they can be built without one (build-trt --flavor rtx)",
            "",
        )
    detail = f"{found.name}, compute capability {found.compute_capability}, driver {found.driver}"
    return Finding("NVIDIA GPU", "ok", detail, "")


def _flavors() -> list[Finding]:
    """Whether an installed TensorRT can really be loaded, libraries and all."""
    findings = []
    packages: dict[tensorrt_api.Flavor, str] = {"rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
    for flavor, package in packages.items():
        if _version(package) is None:
            continue
        try:
            tensorrt_api.load(flavor)
            findings.append(Finding(f"{package} libraries", "ok", "loaded", ""))
        except BackendUnavailable as error:
            reason, _, fix = str(error).rpartition(": ")
            findings.append(Finding(f"{package} libraries", "conflict", reason, fix))
    return findings


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
