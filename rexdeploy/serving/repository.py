"""A Triton model repository on disk: what it holds, and how models are added in one step or not."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rexdeploy.errors import RexdeployError
from rexdeploy.files import open_locked, sync_folder, write_synced
from rexdeploy.serving.config import (
    CONFIG,
    SUFFIXES,
    Role,
    Settings,
    Signature,
    max_batch_in,
    settings_in,
    signature_in,
)

DEFAULT_REPOSITORY = Path("artifacts/triton")
_STAGING = ".{}.rexdeploy"  # beside the repository: Triton takes every folder inside for a model
_LOCK = "lock"
_WAIT_SECONDS = 60  # for another command that is adding a version: it writes some hundred megabytes


@dataclass(frozen=True)
class Deployed:
    """A network as it stands in a repository, and with it its ensemble."""

    name: str
    version: int  # the one that answers
    signature: Signature
    settings: Settings
    max_batch: int

    @property
    def tensor_bytes(self) -> int:
        """The size of its largest batch of preprocessed images."""
        signature = self.signature
        image = math.prod(signature.preprocess.shape(signature.input))
        return self.max_batch * image * (1 if signature.input == "uint8" else 4)

    @property
    def image_name(self) -> str:
        """The ensemble: the bytes of image files in."""
        return self.name + SUFFIXES["ensemble"]


@dataclass(frozen=True)
class Model:
    """One model to be in the repository; `shared` and `version` are files' bytes by name.

    Only the network has more than one version: what decodes images is the same by the signature.
    """

    role: Role
    name: str
    config: str
    shared: Mapping[str, bytes]
    version: Mapping[str, bytes]


def deployed(repository: Path) -> list[Deployed]:
    """The networks in it that rexdeploy has written and that have a version, by name."""
    folders = sorted(repository.iterdir()) if repository.is_dir() else []
    return [found for folder in folders if (found := _deployed(folder)) is not None]


def config_of(folder: Path) -> str | None:
    """The text of a model's configuration; None where there is none that can be read."""
    file = folder / CONFIG
    try:
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    except OSError:
        return None


@contextlib.contextmanager
def changing(repository: Path) -> Iterator[Path]:
    """Within it no other command of ours changes the repository; yields an empty staging folder.

    That is on the repository's disk, and gone afterwards; what a killed command has left of its own
    is cleared away. Folders above the repository are made, and removed again if the block fails.
    Raises RexdeployError if another command takes too long, OSError where nothing can be written.
    """
    place = repository.resolve()
    with _made(place.parent):
        folder = place.parent / _STAGING.format(place.name)
        descriptor = _lock(folder, repository)
        try:
            _clear(folder)  # a killed command's
            yield folder
        finally:
            try:
                _remove(folder)
            except KeyboardInterrupt:
                _remove(folder)
                raise
            finally:
                os.close(descriptor)


def publish(models: Sequence[Model], repository: Path, staging: Path) -> list[tuple[int, bool]]:
    """Adds models, or their next versions: all of it or, if anything fails, nothing.

    Gives each model's latest version, and whether it is new. Everything is written and on the disk
    before the first rename, and each rename is taken back if a later one fails. A polling server
    sees whole models and versions only; a repository that was not there appears by one rename.
    """
    root = staging / "models"
    root.mkdir()
    moves: list[tuple[Path, Path]] = []
    versions = []
    for model in models:
        folder, staged = repository / model.name, root / model.name
        latest = _latest(folder)
        is_new = not latest or (
            model.role == "network" and not _holds(folder / str(latest), model.version)
        )
        number = str(latest + is_new)
        versions.append((latest + is_new, is_new))
        if is_new:
            _write_all(staged / number, model.version)
        # The configuration last: labels that it names are there by then.
        shared = {**model.shared, CONFIG: model.config.encode()}
        changed = {name: data for name, data in shared.items() if not _is(folder / name, data)}
        if changed:
            _write_all(staged, changed)
        if os.path.lexists(folder):
            parts = [*([number] if is_new else []), *changed]
            moves += [(staged / part, folder / part) for part in parts]
        else:
            moves.append((staged, folder))
    sync_folder(root)
    if not repository.exists():
        moves = [(root, repository.resolve())]
    try:
        _move(moves)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # a rename to what was not there before
            raise RexdeployError(
                f"{repository} was changed by another command meanwhile; run this one again"
            ) from None
        raise
    return versions


def _deployed(folder: Path) -> Deployed | None:
    config = config_of(folder)
    signature = signature_in(config, "network") if config is not None else None
    latest = _latest(folder)
    if config is None or signature is None or not latest:
        return None
    return Deployed(folder.name, latest, signature, settings_in(config), max_batch_in(config))


def _latest(folder: Path) -> int:
    """The newest version's number; 0 if there is none."""
    names = (path.name for path in folder.glob("[1-9]*"))
    return max((int(name) for name in names if name.isdecimal() and name.isascii()), default=0)


def _move(moves: Sequence[tuple[Path, Path]]) -> None:
    """Renames each first path to its second, a file in the place of a file; all, or none."""
    begun: list[tuple[Path, Path, Path | None]] = []
    try:
        for source, target in moves:
            before = None
            if target.is_file():
                before = source.with_name(f"{source.name}.before")
                shutil.copy2(target, before)
            begun.append((source, target, before))
            source.rename(target)
        for folder in {target.parent for _, target in moves}:
            sync_folder(folder)
    except BaseException:
        for source, target, before in reversed(begun):
            if os.path.lexists(source):
                continue  # this one was not done
            with contextlib.suppress(OSError):
                if before is None:
                    target.rename(source)
                else:
                    before.rename(target)
        raise


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes a folder and those above it; if the block fails, removes again what it made."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):  # others have put something in it meanwhile
                path.rmdir()
        raise


def _lock(folder: Path, repository: Path) -> int:
    """Makes the staging folder and locks it; a file descriptor, to close at the end.

    A killed command's lock is free, for the kernel has let go of it.
    """
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        if folder.is_symlink():  # to clear it would be to clear what it points to
            raise RexdeployError(f"{folder} is a link, expected nothing there; remove it")
        folder.mkdir(exist_ok=True)
        try:
            return open_locked(folder / _LOCK, wait=False)
        except FileNotFoundError:  # whoever had it has removed the folder meanwhile
            continue
        except BlockingIOError:
            pass
        except BaseException:
            with contextlib.suppress(OSError):
                folder.rmdir()
            raise
        if time.monotonic() > deadline:
            raise RexdeployError(
                f"another command has been changing {repository} for {_WAIT_SECONDS} s; "
                "wait until it is done, or end it, and run this one again"
            )
        time.sleep(0.05)


def _remove(folder: Path) -> None:
    """Removes the staging folder; what cannot be removed the next command clears."""
    with contextlib.suppress(OSError):
        _clear(folder)
        (folder / _LOCK).unlink(missing_ok=True)  # whoever waits makes a new one from here on
        folder.rmdir()


def _clear(folder: Path) -> None:
    """Removes everything in the staging folder but its lock."""
    for path in folder.iterdir():
        if path.name == _LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _holds(folder: Path, files: Mapping[str, bytes]) -> bool:
    """Whether these are the folder's files."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    return names == set(files) and all(_is(folder / name, data) for name, data in files.items())


def _is(path: Path, data: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


def _write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files into a folder, made if need be, and has all of it on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_synced(folder / name, data)
    sync_folder(folder)
