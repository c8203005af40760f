"""Image files made to keep a decoder busy, or to look as if they were: bytes, by hand."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradients(width: int, height: int) -> Image.Image:
    """RGB pixels that differ, and compress well."""
    ramp = Image.linear_gradient("L").resize((width, height))
    round_ramp = Image.radial_gradient("L").resize((width, height))
    return Image.merge("RGB", (ramp, round_ramp, ramp.transpose(Image.Transpose.ROTATE_180)))


# JPEG


def with_scans(jpeg: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan comes `count` times more."""
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + count * jpeg[last:-2] + jpeg[-2:]


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def after_start(jpeg: bytes, *segments: bytes) -> bytes:
    """The JPEG with segments before all of its own."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def bare_jpeg(width: int, height: int, scans: int, segments: int = 0) -> bytes:
    """A JPEG of markers alone, which no decoder takes."""
    frame = segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0")
    scan = segment(0xDA, b"\1\1\0\0\0\0")
    comments = segments * segment(0xFE, b"")
    return b"\xff\xd8" + comments + frame + scans * (scan + b"\x55\xff\0\xff\xd0") + b"\xff\xd9"


def planes_apart(image: Image.Image) -> bytes:
    """A baseline JPEG with a scan for each of its three channels."""
    planes = [
        encoded(plane, "JPEG", quality=90, optimize=False)
        for plane in image.convert("YCbCr").split()
    ]
    first = planes[0]
    frame, scan = first.index(b"\xff\xc0"), first.index(b"\xff\xda")
    tables = first[first.index(b"\xff\xdb") : frame] + first[frame + 13 : scan]
    three = b"\1\x11\0\2\x11\0\3\x11\0"
    size = struct.pack(">BHHB", 8, image.height, image.width, 3)
    scans = b"".join(
        segment(0xDA, bytes([1, number, 0, 0, 63, 0])) + plane[plane.index(b"\xff\xda") + 10 : -2]
        for number, plane in enumerate(planes, 1)
    )
    return b"\xff\xd8" + tables + segment(0xC0, size + three) + scans + b"\xff\xd9"


# PNG


def chunk(kind: bytes, content: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc


def png(width: int, height: int, *extra: bytes, rows: bytes | None = None) -> bytes:
    """An RGB PNG of black rows, with `extra` chunks before them."""
    if rows is None:
        rows = bytes(height * (1 + 3 * width))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows, 1))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def packed_texts(count: int) -> list[bytes]:
    """Texts that unpack to a megabyte and end in an error, at which Pillow forgets their size."""
    bomb = zlib.compress(bytes(2**20 - 2**10))[:-4] + b"oops"
    return count * [chunk(b"zTXt", b"Comment\0\0" + bomb)]


def profiles(count: int) -> list[bytes]:
    return count * [chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(2**20 - 1)))]


# TIFF


def tiff(entries: Sequence[tuple[int, int, int, int]], *more: bytes) -> bytes:
    """A little-endian TIFF: entries (tag, type, count, value), then more bytes behind them."""
    body = struct.pack("<H", len(entries))
    for tag, kind, count, value in sorted(entries):
        body += struct.pack("<HHLL", tag, kind, count, value)
    return b"II*\0\x08\0\0\0" + body + bytes(4) + b"".join(more)


def after_entries(count: int) -> int:
    """Where the bytes behind so many entries lie."""
    return 8 + 2 + 12 * count + 4


def grey_tiff(width: int, height: int, *extra: tuple[int, int, int, int]) -> bytes:
    """One strip (or tile, by `extra`) of deflated zeros."""
    data = zlib.compress(bytes(max(width * height, 64 * 64)))
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 8)]
    entries += [(262, 3, 1, 1), (277, 3, 1, 1), *extra]
    where = after_entries(len(entries) + 2)
    is_tiled = any(tag == 322 for tag, *_ in extra)
    entries += [(324 if is_tiled else 273, 4, 1, where)]
    entries += [(325 if is_tiled else 279, 4, 1, len(data))]
    return tiff(entries, data)


def jpeg_tiff(jpeg: bytes, width: int, height: int) -> bytes:
    """A TIFF whose one strip is a grey JPEG."""
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 7)]
    entries += [(262, 3, 1, 1), (277, 3, 1, 1), (278, 4, 1, height)]
    where = after_entries(len(entries) + 2)
    return tiff([*entries, (273, 4, 1, where), (279, 4, 1, len(jpeg))], jpeg)


# GIF and BMP


def gif_of_blocks(count: int) -> bytes:
    """A comment in pieces of one byte, before the image."""
    gif = encoded(Image.new("L", (4, 4)), "GIF")
    start = 13 + (3 << (gif[10] & 7) + 1 if gif[10] & 128 else 0)
    return gif[:start] + b"!\xfe" + count * b"\1x" + b"\0" + gif[start:]


def packed_bmp(width: int, height: int) -> bytes:
    """Rows of which one pixel is given; Pillow fills up the rest in Python."""
    palette = b"".join(bytes([n, 0, 0, 0]) for n in range(256))
    rows = height * b"\1\1\0\0" + b"\0\1"
    header = struct.pack("<LllHHLLllLL", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    start = 14 + len(header) + len(palette)
    return struct.pack("<2sLHHL", b"BM", start + len(rows), 0, 0, start) + header + palette + rows


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
