"""Classifies images with whatever a bundle holds that this machine can run best."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rexdeploy import machine
from rexdeploy.arrays import Float32, Float64, Images, softmax
from rexdeploy.backends import (
    ENGINE_BACKENDS,
    ONNX_BACKENDS,
    Backend,
    engine_backend,
    engines,
    has_onnxruntime_cuda,
    open_backend,
)
from rexdeploy.bundle.labels import read_labels
from rexdeploy.bundle.manifest import Artifact, BatchRange, Manifest
from rexdeploy.bundle.metadata import check_preprocess
from rexdeploy.bundle.signing import find
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError
from rexdeploy.images import decode

_AGAIN = "build it again: rexdeploy build-trt"
_MAKES_ONE = "'rexdeploy build-trt' makes an engine, 'rexdeploy export' a graph and the weights"
_CHUNK = 16  # images at once where the model takes any number


@dataclass(frozen=True)
class Prediction:
    """One class of one image."""

    index: int
    label: str
    probability: float  # 0 to 1


class NonFiniteOutput(RexdeployError):
    """The model gave NaN or infinite values for an image, as float16 does where it overflows."""


class Classifier:
    """A loaded bundle. Thread-safe; close it, or use it in a `with` statement."""

    def __init__(
        self,
        bundle: Bundle,
        labels: list[str],
        backend: Backend,
        artifact: Artifact,
        passed_over: tuple[str, ...],
    ) -> None:
        self.title = bundle.manifest.model.title
        self.backend = backend.name
        self.artifact = artifact  # the bundle's file that runs
        self.passed_over = passed_over  # why better backends are not used, one line each
        self.spec = bundle.manifest.model
        self.labels = tuple(labels)  # one a class
        self._model: Backend | None = backend
        self._batch = artifact.batch or BatchRange(1, _CHUNK, _CHUNK)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Classifier {self.title} on {self.backend}>"

    @property
    def chunk(self) -> int:
        """How many images the model runs at once, at the most."""
        return self._batch.max

    def prepare(self, inputs: Sequence[Path | str | Image.Image]) -> Images:
        """Images as the model takes them: one array of N, by `spec.input` and `spec.input_shape`.

        Needs no lock: decoding and resizing run beside the model. Raises UsageError that names the
        image, a Pillow image by its place in `inputs`.
        """
        if not inputs:
            raise UsageError("got 0 images, expected 1 or more")
        if isinstance(inputs, str | Path | Image.Image):  # a string is a sequence of strings
            raise UsageError(f"got one image ({inputs}), expected a list of images")
        preprocess = self.spec.preprocess
        pixels = [
            decode.take(item, f"image {index}", preprocess)
            if isinstance(item, Image.Image)
            else decode.read(Path(item), preprocess)
            for index, item in enumerate(inputs)
        ]
        return decode.model_input(np.stack(pixels), self.spec)

    def run(self, batch: Images) -> Float32:
        """What the model itself gives, float32 `[N, classes]`: by `spec.output`, of any batch.

        `batch` is what `prepare` gives. Raises UsageError for anything else, values that are not
        finite among it, RexdeployError where the model fails, NonFiniteOutput where it gives what
        is not finite.
        """
        shape = self.spec.input_shape
        if (
            batch.dtype != np.dtype(self.spec.input)
            or batch.ndim != 4
            or batch.shape[1:] != shape
            or len(batch) == 0
        ):
            raise UsageError(
                f"images: got {batch.dtype} of shape {batch.shape}, expected {self.spec.input} of "
                f"shape (N, {', '.join(map(str, shape))}), N > 0"
            )
        with self._lock:
            if self._model is None:
                raise RexdeployError("this classifier was closed; load the bundle again")
            chunks = [
                self._run_padded(self._model, batch[start : start + self._batch.max])
                for start in range(0, len(batch), self._batch.max)
            ]
        outputs = np.concatenate(chunks)
        if not np.isfinite(outputs).all():
            if not np.isfinite(batch).all():
                raise UsageError("images: got NaN or infinite values, expected finite ones")
            raise NonFiniteOutput(
                f"{self.backend} gave {self.spec.output} that are NaN or infinite; see "
                "'rexdeploy verify'"
            )
        return outputs

    def logits(self, batch: Images) -> Float32:
        """Logits `[N, classes]` (float32) of what `prepare` gives; raises like `run`."""
        if self.spec.output != "logits":
            raise UsageError(
                f"this bundle's files give {self.spec.output}; use probabilities(), or export with "
                "--output logits"
            )
        return self.run(batch)

    def probabilities(self, batch: Images) -> Float64:
        """Probabilities `[N, classes]` (float64) of what `prepare` gives; raises like `run`."""
        outputs = self.run(batch)
        return softmax(outputs) if self.spec.output == "logits" else outputs.astype(np.float64)

    def classify(
        self, inputs: Sequence[Path | str | Image.Image], top: int = 5
    ) -> list[list[Prediction]]:
        """The `top` most probable classes of every image, most probable first."""
        if not inputs or top < 1:
            raise UsageError(f"got {len(inputs)} images and top {top}, expected 1 or more of each")
        return [self.best(row, top) for row in self.probabilities(self.prepare(inputs))]

    def best(self, probabilities: Float64, top: int) -> list[Prediction]:
        """The `top` most probable classes of one image's probabilities `[classes]`."""
        order = np.argsort(-probabilities, kind="stable")[:top]
        return [
            Prediction(int(index), self.labels[index], float(probabilities[index]))
            for index in order
        ]

    def close(self) -> None:
        """Frees the model; later calls raise RexdeployError."""
        with self._lock:
            if self._model is not None:
                self._model.close()
                self._model = None

    def __enter__(self) -> Classifier:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run_padded(self, model: Backend, batch: Images) -> Float32:
        """Runs a batch that may be smaller than the model's minimum, by repeating its images."""
        size = max(len(batch), self._batch.min)
        return model.run(batch[np.arange(size) % len(batch)])[: len(batch)]


def load(
    bundle: Bundle | Path | str,
    backend: str = "auto",
    threads: int | None = None,
    require_signature: Path | str | None = None,
) -> Classifier:
    """Loads a bundle (itself, its folder, or its name in artifacts/) for classification.

    `backend` is "auto" or one backend's name. "auto" takes the first that works: TensorRT engines
    (float16 first), ONNX Runtime with CUDA, ONNX Runtime (an accepted INT8 graph first), PyTorch.
    `threads` is how many a CPU backend may use, and lets none of them spin while it waits; None
    leaves both to the library. `require_signature` is the public key that must have signed the
    bundle ('rexdeploy sign').
    Raises UsageError or BackendUnavailable with every reason.

    Example: `with rexdeploy.load("rexnet_1.5") as classifier: classifier.classify(["cat.jpg"])`
    """
    bundle = find(bundle, require_signature)
    labels = read_labels(bundle)
    choices = _choices(bundle, backend)
    if not choices:
        raise BackendUnavailable(f"{bundle.path} holds no file for backend {backend}: {_MAKES_ONE}")
    passed_over: list[str] = []
    for name, artifact in choices:
        if artifact.kind == "engine" and artifact.proof_fault is not None:
            passed_over.append(f"{artifact.file} on {name}: {artifact.proof_fault}; {_AGAIN}")
            continue
        data = bundle.read(artifact)
        try:
            model = open_backend(name, data, bundle.manifest.model, threads)
        except UsageError as error:
            raise UsageError(f"{bundle.path / artifact.file}: {error}") from None
        except RexdeployError as error:  # missing here, or refused here
            passed_over.append(f"{artifact.file} on {name}: {error}")
            continue
        try:
            passed_over += _unlike(bundle, artifact, data)
        except UsageError:
            model.close()
            raise
        return Classifier(bundle, labels, model, artifact, tuple(passed_over))
    raise BackendUnavailable(f"nothing in the bundle can run here: {'; '.join(passed_over)}")


def _unlike(bundle: Bundle, running: Artifact, data: bytes) -> list[str]:
    """Holds the manifest's preprocessing against the graph's own; says why where it cannot.

    `data` is the file that runs. An engine says nothing of its images: the graph that it was built
    from does. Raises UsageError where the two differ.
    """
    graph = running if running.kind == "onnx" else bundle.manifest.graph
    if graph is None:
        return []
    if graph is not running:
        try:
            data = bundle.read(graph)
        except UsageError as error:
            return [f"comparing the preprocessing with {graph.file}'s: {error}"]
    check_preprocess(bundle, graph, data)
    return []


def int8_here(manifest: Manifest) -> Artifact | None:
    """The accepted INT8 graph, if this machine's processor computes it as it was judged."""
    found = manifest.int8
    return found if found and (machine.has_int8() or not found.needs_int8) else None


def _choices(bundle: Bundle, backend: str) -> list[tuple[str, Artifact]]:
    """Backends with the file each would run, best first."""
    known = ("auto", *ENGINE_BACKENDS, *ONNX_BACKENDS, "pytorch")
    if backend not in known:
        raise UsageError(f"backend: got '{backend}', expected one of {', '.join(known)}")
    manifest = bundle.manifest
    choices = [(engine_backend(engine), engine) for engine in engines(manifest)]
    graph = manifest.graph
    weights = manifest.find("weights")
    if graph is not None:
        # On a machine without a GPU, a line about CUDA at every prediction would say nothing.
        if backend == "onnxruntime-cuda" or has_onnxruntime_cuda() or machine.has_device():
            choices.append(("onnxruntime-cuda", graph))
        if (int8 := int8_here(manifest)) is not None:
            choices.append(("onnxruntime", int8))
        choices.append(("onnxruntime", graph))
        if backend == "openvino":
            choices.append(("openvino", graph))
    if weights is not None:
        choices.append(("pytorch", weights))
    return [choice for choice in choices if backend in ("auto", choice[0])]
