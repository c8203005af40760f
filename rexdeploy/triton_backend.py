"""What Triton's Python backend runs: a bundle's network, and the decoding of image files.

A model.py in a repository imports one of these classes under the name that Triton expects. They
need this package, numpy, pillow and one runtime in Triton's Python, and no torch.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from rexdeploy.arrays import Float32, Images, UInt8
from rexdeploy.bundle.manifest import ModelSpec
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.images import decode
from rexdeploy.inference.classifier import load

_MOST_BYTES = 2**26  # of one file; `rexdeploy serve` takes less, other servers do not ask

_USED = ctypes.c_char_p(b"used_dltensor")  # how a consumer names a DLPack capsule; kept alive here
_set_capsule_name = ctypes.pythonapi.PyCapsule_SetName
_set_capsule_name.argtypes = [ctypes.py_object, ctypes.c_char_p]


class Network:
    """Runs a bundle's network on batches that Triton has put together from several requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the bundle in the version's folder with the best backend of this machine."""
        self._utils = import_module("triton_python_backend_utils")  # exists inside Triton only
        # Threads that spin take the cores from those that decode the next images: with a number of
        # threads, none of them spins (`load_session` has what it costs).
        self._classifier = load(_version_folder(args), threads=_share(args))
        self._spec = self._classifier.spec
        for reason in self._classifier.passed_over:
            self._utils.Logger.log_warn(f"passed over: {reason}")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers every request with its own outputs, or with its own error."""
        batches = [_input(self._utils, request, self._spec.input_name) for request in requests]
        return [
            _response(self._utils, self._spec.output_name, outputs)
            for outputs in run_each(self._classifier.run, batches)
        ]

    def finalize(self) -> None:
        """Frees the network."""
        self._classifier.close()


class Preprocess:
    """Decodes, crops and normalises image files."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads how from the manifest in the version's folder."""
        self._utils = import_module("triton_python_backend_utils")  # exists inside Triton only
        self._spec = Bundle.open(_version_folder(args)).manifest.model
        # Pillow decodes and resizes without the GIL.
        self._threads = ThreadPoolExecutor(_cores())

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers every request with its images, or with what is wrong with one of them."""
        batches = [_input(self._utils, request, "image") for request in requests]
        waiting = [
            [
                self._threads.submit(decoded, row.tobytes(), n, self._spec)
                for n, row in enumerate(batch)
            ]
            for batch in batches
        ]
        answers: list[Images | RexdeployError] = []
        for futures in waiting:
            try:
                pixels = np.stack([future.result() for future in futures])
                answers.append(decode.model_input(pixels, self._spec))
            except RexdeployError as error:
                answers.append(error)
        return [_response(self._utils, "preprocessed", answer) for answer in answers]

    def finalize(self) -> None:
        """Ends the threads."""
        self._threads.shutdown()


def run_each(
    run: Callable[[Any], Float32], batches: Sequence[Images]
) -> list[Float32 | RexdeployError]:
    """The outputs of each batch, all run as one; or of those that fail, why.

    One client's NaN must not fail the others' requests: where the whole fails, each runs alone.
    """
    try:
        ends = np.cumsum([len(batch) for batch in batches])
        return list(np.split(run(np.concatenate(batches)), ends[:-1]))
    except RexdeployError as error:
        if len(batches) == 1:
            return [error]
        return [answer for batch in batches for answer in run_each(run, [batch])]


def decoded(data: bytes, index: int, spec: ModelSpec) -> UInt8:
    """The bytes of an image file to uint8 RGB `[height, width, 3]`; raises UsageError.

    `index` is the image's place in its request.
    """
    if len(data) > _MOST_BYTES:
        raise UsageError(
            f"image {index}: got {len(data)} bytes, expected at most {_MOST_BYTES}; send it smaller"
        )
    with decode.opened(data, f"image {index}") as image:
        return decode.crop(decode.to_rgb(image), spec.preprocess)


def _cores() -> int:
    """How many this process may run on: of a container's, not of its machine's."""
    return len(os.sched_getaffinity(0))


def _share(args: dict[str, str]) -> int:
    """How many threads one of the model's instances gets, so that all have the cores' number."""
    groups: list[dict[str, int]] = json.loads(args["model_config"])["instance_group"]
    return max(1, _cores() // sum(group["count"] for group in groups))


def _version_folder(args: dict[str, str]) -> Path:
    return Path(args["model_repository"]) / args["model_version"]


def _input(utils: Any, request: Any, name: str) -> Any:
    """A request's tensor as an array that lives as long as the request.

    By DLPack, as the answers go back: Triton's Python backend up to 2.51 is built for NumPy 1, and
    with NumPy 2 its `as_numpy` silently repeats the first element, its `Tensor` drops the data.
    """
    return np.from_dlpack(utils.get_input_tensor_by_name(request, name))


def _response(utils: Any, name: str, answer: Images | RexdeployError) -> Any:
    if isinstance(answer, RexdeployError):
        # The client's fault, or ours: 400 or 500 in HTTP, of which monitoring counts the latter.
        is_theirs = isinstance(answer, UsageError)
        kind = utils.TritonError.INVALID_ARG if is_theirs else utils.TritonError.INTERNAL
        return utils.InferenceResponse([], utils.TritonError(str(answer), kind))
    array: Any = np.ascontiguousarray(answer)
    capsule = array.__dlpack__()
    tensor = utils.Tensor.from_dlpack(name, capsule)
    # Triton leaves "used_dlpack", at which NumPy complains once a response.
    _set_capsule_name(capsule, _USED)
    return utils.InferenceResponse([tensor])
