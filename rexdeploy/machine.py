"""The machine: its GPU, processor, memory, packages; and a bound on what a command takes."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rexdeploy.errors import RexdeployError

_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # Linux, and Linux inside Windows


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU."""

    name: str
    compute_capability: str  # such as "8.9"
    driver: str  # its version, or the CUDA version that it supports
    uuid: str | None = None  # as nvidia-smi names it; None where only nvidia-smi was asked

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


def has_device() -> bool:
    """Whether a GPU's driver is loaded, without asking it: `detect` takes 80 ms."""
    return any(device.exists() for device in _DEVICES)


def clocks(found: Gpu) -> str | None:
    """The GPU's clocks now and at most, and its power state, as nvidia-smi prints them.

    By its UUID: nvidia-smi counts all GPUs by their place on the bus, CUDA those that
    CUDA_VISIBLE_DEVICES leaves, the fastest first.
    """
    return _ask_nvidia_smi("clocks.sm,clocks.max.sm,clocks.mem,pstate,temperature.gpu", found.uuid)


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
        identity = ask(driver.cuDeviceGetUuid, device)
        version = ask(driver.cuDriverGetVersion)
    except (RuntimeError, OSError):  # no driver library, no device
        return None
    assert isinstance(name, bytes)
    assert isinstance(version, int)
    text = name.split(b"\0")[0].decode(errors="replace")
    return Gpu(
        text,
        f"{major}.{minor}",
        f"CUDA {version // 1000}.{version % 1000 // 10}",
        f"GPU-{uuid.UUID(bytes=bytes(identity.bytes))}",  # type: ignore[attr-defined]
    )


def _from_nvidia_smi() -> Gpu | None:
    try:
        name, capability, driver = (
            _ask_nvidia_smi("name,compute_cap,driver_version") or ""
        ).rsplit(", ", 2)
    except ValueError:
        return None
    return Gpu(name, capability, driver)


def _ask_nvidia_smi(fields: str, identity: str | None = None) -> str | None:
    """A line of values for that GPU, or the first; None where the tool is missing or fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    try:
        answer = subprocess.run(
            [
                command,
                f"--query-gpu={fields}",
                "--format=csv,noheader",
                *([f"--id={identity}"] if identity else []),
            ],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(answer.stdout.splitlines()), None)


_PACKAGES = (
    "rexdeploy", "torch", "timm", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-rtx",
    "tensorrt",
)  # fmt: skip


def machine() -> dict[str, str]:
    """The machine, and the libraries that decide about its speed, as a result names them."""
    described = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    for package in _PACKAGES:
        try:
            described[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found = detect()
    if found is not None:
        described["gpu"] = f"{found.name}, driver {found.driver}"
        described["gpu clocks"] = clocks(found) or "not known: nvidia-smi does not say"
    return described


def has_int8() -> bool:
    """Whether the processor sums products of 8 bits in 32: x86 with VNNI, or any other kind.

    x86 without it sums pairs in 16 bits, which saturate for unsigned by signed of 8 bits each.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    flags = _cpuinfo().get("flags", "").split()
    return any(name in flags for name in ("avx512_vnni", "avx_vnni"))


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the last core; nothing elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _processor() -> str:
    """Its name, and the widest vector unit, which decides more than the name."""
    fields = _cpuinfo()
    flags = fields.get("flags", "").split()
    vectors = next((name for name in ("avx512f", "avx2", "avx") if name in flags), "")
    return f"{fields.get('model name', platform.processor())} {vectors}".strip()


MAX_BYTES = 32 << 30
"""Beside what a command has when it begins. What is known beforehand is held to less: `bounds`."""
MAX_SHARE = 0.75  # of the machine's memory
_DATA_PAGES = 5  # of /proc/self/statm


@contextmanager
def bounded(most: int = MAX_BYTES) -> Iterator[None]:
    """Lets this process take `most` bytes more than it has, or a share of the machine's memory.

    What the block asks for beyond that raises RexdeployError. It bounds the whole process, so it is
    for commands. Where there is a GPU nothing is bounded: what CUDA takes of the address space has
    not been measured.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    page = resource.getpagesize()
    most = min(most, int(MAX_SHARE * page * os.sysconf("SC_PHYS_PAGES")))
    if not has_device():
        pages = int(Path("/proc/self/statm").read_text().split()[_DATA_PAGES])
        soft = pages * page + most
        limits = [limit for limit in (soft, *before) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), before[1]))
    try:
        yield
    except MemoryError:
        raise RexdeployError(_text(most)) from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # as torch says it
            raise
        raise RexdeployError(_text(most)) from None
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _text(most: int) -> str:
    return (
        f"this takes more than {most / (1 << 30):.3g} GiB of memory, or more than the machine has; "
        "give fewer or smaller images, a smaller batch or another file"
    )
