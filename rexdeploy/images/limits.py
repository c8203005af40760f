"""What an image file may ask of a decoder, checked before the decoder sees any of it.

Limits of pixels alone leave minutes of work in a small file: a JPEG's pixels are decoded once for
every scan, a PNG's texts and profiles are unpacked, a TIFF's tiles may be larger than its image.
cpp/src/jpeg.cpp and cpp/src/png.cpp hold the same rules and numbers.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

from rexdeploy.errors import UsageError

MAX_BYTES = 2**30  # of a file: the largest image with 16 bits in four channels fits
MAX_PIXELS = 89_478_485  # Pillow's own
MAX_SCANS = 500
MAX_SCAN_PIXELS = 2**30  # scans times pixels: twelve scans of the largest image; usual are ten
MAX_SEGMENTS = 1024  # of a JPEG, beside its scans
MAX_METADATA = 2**24  # bytes before a JPEG's first scan
MAX_EXIF = 64  # parts of a JPEG's EXIF: for each, Pillow copies all before it
MAX_PACKED = 32  # of a PNG's chunks: each may unpack to a thousand times its size
MAX_ENTRIES = 1024  # of a directory of a TIFF
MAX_DIRECTORIES = 8
MAX_VALUES = 2**20  # of a TIFF's entries that are numbers, each an object in Python
MAX_TILE = 2**24  # pixels of a TIFF's tile, unless its image has more
_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd8-\xef\xfe]")  # all other markers have no content
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_IMAGE_START, _IMAGE_END, _SCAN, _APP1 = 0xD8, 0xD9, 0xDA, 0xE1
# A TIFF's types: bytes, text and undefined are one object however many, a fraction is a slow one.
_VALUE_COST = {1: 0, 2: 0, 7: 0, 5: 16, 10: 16}
_WHOLE_NUMBERS = {1: 1, 3: 2, 4: 4, 13: 4, 16: 8, 18: 8}  # bytes of each
_WIDTH, _LENGTH, _TILE_WIDTH, _TILE_LENGTH = 256, 257, 322, 323
_DIRECTORIES = (34665, 34853, 40965)  # of EXIF, of a position, and of EXIF's within it


def check(data: bytes) -> None:
    """Raises UsageError for an image file that would keep its decoder busy for more than seconds.

    What is no image, or a damaged one, is left to the decoder to refuse.
    """
    if data.startswith(b"\xff\xd8\xff"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data)
    elif data.startswith((b"II", b"MM")):
        _check_tiff(data)


def check_size(width: int, height: int) -> None:
    """Raises UsageError for an image of too many pixels."""
    if width * height > MAX_PIXELS:
        raise UsageError(
            f"too large to decode safely ({width} x {height} pixels, limit {MAX_PIXELS})"
        )


def _check_jpeg(data: bytes) -> None:
    """Counts segments and scans as libjpeg comes across them, up to the end of the first image.

    The pixels' own bytes hold no such marker (a 0xFF among them is followed by 0), and what an
    APP segment holds, such as a thumbnail, is passed over with it.
    """
    position, segments, parts, scans, pixels = 2, 0, 0, 0, 0
    while found := _SEGMENT.search(data, position):
        start, marker = found.end(), data[found.end() - 1]
        if marker in (_IMAGE_START, _IMAGE_END):
            return
        position = start + max(2, int.from_bytes(data[start : start + 2], "big"))
        if marker in _FRAMES:
            height = int.from_bytes(data[start + 3 : start + 5], "big")
            pixels = max(pixels, height * int.from_bytes(data[start + 5 : start + 7], "big"))
        if marker == _SCAN:
            scans += 1
        else:
            segments += 1
            parts += marker == _APP1 and data.startswith(b"Exif\0\0", start + 2)
        if scans > MAX_SCANS:
            raise UsageError(f"more than {MAX_SCANS} scans; save it anew")
        if scans * pixels > MAX_SCAN_PIXELS:
            raise UsageError(
                f"too many scans of {pixels} pixels (limit {MAX_SCAN_PIXELS} in all); save it anew"
            )
        if segments > MAX_SEGMENTS:
            raise UsageError(f"more than {MAX_SEGMENTS} segments; save it anew")
        if parts > MAX_EXIF:
            raise UsageError(f"EXIF in more than {MAX_EXIF} parts; save it anew")
        if scans == 0 and position > MAX_METADATA:
            raise UsageError(f"more than {MAX_METADATA} bytes before its pixels; save it anew")


def _check_png(data: bytes) -> None:
    position, packed = 8, 0
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        position += 12 + size
        packed += kind in (b"zTXt", b"iTXt", b"iCCP")
        if packed > MAX_PACKED:
            raise UsageError(f"more than {MAX_PACKED} compressed texts and profiles; save it anew")
        if kind == b"IEND":
            return


def _check_tiff(data: bytes) -> None:
    """Checks the first image's directory and those of EXIF: Pillow reads no others."""
    if data[3:4] == b"\x2b":
        raise UsageError("a BigTIFF of the other byte order; save it as a plain TIFF")
    tags = _Tiff(data).numbers()
    width, length = tags.get(_WIDTH, 0), tags.get(_LENGTH, 0)
    tile_width, tile_length = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)
    padded = (width + tile_width) * (length + tile_length)
    if tile_width * tile_length > max(width * length, MAX_TILE) or padded > 2 * MAX_PIXELS:
        raise UsageError(
            f"tiles of {tile_width} x {tile_length} pixels and an image of {width} x {length} are "
            "too large to decode safely; save it anew"
        )


class _Tiff:
    """The directories of a TIFF, as far as their sizes matter."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._order = "<" if data.startswith(b"II") else ">"
        self._is_big = data[2:3] == b"\x2b"
        self._values = 0

    def numbers(self) -> dict[int, int]:
        """The entries that are one whole number, by tag: the largest where there are several."""
        largest: dict[int, int] = {}
        try:
            pending = [*self._unpack("Q" if self._is_big else "L", 8 if self._is_big else 4)]
            for visited in range(MAX_DIRECTORIES + 1):
                if not pending:
                    break
                if visited == MAX_DIRECTORIES:
                    raise UsageError(f"more than {MAX_DIRECTORIES} directories; save it anew")
                for tag, number in self._entries(pending.pop()):
                    largest[tag] = max(number, largest.get(tag, 0))
                    if tag in _DIRECTORIES:
                        pending.append(number)
        except (struct.error, OverflowError):
            pass  # it ends too early, as the decoder will say
        return largest

    def _entries(self, offset: int) -> Iterator[tuple[int, int]]:
        """A directory's entries that are one whole number; counts all."""
        (count,) = self._unpack("Q" if self._is_big else "H", offset)
        if count > MAX_ENTRIES:
            raise UsageError(f"a directory of {count} entries (limit {MAX_ENTRIES}); save it anew")
        layout, first = ("HHQ8s", offset + 8) if self._is_big else ("HHL4s", offset + 2)
        step = struct.calcsize("=" + layout)
        for index in range(count):
            tag, kind, length, raw = self._unpack(layout, first + index * step)
            self._values += length * _VALUE_COST.get(kind, 1)
            if self._values > MAX_VALUES:
                raise UsageError(f"more than {MAX_VALUES} numbers beside its pixels; save it anew")
            size = _WHOLE_NUMBERS.get(kind)
            if length == 1 and size is not None:
                yield tag, int.from_bytes(raw[:size], "little" if self._order == "<" else "big")

    def _unpack(self, layout: str, offset: int) -> tuple[Any, ...]:
        return struct.unpack_from(self._order + layout, self._data, offset)
