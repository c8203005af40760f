"""Images to train on: a folder with a folder for each class, and what of it is held back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rexdeploy.bundle.manifest import Preprocess
from rexdeploy.errors import UsageError
from rexdeploy.images import decode
from rexdeploy.images.sets import walk
from rexdeploy.progress import Report
from rexdeploy.text import one_line, printable

_HELD_BACK = 10  # one in so many of each class's images, where no others are given to validate by
_TOLD = 1000  # images between two lines of progress


@dataclass(frozen=True)
class ClassFolders:
    """Image files by class and name, and the classes' names."""

    folder: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]  # paths within the folder
    labels: tuple[int, ...]  # of each file, indices into `classes`

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        """One image's file."""
        return self.folder / self.files[index]

    @property
    def fingerprint(self) -> str:
        """A hash of the files' names and sizes: other images have another."""
        sizes = (self.path(index).stat().st_size for index in range(len(self)))
        rows = (f"{file}\0{size}\n" for file, size in zip(self.files, sizes, strict=True))
        return hashlib.sha256("".join(rows).encode("utf-8", "surrogateescape")).hexdigest()

    def without(self, files: Sequence[str]) -> ClassFolders:
        """The others; raises UsageError if a class has none left."""
        gone = set(files)
        kept = [index for index, file in enumerate(self.files) if file not in gone]
        left = self._only(kept)
        empty = set(self.labels) - set(left.labels)
        if empty:
            names = [self.classes[label] for label in sorted(empty)]
            raise UsageError(
                f"{self.folder}: no image of {_few(names)} can be read "
                f"({len(gone)} of {len(self)} files cannot); replace them"
            )
        return left

    def split(self, seed: int) -> tuple[ClassFolders, ClassFolders]:
        """Images to train on, and a tenth of every class's to validate by.

        Of a class of two to nine images it is one, of one alone none.
        """
        rng = np.random.default_rng(seed)
        held: list[int] = []
        for label in range(len(self.classes)):
            own = np.flatnonzero(np.array(self.labels) == label)
            count = max(1, round(len(own) / _HELD_BACK)) if len(own) > 1 else 0
            held += rng.permutation(own)[:count].tolist()
        if not held:
            raise UsageError(
                f"{self.folder}: every class has one image, and none can be held back to validate "
                "by; give --val DIR"
            )
        back = set(held)
        return (
            self._only([index for index in range(len(self)) if index not in back]),
            self._only(sorted(held)),
        )

    def _only(self, indices: Sequence[int]) -> ClassFolders:
        return replace(
            self,
            files=tuple(self.files[index] for index in indices),
            labels=tuple(self.labels[index] for index in indices),
        )


def find_class_folders(folder: Path, classes: tuple[str, ...] | None = None) -> ClassFolders:
    """The images of `folder/CLASS/...`; the classes are the folders' names, sorted, or `classes`.

    Raises UsageError where there are no such folders, one without images, only one class, or one
    that is not among `classes`.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; expected one with a folder for each class")
    names = sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."
    )
    if not names:
        raise UsageError(
            f"{folder}: no folders in it, expected one for each class: {folder}/CLASS/IMAGE"
        )
    if classes is None:
        if len(names) == 1:
            raise UsageError(
                f"{folder}: got one class, {_few(names)}, expected two or more to tell apart"
            )
        classes = tuple(names)
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise UsageError(
            f"{folder}: {len(unknown)} of its {len(names)} classes are not among those to train: "
            f"got {_few(unknown)}, expected of {_few(classes)}"
        )
    files: list[str] = []
    labels: list[int] = []
    for name in names:
        found = [path.relative_to(folder).as_posix() for path in walk(folder / name)]
        files += found
        labels += [classes.index(name)] * len(found)
    return ClassFolders(folder, classes, tuple(files), tuple(labels))


def unreadable(
    images: ClassFolders, spec: Preprocess, workers: int, report: Report
) -> dict[str, str]:
    """Why each file cannot be read that cannot: all are decoded once, in threads.

    Raises UsageError if it is all of them.
    """

    def fault(index: int) -> str | None:
        try:
            decode.read(images.path(index), spec)
        except UsageError as error:
            return str(error).removeprefix(f"{images.path(index)}: ")
        return None

    found: dict[str, str] = {}
    with ThreadPoolExecutor(workers) as pool:
        for index, why in enumerate(pool.map(fault, range(len(images)))):
            if index % _TOLD == 0:
                report(f"reading {len(images)} images of {images.folder} once: {index} done")
            if why is not None:
                found[images.files[index]] = why
    if len(found) == len(images):
        file, why = next(iter(found.items()))
        raise UsageError(
            f"{images.folder}: none of its {len(images)} images can be read (first: {file}: {why})"
        )
    return found


def _few(names: Sequence[str]) -> str:
    quoted = ", ".join(f"'{printable(name)}'" for name in names[:3])
    return one_line(quoted, 120) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
