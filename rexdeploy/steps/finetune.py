"""Trains a network on a folder of images by class, and goes on where a killed training was."""

from __future__ import annotations

import contextlib
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from rexdeploy.bundle.manifest import Preprocess
from rexdeploy.errors import UsageError, VerificationFailed
from rexdeploy.images.class_folders import ClassFolders, find_class_folders, unreadable
from rexdeploy.images.training import (
    AsServed,
    Batches,
    Examples,
    loader,
    readable,
    seed_of,
    training_transform,
)
from rexdeploy.models import unfinished
from rexdeploy.models.notes import Notes, check_names, save_with_notes
from rexdeploy.models.rexnet import CONFIGS, Family, RexNet, check_width
from rexdeploy.models.training import (
    RECIPES,
    Recipe,
    Trainer,
    device,
    first_not_finite,
    group,
    import_timm,
    place,
    replace_classifier,
    shared,
)
from rexdeploy.models.weights import read_weights
from rexdeploy.progress import Report, Result, silent
from rexdeploy.steps.export import DEFAULT_IMAGE_SIZE, check_image_size
from rexdeploy.text import printable

DEFAULT_OUT = Path("finetuned.safetensors")
_MAX_WORKERS = 8
_CHECK_STEPS = 20  # between two looks at the losses: on a GPU each look waits for it
_TELL_S = 10.0


@dataclass(frozen=True)
class Epoch:
    """One epoch; `val_loss` and `correct` are of the network that would be kept."""

    number: int
    loss: float  # mean over the training steps, as the recipe smooths labels
    val_loss: float
    correct: int  # of the images that it is validated by
    learning_rate: float  # at its end
    seconds: float


@dataclass(frozen=True, repr=False)
class FinetuneResult(Result):
    """A trained network's checkpoint, and how its training went."""

    out: str
    family: Family
    width: float
    image_size: int
    recipe: str
    classes: tuple[str, ...]
    training_images: int
    validation_images: int
    unreadable: dict[str, str]  # files that were left out, and why
    epochs: tuple[Epoch, ...]
    resumed: int  # epochs that an earlier run had done

    @property
    def best(self) -> Epoch:
        """The epoch whose network was kept."""
        return max(self.epochs, key=_goodness)

    @property
    def top1(self) -> float:
        """Share of the validation images that the kept network answers right."""
        return self.best.correct / self.validation_images

    def __repr__(self) -> str:
        return (
            f"<FinetuneResult {self.out}: {self.family} {self.width:g}, {len(self.classes)} "
            f"classes; top-1 {self.top1:.2%} of {self.validation_images} images after epoch "
            f"{self.best.number} of {len(self.epochs)}>"
        )

    def _document(self) -> dict[str, Any]:
        return {
            **msgspec.to_builtins(self),
            "unreadable": {printable(file): why for file, why in self.unreadable.items()},
            "best_epoch": self.best.number,
            "top1": self.top1,
        }


def finetune(
    folder: Path | str,
    *,
    weights: Path | str | None = None,
    lite: bool = False,
    width: float | None = None,
    image_size: int | None = None,
    epochs: int | None = None,
    recipe: str = "small",
    batch: int | None = None,
    lr: float | None = None,
    val: Path | str | None = None,
    seed: int = 0,
    workers: int | None = None,
    out: Path | str = DEFAULT_OUT,
    force: bool = False,
    report: Report = silent,
) -> FinetuneResult:
    """Trains on the images of `folder/CLASS/...`, and writes the best epoch's network to `out`.

    `weights` is a checkpoint's file, "pretrained", or None to begin with an untrained network;
    where it has other classes, it gets a new classifier. `recipe` is "small" or "published", and
    gives `epochs`, `batch` and `lr` (in proportion to the batch). Without `val`, a folder like
    `folder`, a tenth of every class is held back. Until it is done, `OUT.training` has what the
    same call needs to go on after a kill, on a CPU to the same bytes; `force` replaces a file
    `out`, or another training's state, that is there. Under torchrun a batch is split over the
    processes.

    Raises UsageError for what cannot be used, BackendUnavailable without timm, RexdeployError where
    a file cannot be written, and VerificationFailed where the loss is NaN or infinite; the last
    good checkpoint and state stay.

    Example: `rexdeploy.finetune("train", lite=True, image_size=64, out="mine.safetensors").best`
    """
    import_timm()
    plan = _plan(recipe, epochs, batch, lr, seed)
    if width is not None:
        check_width(width)
    if image_size is not None:
        check_image_size(image_size)
    workers = min(os.cpu_count() or 1, _MAX_WORKERS) if workers is None else workers
    if not 1 <= workers <= 256:
        raise UsageError(f"workers: got {workers}, expected 1 to 256 processes that read images")
    out = Path(out)
    if out.suffix != ".safetensors":
        raise UsageError(f"out: got {out}, expected a name in .safetensors")
    images = find_class_folders(Path(folder))
    check_names(images.classes, str(images.folder))
    held = None if val is None else find_class_folders(Path(val), images.classes)
    with contextlib.ExitStack() as stack:
        first = int(os.environ.get("RANK", "0")) == 0
        if first:
            stack.enter_context(unfinished.lock(out))
        stack.enter_context(group())
        report("loading the network")
        model, notes, origin = _network(weights, lite, width, image_size, images.classes, seed)
        settings = {
            **plan.settings,
            "network": f"{model.config.family} {notes.width:g}",
            "weights": origin,
            "image size": notes.image_size,
            "classes": len(images.classes),
            "training images": len(images),
            "names or sizes of the training images": images.fingerprint,
            "validation images": len(held) if held else "a tenth of the training images",
            "names or sizes of the validation images": held.fingerprint if held else "",
        }
        state = shared(lambda: unfinished.read_state(out, settings, force) if first else None)
        spec = Preprocess(height=notes.image_size, width=notes.image_size)
        found = state and state["unreadable"]
        if found is None:
            data = [part for part in (images, held) if part and first]
            found = shared(lambda: [unreadable(part, spec, workers, report) for part in data])
        images = images.without(list(found[0]))
        if held is None:
            training, held = images.split(seed)
        else:
            training, held = images, held.without(list(found[1]))
        if plan.batch > len(training):
            raise UsageError(
                f"{folder}: {len(training)} images to train on are fewer than a batch of "
                f"{plan.batch}; give --batch {len(training)} or less, or more images"
            )
        run = _Run(model, notes, plan, training, held, workers, out, settings, found, report)
        before, history = run.restore(state), run.train(first)
        return FinetuneResult(
            out=printable(str(out)),
            family=model.config.family,
            width=notes.width,
            image_size=notes.image_size,
            recipe=recipe,
            classes=images.classes,
            training_images=len(training),
            validation_images=len(held),
            unreadable={
                str(Path(root) / file): why
                for root, faults in zip((folder, val or ""), found, strict=False)
                for file, why in faults.items()
            },
            epochs=tuple(history),
            resumed=before,
        )


@dataclass(frozen=True)
class _Plan:
    recipe: Recipe
    epochs: int
    batch: int  # of all processes together
    lr: float
    seed: int
    settings: dict[str, Any]  # what a training that goes on must have in common


def _plan(name: str, epochs: int | None, batch: int | None, lr: float | None, seed: int) -> _Plan:
    """The recipe with the options that replace its own; raises UsageError."""
    if name not in RECIPES:
        raise UsageError(f"recipe: got '{name}', expected {' or '.join(RECIPES)}")
    recipe = RECIPES[name]
    epochs = recipe.epochs if epochs is None else epochs
    batch = recipe.batch if batch is None else batch
    lr = recipe.lr * batch / recipe.batch if lr is None else lr
    if not 1 <= epochs <= 100_000:
        raise UsageError(f"epochs: got {epochs}, expected 1 to 100000")
    if not 2 <= batch <= 1_000_000:
        raise UsageError(f"batch: got {batch}, expected 2 or more images: batch norms need two")
    if not (math.isfinite(lr) and lr > 0):
        raise UsageError(f"learning rate: got {lr}, expected a number above 0")
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"seed: got {seed}, expected 0 or more, below 2^63")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if batch % processes or batch < 2 * processes:
        raise UsageError(
            f"batch: got {batch} for {processes} processes, expected a multiple of {processes}, "
            "two images or more each"
        )
    settings = {"recipe": name, "epochs": epochs, "batch": batch, "lr": lr, "seed": seed}
    return _Plan(recipe, epochs, batch, lr, seed, settings)


def _network(
    weights: Path | str | None,
    lite: bool,
    width: float | None,
    image_size: int | None,
    classes: tuple[str, ...],
    seed: int,
) -> tuple[RexNet, Notes, str]:
    """The network to train, what will be noted of it, and where its weights come from."""
    if weights is None:
        width = 1.0 if width is None else width
        config = CONFIGS["rexnet_lite" if lite else "rexnet"](width, len(classes))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed))
            model = RexNet(config)
        return model, Notes(classes, width, image_size or DEFAULT_IMAGE_SIZE), "none"
    checkpoint, source = read_weights(lite, width, None, weights)
    model, earlier = checkpoint.build(), checkpoint.notes
    same = earlier.labels == classes if earlier else checkpoint.num_classes == len(classes)
    if not same:
        model = replace_classifier(model, len(classes), seed_of(seed))
    size = image_size or (earlier.image_size if earlier else DEFAULT_IMAGE_SIZE)
    check_image_size(size)
    return model, Notes(classes, checkpoint.width, size), source.sha256


class _Run:
    """A training under way."""

    def __init__(
        self,
        model: RexNet,
        notes: Notes,
        plan: _Plan,
        training: ClassFolders,
        held: ClassFolders,
        workers: int,
        out: Path,
        settings: dict[str, Any],
        found: list[dict[str, str]],
        report: Report,
    ) -> None:
        self.notes, self.plan, self.out, self.report = notes, plan, out, report
        self.kept = {"settings": settings, "unreadable": found}
        self.history: list[Epoch] = []
        rank, processes = place()
        spec = Preprocess(height=notes.image_size, width=notes.image_size)
        transform = training_transform(plan.recipe.augmentation, spec)
        self.batches = Batches(len(training), plan.batch, plan.seed, rank, processes)
        examples = Examples(training, transform, plan.seed)
        self.training = loader(examples, self.batches, workers, unfinished.let_go)
        share = [[(0, at)] for at in range(rank, len(held), processes)]
        size = max(1, plan.batch // processes)
        grouped = [
            [key for keys in share[at : at + size] for key in keys]
            for at in range(0, len(share), size)
        ]
        examples = Examples(held, AsServed(spec), None)
        self.validation = loader(examples, grouped, workers, unfinished.let_go)
        self.trainer = Trainer(
            model, plan.recipe, plan.lr, plan.epochs, len(self.batches), device()
        )

    def restore(self, state: dict[str, Any] | None) -> int:
        """Goes on from a state, if there is one; returns how many epochs were done."""
        if state is not None:
            self.trainer.restore(state["trainer"])
            self.history = [Epoch(**epoch) for epoch in state["history"]]
        return len(self.history)

    def train(self, first: bool) -> list[Epoch]:
        """All epochs that are left; after each the state, and the network if it is the best."""
        for number in range(len(self.history) + 1, self.plan.epochs + 1):
            epoch = self._epoch(number)
            best = max(map(_goodness, self.history), default=None)
            self.history.append(epoch)
            if first:
                # In this order: a kill between the two repeats the epoch, to the same weights.
                if best is None or _goodness(epoch) > best:
                    unfinished.write(self.out, self.out, self._checkpoint())
                if number < self.plan.epochs:
                    state = {
                        **self.kept,
                        "history": msgspec.to_builtins(self.history),
                        "trainer": self.trainer.state(),
                    }
                    unfinished.write_state(self.out, state)
        if first:
            unfinished.state_of(self.out).unlink(missing_ok=True)
        return self.history

    def _epoch(self, number: int) -> Epoch:
        begun = told = time.monotonic()
        # What came before does not matter: a training that goes on draws what it would have drawn.
        torch.manual_seed(seed_of(self.plan.seed, number))
        self.batches.epoch = number
        losses: list[float] = []
        unseen: list[Tensor] = []
        title = f"epoch {number} of {self.plan.epochs}"
        self.report(title + self._so_far())
        steps = len(self.batches)
        for step, found in enumerate(self.training, start=1):
            unseen.append(self.trainer.step(*readable(found)))
            if step % _CHECK_STEPS and step != steps:
                continue
            losses += (self.trainer.summed(torch.stack(unseen)) / place()[1]).tolist()
            unseen.clear()
            wrong = first_not_finite(losses)
            if wrong is not None:
                raise VerificationFailed(
                    f"the loss is {losses[wrong]} in epoch {number}, step {wrong + 1} of {steps}; "
                    f"{self._what_stays()}: give a lower --lr (it is {self.plan.lr:g})"
                )
            if time.monotonic() - told > _TELL_S:
                told = time.monotonic()
                self.report(f"{title}: step {step} of {steps}, loss {losses[-1]:.3f}")
        val_loss, correct, _ = self.trainer.validate(map(readable, self.validation))
        if not math.isfinite(val_loss):
            raise VerificationFailed(
                f"the validation loss is {val_loss} after epoch {number}, step {steps} of {steps}; "
                f"{self._what_stays()}: give a lower --lr (it is {self.plan.lr:g})"
            )
        mean = math.fsum(losses) / len(losses)
        rate, taken = self.trainer.learning_rate, time.monotonic() - begun
        return Epoch(number, mean, val_loss, correct, rate, round(taken, 3))

    def _so_far(self) -> str:
        if not self.history:
            return ""
        last, best = self.history[-1], max(self.history, key=_goodness)
        images = len(self.validation.dataset)  # type: ignore[arg-type]
        return (
            f" (loss {last.loss:.3f}, top-1 {last.correct / images:.1%}; best "
            f"{best.correct / images:.1%})"
        )

    def _what_stays(self) -> str:
        if not self.history:
            return "nothing was written"
        return f"{self.out} is the best network of the epochs before"

    def _checkpoint(self) -> bytes:
        """The network in the published format and order of memory."""
        state = {
            name: tensor.cpu().contiguous()
            for name, tensor in self.trainer.result.state_dict().items()
        }
        return save_with_notes(state, self.notes)


def _goodness(epoch: Epoch) -> tuple[int, float]:
    return epoch.correct, -epoch.val_loss
