"""The C++ runtime: its logits, pixels and output are Python's, and nothing makes it crash."""

from __future__ import annotations

import io
import os
import random
import re
import struct
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import PIL
import pytest
from PIL import Image

from rexdeploy import machine
from rexdeploy.bundle.manifest import Preprocess, to_json
from rexdeploy.bundle.store import Bundle, sha256
from rexdeploy.errors import UsageError
from rexdeploy.images import decode, sets
from rexdeploy.inference.classifier import load
from tests.helpers import ROOT, entry, run_cli, run_program
from tests.hostile_images import chunk
from tests.mutations import mutated, mutated_png
from tests.test_triton import with_labels

pytestmark = pytest.mark.slow

BUILD = ROOT / "cpp" / "build"
TENSORRT = "TENSORRT_INCLUDE_DIR"


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Programs:
    """The programs of one build, and the environment that they find their libraries with."""

    folder: Path
    env: dict[str, str]

    def run(self, name: str, *arguments: str | Path, env: dict[str, str] | None = None) -> Answer:
        program, env = self.folder / f"rexdeploy-{name}", {**self.env, **(env or {})}
        done = run_program(program, *arguments, env=env, errors="replace")
        return Answer(done.returncode, done.stdout, done.stderr)

    def probe(self, command: str, calls: Sequence[Sequence[str | Path]]) -> list[str]:
        """One line for each call; a crash or a sanitizer's report fails the test."""
        answer = self.run("probe", command, *(argument for call in calls for argument in call))
        assert answer.code == 0, answer.err
        assert answer.err == ""
        lines = answer.out.splitlines()
        assert len(lines) == len(calls)
        return lines

    def refused(self, *arguments: str | Path, env: dict[str, str] | None = None) -> str:
        """What `rexdeploy-run` says: one line, exit code 2, nothing on stdout."""
        answer = self.run("run", *arguments, env=env)
        assert answer.code == 2, answer
        assert answer.out == ""
        lines = answer.err.splitlines()
        assert len(lines) == 1, answer.err
        assert lines[0].startswith("error: ")
        return lines[0]


@pytest.fixture(scope="session")
def built() -> None:
    """Both builds; skipped where this machine cannot make them."""
    done = run_program(ROOT / "scripts" / "cpp_build.sh", timeout=None)
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr


def _programs(name: str) -> Programs:
    capi = Path(ort.__file__).parent / "capi"
    env = {"REXDEPLOY_ONNXRUNTIME": str(next(capi.glob("libonnxruntime.so.1*")))}
    return Programs(BUILD / name, env)


@pytest.fixture(scope="session")
def release(built: None) -> Programs:
    return _programs("release")


@pytest.fixture(scope="session")
def sanitized(built: None) -> Programs:
    """Leaks are reported too."""
    return _programs("sanitized")


def test_the_unit_tests_pass_under_the_sanitizers(sanitized: Programs) -> None:
    answer = sanitized.run("tests")
    assert answer.code == 0, answer.out + answer.err


# The same numbers


def _outputs(programs: Programs, bundle: Path, pool: np.ndarray[Any, Any], out: Path) -> Any:
    raw = out.with_suffix(".raw")
    raw.write_bytes(pool.tobytes())
    assert programs.probe("outputs", [(out, bundle, "0", raw)]) == ["onnxruntime"]
    return np.fromfile(out, np.float32).reshape(len(pool), -1)


def test_logits_are_pythons_bit_for_bit(
    release: Programs, v1_original: Bundle, tmp_path: Path
) -> None:
    """18 images are one more than a whole chunk and one."""
    pool = sets.synthetic(18, v1_original.manifest.model.preprocess, seed=3)
    for count in (1, 18):
        got = _outputs(release, v1_original.path, pool[:count], tmp_path / "logits")
        with load(v1_original, "onnxruntime") as classifier:
            np.testing.assert_array_equal(got, classifier.logits(pool[:count]))


def test_logits_are_the_same_under_the_sanitizers(
    sanitized: Programs, small_v1_original: Bundle, tmp_path: Path
) -> None:
    pool = sets.synthetic(2, small_v1_original.manifest.model.preprocess, seed=4)
    got = _outputs(sanitized, small_v1_original.path, pool, tmp_path / "logits")
    with load(small_v1_original, "onnxruntime") as classifier:
        np.testing.assert_array_equal(got, classifier.logits(pool))


def test_bytes_in_and_probabilities_out(
    release: Programs,
    small_v1_original: Bundle,
    small_pixels_original: Bundle,
    photos: Path,
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    got = _outputs(release, small_pixels_original.path, pool, tmp_path / "probabilities")
    with load(small_pixels_original, "onnxruntime") as classifier:
        np.testing.assert_array_equal(got, classifier.run(pool))

    # No second softmax.
    arguments: list[str | Path] = [*sets.find(photos), "--backend", "onnxruntime"]
    answer = release.run("run", small_pixels_original.path, *arguments)
    expected = run_cli("predict", *arguments, "--bundle", small_pixels_original.path, cwd=tmp_path)
    assert answer.out == expected.out
    same = release.run("run", small_v1_original.path, *arguments)
    labels = [[line.split()[-1] for line in text.splitlines()] for text in (answer.out, same.out)]
    assert labels[0] == labels[1]


SIZES = [
    (1, 1), (1, 100), (100, 1), (2, 3), (223, 224), (224, 224), (225, 223), (256, 256),
    (257, 255), (13, 900), (901, 17), (640, 427), (427, 640), (1031, 769), (50, 2477), (333, 334),
    (2003, 1499), (187, 2999), (509, 1801), (600, 1500),
]  # fmt: skip


@pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="before 13.0, Pillow resized tall images else"
)
@pytest.mark.parametrize(
    "spec",
    [
        Preprocess(),
        Preprocess(interpolation="bilinear"),
        Preprocess(height=97, width=131, crop_pct=0.91, mean=(0.1, 0.5, 0.9), std=(0.3, 0.7, 1.3)),
        Preprocess(height=320, width=288, crop_pct=1.0, interpolation="bilinear"),
    ],
)
def test_preprocessing_is_pillows_bit_for_bit(
    release: Programs, small_v1_original: Bundle, spec: Preprocess, tmp_path: Path
) -> None:
    manifest = small_v1_original.manifest
    manifest = replace(manifest, model=replace(manifest.model, preprocess=spec))
    (tmp_path / "manifest.json").write_bytes(to_json(manifest))
    rng = np.random.default_rng(1)
    calls, expected = [], []
    for width, height in SIZES:
        # Noise reaches the resampler's overshoots on both sides.
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        file = tmp_path / f"{width}x{height}.png"
        image.save(file, compress_level=1)
        calls.append((tmp_path / f"{file.stem}.f32", tmp_path / "manifest.json", file))
        expected.append(decode.normalise(decode.crop(image, spec), spec))
    assert set(release.probe("preprocess", calls)) == {"ok"}
    for call, wanted in zip(calls, expected, strict=True):
        got = np.fromfile(call[0], np.float32).reshape(wanted.shape)
        np.testing.assert_array_equal(got, wanted, err_msg=call[2].stem)


# The same pixels


def _png(width: int, height: int, bits: int, colours: int, *extra: bytes, laced: int = 0) -> bytes:
    """A PNG of any kind, which Pillow cannot write: random rows, `extra` chunks before them."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]
    rng = np.random.default_rng(bits + colours)
    rows = b""
    for left, top, across, down in ADAM7 if laced else [(0, 0, 1, 1)]:
        columns = len(range(left, width, across))
        size = (columns * bits * samples + 7) // 8
        for _ in range(top, height, down) if columns else ():
            rows += b"\0" + rng.integers(0, 256, size, np.uint8).tobytes()
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, laced)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    head, data, end = (chunk(name, content) for name, content in chunks)
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + data + end


ADAM7 = [
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)
]  # fmt: skip
"""Of an interlaced PNG's passes: first column and row, and the steps to the next."""


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _samples() -> Iterator[tuple[str, bytes]]:
    """Every kind of JPEG and PNG, by name."""
    rng = np.random.default_rng(2)
    noise = Image.fromarray(rng.integers(0, 256, (45, 67, 3), dtype=np.uint8))
    photo = noise.resize((131, 77), Image.Resampling.BICUBIC)
    for quality, subsampling, progressive in ((90, 0, 0), (75, 2, 0), (60, 1, 1), (95, 2, 1)):
        options = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
        yield f"rgb-{quality}-{subsampling}.jpg", _encoded(photo, "JPEG", **options)
    yield "restarts.jpg", _encoded(photo, "JPEG", restart_marker_blocks=2)
    yield "grey.jpg", _encoded(photo.convert("L"), "JPEG")
    cmyk = _encoded(photo.convert("CMYK"), "JPEG", quality=95)
    adobe = cmyk.index(b"\xff\xee\0\x0eAdobe")
    yield "cmyk.jpg", cmyk
    yield "ycck.jpg", cmyk[: adobe + 15] + b"\2" + cmyk[adobe + 16 :]
    yield "cmyk-unmarked.jpg", cmyk[:adobe] + cmyk[adobe + 16 :]
    yield "kept-rgb.jpg", _encoded(photo, "JPEG", keep_rgb=True)
    yield "tiny.jpg", _encoded(photo.resize((1, 1)), "JPEG")
    for orientation in range(10):
        yield f"turned-{orientation}.jpg", _encoded(photo, "JPEG", exif=_exif(orientation))
        yield f"turned-{orientation}.png", _encoded(noise, "PNG", exif=_exif(orientation))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6"/></x:xmpmeta>'
    yield "xmp.jpg", _encoded(photo, "JPEG", xmp=xmp)
    block = b"Exif\0\0" + _exif(6).tobytes()
    hexadecimal = textwrap.fill(block.hex(), 72)
    profile = f"\nexif\n{len(block):8}\n{hexadecimal}\n".encode()  # as ImageMagick writes it
    text = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile))
    yield "raw-profile.png", _png(9, 7, 8, 2, text)
    yield "no-end.png", _png(9, 7, 8, 2)[:-12]
    yield "xmp.png", _png(9, 7, 8, 2, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        yield f"{mode}.png", _encoded(noise.convert(mode), "PNG")
    yield "transparent.png", _encoded(noise.convert("P"), "PNG", transparency=3)
    for colours, all_bits in {0: (1, 2, 4, 8, 16), 2: (8, 16), 4: (8, 16), 6: (8, 16)}.items():
        for bits in all_bits:
            yield f"{colours}-{bits}.png", _png(21, 13, bits, colours)
            yield f"laced-{colours}-{bits}.png", _png(21, 13, bits, colours, laced=1)
    palette = chunk(b"PLTE", bytes(range(3 * 3)))  # fewer colours than the pixels name
    for bits in (2, 4, 8):
        yield f"palette-{bits}.png", _png(21, 13, bits, 3, palette)
    yield "key.png", _png(21, 13, 8, 0, chunk(b"tRNS", b"\0\x05"))
    frames = [noise, noise.transpose(Image.Transpose.ROTATE_180)]
    yield "animated.png", _encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])


def test_decoded_pixels_are_pillows(
    release: Programs, sanitized: Programs, photos: Path, tmp_path: Path
) -> None:
    with Image.open(sets.find(photos)[0]) as photo:
        photo.save(tmp_path / "photo.jpg", quality=88)
    for name, data in _samples():
        (tmp_path / name).write_bytes(data)
    files = sorted(tmp_path.iterdir())
    assert len(files) > 50
    calls = [(tmp_path / f"{file.name}.rgb", file) for file in files]
    for programs in (release, sanitized):
        lines = programs.probe("decode", calls)
        for (raw, file), line in zip(calls, lines, strict=True):
            wanted = np.asarray(decode.load(file))
            assert line == f"{wanted.shape[1]} {wanted.shape[0]}", file.name
            got = np.fromfile(raw, np.uint8).reshape(wanted.shape)
            np.testing.assert_array_equal(got, wanted, err_msg=file.name)


# The same output


def test_run_prints_what_predict_prints(
    release: Programs, small_v1_original: Bundle, photos: Path, tmp_path: Path
) -> None:
    paths = sets.find(photos)
    common = ("--backend", "onnxruntime", "--top", "3")
    answer = release.run("run", small_v1_original.path, *paths, *common)
    expected = run_cli("predict", *paths, "--bundle", small_v1_original.path, *common, cwd=tmp_path)
    assert (answer.code, answer.out, answer.err) == (0, expected.out, "")
    (tmp_path / "empty.png").touch()
    mixed = [tmp_path / "gone.png", paths[0], tmp_path / "empty.png", paths[1], paths[0]]
    answer = release.run("run", small_v1_original.path, *mixed, *common)
    expected = run_cli("predict", *mixed, "--bundle", small_v1_original.path, *common, cwd=tmp_path)
    assert (answer.code, answer.out) == (expected.code, expected.out)
    assert answer.code == 2
    starts = [line.rpartition(": ")[0] for line in answer.err.splitlines()]
    assert starts == [f"error: {mixed[0]}", f"error: {mixed[2]}"]
    answer = release.run("run", small_v1_original.path, f"{photos}/.//{paths[0].name}", *common)
    assert answer.out.splitlines()[1] == str(paths[0])
    answer = release.run("run", small_v1_original.path, *paths)
    assert answer.err.startswith("passed over: fp16.rtx-sm89.engine on tensorrt-rtx: ")
    assert release.run("run", small_v1_original.path, paths[0], "--quiet").out == ""
    assert "--help: no such file" in release.run("run", small_v1_original.path, "--", "--help").err


def test_labels_are_pythons(release: Programs, small_v1: Bundle, photos: Path) -> None:
    """Both kinds of line ends, a byte order mark, and more than ASCII."""
    names = [f"{'äß犬 '[n % 4]}{n}" for n in range(37)]
    text = "\ufeff" + "".join(name + ["\n", "\r\n"][index % 2] for index, name in enumerate(names))
    bundle = with_labels(small_v1, text.encode())
    photo = sets.find(photos)[0]
    answer = release.run("run", bundle.path, photo, "--top", "99", "--backend", "onnxruntime")
    with load(bundle, "onnxruntime") as classifier:
        expected = [item.label for item in classifier.classify([photo], 99)[0]]
    assert sorted(expected) == sorted(names)
    assert [line.split("%  ")[1] for line in answer.out.splitlines()[2:]] == expected


_CONTROLS = [
    text.encode() for text in ("a\x85", "\x9b31m", "\u2028", "\u202e", "b\u2066", "\ufeff")
]


def test_labels_that_python_refuses_are_refused(sanitized: Programs, small_v1: Bundle) -> None:
    """Whatever the defect: the same line of the file is named, and the same reason."""
    good = [f"name {n}".encode() for n in range(37)]
    for defect in (b"", b"  ", b"a\0", b"\x1b[2J", b"\t", b"a\rb", b"\x7f", *_CONTROLS):
        data = b"\n".join([*good[:4], defect, *good[5:]]) + b"\n"
        bundle = with_labels(small_v1, data)
        with pytest.raises(UsageError) as refusal:
            load(bundle)
        assert "line 5 " in str(refusal.value)
        assert str(refusal.value) in sanitized.refused(bundle.path, "a.png")
    for data in (b"", b"\xef\xbb\xbf", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"a\xe2\x80"):
        bundle = with_labels(small_v1, data)
        with pytest.raises(UsageError, match="UTF-8|is empty"):
            load(bundle)
        refused = sanitized.refused(bundle.path, "a.png")
        assert "is not UTF-8 text" in refused or "is empty" in refused


def test_an_edited_preprocessing_is_refused(
    sanitized: Programs, small_v1: Bundle, photos: Path
) -> None:
    file = small_v1.path / "manifest.json"
    for old, new in (("0.229", "0.228"), ('"bicubic"', '"bilinear"'), ("0.875", "0.876")):
        before = file.read_text()
        file.write_text(before.replace(old, new))
        refused = sanitized.refused(small_v1.path, sets.find(photos)[0])
        assert "the manifest's preprocessing is not that of the graph; make it again" in refused
        file.write_text(before)


def test_bench_prints_percentiles(release: Programs, small_v1_original: Bundle) -> None:
    arguments = ("--rounds", "3", "--threads", "1", "--batch", "2", "--backend", "onnxruntime")
    answer = release.run("bench", small_v1_original.path, *arguments)
    assert answer.code == 0, answer.err
    first, second = answer.out.splitlines()
    assert first == "rexnet 0.3 on onnxruntime, batch 2, 3 rounds"
    numbers = [float(part.split()[-2]) for part in second.split(",")]
    assert numbers[0] <= numbers[1] <= numbers[2]
    assert numbers[3] == pytest.approx(2000 / numbers[0], rel=0.01)


# What is wrong is refused in one line, under the sanitizers


def test_wrong_arguments_are_refused(sanitized: Programs, small_v1_original: Bundle) -> None:
    bundle = small_v1_original.path
    assert "expected a bundle's folder" in sanitized.refused(bundle)
    assert "no such option: --tops" in sanitized.refused(bundle, "a.png", "--tops", "1")
    assert "needs a value" in sanitized.refused(bundle, "a.png", "--top")
    assert "got '0', expected a number from 1" in sanitized.refused(bundle, "a.png", "--top=0")
    wrong = sanitized.refused(bundle, "a.png", "--backend", "cuda")
    assert "backend: got 'cuda', expected one of auto" in wrong
    absent = sanitized.refused(bundle, "a.png", "--backend", "tensorrt")
    assert "holds no file for backend tensorrt" in absent


def test_unusable_images_are_refused(
    sanitized: Programs, small_v1_original: Bundle, photos: Path, tmp_path: Path
) -> None:
    photo = sets.find(photos)[0].read_bytes()
    with Image.open(io.BytesIO(photo)) as opened:
        jpeg = _encoded(opened, "JPEG")
        gif = _encoded(opened.convert("P"), "GIF")
        progressive = _encoded(opened.resize((16, 16)), "JPEG", progressive=True)
    huge_jpeg = jpeg.replace(struct.pack(">BHH", 8, 427, 640), struct.pack(">BHH", 8, 30000, 30000))
    header = struct.pack(">IIBBBBB", 30000, 30000, 1, 0, 0, 0, 0)
    huge_png = photo[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    hostile = {
        "empty.png": (b"", ": not an image"),
        "text.jpg": (b"hello", ": not an image"),
        "a.gif": (gif, "give JPEG or PNG"),
        "huge.png": (huge_png, "too large to decode safely"),
        "huge.jpg": (huge_jpeg, "too large to decode safely"),
        "scans.jpg": (progressive[:-2] + 600 * scan + progressive[-2:], "more than 500 scans"),
        "short.png": (photo[: len(photo) // 2], "cannot be decoded"),
        "short.jpg": (jpeg[: len(jpeg) // 2], "cannot be decoded"),
        "magic.png": (photo[:8], "cannot be decoded"),
        "magic.jpg": (jpeg[:3], "cannot be decoded"),
        "no-rows.png": (_png(9, 9, 8, 2).replace(b"IDAT", b"iDAT"), "cannot be decoded"),
        "no-palette.png": (_png(9, 9, 8, 3), "cannot be decoded"),
        "gone.png": (None, "no such file"),
        ".": (None, "Is a directory"),
    }
    for name, (data, _) in hostile.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
    with open(tmp_path / "sparse.jpg", "wb") as sparse:
        sparse.truncate(2**40)
    hostile["sparse.jpg"] = (None, "too large to decode safely (limit 1073741824 bytes)")
    calls = [(tmp_path / "out", tmp_path / name) for name in hostile]
    for line, (name, (_, reason)) in zip(
        sanitized.probe("decode", calls), hostile.items(), strict=True
    ):
        assert line.startswith("error: "), name
        assert str(tmp_path / name) in line
        assert reason in line

    Image.new("RGB", (101, 1)).save(tmp_path / "thin.png")
    line = sanitized.refused(small_v1_original.path, tmp_path / "thin.png", "--backend=onnxruntime")
    assert f"{tmp_path / 'thin.png'}: an image of 101 x 1 pixels is too thin" in line


def test_the_most_texts_that_are_read_fit_in_memory(release: Programs, tmp_path: Path) -> None:
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 7_900_000))
    (tmp_path / "bomb.png").write_bytes(_png(9, 7, 8, 2, *[text] * 32))
    # From a small process: what this one holds would count as its child's.
    measure = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    program, out = release.folder / "rexdeploy-probe", tmp_path / "out"
    command: list[str | Path] = [
        sys.executable,
        "-c",
        measure,
        program,
        "decode",
        out,
        tmp_path / "bomb.png",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "9 7" in done.stdout.splitlines()
    assert int(done.stdout.splitlines()[-1]) < 500_000  # KiB


def test_damaged_bundles_are_refused(
    sanitized: Programs, small_v1: Bundle, photos: Path, tmp_path: Path
) -> None:
    photo = sets.find(photos)[0]
    graph = entry(small_v1, "fp32.onnx")
    file, manifest = small_v1.path / graph.file, small_v1.path / "manifest.json"
    good, document = file.read_bytes(), manifest.read_text()

    def refused() -> str:
        return sanitized.refused(small_v1.path, photo, "--backend", "onnxruntime")

    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert "fp32.onnx is not the file the manifest describes" in refused()
    file.unlink()
    assert "fp32.onnx cannot be read (No such file or directory); make it again" in refused()
    os.mkfifo(file)
    assert "fp32.onnx cannot be read (Invalid argument)" in refused()
    file.unlink()
    garbage = b"not onnx at all"
    file.write_bytes(garbage)
    manifest.write_text(document.replace(graph.sha256, sha256(garbage)))
    assert "fp32.onnx: not an ONNX model that onnxruntime can load (" in refused()
    file.write_bytes(good)
    changes = {
        '"num_classes": 37': ('"num_classes": 36', "the model maps [-1, 3, 64, 64] to [-1, 37]"),
        '"height": 64': ('"height": 65', "expected [-1, 3, 65, 64]"),
        '"file": "fp32.onnx"': ('"file": "../fp32.onnx"', "is not a plain name inside"),
        '"format": 1': ('"format": 2', "got manifest format 2, this program reads 1"),
        '"family": "rexnet"': ('"family": "resnet"', "'family' has the unknown value 'resnet'"),
        '"crop_pct": 0.875': ('"crop_pct": 0.0', "'crop_pct' is not a usable number"),
        '"model"': ('"\x01', "is not a readable manifest"),
    }
    for old, (new, reason) in changes.items():
        assert old in document
        manifest.write_text(document.replace(old, new, 1))
        assert reason in refused()
    manifest.write_text(document)
    (small_v1.path / ".manifest.commit").write_text(document)
    assert "unfinished work of a killed command: finish it with any rexdeploy" in refused()
    assert "is not a bundle" in sanitized.refused(tmp_path / "nowhere", photo)
    manifest.unlink()
    (small_v1.path / ".manifest.commit").unlink()
    assert "is not a bundle" in refused()


def test_libraries_that_are_missing_or_wrong_are_named(
    sanitized: Programs, small_v1_original: Bundle, photos: Path, tmp_path: Path
) -> None:
    photo = sets.find(photos)[0]
    (tmp_path / "text.so").write_text("no library")
    # As a library of long ago answers.
    _compile(
        'static const char* version() { return "1.9.0"; }\n'
        "static const void* base[] = {nullptr, (void*)version};\n"
        'extern "C" const void* OrtGetApiBase() { return base; }\n',
        tmp_path / "old.so",
    )
    for library, reason in {
        str(tmp_path / "old.so"): "got ONNX Runtime 1.9.0 (",
        "/nowhere/libonnxruntime.so": "No such file or directory); set REXDEPLOY_ONNXRUNTIME",
        str(tmp_path / "text.so"): "cannot be loaded (",
        "libm.so.6": "the library libm.so.6 has no function OrtGetApiBase",
    }.items():
        env = {"REXDEPLOY_ONNXRUNTIME": library}
        arguments = (small_v1_original.path, photo, "--backend", "onnxruntime")
        assert reason in sanitized.refused(*arguments, env=env)


# Random damage


def test_random_damage_does_no_harm(
    sanitized: Programs, small_v1_original: Bundle, tmp_path: Path
) -> None:
    rng = random.Random(0)
    samples = [(name, data) for name, data in _samples() if "-0" not in name]
    decoded = []
    for index in range(800):
        name, data = samples[index % len(samples)]
        damage: Callable[[bytes, random.Random], bytes] = mutated
        if name.endswith(".png") and index % 5:
            damage = mutated_png
        file = tmp_path / f"{index}-{name}"
        file.write_bytes(damage(data, rng))
        decoded.append((tmp_path / "out", file))
    lines = sanitized.probe("decode", decoded)
    refused = sum(line.startswith("error: ") for line in lines)
    assert 100 < refused < 700  # neither all of it was harmless, nor none

    document = (small_v1_original.path / "manifest.json").read_bytes()
    manifests = []
    for index in range(300):
        file = tmp_path / f"{index}.json"
        file.write_bytes(mutated(document, rng))
        manifests.append((file,))
    lines = sanitized.probe("manifest", manifests)
    assert 50 < sum(line.startswith("error: ") for line in lines) < 300


def _compile(source: str, library: Path) -> None:
    command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)


# TensorRT, as far as a machine without a GPU goes


@pytest.fixture
def with_tensorrt(sanitized: Programs) -> Programs:
    if not os.environ.get(TENSORRT):
        pytest.skip(f"built without TensorRT: {TENSORRT} is not set")
    libraries = pytest.importorskip("tensorrt_rtx_libs", reason="TensorRT-RTX is not installed")
    library = Path(libraries.__path__[0]) / "libtensorrt_rtx.so.1"
    return replace(sanitized, env=sanitized.env | {"REXDEPLOY_TENSORRT_RTX": str(library)})


def test_engines_that_cannot_be_loaded_are_explained(
    with_tensorrt: Programs, small_v1: Bundle, photos: Path
) -> None:
    """Among them a good one: this machine has no GPU."""
    if machine.detect() is not None:
        pytest.skip("this machine has a GPU")
    engine = entry(small_v1, "fp16.rtx-sm89.engine")
    good = small_v1.read(engine)
    said = "the engine cannot be loaded: IRuntime::deserializeCudaEngine: Error Code 1: "
    cases = [
        (good, "no NVIDIA GPU driver, or too old a one: IRuntime::deserializeCudaEngine: "),
        (b"x" * 1000, f"{said}Serialization"),
        (good[:-1], f"a truncated TensorRT-RTX engine: got {len(good) - 1} bytes, expected"),
        (good[:40], "a truncated TensorRT-RTX engine: got 40 bytes, expected 64"),
        (good[:24] + bytes([9, 8, 7, 6]) + good[28:], "built by TensorRT-RTX 9.8.7.6 and this"),
    ]
    for plan, reason in cases:
        file = replace(engine, sha256=sha256(plan))
        bundle = small_v1.update(file, files={engine.file: plan})
        arguments = (bundle.path, sets.find(photos)[0], "--backend", "tensorrt-rtx")
        assert reason in with_tensorrt.refused(*arguments)


def test_a_library_of_another_major_version_is_not_called(
    with_tensorrt: Programs, small_v1_original: Bundle, photos: Path, tmp_path: Path
) -> None:
    """With other headers, the first call into it would crash."""
    parts = {"Major": 10, "Minor": 9, "Patch": 0, "Build": 34}
    source = "".join(
        f'extern "C" int getInferLib{part}Version() {{ return {number}; }}\n'
        for part, number in parts.items()
    )
    library = tmp_path / "libtensorrt_rtx.so.1"
    _compile(source, library)
    line = with_tensorrt.refused(
        small_v1_original.path,
        sets.find(photos)[0],
        "--backend",
        "tensorrt-rtx",
        env={"REXDEPLOY_TENSORRT_RTX": str(library)},
    )
    assert "got the library 10.9.0.34, expected one that fits the headers of TensorRT" in line


def test_onnxruntime_in_a_program_of_ones_own_is_left_alone(release: Programs) -> None:
    """Its C++ headers keep the library in one symbol, the same for all who include them."""
    command = ["nm", "--demangle", str(release.folder / "librexdeploy.a")]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Ort::Global<void>::api_" in names
    assert not re.search(r"\bOrt::", names)


def test_folders_that_hold_other_things_are_not_replaced_by_headers(tmp_path: Path) -> None:
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "mine.h").touch()
    script = ROOT / "scripts" / "cpp_headers.sh"
    done = run_program(script, tmp_path / "include")
    assert done.returncode == 2
    assert "holds something else" in done.stderr
    assert (tmp_path / "include" / "mine.h").exists()
