"""Detects objects with a bundle's stages, in ONNX Runtime or in PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from rexdeploy.arrays import UInt8
from rexdeploy.bundle.labels import read_labels
from rexdeploy.bundle.manifest import DETECTORS, Role
from rexdeploy.bundle.metadata import check_preprocess
from rexdeploy.bundle.signing import find
from rexdeploy.bundle.store import Bundle
from rexdeploy.detection.preprocess import prepare
from rexdeploy.detection.runtime import (
    ONNXRUNTIME,
    PYTORCH,
    Choice,
    Detections,
    OnnxStage,
    Stages,
    trace,
)
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.images import decode

BACKENDS = ("auto", ONNXRUNTIME, PYTORCH)


class Detector:
    """A loaded detector's bundle. Thread-safe; close it, or use it in a `with` statement."""

    def __init__(self, bundle: Bundle, labels: Sequence[str], stages: Stages, backend: str) -> None:
        self.spec = bundle.manifest.model
        self.title, self.backend = self.spec.title, backend
        self.labels = tuple(labels)  # of every class, the background's first
        self._stages: Stages | None = stages
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Detector {self.title} on {self.backend}>"

    def detect(
        self,
        images: Sequence[Path | str | Image.Image],
        score: float = Choice.score,
        max_detections: int = Choice.limit,
    ) -> list[Detections]:
        """What each image shows: boxes in its own pixels, the highest score first.

        Raises UsageError that names an image that cannot be read, a Pillow image by its place;
        RexdeployError where the network fails, or gives NaN or infinite values.
        """
        if isinstance(images, str | Path | Image.Image):  # a string is a sequence of strings
            raise UsageError(f"got one image ({images}), expected a list of images")
        choice = chosen(score, max_detections)
        return [self._one(self._pixels(item, at), choice) for at, item in enumerate(images)]

    def _pixels(self, item: Path | str | Image.Image, at: int) -> UInt8:
        if isinstance(item, Image.Image):
            try:
                return np.asarray(decode.to_rgb(item))
            except Exception as error:  # whatever Pillow raises
                raise UsageError(f"image {at}: {error}") from None
        return np.asarray(decode.load(Path(item)))

    def _one(self, pixels: UInt8, choice: Choice) -> Detections:
        spec = self.spec.preprocess
        prepared = prepare(pixels, spec.height, spec.width, spec.mean, spec.std)
        with self._lock:
            if self._stages is None:
                raise RexdeployError("this detector was closed; load the bundle again")
            found = trace(self._stages, prepared, (pixels.shape[0], pixels.shape[1]), choice)
        if max(found.detections.labels, default=0) >= len(self.labels):
            raise RexdeployError(
                f"the network gives class {max(found.detections.labels)}, and the manifest knows "
                f"{len(self.labels)}: run `rexdeploy verify`"
            )
        return found.detections

    def close(self) -> None:
        """Lets go of the stages; harmless twice."""
        with self._lock:
            for stage in (self._stages or {}).values():
                stage.close()
            self._stages = None

    def __enter__(self) -> Detector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def chosen(score: float, max_detections: int) -> Choice:
    """Which detections are given; raises UsageError for numbers that cannot be."""
    if not 0 <= score <= 1:
        raise UsageError(f"score: got {score:g}, expected 0 to 1")
    if not 1 <= max_detections <= 1000:
        raise UsageError(f"max detections: got {max_detections}, expected 1 to 1000")
    return Choice(score, max_detections)


def load_detector(
    bundle: Bundle | Path | str | None = None,
    backend: str = "auto",
    *,
    require_signature: Path | str | None = None,
) -> Detector:
    """The detector of a bundle, its folder, its name in artifacts/, or None: the latest one there.

    `backend` is "onnxruntime", "pytorch", or "auto": the first. Raises UsageError for what is no
    detector's bundle or lacks a stage, BackendUnavailable where the backend cannot run here.

    Example: `with rexdeploy.load_detector("street") as detector: detector.detect(["street.jpg"])`
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend: got '{backend}', expected one of {', '.join(BACKENDS)}")
    found = find(bundle, require_signature, DETECTORS)
    spec = found.manifest.model
    labels = read_labels(found)
    if backend == PYTORCH:
        from rexdeploy.detection.reference import rebuilt, torch_stages

        weights = found.manifest.find("weights")
        if weights is None:
            raise UsageError(f"{found.path} holds no weights; run 'rexdeploy export' again")
        model = rebuilt(found.read(weights), spec)
        return Detector(found, labels, torch_stages(model, spec.task == "segment"), PYTORCH)
    wanted: tuple[Role, ...] = ("features", "boxes")
    wanted += ("masks",) if spec.task == "segment" else ()
    stages = {}
    for role in wanted:
        artifact = next(
            (
                item
                for item in found.manifest.artifacts
                if item.kind == "onnx" and item.role == role and item.precision == "fp32"
            ),
            None,
        )
        if artifact is None:
            raise UsageError(
                f"{found.path} holds no float32 graph of stage '{role}'; run 'rexdeploy export'"
            )
        data = found.read(artifact)
        check_preprocess(found, artifact, data)
        stages[role] = OnnxStage(data, role)
    return Detector(found, labels, stages, ONNXRUNTIME)
