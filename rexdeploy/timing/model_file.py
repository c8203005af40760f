"""What a backend opens to be timed."""

from __future__ import annotations

from dataclasses import dataclass

from rexdeploy.bundle.manifest import BatchRange


@dataclass(frozen=True)
class ModelFile:
    """Bytes that a backend can open, and what they are."""

    name: str
    data: bytes
    precision: str
    batch: BatchRange | None  # the batch sizes it takes; None: any
