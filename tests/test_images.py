"""Preprocessing: timm's arithmetic to the bit, and files that are no images."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from timm.data.dataset import ImageDataset
from timm.data.transforms_factory import create_transform

from rexdeploy import arrays
from rexdeploy.bundle.manifest import Preprocess
from rexdeploy.errors import UsageError
from rexdeploy.images import decode, sets


def _timm(image: Image.Image, spec: Preprocess) -> arrays.Float32:
    transform = create_transform(
        (3, spec.height, spec.width),
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        crop_pct=spec.crop_pct,
    )
    result: arrays.Float32 = transform(image).numpy()
    return result


@pytest.mark.parametrize(
    "spec",
    [
        Preprocess(),
        Preprocess(288, 288, 1.0),
        Preprocess(160, 160, 0.875, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_photographs_become_what_timm_makes_of_them(photos: Path, spec: Preprocess) -> None:
    for path in sets.find(photos):
        image = decode.load(path)
        for shape in (image.size, (301, 700), (700, 301), (256, 256), (257, 255), (40, 33)):
            resized = image.resize(shape)
            got = decode.normalise(decode.crop(resized, spec), spec)
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, _timm(resized, spec))


@given(
    st.tuples(st.integers(4, 400), st.integers(4, 400)),
    st.tuples(st.integers(32, 200), st.integers(32, 200)),
    st.sampled_from([0.8, 0.875, 0.95, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_every_image_gives_the_networks_shape(
    size: tuple[int, int], wanted: tuple[int, int], crop: float
) -> None:
    spec = Preprocess(wanted[0], wanted[1], crop)
    got = decode.normalise(decode.crop(Image.new("RGB", size, (255, 255, 255)), spec), spec)
    assert got.shape == (3, *wanted)
    # No pixel of the crop comes from outside the (white) image.
    expected = (1 - np.array(spec.mean)) / np.array(spec.std)
    np.testing.assert_allclose(got.mean(axis=(1, 2)), expected, rtol=1e-5)


def test_any_mode_is_decoded_to_rgb(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "1", "LA"):
        path = tmp_path / f"{mode}.tif"
        Image.new(mode, (20, 10)).save(path)
        assert decode.load(path).mode == "RGB"


@pytest.mark.parametrize(
    ("orientation", "stored"),  # how a camera that is held so stores what is upright
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
        (9, None),  # no orientation of the standard
    ],
)
def test_exif_orientation_is_applied(
    orientation: int, stored: Image.Transpose | None, tmp_path: Path
) -> None:
    upright = _noise((20, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = upright if stored is None else upright.transpose(stored)
    for name in ("turned.png", "turned.webp", "turned.tif"):
        turned.save(tmp_path / name, exif=exif, lossless=True)
        np.testing.assert_array_equal(decode.load(tmp_path / name), upright)


def test_transparent_pixels_keep_their_colour(tmp_path: Path) -> None:
    """As torchvision's and timm's loaders have it, and without Pillow's warning."""
    colours = _noise((20, 10)).quantize(16)
    rgb, alpha = np.asarray(colours.convert("RGB")), Image.new("L", (20, 10), 0)
    colours.save(tmp_path / "bytes.png", transparency=bytes(16))
    colours.save(tmp_path / "index.png", transparency=3)
    colours.save(tmp_path / "index.gif", transparency=3)
    Image.merge("RGBA", (*colours.convert("RGB").split(), alpha)).save(tmp_path / "rgba.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("bytes.png", "index.png", "index.gif", "rgba.png"):
            np.testing.assert_array_equal(decode.load(tmp_path / name), rgb)
        np.testing.assert_array_equal(decode.to_rgb(colours.convert("PA")), rgb)
    grey = _noise((20, 10)).convert("L")
    Image.merge("LA", (grey, alpha)).save(tmp_path / "la.png")
    np.testing.assert_array_equal(decode.load(tmp_path / "la.png"), grey.convert("RGB"))


def test_cmyk_is_not_inverted(tmp_path: Path) -> None:
    for name in ("cmyk.jpg", "cmyk.tif"):
        Image.new("RGB", (16, 16), (200, 100, 50)).convert("CMYK").save(tmp_path / name)
        pixel = np.asarray(decode.load(tmp_path / name))[8, 8]
        np.testing.assert_allclose(pixel, (200, 100, 50), atol=4)


@pytest.mark.parametrize("name", ["animated.gif", "animated.webp", "animated.png"])
def test_the_first_frame_of_an_animation_is_taken(name: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (12, 12), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    with Image.open(tmp_path / name) as image:
        assert getattr(image, "n_frames", 1) == 2
    np.testing.assert_array_equal(decode.load(tmp_path / name), frames[0])


def test_16_bit_colour_is_its_high_bytes(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + bytes((200, 7, 100, 7, 50, 7)) * 4 for _ in range(4))
    (tmp_path / "deep.png").write_bytes(_png(4, 4, 16, rows))
    np.testing.assert_array_equal(decode.load(tmp_path / "deep.png"), [[[200, 100, 50]] * 4] * 4)


def test_the_bytes_count_and_not_the_name(tmp_path: Path) -> None:
    _noise((20, 10)).save(tmp_path / "a.bmp")
    (tmp_path / "a.bmp").rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(decode.load(tmp_path / "a.jpg"), _noise((20, 10)))


def test_timms_loader_leaves_a_turned_image_as_it_lies(tmp_path: Path) -> None:
    """What docs/python.md says of timm: should it turn images one day, the page is to say so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "class").mkdir()
    path = tmp_path / "class" / "turned.png"
    lying = _noise((20, 10))
    lying.save(path, exif=exif)
    theirs, _ = ImageDataset(str(tmp_path))[0]  # type: ignore[no-untyped-call]
    np.testing.assert_array_equal(np.asarray(theirs), np.asarray(lying))
    np.testing.assert_array_equal(np.asarray(decode.load(path)), np.rot90(np.asarray(lying), -1))


def test_a_huge_exif_block_does_no_harm(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x9286] = b"x" * 65_000  # a comment
    _noise((20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert decode.load(tmp_path / "a.jpg").size == (20, 10)


def test_exif_that_cannot_be_read_is_ignored(tmp_path: Path) -> None:
    image = _noise((20, 10))
    for name in ("a.jpg", "a.png", "a.webp"):
        image.save(tmp_path / name, exif=b"neither of TIFF's byte orders", lossless=True)
        assert decode.load(tmp_path / name).size == (20, 10)
    profile = PngImagePlugin.PngInfo()
    profile.add_text("Raw profile type exif", "\nexif\n4\nnot hexadecimal\n")
    image.save(tmp_path / "b.png", pnginfo=profile)
    np.testing.assert_array_equal(decode.load(tmp_path / "b.png"), image)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray((ramp / 257).round().astype(np.uint8)).save(tmp_path / "shallow.png")
    deep, shallow = (decode.load(tmp_path / f"{name}.png") for name in ("deep", "shallow"))
    assert np.abs(np.asarray(deep).astype(int) - np.asarray(shallow)).max() <= 1


def test_pixels_without_a_known_range_and_threads_of_pixels_are_refused(tmp_path: Path) -> None:
    Image.new("F", (20, 10)).save(tmp_path / "float.tif")
    with pytest.raises(UsageError, match="float.tif: pixels of type F have no known range"):
        decode.load(tmp_path / "float.tif")
    with pytest.raises(UsageError, match="too thin"):
        decode.crop(Image.new("RGB", (1, 2000)), Preprocess())


def test_hidden_files_and_folders_are_no_images(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "real.png")
    (tmp_path / "._real.png").write_bytes(b"resource fork")
    (tmp_path / "folder.jpg").mkdir()
    assert sets.find(tmp_path) == [tmp_path / "real.png"]


def test_a_folders_images_are_found_by_name_at_every_depth(tmp_path: Path) -> None:
    names = ["a/z.png", "a.png", "a/b/c.JPG", "A.png", "b.tif", "a-b/x.png", "a/b.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "again").symlink_to(tmp_path)  # a folder that is linked is not walked, nor endless
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert sets.find(tmp_path) == sorted(tmp_path / name for name in (*names, "link.png"))


def _noise(size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    """An RGB PNG of any size and depth, by the specification."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def _bomb(path: Path) -> None:
    path.write_bytes(_png(30_000, 30_000, 8, b""))


def _large(path: Path) -> None:
    """Pillow itself would warn, and decode 300 MB."""
    path.write_bytes(_png(10_000, 10_000, 8, b""))


def _eps(path: Path) -> None:
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")


def _truncated(path: Path) -> None:
    Image.effect_noise((300, 300), 50).save(path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "image.png: no such file"),
        (lambda path: path.write_bytes(b""), "not an image that is read here"),
        (lambda path: path.write_text("hello"), "not an image that is read here"),
        (lambda path: path.mkdir(), "not a file"),
        (os.mkfifo, "not a file"),
        (_truncated, "cannot be decoded"),
        (_bomb, "too large to decode safely"),
        (_large, "too large to decode safely"),
        (_eps, "not an image that is read here"),
    ],
)
def test_what_is_no_image_is_refused(make: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    make(path)  # type: ignore[operator]
    with pytest.raises(UsageError, match=message):
        decode.load(path)


def test_large_images_are_refused_in_many_threads(tmp_path: Path) -> None:
    """Python's warning filters, which Pillow's first limit goes through, are the process's."""
    _large(tmp_path / "large.png")
    before = list(warnings.filters)

    def refused(_: int) -> bool:
        with pytest.raises(UsageError, match="too large to decode safely"):
            decode.load(tmp_path / "large.png")
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(refused, range(200)))
    assert list(warnings.filters) == before


def _encoded() -> list[bytes]:
    """Small files of every format and compression that a mutation may take elsewhere."""
    noise, exif = _noise((24, 17)), Image.Exif()
    exif[0x0112] = 6
    files: list[bytes] = []

    def add(image: Image.Image, kind: str, **options: object) -> None:
        file = io.BytesIO()
        image.save(file, kind, **options)
        files.append(file.getvalue())

    add(noise, "JPEG", exif=exif)
    add(noise.convert("CMYK"), "JPEG", progressive=True)
    add(noise, "PNG", exif=exif)
    add(noise.quantize(9), "PNG", transparency=bytes(9))
    add(noise, "WEBP", exif=exif)
    for kind in ("WEBP", "GIF", "MPO"):
        add(noise, kind, save_all=True, append_images=[noise.rotate(9)])
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        add(noise, "TIFF", compression=compression)
    for kind in ("BMP", "ICO", "PPM", "TGA", "PCX", "SGI", "DDS"):
        add(noise, kind)
    return files


_ENCODED = _encoded()


@given(st.sampled_from(_ENCODED), st.data())
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@pytest.mark.filterwarnings("ignore")
def test_no_bytes_do_more_than_be_refused(
    tmp_path: Path, encoded: bytes, data: st.DataObject
) -> None:
    mutated = bytearray(encoded)
    for _ in range(data.draw(st.integers(1, 6))):
        where = data.draw(st.integers(0, len(mutated) - 1))
        mutated[where : where + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        mutated = mutated or bytearray(b"x")
    (tmp_path / "image").write_bytes(mutated)
    try:
        pixels = decode.read(tmp_path / "image", Preprocess(32, 32))
    except UsageError as error:
        refused = str(error)
    else:
        assert pixels.shape == (32, 32, 3)
        return
    assert refused.startswith(f"{tmp_path / 'image'}: ")
    assert len(refused.splitlines()) == 1


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match="no images in"):
        sets.find(tmp_path)
    with pytest.raises(UsageError, match="expected a folder of images"):
        sets.find(tmp_path / "notes.txt")


def test_synthetic_images_are_reproducible_and_differ() -> None:
    spec = Preprocess(64, 64)
    pool = sets.synthetic(6, spec, seed=3)
    np.testing.assert_array_equal(pool, sets.synthetic(6, spec, seed=3))
    assert pool.shape == (6, 3, 64, 64)
    assert pool.dtype == np.float32
    assert not np.array_equal(pool, sets.synthetic(6, spec, seed=4))
    means = pool.mean(axis=(2, 3))
    assert np.abs(means[:, None] - means[None]).max(axis=2)[~np.eye(6, dtype=bool)].min() > 0.05
