"""Trains a network on a folder of images by class, and goes on where a killed training was."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import torch

from rexdeploy import machine
from rexdeploy.backends.pytorch import reference
from rexdeploy.bundle.labels import read_labels
from rexdeploy.bundle.manifest import Preprocess
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import UsageError
from rexdeploy.models.notes import Notes, check_names
from rexdeploy.models.rexnet import CONFIGS, Family, RexNet, check_width
from rexdeploy.models.weights import read_weights
from rexdeploy.progress import Report, Result, silent
from rexdeploy.steps.export import DEFAULT_IMAGE_SIZE, check_image_size
from rexdeploy.text import printable
from rexdeploy.training import unfinished
from rexdeploy.training.class_folders import find_class_folders, unreadable
from rexdeploy.training.examples import seed_of
from rexdeploy.training.processes import group, shared
from rexdeploy.training.run import Epoch, Plan, Run, goodness
from rexdeploy.training.trainer import RECIPES, import_timm, replace_classifier

QAT_EPOCHS = 10
QAT_SLOWER = 10.0  # times: a network that has learned is to change little
DEFAULT_OUT = Path("finetuned.safetensors")
_MAX_WORKERS = 8


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
        return max(self.epochs, key=goodness)

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
    qat: Bundle | Path | str | None = None,
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

    `qat` is a bundle (one, its folder, its name in artifacts/) whose INT8 missed its bar: its
    network goes on learning with INT8's rounding in it, at a tenth of the rate, for 10 epochs. What
    is written is a float32 checkpoint; an epoch's figures are those with rounding.

    Raises UsageError for what cannot be used, BackendUnavailable without timm, RexdeployError where
    a file cannot be written, and VerificationFailed where the loss is NaN or infinite; the last
    good checkpoint and state stay.

    Example: `rexdeploy.finetune("train", lite=True, image_size=64, out="mine.safetensors").best`
    """
    import_timm()
    plan = _plan(recipe, epochs, batch, lr, seed, qat is not None)
    if qat is not None and (weights, lite, width, image_size) != (None, False, None, None):
        raise UsageError(
            "qat takes a bundle's own network: leave weights, lite, width and image size out"
        )
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
        spec = None
        if qat is None:
            model, notes, origin = _network(weights, lite, width, image_size, images.classes, seed)
        else:
            model, notes, origin, spec = _network_of(Bundle.find(qat), images.classes)
        spec = spec or Preprocess(height=notes.image_size, width=notes.image_size)
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
        run = Run(model, notes, spec, plan, training, held, workers, out, settings, found, report)
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


def _plan(
    name: str, epochs: int | None, batch: int | None, lr: float | None, seed: int, in_int8: bool
) -> Plan:
    """The recipe with the options that replace its own; raises UsageError."""
    if name not in RECIPES:
        raise UsageError(f"recipe: got '{name}', expected {' or '.join(RECIPES)}")
    recipe = RECIPES[name]
    if epochs is None:
        epochs = QAT_EPOCHS if in_int8 else recipe.epochs
    batch = recipe.batch if batch is None else batch
    if lr is None:
        lr = recipe.lr * batch / recipe.batch / (QAT_SLOWER if in_int8 else 1)
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
    settings: dict[str, Any] = {
        "recipe": name,
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "seed": seed,
    }
    if not in_int8:
        return Plan(recipe, epochs, batch, lr, seed, settings)
    # Such as `quantize` gives them here.
    bits = 8 if machine.has_int8() else 7
    settings["INT8's weights"] = f"{bits} bits"
    return Plan(recipe, epochs, batch, lr, seed, settings, bits)


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


def _network_of(bundle: Bundle, classes: tuple[str, ...]) -> tuple[RexNet, Notes, str, Preprocess]:
    """A bundle's network, what will be noted of it, its hash, and how its images are prepared."""
    spec, weights = bundle.manifest.model, bundle.manifest.find("weights")
    if weights is None or spec.width is None:
        raise UsageError(f"{bundle.path} holds somebody's own ONNX graph, which cannot be trained")
    labels = tuple(read_labels(bundle)) if bundle.manifest.find("labels") else None
    if labels not in (None, classes) or spec.num_classes != len(classes):
        raise UsageError(
            f"{bundle.path} knows {spec.num_classes} classes, and the images show "
            f"{len(classes)} others: INT8 is learned on the images that the network was trained on"
        )
    size = spec.preprocess.height
    if size != spec.preprocess.width:
        raise UsageError(
            f"{bundle.path} takes {spec.preprocess.width} x {size} pixels, expected a square"
        )
    model = cast(RexNet, reference(bundle.read(weights), spec))
    return model, Notes(classes, spec.width, size), weights.sha256, spec.preprocess
