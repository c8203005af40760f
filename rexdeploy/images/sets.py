"""Many images: those of a folder, and synthetic ones."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rexdeploy.arrays import Float32, UInt8
from rexdeploy.bundle.manifest import Preprocess
from rexdeploy.errors import UsageError
from rexdeploy.images.decode import normalise, read

_EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def load_batch(paths: Sequence[Path], spec: Preprocess) -> UInt8:
    """Image files to uint8 RGB `[N, height, width, 3]`, resized and cropped."""
    return np.stack([read(path, spec) for path in paths])


def find(folder: Path) -> list[Path]:
    """The image files in `folder` and below, by name; raises like `walk`."""
    return list(walk(folder))


def walk(folder: Path) -> Iterator[Path]:
    """Yields the image files in `folder` and below, by name; holds a few folders' names at once.

    Links to folders are not followed. Raises UsageError if there are no images, OSError for a
    folder that cannot be listed.
    """
    if not folder.is_dir():
        raise UsageError(f"images: got {folder}, expected a folder of images")
    found = False
    stack = _entries(folder)
    while stack:
        entry = stack.pop()
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            stack += _entries(path)
        elif (
            path.suffix.lower() in _EXTENSIONS
            and not entry.name.startswith(".")
            # Path's own raises for what may not be looked at.
            and (entry.is_file(follow_symlinks=False) or os.path.isfile(path))  # noqa: PTH113
        ):
            found = True
            yield path
    if not found:
        raise UsageError(f"no images in {folder}: expected files such as .jpg or .png")


def synthetic(count: int, spec: Preprocess, seed: int = 0) -> Float32:
    """`synthetic_pixels`, normalised: float32 `[count, 3, height, width]`."""
    return normalise(synthetic_pixels(count, spec, seed), spec)


def synthetic_pixels(count: int, spec: Preprocess, seed: int = 0) -> UInt8:
    """Seeded images that differ in colour, brightness and texture: uint8 RGB `[count, H, W, 3]`.

    Random grids from 2 to 40 cells a side, enlarged and summed: structure at every scale, which
    plain noise lacks (a network's pooled features hardly vary over noise images).
    """
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        mixed = np.zeros((spec.height, spec.width, 3))
        for cells in (2, 5, 12, 40):
            grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            enlarged = grid.resize((spec.width, spec.height), Image.Resampling.BICUBIC)
            mixed += np.asarray(enlarged) * rng.uniform()
        mixed *= rng.uniform(60, 255) / max(mixed.max(), 1)
        images.append(mixed.astype(np.uint8))
    return np.stack(images)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, the first by name at the end."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name, reverse=True)


SEED = 1
"""Of the synthetic images that `verify` and `tune-precision` judge by.

`export` checks its graphs over others, and sets an untrained network's batch norms over yet others.
"""
_Kind = Callable[[np.random.Generator, Preprocess], UInt8]
_WORDS = "lorem ipsum dolor sit amet 0123456789 ReXNet WMNQ#%&@ "


def pool(
    folder: Path | str | None, count: int, spec: Preprocess, rows: int = 0
) -> tuple[UInt8, str]:
    """Images to compare networks over, uint8 RGB `[N, height, width, 3]`, and a description.

    At most `count` of a folder's, spread over all its subfolders, or as many synthetic ones. If a
    batch has `rows` rows, more of them, so that no two of its rows show the same: synthetic ones,
    or of a folder's images mirrored, turned and recoloured copies as far as there are any (95).
    """
    if folder is None:
        total = max(count, rows)
        return varied_pixels(total, spec, seed=SEED), f"{total} synthetic images"
    folder = Path(folder)
    found = find(folder)
    paths = found[:: max(1, math.ceil(len(found) / count))]
    pixels = load_batch(paths, spec)
    described = f"{len(paths)} images of {folder}"
    more = list(itertools.islice(_new(copies(pixels), pixels), max(0, rows - len(pixels))))
    if more:
        described += f" and {len(more)} turned or recoloured copies"
        pixels = np.concatenate([pixels, np.stack(more)])
    return pixels, described


def _new(found: Iterator[UInt8], known: UInt8) -> Iterator[UInt8]:
    """Those that are equal to none before: a grey image is grey in any order of colours."""
    seen = {image.tobytes() for image in known}
    for image in found:
        data = image.tobytes()
        if data not in seen:
            seen.add(data)
            yield image


def copies(pixels: UInt8) -> Iterator[UInt8]:
    """All images in one new orientation and order of colours, then all in the next."""
    is_square = pixels.shape[1] == pixels.shape[2]
    turns = range(4) if is_square else (0, 2)
    for inverted, order, mirrored, turn in itertools.product(
        (False, True), itertools.permutations(range(3)), (False, True), turns
    ):
        if (inverted, order, mirrored, turn) == (False, (0, 1, 2), False, 0):
            continue
        for image in pixels:
            copy = np.rot90(image[:, ::-1] if mirrored else image, turn)[..., list(order)]
            yield 255 - copy if inverted else copy


def varied(count: int, spec: Preprocess, seed: int) -> Float32:
    """`varied_pixels`, normalised: float32 `[count, 3, height, width]`."""
    return normalise(varied_pixels(count, spec, seed), spec)


def varied_pixels(count: int, spec: Preprocess, seed: int) -> UInt8:
    """`count` different images of all kinds: uint8 RGB `[count, height, width, 3]`.

    The first sixteen hold every kind, black and white among them. The first N of two calls with the
    same seed are equal, whatever the count.
    """
    rng = np.random.default_rng((seed, 0x5EED))
    found: list[UInt8] = []
    seen: set[bytes] = set()
    while len(found) < count:
        index = len(found)
        kind = _FIRST[index] if index < len(_FIRST) else _LATER[index % len(_LATER)]
        image = kind(rng, spec)
        while image.tobytes() in seen:  # tiny images, and black once it is there
            image = _noise(rng, spec)
        seen.add(image.tobytes())
        found.append(image)
    return np.stack(found)


def _grids(rng: np.random.Generator, spec: Preprocess) -> UInt8:
    """Smooth structure at every scale."""
    image: UInt8 = synthetic_pixels(1, spec, seed=int(rng.integers(2**31)))[0]
    return image


def _leaves(rng: np.random.Generator, spec: Preprocess) -> UInt8:
    """Dead leaves: shapes of many sizes that hide each other, as things in a photograph do."""
    image = Image.new("RGB", (spec.width, spec.height), _colour(rng))
    draw = ImageDraw.Draw(image)
    longest = max(spec.width, spec.height)
    for radius in longest / rng.uniform(2, 80, 150):
        x, y = rng.uniform(0, spec.width), rng.uniform(0, spec.height)
        shape = draw.ellipse if rng.uniform() < 0.5 else draw.rectangle
        shape((x - radius, y - radius, x + radius, y + radius), fill=_colour(rng))
    return np.array(image)


def _spectrum(rng: np.random.Generator, spec: Preprocess) -> UInt8:
    """Random phases under the amplitudes of photographs, which fall as 1 / frequency."""
    rows = np.fft.fftfreq(spec.height)[:, None]
    columns = np.fft.rfftfreq(spec.width)[None]
    frequency = np.maximum(np.hypot(rows, columns), 1 / max(spec.height, spec.width))
    size = (4, spec.height, spec.width // 2 + 1)
    waves = np.exp(2j * np.pi * rng.uniform(size=size)) / frequency
    planes = np.fft.irfft2(waves, s=(spec.height, spec.width))
    planes = (planes - planes.mean(axis=(1, 2), keepdims=True)) / max(planes.std(), 1e-9)
    # Mostly brightness, as in photographs, and a little colour.
    mixed = planes[:1] + rng.uniform(0.1, 0.6) * planes[1:]
    pixels = np.clip(rng.uniform(90, 160) + rng.uniform(40, 80) * mixed, 0, 255)
    image: UInt8 = np.moveaxis(pixels, 0, -1).astype(np.uint8)
    return image


def _checkerboard(rng: np.random.Generator, spec: Preprocess) -> UInt8:
    """Two opposite colours, in cells from one pixel to sixteen."""
    return _board(int(2 ** rng.integers(0, 5)), _saturated(rng), spec)


def _board(cell: int, colour: UInt8, spec: Preprocess) -> UInt8:
    y, x = np.indices((spec.height, spec.width)) // cell
    return np.where(((x + y) % 2)[..., None].astype(bool), colour, 255 - colour).astype(np.uint8)


def _pixels_apart(rng: np.random.Generator, spec: Preprocess) -> UInt8:
    """Black and white pixel by pixel: the most that a convolution of neighbours can meet."""
    return _board(1, np.full(3, 255 * rng.integers(0, 2), np.uint8), spec)


def _squares(rng: np.random.Generator, spec: Preprocess) -> UInt8:
    """Black and white in cells of two to eight pixels."""
    return _board(int(2 ** rng.integers(1, 4)), np.full(3, 255, np.uint8), spec)


def _stripes(rng: np.random.Generator, spec: Preprocess) -> UInt8:
    """A grating of hard edges at any angle."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(2, 24)
    y, x = np.indices((spec.height, spec.width))
    is_on = ((x * np.cos(angle) + y * np.sin(angle)) // period % 2).astype(bool)
    colour = _saturated(rng)
    return np.where(is_on[..., None], colour, 255 - colour).astype(np.uint8)


def _text(rng: np.random.Generator, spec: Preprocess) -> UInt8:
    """A page: dark letters on light paper, or the other way round."""
    paper = int(rng.integers(225, 256))
    ink = int(rng.integers(0, 40))
    if rng.uniform() < 0.3:
        paper, ink = ink, paper
    image = Image.new("RGB", (spec.width, spec.height), (paper,) * 3)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    for top in range(0, spec.height, 11):
        letters = rng.permutation(list(_WORDS * (1 + spec.width // 300)))
        draw.text((int(rng.integers(-4, 5)), top), "".join(letters), fill=(ink,) * 3, font=font)
    return np.array(image)


def _patches(rng: np.random.Generator, spec: Preprocess) -> UInt8:
    """Patches of fully saturated colours."""
    cells = int(rng.integers(2, 12))
    grid = 255 * rng.integers(0, 2, (cells, cells, 3), dtype=np.uint8)
    enlarged = Image.fromarray(grid).resize((spec.width, spec.height), Image.Resampling.NEAREST)
    return np.array(enlarged)


def _noise(rng: np.random.Generator, spec: Preprocess) -> UInt8:
    """Every pixel and channel on or off."""
    return 255 * rng.integers(0, 2, (spec.height, spec.width, 3), dtype=np.uint8)


def _points(rng: np.random.Generator, spec: Preprocess) -> UInt8:
    """A few single pixels on black, or on white."""
    count = int(rng.integers(1, 9))
    pixels = np.zeros((spec.height, spec.width, 3), np.uint8)
    pixels[rng.integers(0, spec.height, count), rng.integers(0, spec.width, count)] = 255
    return pixels if rng.uniform() < 0.5 else 255 - pixels


def _black(rng: np.random.Generator, spec: Preprocess) -> UInt8:
    del rng
    return np.zeros((spec.height, spec.width, 3), np.uint8)


def _white(rng: np.random.Generator, spec: Preprocess) -> UInt8:
    return 255 - _black(rng, spec)


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue


def _saturated(rng: np.random.Generator) -> UInt8:
    """A corner of the colour cube: its opposite is 255 less it."""
    return 255 * rng.integers(0, 2, 3, dtype=np.uint8)


_FIRST: tuple[_Kind, ...] = (
    _leaves, _grids, _pixels_apart, _text, _spectrum, _patches, _squares, _stripes,
    _noise, _leaves, _black, _white, _points, _spectrum, _checkerboard, _grids,
)  # fmt: skip
_LATER: tuple[_Kind, ...] = (
    _grids, _leaves, _spectrum, _patches, _checkerboard, _text, _stripes, _points, _noise, _squares,
)  # fmt: skip
