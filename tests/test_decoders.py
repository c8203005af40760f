"""Image files that would keep a decoder busy, in Python and in C++: refused before it starts."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rexdeploy import arrays
from rexdeploy.errors import UsageError
from rexdeploy.images import decode, limits
from rexdeploy.images.limits import MAX_PIXELS, MAX_SCAN_PIXELS
from tests import hostile_images as hostile
from tests.cpp_probe import probe
from tests.helpers import ROOT, run_program
from tests.hostile_images import after_start, bare_jpeg, encoded, gradients, segment, with_scans


def _refusal(data: bytes) -> str:
    """Why Python refuses an image file; empty if it does not."""
    try:
        with decode.opened(data, "x") as image:
            decode.to_rgb(image)
    except UsageError as error:
        refusal = str(error).removeprefix("x: ")
    else:
        return ""
    assert len(refusal.splitlines()) == 1
    return refusal


def _pillows(data: bytes) -> arrays.UInt8:
    """The pixels as Pillow alone decodes them."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


# JPEG: many scans


def _photo(width: int = 400, height: int = 300) -> bytes:
    return encoded(gradients(width, height), "JPEG", progressive=True)


TOO_MUCH: dict[str, tuple[Callable[[], bytes], str]] = {
    "1500 scans": (lambda: with_scans(_photo(4000, 3000), 1500), "too many scans of 12000000"),
    "501 scans": (lambda: bare_jpeg(8, 8, 501), "more than 500 scans"),
    "90 scans": (lambda: bare_jpeg(4000, 3000, 90), "too many scans of 12000000 pixels"),
    "13 scans": (lambda: bare_jpeg(9459, 9459, 13), "too many scans of 89472681 pixels"),
    "1025 segments": (lambda: bare_jpeg(8, 8, 1, 1025), "more than 1024 segments"),
    "parts of EXIF": (
        lambda: after_start(_photo(), *65 * [segment(0xE1, b"Exif\0\0" + bytes(16))]),
        "EXIF in more than 64 parts",
    ),
    "comments": (
        lambda: after_start(_photo(), *300 * [segment(0xFE, bytes(65_000))]),
        "more than 16777216 bytes before its pixels",
    ),
    "33 texts": (lambda: hostile.png(9, 7, *hostile.packed_texts(33)), "more than 32 compressed"),
    "33 profiles": (lambda: hostile.png(9, 7, *hostile.profiles(33)), "more than 32 compressed"),
}
"""Of the formats that C++ reads too: how it is made, and what both say of it."""

WITHIN: dict[str, Callable[[], bytes]] = {
    "500 scans": lambda: with_scans(_photo(), 500 - _photo().count(b"\xff\xda")),
    "a progressive photograph": lambda: _photo(4000, 3000),
    "noise": lambda: encoded(hostile.noise(300, 200), "JPEG", quality=100, progressive=True),
    "restart markers": lambda: encoded(
        gradients(301, 203), "JPEG", progressive=True, restart_marker_blocks=1
    ),
    "planes apart": lambda: hostile.planes_apart(gradients(301, 203)),
    "a preview with many scans": lambda: after_start(
        _photo(), segment(0xE2, with_scans(_photo(40, 30), 600))
    ),
    "600 images in one file": lambda: 600 * _photo(40, 30),
    "1000 segments": lambda: after_start(_photo(), *1000 * [segment(0xFE, b"")]),
    "32 texts": lambda: hostile.png(9, 7, *hostile.packed_texts(32)),
    "32 profiles": lambda: hostile.png(9, 7, *hostile.profiles(1)),
}
"""Of the same formats: what both read to the same pixels as Pillow alone."""


@pytest.mark.parametrize("name", TOO_MUCH)
def test_too_much_work_is_refused(name: str) -> None:
    make, reason = TOO_MUCH[name]
    assert _refusal(make()).startswith(reason)


@pytest.mark.parametrize("name", WITHIN)
def test_what_looks_like_it_is_decoded(name: str, tmp_path: Path) -> None:
    data = WITHIN[name]()
    (tmp_path / "file").write_bytes(data)
    np.testing.assert_array_equal(decode.load(tmp_path / "file"), _pillows(data))


@pytest.mark.slow
def test_cpp_refuses_and_reads_the_same(tmp_path: Path) -> None:
    for name, (make, _) in TOO_MUCH.items():
        (tmp_path / name).write_bytes(make())
    lines = probe("decode", [(tmp_path / "out", tmp_path / name) for name in TOO_MUCH], "sanitized")
    for line, name in zip(lines, TOO_MUCH, strict=True):
        assert line == f"error: {tmp_path / name}: {_refusal((tmp_path / name).read_bytes())}"
    for name, whole in WITHIN.items():
        (tmp_path / name).write_bytes(whole())
    lines = probe("decode", [(tmp_path / f"{name}.rgb", tmp_path / name) for name in WITHIN])
    for line, name in zip(lines, WITHIN, strict=True):
        wanted = _pillows((tmp_path / name).read_bytes())
        assert line == f"{wanted.shape[1]} {wanted.shape[0]}", name
        got = np.fromfile(tmp_path / f"{name}.rgb", np.uint8).reshape(wanted.shape)
        np.testing.assert_array_equal(got, wanted, err_msg=name)


def test_scans_are_counted_at_the_limits() -> None:
    for width, height, most in ((8, 8, 500), (4000, 3000, 89), (9459, 9459, 12), (1, 65535, 500)):
        assert most == 500 or (most + 1) * width * height > MAX_SCAN_PIXELS
        limits.check(bare_jpeg(width, height, most))
        with pytest.raises(UsageError, match="scans"):
            limits.check(bare_jpeg(width, height, most + 1))


def test_scans_of_a_jpeg_within_a_tiff_are_counted_too() -> None:
    jpeg = encoded(gradients(400, 300).convert("L"), "JPEG", progressive=True)
    assert _refusal(hostile.jpeg_tiff(jpeg, 400, 300)) == ""
    assert "cannot be decoded" in _refusal(hostile.jpeg_tiff(with_scans(jpeg, 20), 400, 300))


# Other bombs


MUCH_MORE: dict[str, tuple[Callable[[], bytes], str]] = {
    "padding": (
        lambda: after_start(_photo(), segment(0xFE, b""), bytes(2**20)),
        "it is in more than 524288 pieces",
    ),
    "comments": (lambda: hostile.gif_of_blocks(2**18), "it is in more than 524288 pieces"),
    "packed bmp": (lambda: hostile.packed_bmp(4097, 4096), "a compressed BMP of 16781312 pixels"),
    "one large tile": (
        lambda: hostile.grey_tiff(64, 64, (322, 4, 1, 8192), (323, 4, 1, 8192)),
        "tiles of 8192 x 8192 pixels and an image of 64 x 64 are too large",
    ),
    "many wide tiles": (
        lambda: hostile.grey_tiff(900, 2000, (322, 4, 1, 100_000), (323, 4, 1, 16)),
        "tiles of 100000 x 16 pixels",
    ),
    "a tile said twice": (
        lambda: hostile.grey_tiff(
            64, 64, (322, 4, 1, 8192), (322, 4, 1, 16), (323, 4, 1, 8192), (323, 4, 1, 16)
        ),
        "tiles of 8192 x 8192 pixels",
    ),
    "directory": (
        lambda: hostile.grey_tiff(8, 8, *[(40_000 + n, 4, 1, 0) for n in range(1025)]),
        "a directory of 1033 entries",
    ),
    "fractions": (
        lambda: hostile.grey_tiff(8, 8, (40_000, 5, 70_000, 8)),
        "more than 1048576 numbers beside its pixels",
    ),
    "directories in a ring": (
        lambda: hostile.grey_tiff(8, 8, (34665, 4, 1, 8)),
        "more than 8 directories",
    ),
    "the other byte order": (lambda: b"MM\0\x2b\0\x08\0\0" + bytes(99), "a BigTIFF of the other"),
}


@pytest.mark.parametrize("name", MUCH_MORE)
def test_other_bombs_are_refused(name: str) -> None:
    make, reason = MUCH_MORE[name]
    assert _refusal(make()).startswith(reason)


def test_pieces_are_counted_in_every_format(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = hostile.png(9, 7, 1000 * hostile.chunk(b"teSt", b""))
    assert _refusal(chunks) == ""
    monkeypatch.setattr(decode, "_MAX_READS", 2000)
    for data in (chunks, hostile.gif_of_blocks(1000), hostile.packed_bmp(300, 1000)):
        assert _refusal(data) == "it is in more than 2000 pieces; save it anew"


HARMLESS: dict[str, Callable[[], bytes]] = {
    "chunks": lambda: hostile.png(9, 7, 1000 * hostile.chunk(b"teSt", b"")),
    "comments": lambda: hostile.gif_of_blocks(1000),
    "packed bmp": lambda: hostile.packed_bmp(300, 200),
    "tiles": lambda: hostile.grey_tiff(64, 64, (322, 4, 1, 64), (323, 4, 1, 64)),
    "a tile larger than its image": lambda: hostile.grey_tiff(
        60, 60, (322, 4, 1, 64), (323, 4, 1, 64)
    ),
    "strips of one row": lambda: encoded(gradients(64, 3000), "TIFF", strip_size=1),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_the_same_in_ordinary_numbers_is_decoded(name: str) -> None:
    data = HARMLESS[name]()
    with decode.opened(data, "x") as image:
        np.testing.assert_array_equal(decode.to_rgb(image), _pillows(data))


@pytest.mark.parametrize("kind", ["PPM", "DDS", "SGI", "TGA", "JPEG2000", "ICO", "PCX"])
def test_formats_without_a_bound_are_not_read(kind: str) -> None:
    """A Pillow image of any format can still be given to `predict`'s Python interface."""
    data = encoded(hostile.noise(32, 32), kind)
    assert "give JPEG, PNG, WebP, GIF, BMP or TIFF" in _refusal(data)


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "sparse.png", "wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(UsageError, match=r"too large to decode safely \(limit 1073741824 bytes\)"):
        decode.load(tmp_path / "sparse.png")


def test_pillows_own_limit_may_be_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    data = hostile.png(10_000, 10_000, rows=b"")
    assert (
        _refusal(data) == f"too large to decode safely (10000 x 10000 pixels, limit {MAX_PIXELS})"
    )


def test_large_images_are_decoded_few_at_a_time() -> None:
    """Together they have no more pixels than one may have; small ones pass by."""
    inside: list[int] = []
    entered, leave = threading.Condition(), threading.Event()

    def hold(side: int) -> None:
        with decode.opened(hostile.png(side, side, rows=b""), "x"):
            with entered:
                inside.append(side)
                entered.notify_all()
            assert leave.wait(30)

    threads = [threading.Thread(target=hold, args=(side,)) for side in (6001, 5001, 8000, 100)]
    for thread in threads[:2]:
        thread.start()
    with entered:
        assert entered.wait_for(lambda: len(inside) == 2, 30)
    for thread in threads[2:]:
        thread.start()
    with entered:
        assert entered.wait_for(lambda: len(inside) == 3, 30)
        assert sorted(inside) == [100, 5001, 6001]
        assert not entered.wait_for(lambda: 8000 in inside, 0.3)
    leave.set()
    for thread in threads:
        thread.join(30)
    assert 8000 in inside


# What is admitted ends in time


def _admitted() -> dict[str, Callable[[], bytes]]:
    """Of every format, a file that keeps the decoder as busy as its limits allow (or nearly)."""
    side = 9459
    return {
        "jpeg": lambda: with_scans(_photo(1465, 1465), 490),
        "png": lambda: hostile.png(side, side, *hostile.profiles(32)),
        "webp": lambda: encoded(gradients(4000, 4000), "WEBP", quality=1),
        "gif": lambda: encoded(Image.new("L", (side, side)), "GIF"),
        "bmp": lambda: hostile.packed_bmp(4096, 4096),
        "tiff": lambda: hostile.grey_tiff(side, side),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp", "tiff"])
def test_the_worst_that_is_admitted_ends(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(_admitted()[kind]())
    code = (
        "import sys, pathlib; from rexdeploy.images import decode; "
        "from rexdeploy.bundle.manifest import Preprocess; "
        "print(decode.read(pathlib.Path(sys.argv[1]), Preprocess()).shape)"
    )
    done = run_program(sys.executable, "-c", code, tmp_path / "file", cwd=ROOT)
    assert (done.stdout, done.returncode) == ("(224, 224, 3)\n", 0), done.stderr
