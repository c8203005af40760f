"""A bound on what one command takes, whatever the files that it reads ask for."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rexdeploy import gpu
from rexdeploy.errors import RexdeployError

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
    if not gpu.has_device():
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
