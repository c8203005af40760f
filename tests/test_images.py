"""Preprocessing: timm's arithmetic to the bit, and files that are no images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms_factory import create_transform

from rexdeploy import images
from rexdeploy.errors import UsageError
from rexdeploy.manifest import Preprocess


def _timm(image: Image.Image, spec: Preprocess) -> images.Float32:
    transform = create_transform(
        (3, spec.height, spec.width),
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        crop_pct=spec.crop_pct,
    )
    result: images.Float32 = transform(image).numpy()
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
    for path in images.find(photos):
        image = images.load(path)
        for shape in (image.size, (301, 700), (700, 301), (256, 256), (257, 255), (40, 33)):
            resized = image.resize(shape)
            got = images.normalise(images.crop(resized, spec), spec)
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
    got = images.normalise(images.crop(Image.new("RGB", size, (255, 255, 255)), spec), spec)
    assert got.shape == (3, *wanted)
    # No pixel of the crop comes from outside the (white) image.
    expected = (1 - np.array(spec.mean)) / np.array(spec.std)
    np.testing.assert_allclose(got.mean(axis=(1, 2)), expected, rtol=1e-5)


def test_any_mode_is_decoded_to_rgb(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "1", "LA"):
        path = tmp_path / f"{mode}.tif"
        Image.new(mode, (20, 10)).save(path)
        assert images.load(path).mode == "RGB"


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert images.load(tmp_path / "turned.jpg").size == (10, 20)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray((ramp / 257).round().astype(np.uint8)).save(tmp_path / "shallow.png")
    deep, shallow = (images.load(tmp_path / f"{name}.png") for name in ("deep", "shallow"))
    assert np.abs(np.asarray(deep).astype(int) - np.asarray(shallow)).max() <= 1


def test_pixels_without_a_known_range_and_threads_of_pixels_are_refused(tmp_path: Path) -> None:
    Image.new("F", (20, 10)).save(tmp_path / "float.tif")
    with pytest.raises(UsageError, match="float.tif: pixels of type F have no known range"):
        images.load(tmp_path / "float.tif")
    with pytest.raises(UsageError, match="too thin"):
        images.crop(Image.new("RGB", (1, 2000)), Preprocess())


def test_hidden_files_and_folders_are_no_images(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "real.png")
    (tmp_path / "._real.png").write_bytes(b"resource fork")
    (tmp_path / "folder.jpg").mkdir()
    assert images.find(tmp_path) == [tmp_path / "real.png"]


def _bomb(path: Path) -> None:
    """A small file that claims 20,000 x 20,000 pixels."""
    Image.new("1", (20_000, 20_000)).save(path)


def _truncated(path: Path) -> None:
    Image.effect_noise((300, 300), 50).save(path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no image at"),
        (lambda path: path.write_bytes(b""), "not an image that Pillow can read"),
        (lambda path: path.write_text("hello"), "not an image that Pillow can read"),
        (lambda path: path.mkdir(), "cannot be decoded"),
        (_truncated, "cannot be decoded"),
        (_bomb, "too large to decode safely"),
    ],
)
def test_what_is_no_image_is_refused(make: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    make(path)  # type: ignore[operator]
    with pytest.raises(UsageError, match=message):
        images.load(path)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match="no images in"):
        images.find(tmp_path)
    with pytest.raises(UsageError, match="expected a folder of images"):
        images.find(tmp_path / "notes.txt")


def test_synthetic_images_are_reproducible_and_differ() -> None:
    spec = Preprocess(64, 64)
    pool = images.synthetic(6, spec, seed=3)
    np.testing.assert_array_equal(pool, images.synthetic(6, spec, seed=3))
    assert pool.shape == (6, 3, 64, 64)
    assert pool.dtype == np.float32
    assert not np.array_equal(pool, images.synthetic(6, spec, seed=4))
    means = pool.mean(axis=(2, 3))
    assert np.abs(means[:, None] - means[None]).max(axis=2)[~np.eye(6, dtype=bool)].min() > 0.05
