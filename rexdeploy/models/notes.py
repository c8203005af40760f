"""What a checkpoint says of itself beside its weights: classes, width, image size."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import BinaryIO

import msgspec
import safetensors
import safetensors.torch
from torch import Tensor

from rexdeploy.bundle.labels import parse_labels
from rexdeploy.errors import UsageError

_KEY = "rexdeploy"
# One key, not one for each note: safetensors writes several in another order each time, and a
# training that goes on after a kill has to end in the same bytes.


@dataclass(frozen=True)
class Notes:
    """The notes that `finetune` writes; other checkpoints have none."""

    labels: tuple[str, ...]
    width: float
    image_size: int  # that it was trained at


def save_with_notes(state_dict: dict[str, Tensor], notes: Notes) -> bytes:
    """A safetensors file: the same bytes for the same weights and notes."""
    text = json.dumps(msgspec.to_builtins(notes), ensure_ascii=False)
    return safetensors.torch.save(state_dict, {_KEY: text})


def read_notes(file: BinaryIO, name: str, num_classes: int) -> Notes | None:
    """The notes of an open safetensors file of a network with so many classes; None: it has none.

    Raises UsageError for notes that cannot be: `name` begins the message.
    """
    with safetensors.safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt") as opened:
        text = (opened.metadata() or {}).get(_KEY)
    if text is None:
        return None
    try:
        notes = msgspec.json.decode(text, type=Notes)
    except (ValueError, msgspec.DecodeError) as error:
        raise UsageError(
            f"{name}: its notes under '{_KEY}' are not readable ({' '.join(str(error).split())}); "
            "give the file that finetune wrote, or save the weights without metadata"
        ) from None
    check_names(notes.labels, f"{name}: the labels in it")
    if len(notes.labels) != num_classes:
        raise UsageError(
            f"{name}: got {len(notes.labels)} labels in its notes, expected one for each of the "
            f"{num_classes} classes"
        )
    return notes


def check_names(names: tuple[str, ...], where: str) -> None:
    """Raises UsageError for names that a labels file could not hold: there is one rule."""
    try:
        data = "".join(f"{name}\n" for name in names).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: a name is not UTF-8 (character {error.start}); rename it"
        ) from None
    read = parse_labels(data, where)
    if read != list(names):  # a name with a line feed is two lines
        odd = next(name for name, line in zip(names, read, strict=False) if name != line)
        raise UsageError(
            f"{where}: the name {odd!r} holds a line break or a byte order mark; rename it"
        )
