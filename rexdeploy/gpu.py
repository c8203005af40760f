"""The first GPU of this machine, as CUDA counts them."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU."""

    name: str
    compute_capability: str  # such as "8.9"
    driver: str  # its version, or the CUDA version that it supports

    @property
    def target(self) -> str:
        """The compute capability as TensorRT-RTX spells it: `sm89`."""
        return "sm" + self.compute_capability.replace(".", "")


def detect() -> Gpu | None:
    """The GPU that engines would run on, or None where there is none or no driver answers.

    Asks the driver, which heeds CUDA_VISIBLE_DEVICES and is there in every container with a GPU;
    nvidia-smi where cuda-bindings is not installed.
    """
    try:
        return _from_driver()
    except ImportError:
        return _from_nvidia_smi()


def _from_driver() -> Gpu | None:
    from cuda.bindings import driver

    def ask(function: object, *arguments: object) -> object:
        status, *values = function(*arguments)  # type: ignore[operator]
        if status != driver.CUresult.CUDA_SUCCESS:
            raise OSError(f"{function}: {status}")
        return values[0] if values else None

    attributes = driver.CUdevice_attribute
    try:
        ask(driver.cuInit, 0)
        device = ask(driver.cuDeviceGet, 0)
        name = ask(driver.cuDeviceGetName, 128, device)
        major, minor = (
            ask(driver.cuDeviceGetAttribute, attribute, device)
            for attribute in (
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        version = ask(driver.cuDriverGetVersion)
    except (RuntimeError, OSError):  # no driver library, no device
        return None
    assert isinstance(name, bytes)
    assert isinstance(version, int)
    text = name.split(b"\0")[0].decode(errors="replace")
    return Gpu(text, f"{major}.{minor}", f"CUDA {version // 1000}.{version % 1000 // 10}")


def _from_nvidia_smi() -> Gpu | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = "--query-gpu=name,compute_cap,driver_version"
    try:
        answer = subprocess.run(
            [command, query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        name, capability, driver = answer.stdout.splitlines()[0].rsplit(", ", 2)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return Gpu(name, capability, driver)
