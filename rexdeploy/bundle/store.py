"""A bundle: one folder that holds a model, everything built from it, and a manifest.

A bundle changes in one atomic step. New files are staged beside the old ones, then a journal with
the complete new manifest is renamed into place (from here on the change has happened), then the
staged files and the manifest are renamed over the old ones. Whoever opens the folder next finishes
an interrupted step first, so a command killed at any moment leaves the old bundle or the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

import msgspec

from rexdeploy.bundle.manifest import (
    MANIFEST,
    VERIFICATION,
    Artifact,
    Manifest,
    Task,
    decode,
    judged,
    to_json,
)
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.files import MAX_TEXT_BYTES, read_plain, sync_folder, write_synced
from rexdeploy.text import plain

DEFAULT_ROOT = Path("artifacts")
SIGNATURE = "bundle.sig"
"""See `rexdeploy.bundle.signing`; it is of one state of the bundle, and goes with it."""
_JOURNAL = ".manifest.commit"
_STAGED = ".{}.staged"
_Report = TypeVar("_Report")


@dataclass(frozen=True, repr=False)
class Bundle:
    """A bundle as one command sees it: its folder, and the manifest read when it was opened."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Opens the bundle at `path`; raises UsageError if there is none or it is damaged."""
        if not is_bundle(path):
            raise UsageError(
                f"{path} is not a bundle: expected a folder with a manifest.json; "
                "'rexdeploy export' makes one"
            )
        with readable(path):
            return cls(path, _read_manifest(path))

    @classmethod
    def find(
        cls,
        where: Bundle | Path | str | None,
        root: Path = DEFAULT_ROOT,
        tasks: Sequence[Task] = ("classify",),
    ) -> Bundle:
        """The bundle itself, at a folder, or of a name under `root`; of None the latest in `root`.

        The latest is the one a command changed last, by the time in its manifest. Raises UsageError
        where there is none, and for one of a task that is not among those asked for.
        """
        found = cls._find(where, root)
        task = found.manifest.model.task
        if task not in tasks:
            raise UsageError(
                f"{found.path} holds a network that can {task}, expected one that can "
                f"{' or '.join(tasks)}: this command does not know the others"
            )
        return found

    @classmethod
    def _find(cls, where: Bundle | Path | str | None, root: Path) -> Bundle:
        if isinstance(where, Bundle):
            return where
        if where is not None:
            where = Path(where)
            named = root / where
            return cls.open(named if is_bundle(named) and not is_bundle(where) else where)
        # A damaged bundle is an error, not passed over: it may be the very one that is meant.
        bundles = [
            cls.open(folder)
            for folder in (sorted(root.iterdir()) if root.is_dir() else [])
            if is_bundle(folder)
        ]
        if not bundles:
            raise UsageError(
                f"no bundle in {root}{os.sep}: run 'rexdeploy export' first, or name a bundle's "
                "folder"
            )
        return max(bundles, key=lambda bundle: bundle.manifest.updated_at)

    def __repr__(self) -> str:
        files = len(self.manifest.artifacts)
        return f"<Bundle {self.path}: {self.manifest.model.title}, {files} files>"

    def read(self, artifact: Artifact) -> bytes:
        """An artifact's bytes, checked against its hash; raises UsageError."""
        with readable(self.path):
            changed = artifact not in _read_manifest(self.path).artifacts
            try:
                data = read_plain(self.path / artifact.file)
            except OSError as error:
                raise UsageError(
                    f"{self.path / artifact.file} cannot be read ({error.strerror}); "
                    f"make it again: {artifact.command or 'rexdeploy export'}"
                ) from None
        if changed:
            raise UsageError(
                f"{self.path} was changed by another command meanwhile; run this one again"
            )
        found = sha256(data)
        if found != artifact.sha256:
            raise UsageError(
                f"{self.path / artifact.file} is not the file the manifest describes: got sha256 "
                f"{found[:12]}, expected {artifact.sha256[:12]}; "
                f"make it again: {artifact.command or 'rexdeploy export'}"
            )
        return data

    def read_report(self, file: str, kind: type[_Report]) -> _Report | None:
        """What `with_report` has kept; None where there is nothing that can be read as such."""
        artifact = self.manifest.find_file(file)
        if artifact is None:
            return None
        try:
            return msgspec.json.decode(self.read(artifact), type=kind)
        except (UsageError, msgspec.DecodeError):
            return None

    def with_report(self, file: str, report: object, parent: Artifact) -> Bundle:
        """Keeps what a search has found so far, of a graph; raises like `update`."""
        data = to_json(report)
        artifact = Artifact("report", file, sha256(data), parent_sha256=parent.sha256)
        return self.update(artifact, files={file: data})

    def update(self, *added: Artifact, files: Mapping[str, bytes]) -> Bundle:
        """Adds or replaces artifacts (`files`: bytes by file name) in one atomic step.

        Raises UsageError if another command meanwhile replaced what they were made from, or, of a
        verification, anything that it judged.
        """
        is_verdict = any(artifact.file == VERIFICATION for artifact in added)

        def merge(current: Manifest | None) -> Manifest:
            if current is not None:
                merged = current.with_artifacts(*added)
                is_stale = is_verdict and (
                    judged(current.artifacts) != judged(self.manifest.artifacts)
                )
                if not is_stale and all(artifact in merged.artifacts for artifact in added):
                    return merged
            raise UsageError(
                f"{self.path} was changed by another command meanwhile; run this one again"
            )

        return commit(self.path, merge, files)


def commit(
    path: Path, merge: Callable[[Manifest | None], Manifest], files: Mapping[str, bytes]
) -> Bundle:
    """Moves the bundle at `path` to the manifest `merge(current)`, with `files`, or not at all.

    `merge` runs under the bundle's lock; what it raises leaves the bundle as it was.
    """
    try:
        is_made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        try:
            return _committed(path, merge, files)
        except BaseException:
            if is_made:
                with contextlib.suppress(OSError):  # what holds a bundle by now stays
                    path.rmdir()
            raise
    except OSError as error:
        raise RexdeployError(
            f"cannot write the bundle {path} ({error.strerror}); nothing was changed: "
            "free some space, or use another folder"
        ) from None


def _committed(
    path: Path, merge: Callable[[Manifest | None], Manifest], files: Mapping[str, bytes]
) -> Bundle:
    with _locked(path):
        _finish_interrupted(path)
        current = _read_manifest(path) if (path / MANIFEST).exists() else None
        manifest = replace(
            merge(current),
            updated_at=datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        )
        _check_targets(path, manifest, is_new=current is None)
        try:
            for name, data in files.items():
                write_synced(path / _STAGED.format(name), data)
            write_synced(path / _STAGED.format(MANIFEST), to_json(manifest))
            os.replace(path / _STAGED.format(MANIFEST), path / _JOURNAL)
        except OSError:
            _remove_staged(path)
            raise
        _finish_interrupted(path)
    return Bundle(path, manifest)


def attach_signature(path: Path, make: Callable[[], bytes]) -> None:
    """Puts the signature that `make` gives beside the manifest, in one rename.

    `make` runs under the bundle's lock; what it raises leaves the bundle as it was.
    """
    try:
        with _locked(path):
            _finish_interrupted(path)
            staged = path / _STAGED.format(SIGNATURE)
            data = make()
            try:
                write_synced(staged, data)
                os.replace(staged, path / SIGNATURE)
                sync_folder(path)
            except OSError:
                _remove_staged(path)
                raise
    except OSError as error:
        raise RexdeployError(
            f"cannot sign the bundle {path} ({error.strerror}); nothing was changed: "
            "make its folder writable, or free some space"
        ) from None


def check_name(name: str) -> None:
    """Raises UsageError for what is no plain name of a bundle's folder."""
    if name in ("", ".", "..") or "/" in name or name.startswith(".") or plain(name) != name:
        raise UsageError(f"name: got '{name}', expected a plain folder name")


def is_bundle(path: Path) -> bool:
    """Whether `path` is a folder with a manifest, or with the journal of one."""
    return path.is_dir() and any((path / name).exists() for name in (MANIFEST, _JOURNAL))


def check_writable(root: Path) -> None:
    """Raises UsageError unless files can be made in `root`; call it before a long step."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write to the folder {root} ({error.strerror}); choose another with --out"
        ) from None


def sha256(data: bytes) -> str:
    """The SHA-256 of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _check_targets(path: Path, manifest: Manifest, is_new: bool) -> None:
    """Raises UsageError where the bundle's files would meet somebody else's."""
    if is_new and any(path.iterdir()):
        raise UsageError(
            f"{path} is a folder with other files in it, not a bundle; choose another name"
        )
    files = (artifact.file for artifact in manifest.artifacts)
    for name in (MANIFEST, _JOURNAL, SIGNATURE, *files):
        if (path / name).is_dir():
            raise UsageError(f"{path / name} is a folder where the bundle needs a file; remove it")


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Holds the bundle's lock for reading, when no step is left unfinished.

    A shared lock: servers start side by side, and NFS gives no other on a folder.
    """
    if os.access(path, os.W_OK) and any(path.glob(_STAGED.format("*"))):
        with _locked(path):
            _finish_interrupted(path)
    while True:
        with _locked(path, fcntl.LOCK_SH):
            if not (path / _JOURNAL).exists():
                yield
                return
        with _locked(path):
            _finish_interrupted(path)


@contextlib.contextmanager
def _locked(path: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Holds the bundle's lock; the kernel lets go of it when the process dies."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"the bundle {path} cannot be opened ({error.strerror})") from None
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        data = read_plain(file, MAX_TEXT_BYTES)
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}); export again") from None
    return decode(data, str(file))


def _finish_interrupted(path: Path) -> None:
    """Completes a step whose journal was written; clears away one that got less far."""
    journal = path / _JOURNAL
    if not journal.exists():
        _remove_staged(path)
        return
    if not os.access(path, os.W_OK):
        raise UsageError(
            f"{path} holds the unfinished work of a killed command and cannot be written here; "
            "open it once with the right to write"
        )
    try:
        manifest = decode(read_plain(journal, MAX_TEXT_BYTES), str(journal))
        for artifact in manifest.artifacts:
            staged = path / _STAGED.format(artifact.file)
            if staged.exists():
                os.replace(staged, path / artifact.file)
        _remove_dropped(path, manifest)
        (path / SIGNATURE).unlink(missing_ok=True)  # of the old state
        os.replace(journal, path / MANIFEST)
        sync_folder(path)
    except OSError as error:
        raise UsageError(
            f"{path} was changed, and its new files cannot be put in their places "
            f"({error.strerror}); the next command that opens it does it: make room for them"
        ) from None


def _remove_dropped(path: Path, manifest: Manifest) -> None:
    """Deletes files that the old manifest names and the new one does not; never any other."""
    file = path / MANIFEST
    try:
        old = decode(read_plain(file, MAX_TEXT_BYTES), str(file))
    except (FileNotFoundError, UsageError):
        return  # no old manifest, or a damaged one: then nothing here is known to be ours
    kept = {artifact.file for artifact in manifest.artifacts}
    for artifact in old.artifacts:
        if artifact.file not in kept:
            (path / artifact.file).unlink(missing_ok=True)


def _remove_staged(path: Path) -> None:
    for staged in path.glob(_STAGED.format("*")):
        with contextlib.suppress(OSError):  # a read-only bundle can still be read
            staged.unlink()
