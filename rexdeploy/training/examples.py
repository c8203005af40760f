"""What a training reads: images by epoch and number, each drawn by its own seed, in batches."""

from __future__ import annotations

import functools
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from rexdeploy.bundle.manifest import Preprocess
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.images import decode
from rexdeploy.training.class_folders import ClassFolders


class Examples:
    """Images and their classes by (epoch, index), each read as if it were the only one."""

    def __init__(
        self,
        images: ClassFolders,
        transform: Callable[[Image.Image], Tensor],
        seed: int | None,
    ) -> None:
        self._images, self._transform, self._seed = images, transform, seed

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | str:
        epoch, index = key
        if self._seed is not None:
            # By its own numbers, so that neither the worker nor what it read before matters.
            own = seed_of(self._seed, epoch, index)
            random.seed(own)
            np.random.seed(own % (1 << 32))
            torch.manual_seed(own)
        try:
            image = decode.load(self._images.path(index))
        except UsageError as error:
            return str(error)
        return self._transform(image), self._images.labels[index]


class Batches:
    """The keys of a process's share of every batch, in the order of the epoch that is set."""

    def __init__(self, count: int, batch: int, seed: int, rank: int, processes: int) -> None:
        self._count, self._batch, self._seed = count, batch, seed
        share = batch // processes
        self._own = slice(rank * share, (rank + 1) * share)
        self.epoch = 1

    def __len__(self) -> int:
        return self._count // self._batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self._seed, self.epoch)).permutation(self._count).tolist()
        for number in range(len(self)):
            whole = order[number * self._batch : (number + 1) * self._batch]
            yield [(self.epoch, index) for index in whole[self._own]]


def loader(
    examples: Examples, keys: Any, workers: int, begin: Callable[[], None]
) -> DataLoader[Any]:
    """Batches of examples by lists of their keys, read by so many processes.

    Each calls `begin` first, to let go of what only the command itself may hold.
    """
    # Workers, even if it is one: what they draw is nothing to this process's own random numbers.
    return DataLoader(
        examples,  # type: ignore[arg-type]
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=True,
        worker_init_fn=functools.partial(_begin_worker, begin),
        generator=torch.Generator(),
    )


def _begin_worker(begin: Callable[[], None], number: int) -> None:
    del number
    begin()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's to tell


def collate(items: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    """A batch; of one that has an unreadable image, why: an error's own type is lost on the way."""
    read = [item for item in items if not isinstance(item, str)]
    if len(read) < len(items):
        return next(item for item in items if isinstance(item, str))
    return torch.stack([image for image, _ in read]), torch.tensor([label for _, label in read])


def readable(found: tuple[Tensor, Tensor] | str) -> tuple[Tensor, Tensor]:
    """A batch as it is; raises RexdeployError for one with an image that cannot be read."""
    if isinstance(found, str):
        raise RexdeployError(
            f"{found}; it could be read when the training began: put it back, and the same "
            "command goes on"
        )
    return found


def training_transform(augmentation: str, spec: Preprocess) -> Callable[[Image.Image], Tensor]:
    """What a recipe does to a training image: "randaugment" (timm's) or "affine"."""
    if augmentation == "randaugment":
        import timm.data

        made: Callable[[Image.Image], Tensor] = timm.data.create_transform(  # type: ignore[attr-defined]
            spec.height,
            is_training=True,
            auto_augment="rand-m9-mstd0.5",
            interpolation="random",
            re_prob=0.2,
            re_mode="pixel",
            mean=spec.mean,
            std=spec.std,
        )
        return made
    from torchvision import transforms

    affine = transforms.RandomAffine(
        10, (0.1, 0.1), (0.9, 1.1), interpolation=transforms.InterpolationMode.BILINEAR
    )
    return _Affine(affine, spec)


@dataclass(frozen=True)
class _Affine:
    """The image as it is served, moved, turned and scaled a little."""

    move: Callable[[Image.Image], Image.Image]
    spec: Preprocess

    def __call__(self, image: Image.Image) -> Tensor:
        moved = self.move(Image.fromarray(decode.crop(image, self.spec)))
        return torch.from_numpy(decode.normalise(np.asarray(moved), self.spec))


@dataclass(frozen=True)
class AsServed:
    """The image as it is served, and as `evaluate` reads it."""

    spec: Preprocess

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(decode.normalise(decode.crop(image, self.spec), self.spec))


def seed_of(*numbers: int) -> int:
    """A seed that only these numbers decide."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
