"""What nvidia-smi says of this machine's first GPU."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU."""

    name: str
    compute_capability: str  # such as "8.9"
    driver: str
    memory_mib: int

    @property
    def target(self) -> str:
        """The compute capability as TensorRT-RTX spells it: `sm89`."""
        return "sm" + self.compute_capability.replace(".", "")


def detect() -> Gpu | None:
    """The first NVIDIA GPU, or None where there is none or no driver answers."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = "--query-gpu=name,compute_cap,driver_version,memory.total"
    try:
        answer = subprocess.run(
            [command, query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        name, capability, driver, memory = answer.stdout.splitlines()[0].split(", ")
        return Gpu(name, capability, driver, int(memory))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
