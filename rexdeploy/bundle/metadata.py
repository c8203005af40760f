"""What an ONNX graph's metadata says of its preprocessing, held against what its manifest says.

Without onnx, which a serving machine lacks, and without ONNX Runtime, which one with an engine may
lack: the few fields are read from the file's own encoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from rexdeploy.bundle.manifest import Artifact, Preprocess
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import UsageError

_METADATA = 14  # metadata_props of onnx.ModelProto, an entry each: 1 is its key, 2 its value
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5  # how protobuf encodes a field
_MOST_FIELDS = 100_000  # of a model beside its graph: entries of metadata, operator sets, functions


def check_preprocess(bundle: Bundle, graph: Artifact, data: bytes) -> None:
    """Raises UsageError if the manifest's preprocessing is not the one that its graph was made for.

    `data` is the graph's file. A graph that says nothing (somebody's own) may have any.
    """
    told = preprocess_of(read_metadata(data, graph.file), graph.file)
    if told not in (None, bundle.manifest.model.preprocess):
        raise UsageError(
            f"{bundle.path}: the manifest's preprocessing is not that of {graph.file}; "
            f"make it again: {graph.command or 'rexdeploy export'}"
        )


def preprocess_of(metadata: Mapping[str, str], name: str) -> Preprocess | None:
    """What a graph says that it was made for; raises UsageError where that is damaged."""
    written = metadata.get("rexdeploy.preprocess")
    try:
        return None if written is None else msgspec.json.decode(written, type=Preprocess)
    except msgspec.MsgspecError as error:
        raise UsageError(
            f"{name}: its metadata rexdeploy.preprocess is damaged ({error}); export it again"
        ) from None


def read_metadata(model: bytes, name: str) -> dict[str, str]:
    """The metadata of a serialised ONNX model; raises UsageError for what is no such file."""
    try:
        entries = [dict(_fields(value)) for number, value in _fields(model) if number == _METADATA]
        return {
            bytes(entry.get(1, b"")).decode(): bytes(entry.get(2, b"")).decode()
            for entry in entries
        }
    except (ValueError, IndexError):  # UnicodeDecodeError is a ValueError
        raise UsageError(f"{name} is not a readable ONNX model; export it again") from None


def _fields(message: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and value of every field of a protobuf message that is text, bytes or a message.

    Raises ValueError or IndexError where the bytes are none.
    """
    data = memoryview(message)
    place = 0
    for _ in range(_MOST_FIELDS):
        if place == len(data):
            return
        tag, place = _varint(data, place)
        size = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(tag & 7, 0)
        if tag & 7 == _VARINT:
            _, place = _varint(data, place)
        elif tag & 7 == _BYTES:
            size, place = _varint(data, place)
            yield tag >> 3, data[place : place + size]
        elif not size:
            raise ValueError(f"field type {tag & 7}")
        place += size
        if place > len(data):
            raise ValueError("cut off")
    raise ValueError("too many fields")


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """A number of 7 bits a byte, lowest first, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number of more than 10 bytes")
