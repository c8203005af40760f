"""Labelled images of a folder: which class of the network each file shows."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rexdeploy.errors import UsageError
from rexdeploy.files import MAX_TEXT_BYTES, read_plain
from rexdeploy.images.sets import walk
from rexdeploy.text import one_line, printable

IMAGENET_CLASSES = 1000
_KAGGLE = ["ImageId", "PredictionString"]  # the header of LOC_val_solution.csv


@dataclass(frozen=True)
class LabelledImages:
    """Image files, by name, and the class that each shows."""

    folder: str
    files: tuple[str, ...]  # paths within the folder
    classes: npt.NDArray[np.int64]  # [files], indices of the network's classes
    read_as: str  # what the names were taken for: "labels", "synsets", "indices", "the mapping"

    def first(self, count: int) -> LabelledImages:
        """At most `count` images: every class's first, then every class's second, and so on."""
        turns = zip_longest(*self._by_class().values())
        return self._only([index for index in chain(*turns) if index is not None][:count])

    def sampled(self, count: int, seed: int) -> LabelledImages:
        """At most `count` images at random, of every class in proportion to what it has."""
        if count >= len(self.files):
            return self
        rng = np.random.default_rng(seed)
        groups = [rng.permutation(group).tolist() for group in self._by_class().values()]
        # By their place within the class, of which ties are broken at random: a stratified order.
        places = [
            ((place + rng.uniform()) / len(group), index)
            for group in groups
            for place, index in enumerate(group)
        ]
        return self._only([index for _, index in sorted(places)[:count]])

    def _by_class(self) -> dict[int, list[int]]:
        groups: dict[int, list[int]] = {}
        for index, label in enumerate(self.classes.tolist()):
            groups.setdefault(label, []).append(index)
        return groups

    def _only(self, indices: Sequence[int]) -> LabelledImages:
        kept = sorted(indices)
        files = tuple(self.files[index] for index in kept)
        return replace(self, files=files, classes=self.classes[kept])


def find_labelled(
    folder: Path, labels: Sequence[str], mapping: Path | None = None
) -> LabelledImages:
    """The images of a folder with their classes, of a network with these `labels`.

    Folders in it are classes, by their names: labels (in any case, `_` for a space), ImageNet's
    synsets of a network of 1000 classes, or indices. `mapping` is a text file: lines of a name (a
    class folder's, or an image's with or without its folders and extension) and its class, with a
    tab, a comma or a space between; or one class a line for the images by name; or Kaggle's
    LOC_val_solution.csv.

    Raises UsageError for images without a class, and classes that the network has not.
    """
    files = [os.path.relpath(path, folder) for path in walk(folder)]
    if mapping is not None:
        found, read_as = _by_mapping(files, mapping, labels), "the mapping"
    else:
        found, read_as = _by_folder(files, folder, labels)
    return LabelledImages(str(folder), tuple(files), np.array(found, np.int64), read_as)


def synsets() -> list[str]:
    """ImageNet-1k's synsets, such as n01440764, in the order of its classes."""
    text = resources.files("rexdeploy").joinpath("data/imagenet1k_synsets.txt").read_text()
    return text.split()


def _by_folder(files: Sequence[str], folder: Path, labels: Sequence[str]) -> tuple[list[int], str]:
    names = [Path(file).parts[0] if len(Path(file).parts) > 1 else "" for file in files]
    if "" in names:
        loose = files[names.index("")]
        raise UsageError(
            f"{folder}: {printable(loose)} is in no class's folder: expected "
            f"{folder}/CLASS/IMAGE, or --mapping FILE with the class of each image"
        )
    return _indices(names, str(folder), labels)


def _indices(names: Sequence[str], where: str, labels: Sequence[str]) -> tuple[list[int], str]:
    """The index of each class's name, and what all names were taken for; raises UsageError."""
    different = list(dict.fromkeys(names))
    fewest: list[str] = []
    for read_as, index_of in _ways(labels):
        found = {name: index for name in different if (index := index_of(name)) is not None}
        if len(found) == len(different):
            return [found[name] for name in names], read_as
        unknown = [name for name in different if name not in found]
        if not fewest or len(unknown) < len(fewest):
            fewest = unknown
    ways = "names" + ", ImageNet's synsets" * (len(labels) == IMAGENET_CLASSES)
    raise UsageError(
        f"{where}: {len(fewest)} of {len(different)} classes are none of the network's: got "
        f"{_few(fewest)}; expected {_few(labels)} ({ways} or indices 0 to {len(labels) - 1}), or "
        "--mapping FILE"
    )


def _few(names: Sequence[str]) -> str:
    quoted = ", ".join(f"'{printable(name)}'" for name in names[:3])
    return one_line(quoted, 120) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _ways(labels: Sequence[str]) -> Iterator[tuple[str, Callable[[str], int | None]]]:
    """What a class's name may be, each with the function to its index."""
    exact = _unique(labels)
    loose = _unique([_loose(label) for label in labels])
    yield "labels", lambda name: exact.get(name, loose.get(_loose(name)))
    if len(labels) == IMAGENET_CLASSES:
        yield "synsets", _unique(synsets()).get
    yield "indices", lambda name: _index(name, len(labels))


def _unique(names: Sequence[str]) -> dict[str, int]:
    """Index by name, without names that several classes have."""
    counts = Counter(names)
    return {name: index for index, name in enumerate(names) if counts[name] == 1}


def _loose(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _index(name: str, classes: int) -> int | None:
    if not (name.isascii() and name.isdecimal() and len(name) <= 9):
        return None
    return int(name) if int(name) < classes else None


def _by_mapping(files: Sequence[str], path: Path, labels: Sequence[str]) -> list[int]:
    rows = _rows(path)
    if all(len(row) == 1 for row in rows):
        names = [row[0] for row in rows]
        if len(names) != len(files):
            raise UsageError(
                f"mapping {path}: got {len(names)} lines of one class each and {len(files)} "
                "images, expected one line an image, or lines of a name and its class"
            )
        if all(_index(name, 1001) is not None for name in names):
            raise UsageError(
                f"mapping {path}: numbers without names could be of any order of classes "
                "(ILSVRC2012_validation_ground_truth.txt has one of its own); expected synsets, "
                "labels, or lines of a name and its class"
            )
        return _indices(names, f"mapping {path}", labels)[0]
    pairs: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        if len(row) != 2:
            raise UsageError(
                f"mapping {path}: line {number} is '{printable(' '.join(row))}', expected a name "
                "and its class"
            )
        if pairs.setdefault(row[0], row[1]) != row[1]:
            raise UsageError(
                f"mapping {path}: '{printable(row[0])}' has two classes, '{printable(row[1])}' "
                f"and '{printable(pairs[row[0]])}'; expected one line for each name"
            )
    shown = [_class_of(file, pairs, path) for file in files]
    return _indices(shown, f"mapping {path}", labels)[0]


def _class_of(file: str, pairs: Mapping[str, str], path: Path) -> str:
    """The class of an image: by its path, its name, its name without extension, or its folder."""
    own = Path(file)
    for name in (file, own.name, own.stem, own.parts[0]):
        if name in pairs:
            return pairs[name]
    raise UsageError(
        f"mapping {path}: no line is about {printable(file)}; expected one for each image, or "
        "for its folder"
    )


def _rows(path: Path) -> list[list[str]]:
    try:
        text = read_plain(path, MAX_TEXT_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"mapping {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"mapping {path}: not UTF-8 text; expected names and classes") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"mapping {path} is empty; expected a name and its class a line")
    try:
        rows = list(csv.reader(lines, delimiter="\t" if "\t" in lines[0] else ","))
    except csv.Error as error:
        raise UsageError(f"mapping {path}: {error}; expected names and classes") from None
    if rows[0] == _KAGGLE:  # an image, and its synset before the corners of boxes
        return [[row[0], row[1].split()[0]] for row in rows[1:] if len(row) == 2 and row[1].split()]
    if all(len(row) == 1 for row in rows) and not any("," in line for line in lines):
        # Only where every line has two words is a space what is between them: labels have spaces.
        split = [line.rsplit(maxsplit=1) for line in lines]
        known = set(lines)
        if all(len(pair) == 2 for pair in split) and len(known) == len(lines):
            return split
    return [[cell.strip() for cell in row] for row in rows]
