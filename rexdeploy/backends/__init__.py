"""The libraries that run a model, behind one small protocol; each is imported only when opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from rexdeploy.arrays import Array, Float32, Images, softmax
from rexdeploy.backends import tensorrt_api
from rexdeploy.backends.tensorrt_api import Flavor
from rexdeploy.bundle.manifest import Artifact, Manifest, ModelSpec
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.images.decode import normalise

ONNX_BACKENDS = ("onnxruntime", "onnxruntime-cuda", "openvino")
ENGINE_BACKENDS = tuple(tensorrt_api.BACKENDS.values())
TORCH_BACKENDS = ("pytorch", "pytorch-compile", "pytorch-cuda", "pytorch-cuda-compile")
"""How PyTorch can run a network; "pytorch" is the reference, the others are for benchmarks."""
GPU_BACKENDS = ("pytorch-cuda", "pytorch-cuda-compile", "onnxruntime-cuda", *ENGINE_BACKENDS)

Kernels = Literal["lazy", "eager", "none"]
"""Which kernels TensorRT-RTX runs an engine of several sizes with.

"eager" compiles those of a size before it runs the first time, "none" runs kernels of any size, and
"lazy", which serves, runs these until the others are compiled: what is proven of a lazy run is
proven of either. Other backends have no such choice.
"""

_FASTEST_FIRST = {"fp16": 0, "bf16": 1}  # engines by precision; what is not named comes after


def has_onnxruntime_cuda() -> bool:
    """Whether the installed onnxruntime is one that can use an NVIDIA GPU."""
    try:
        import onnxruntime
    except ImportError:
        return False
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def engine_backend(engine: Artifact) -> str:
    """The name of the backend that runs an engine, by the flavour that built it."""
    return "tensorrt-rtx" if engine.flavor == "rtx" else "tensorrt"


def flavor_of(backend: str) -> Flavor:
    """Whose engines one of ENGINE_BACKENDS runs."""
    return next(flavor for flavor, name in tensorrt_api.BACKENDS.items() if name == backend)


def backends_of(artifact: Artifact) -> tuple[str, ...]:
    """The backends that run such a file, whether they are installed or not."""
    if artifact.kind == "engine":
        return (engine_backend(artifact),)
    return {"onnx": ONNX_BACKENDS, "weights": ("pytorch",)}.get(artifact.kind, ())


def engines(manifest: Manifest) -> list[Artifact]:
    """A bundle's engines, by their precision the fastest first."""
    found = [artifact for artifact in manifest.artifacts if artifact.kind == "engine"]
    return sorted(found, key=lambda engine: _FASTEST_FIRST.get(engine.precision or "", 2))


class Backend(Protocol):
    """A loaded model. Not thread-safe; `close` frees it, and nothing may run after that."""

    name: str

    def run(self, images: Images) -> Float32:
        """Logits or probabilities `[N, classes]` (owned by the caller) of N images.

        Which of the two, and the images' type and shape, are what the model's spec says.
        """

    def close(self) -> None:
        """Frees the model; calling it twice does no harm."""


@dataclass(frozen=True)
class Resident:
    """Images that are on the GPU, and how to run them there."""

    run: Callable[[], None]  # and wait
    outputs: Callable[[], Float32]  # of the last run; NaN before the first one


class DeviceBackend(Backend, Protocol):
    """One of GPU_BACKENDS: it can keep its images on the GPU, for a benchmark without copies."""

    def resident(self, images: Images, cuda_graph: bool) -> Resident:
        """Images on the GPU, until `close`; `cuda_graph`: they run as one launch.

        Raises RexdeployError where they cannot; the backend can be used as before.
        """


def open_backend(
    name: str,
    model: bytes,
    spec: ModelSpec,
    threads: int | None = None,
    spin: bool = False,
    kernels: Kernels = "lazy",
) -> Backend:
    """Loads a serialised model: weights for "pytorch", ONNX or an engine for the others.

    `threads` is how many a CPU backend may use; None leaves it to the library. ONNX Runtime's may
    `spin` within a run where the cores are its own (see `load_session`). Raises BackendUnavailable
    where something is missing on this machine, RexdeployError where the model is refused although
    nothing is, UsageError for an unusable model.
    """
    if name == "pytorch":
        from rexdeploy.backends.pytorch import PyTorchBackend, TorchOptions, reference

        backend = PyTorchBackend(reference(model, spec), TorchOptions(threads=threads))
        return backend if spec == spec.core else _Interface(backend, spec)
    if name == "openvino":
        from rexdeploy.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(model, spec, threads)
    if name in ONNX_BACKENDS:
        from rexdeploy.backends.onnxrt import OnnxRuntimeBackend

        return OnnxRuntimeBackend(model, spec, name == "onnxruntime-cuda", threads, spin)
    if name in ENGINE_BACKENDS:
        from rexdeploy.backends.trt import TensorRTBackend

        return TensorRTBackend(model, spec, flavor_of(name), kernels)
    known = ", ".join(("pytorch", *ONNX_BACKENDS, *ENGINE_BACKENDS))
    raise UsageError(f"backend: got '{name}', expected one of {known}")


class _Interface:
    """A backend of the core, with a spec's input and output around it."""

    def __init__(self, core: Backend, spec: ModelSpec) -> None:
        self.name, self._core, self._spec = core.name, core, spec

    def run(self, images: Images) -> Float32:
        if self._spec.input == "uint8":
            images = normalise(images.astype(np.uint8, copy=False), self._spec.preprocess)
        outputs = self._core.run(images)
        if self._spec.output == "probabilities":
            outputs = softmax(outputs).astype(np.float32)
        return outputs

    def close(self) -> None:
        self._core.close()


@dataclass(frozen=True)
class Rows:
    """Logits by row, with the image that each row comes from."""

    images: npt.NDArray[np.int64]
    logits: Array  # [rows, classes]
    last: int  # how many of the rows, at the end, the largest batch size gave

    def by_image(self) -> Array:
        """`[images, classes]`: each image's first row, which the smallest batch gave."""
        _, first = np.unique(self.images, return_index=True)
        logits: Array = self.logits[first]
        return logits


def run_batches(
    backend: Backend, images: Images, sizes: Sequence[int], most: int | None = None
) -> Rows:
    """Runs the images in batches of each size, so that every row's neighbours differ.

    The largest size runs all images, the others the first `most` of them (None: all). No batch has
    a period: where it is larger than the images are many, they are drawn in random order, so that
    no row can stand for another. Raises RexdeployError where the backend fails, or gives anything
    but one row an image.
    """
    indices, logits = [], []
    last = 0
    for size in sorted(set(sizes)):
        count = len(images) if size == max(sizes) or most is None else min(most, len(images))
        order = _without_period(count, -(-count // size) * size)
        last = len(order)
        for start in range(0, last, size):
            index = order[start : start + size]
            answer = backend.run(images[index])
            if answer.ndim != 2 or len(answer) != size:
                raise RexdeployError(
                    f"gave logits of shape {list(answer.shape)} for a batch of {size}"
                )
            indices.append(index)
            logits.append(answer)
    return Rows(np.concatenate(indices), np.concatenate(logits), last)


def _without_period(count: int, rows: int) -> npt.NDArray[np.int64]:
    """All of `count` images once, in order, and then any of them, until there are `rows`."""
    more = np.random.default_rng(0).integers(0, count, max(0, rows - count))
    return np.concatenate([np.arange(count), more])
