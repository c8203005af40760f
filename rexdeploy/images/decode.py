"""From image files to what a network takes: RGB pixels, and float32 NCHW; and synthetic images."""

from __future__ import annotations

import math
import os
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from rexdeploy.arrays import Float32, Images, UInt8
from rexdeploy.bundle.manifest import ModelSpec, Preprocess
from rexdeploy.errors import UsageError, first_line
from rexdeploy.images import limits

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
_MAX_ASPECT = 100  # resized so that its short side fits, a longer one would take gigabytes
_UPRIGHT = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Read by libtiff for each file: each scan of a JPEG within a TIFF decodes all of its pixels, too.
os.environ.setdefault("LIBTIFF_JPEG_MAX_ALLOWED_SCAN_NUMBER", "12")
_WARNINGS = threading.Lock()
# What holds photographs, of all that Pillow reads. Others are decoded by Python a pixel at a time
# (QOI, DDS), unpack without a limit (FITS), or run a program (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_LARGE = 2**24  # pixels: 48 MiB decoded, and several copies of it on the way to the network
_MAX_RLE = 2**24  # pixels of a compressed BMP, which Pillow unpacks in Python
_MAX_READS = 2**19  # of one file: a PNG of the largest size in chunks of 8 KiB takes half of them


def load(path: Path) -> Image.Image:
    """Decodes one image file to RGB, upright by its EXIF orientation; raises like `opened`."""
    with opened(path, str(path)) as image:
        return to_rgb(image)


def read(path: Path, spec: Preprocess) -> UInt8:
    """One image file to uint8 RGB `[height, width, 3]`, resized and cropped; as `opened` raises."""
    with opened(path, str(path)) as image:
        return crop(to_rgb(image), spec)


@contextmanager
def opened(source: Path | bytes, name: str) -> Iterator[Image.Image]:
    """An image whose header is read, and whose pixels are decoded when the block uses them.

    `source` is a file, or its content. Raises UsageError, `NAME: why`, for whatever cannot be
    decoded, also in the block; no file makes it wait, run a program, or take more than the bounds
    of time and memory in docs/python.md. Where the block waits, it is for other large images in
    other threads: together they have no more pixels than one image may have.
    """
    with _named(name):
        data = source if isinstance(source, bytes) else _read(source)
        limits.check(data)
        with _open(data) as image:
            pixels = image.width * image.height
            if image.tile and image.tile[0][0] == "bmp_rle" and pixels > _MAX_RLE:
                raise UsageError(
                    f"a compressed BMP of {pixels} pixels (limit {_MAX_RLE}); save it as PNG"
                )
            with _large_images.hold(pixels if pixels > _LARGE else 0):
                yield image


def take(image: Image.Image, name: str, spec: Preprocess) -> UInt8:
    """Any Pillow image, its pixels decoded or not yet, as `read` gives a file's.

    Raises UsageError, `NAME: why`.
    """
    with _named(name):
        return crop(to_rgb(image), spec)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB, upright by its EXIF orientation.

    16-bit grey is scaled to 8 bits (Pillow's own conversion clips it to white). Transparency is
    dropped, as torchvision's and timm's loaders drop it: a transparent pixel keeps its colour. Of
    an animation the first frame is taken. EXIF that cannot be read is ignored. Raises UsageError
    for pixels without a known range, and what Pillow raises for those that cannot be decoded.
    """
    if image.mode in ("I", "F"):
        raise UsageError(f"pixels of type {image.mode} have no known range; save it with 8 bits")
    image.load()  # so that what is raised below is about EXIF, and not about pixels
    orientation = None
    with suppress(SyntaxError, ValueError, struct.error):
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    # Not ImageOps.exif_transpose: it writes all of EXIF anew, in Python.
    if isinstance(orientation, int) and orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours; straight to RGB, Pillow warns
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return image.convert("RGB")


def crop(image: Image.Image, spec: Preprocess) -> UInt8:
    """One RGB image to uint8 RGB `[height, width, 3]`, resized and cropped.

    The same arithmetic as timm's evaluation transform: resize so that the crop covers
    `crop_pct`, crop the centre. Raises UsageError for an image too thin to resize, or empty.
    """
    if not min(image.size) or max(image.size) > _MAX_ASPECT * min(image.size):
        raise UsageError(
            f"an image of {image.width} x {image.height} pixels is too thin: expected sides at "
            f"most {_MAX_ASPECT} times as long as each other"
        )
    covered_w = math.floor(spec.width / spec.crop_pct)
    covered_h = math.floor(spec.height / spec.crop_pct)
    if covered_w * image.height >= covered_h * image.width:
        size = (covered_w, max(covered_h, int(covered_w * image.height / image.width)))
    else:
        size = (max(covered_w, int(covered_h * image.width / image.height)), covered_h)
    image = image.resize(size, _RESAMPLING[spec.interpolation])
    left = round((size[0] - spec.width) / 2)
    top = round((size[1] - spec.height) / 2)
    image = image.crop((left, top, left + spec.width, top + spec.height))
    return np.asarray(image, dtype=np.uint8)


def normalise(pixels: UInt8, spec: Preprocess) -> Float32:
    """uint8 RGB `[..., H, W, 3]` to float32 `[..., 3, H, W]`, in torch's order of operations."""
    scaled = np.moveaxis(pixels, -1, -3).astype(np.float32) / np.float32(255)
    mean = np.array(spec.mean, dtype=np.float32)[:, None, None]
    std = np.array(spec.std, dtype=np.float32)[:, None, None]
    normalised: Float32 = (scaled - mean) / std
    return np.ascontiguousarray(normalised)


def model_input(pixels: UInt8, spec: ModelSpec) -> Images:
    """uint8 RGB `[N, H, W, 3]` in the form that the model's files take."""
    return pixels if spec.input == "uint8" else normalise(pixels, spec.preprocess)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Makes UsageError, `NAME: why`, of whatever goes wrong with one image in the block."""
    try:
        yield
    except FileNotFoundError:
        raise UsageError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise UsageError(
            f"{name}: not an image that is read here; give JPEG, PNG, WebP, GIF, BMP or TIFF"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UsageError(f"{name}: too large to decode safely ({error})") from None
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UsageError(f"{name}: cannot be decoded as an image ({reason})") from None
    except Exception as error:  # on broken files Pillow raises almost any, MemoryError too
        raise UsageError(f"{name}: cannot be decoded as an image ({first_line(error)})") from None


def _read(path: Path) -> bytes:
    status = path.stat()
    # A named pipe would be waited for, and a folder's error differs between systems.
    if not stat.S_ISREG(status.st_mode):
        raise UsageError("not a file")
    if status.st_size > limits.MAX_BYTES:
        raise UsageError(f"too large to decode safely (limit {limits.MAX_BYTES} bytes)")
    return path.read_bytes()


def _open(data: bytes) -> ImageFile.ImageFile:
    """Reads a file's header; raises what Pillow does, DecompressionBombWarning among it.

    Pillow warns above 89 megapixels and refuses above twice that; here both refuse. The lock is
    there because the filters of `warnings` are the process's, and threads would swap them.
    """
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(_Bytes(data), formats=_FORMATS)
    limits.check_size(image.width, image.height)  # whatever Pillow's own limit is set to
    return image


class _Bytes(BytesIO):
    """A file that can be read in so many pieces only: Pillow takes Python's time for each."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads > _MAX_READS:
            raise UsageError(f"it is in more than {_MAX_READS} pieces; save it anew")
        return super().read(size)


class _LargeImages:
    """Lets images in while they have together no more pixels than one may have, one by one."""

    def __init__(self) -> None:
        self._free = limits.MAX_PIXELS
        self._turn = threading.Lock()  # the next in line, who may need most, is not overtaken
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        if pixels:
            with self._turn, self._changed:
                self._changed.wait_for(lambda: self._free >= pixels)
                self._free -= pixels
        try:
            yield
        finally:
            if pixels:
                with self._changed:
                    self._free += pixels
                    self._changed.notify()


_large_images = _LargeImages()
