"""A training that is not finished: locked, kept beside its output, and gone on with."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.files import check_replaceable, open_locked, open_plain, replacing

_FORMAT = 1
_held: set[int] = set()  # the descriptors of locks


def state_of(out: Path) -> Path:
    """Where the state of an unfinished training is."""
    return out.with_name(f"{out.name}.training")


def write_state(out: Path, state: dict[str, Any]) -> None:
    """Keeps what a training needs to go on."""
    data = io.BytesIO()
    torch.save({"format": _FORMAT, **state}, data)  # not into the file: torch hides a full disk
    write(out, state_of(out), data.getvalue())


def write(out: Path, path: Path, data: bytes) -> None:
    """Writes the checkpoint `out`, or what belongs to it; raises RexdeployError where it cannot."""
    try:
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        stays = f"{out} is the last good one, whole" if out.exists() else "nothing was written"
        raise RexdeployError(
            f"cannot write {path} ({error.strerror or error}); {stays}: make room, and the same "
            "command goes on"
        ) from None


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Keeps other processes from the same output; raises UsageError where one has it."""
    check_replaceable(out)
    path = out.with_name(f".{out.name}.training.lock")
    try:
        descriptor = open_locked(path, wait=False)
    except BlockingIOError:
        raise UsageError(
            f"{out} is being trained by another command: wait for it, or give another --out"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror})") from None
    _held.add(descriptor)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        _held.remove(descriptor)
        os.close(descriptor)


def let_go() -> None:
    """Closes the locks in a process that was forked: it may outlive a parent that was killed."""
    while _held:
        os.close(_held.pop())


def read_state(out: Path, settings: dict[str, Any], force: bool) -> dict[str, Any] | None:
    """The unfinished training of these settings; None: there is none.

    Raises UsageError for another's, and for a finished `out`, unless `force`.
    """
    path = state_of(out)
    if not path.exists():
        if out.exists() and not force:
            raise UsageError(f"{out} is there already: give another --out, or --force")
        return None
    try:
        with open_plain(path) as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
        before = state["settings"]
        different = [
            f"{name} {_short(before.get(name))} then, {_short(settings.get(name))} now"
            for name in {**settings, **before}
            if before.get(name) != settings.get(name)
        ]
        if state["format"] != _FORMAT:
            different = [f"format {state['format']} then, {_FORMAT} now"]
    except Exception as error:  # torch raises nearly every built-in type on damaged archives
        if force:
            return None
        raise UsageError(
            f"{path} is no training's state ({type(error).__name__}); remove it, or give --force "
            "to begin anew"
        ) from None
    if different and not force:
        raise UsageError(
            f"{path} is of a training with other options or data: {'; '.join(different)}; give "
            "the same, or --force to begin anew"
        )
    if not different and not out.exists():
        raise UsageError(f"{path} is there, and its checkpoint {out} is gone; remove both")
    return None if different else state


def _short(value: object) -> str:
    if value is None:
        return "not given"
    return f"{value:.8}" if isinstance(value, str) and len(value) == 64 else str(value)
