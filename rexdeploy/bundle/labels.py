"""The names of a model's classes: one rule for the file that they are read from."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import UsageError
from rexdeploy.files import MAX_TEXT_BYTES, read_plain
from rexdeploy.text import STEERING

IMAGENET_CLASSES = 1000


def parse_labels(data: bytes, name: str) -> list[str]:
    """One class name a line of UTF-8 text, as it stands; `name` is the file's in errors.

    Lines end in a line feed, or a carriage return and one; a byte order mark at the very beginning
    is no part of the first name. Raises UsageError for anything else: bytes that are not UTF-8, a
    blank line, and a control character (`text.STEERING`: NUL and tabs among them), of which
    readers of the file would make other lines, or other names, or a terminal's commands.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name}: byte {error.start} is not UTF-8, expected text in UTF-8; save it as that"
        ) from None
    if not text:
        raise UsageError(f"{name} is empty, expected one class name a line")
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip(" "):
            raise UsageError(f"{name}: line {number} is blank, expected one class name a line")
        control = STEERING.search(line)
        if control is not None:
            raise UsageError(
                f"{name}: line {number} holds the control character U+{ord(control[0]):04X}, "
                "expected class names without any; take it out"
            )
    return lines


def read_labels(bundle: Bundle) -> list[str]:
    """A bundle's label of every class; "class 7" where it has none.

    Raises UsageError for a file that is damaged or breaks the rule, or has another number of names.
    """
    count = bundle.manifest.model.num_classes
    artifact = bundle.manifest.find("labels")
    if artifact is None:
        return [f"class {index}" for index in range(count)]
    name = str(bundle.path / artifact.file)
    labels = parse_labels(bundle.read(artifact), name)
    if len(labels) != count:
        raise UsageError(
            f"{name}: got {len(labels)} labels, expected {count}; export again with --labels"
        )
    return labels


def labels_for(file: Path | str | None, num_classes: int) -> list[str] | None:
    """One label a class: from the file given, or ImageNet-1k's for a network of 1000 classes."""
    if file is None:
        if num_classes != IMAGENET_CLASSES:
            return None
        return resources.files("rexdeploy").joinpath("data/imagenet1k.txt").read_text().splitlines()
    try:
        data = read_plain(Path(file), MAX_TEXT_BYTES)
    except OSError as error:
        raise UsageError(f"labels {file} cannot be read ({error.strerror})") from None
    labels = parse_labels(data, f"labels {file}")
    if len(labels) != num_classes:
        raise UsageError(
            f"labels {file}: got {len(labels)} lines, expected one for each of the "
            f"{num_classes} classes"
        )
    return labels
