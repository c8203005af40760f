"""The images of the test networks in tests/data: scikit-learn's digits, and a drawn set of dials.

The digits are too easy to judge a rounded network by: every setting is within one image there. The
dials are made by a seed. Their twelve classes are the hour that the hand shows, and the hand stands
beside its hour by chance, so that six images in a hundred show another hour than their class, and
many are near to the next: a network that is a little off answers some of them otherwise. Colours,
sizes, places, scratches and noise vary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

CLASSES = 12
SIZE = 32
SPREAD = 8.0  # degrees, standard deviation of the hand about its hour; halfway to the next: 15
NOISE = 14.0  # standard deviation of every pixel's, of 255
CONTRAST = 90.0
SCRATCHES = 4
_FINER = 4  # drawn so many times as large, and made smaller


def drawn_image(seed: int, number: int) -> npt.NDArray[np.uint8]:
    """Image `number` of a set, RGB `[SIZE, SIZE, 3]`; its class is `number % CLASSES`."""
    rng = np.random.default_rng((seed, number))
    side = SIZE * _FINER
    direction = rng.normal(size=3)
    direction *= CONTRAST / np.abs(direction).max()
    paper = rng.uniform(90, 165, 3)
    dark, light = (tuple(np.clip(paper + sign * direction, 0, 255).astype(int)) for sign in (-1, 1))
    image = Image.new("RGB", (side, side), tuple(paper.astype(int)))
    draw = ImageDraw.Draw(image)
    middle = side * (0.5 + rng.uniform(-0.06, 0.06, 2))
    radius = side * rng.uniform(0.3, 0.38)
    draw.ellipse((*(middle - radius), *(middle + radius)), fill=light)
    angle = np.deg2rad(360 / CLASSES * (number % CLASSES) + rng.normal(0, SPREAD))
    tip = middle + radius * np.array((np.sin(angle), -np.cos(angle)))
    draw.line((*middle, *tip), fill=dark, width=int(_FINER * rng.uniform(2, 4)))
    for _ in range(SCRATCHES):
        begin = rng.uniform(0, side, 2)
        end = begin + side * rng.uniform(-0.2, 0.2, 2)
        draw.line((*begin, *end), fill=dark if rng.uniform() < 0.5 else light, width=_FINER)
    small = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), np.float64)
    return np.clip(small + rng.normal(0, NOISE, small.shape), 0, 255).astype(np.uint8)


def write_drawn_images(folder: Path, seed: int, count: int) -> Path:
    """Writes `folder/HOUR/NUMBER.png`; the same files for the same seed and count."""
    for number in range(count):
        hour = folder / f"{number % CLASSES:02d}"
        hour.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn_image(seed, number)).save(hour / f"{number:05d}.png")
    return folder


def write_digits(folder: Path, held_back: bool, most: int | None = None) -> Path:
    """Writes `folder/DIGIT/NUMBER.png`: the fifth of scikit-learn's that is held back, or the rest.

    At `most` so many of them. One pixel wider on each side, so that the crop of the preprocessing
    cuts off no ink.
    """
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    fifth = len(order) // 5
    for number in (order[:fifth] if held_back else order[fifth:])[:most]:
        ink = Image.fromarray((np.pad(digits.images[number], 1) * (255 / 16)).astype(np.uint8))
        of_class = folder / str(digits.target[number])
        of_class.mkdir(parents=True, exist_ok=True)
        image = ink.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")
        image.save(of_class / f"{number:04d}.png")
    return folder
