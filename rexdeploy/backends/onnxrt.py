"""ONNX Runtime, on the CPU or on an NVIDIA GPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rexdeploy.arrays import Float32, Images
from rexdeploy.backends import Resident
from rexdeploy.backends.onnxrt_cuda import open_session
from rexdeploy.bundle.manifest import ModelSpec
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError, first_line

_NUMPY_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}


class OnnxRuntimeBackend:
    """Runs an ONNX model with one image input and one output."""

    def __init__(
        self,
        model: bytes,
        spec: ModelSpec,
        cuda: bool = False,
        threads: int | None = None,
        spin: bool = False,
    ) -> None:
        self.name = "onnxruntime-cuda" if cuda else "onnxruntime"
        self._model = model
        self._session = load_session(model, cuda, threads, spin=spin)
        _check_signature(self._session.get_inputs(), self._session.get_outputs(), spec)
        self._input = self._session.get_inputs()[0].name
        self._batch = self._session.get_inputs()[0].shape[0]

    def run(self, images: Images) -> Float32:
        if isinstance(self._batch, int) and len(images) != self._batch:
            raise UsageError(
                f"the model takes batches of exactly {self._batch}, got {len(images)}; "
                "export with --batch dynamic"
            )
        with _named_errors(f"{self.name} failed on a batch of {len(images)}"):
            outputs = self._session.run(None, {self._input: images})
        logits: Float32 = np.asarray(outputs[0], dtype=np.float32)
        return logits

    def resident(self, images: Images, cuda_graph: bool) -> Resident:
        """How to run the images from device memory, without copies; only with CUDA.

        Raises RexdeployError where they cannot be run so.
        """
        import onnxruntime as ort

        outputs = np.full_like(self.run(images), np.nan)
        session = self._session
        if cuda_graph:  # recorded at a session's first run, for its one shape
            try:
                session = load_session(self._model, cuda=True, cuda_graph=True)
            except UsageError as error:  # the model has run without a CUDA graph
                raise RexdeployError(f"it cannot be captured as a CUDA graph: {error}") from None
        with _named_errors(f"{self.name} failed"):
            on_device = [
                ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0) for array in (images, outputs)
            ]
            binding = session.io_binding()
            binding.bind_ortvalue_input(self._input, on_device[0])
            binding.bind_ortvalue_output(session.get_outputs()[0].name, on_device[1])

        def run() -> None:
            with _named_errors(f"{self.name} failed"):
                session.run_with_iobinding(binding)  # waits for the GPU

        return Resident(run, lambda: np.array(on_device[1].numpy(), np.float32))

    def close(self) -> None:
        self._session = None


def load_session(
    model: bytes,
    cuda: bool = False,
    threads: int | None = None,
    cuda_graph: bool = False,
    spin: bool = False,
) -> Any:
    """An onnxruntime session of the model; `cuda_graph` records its first run to replay it.

    With `cuda`, nothing falls back to the CPU, neither now nor in the middle of a run.

    With a number of threads none of them spins once a run has ended. `spin` lets them do so within
    a run, from one node to the next: 1.1 to 1.3 times as fast on cores that nothing else wants.
    Where something else wants them, it is the slower way: beside a process that decodes images, on
    two busy cores of an AMD EPYC, V1 1.0 answered 12.7 instead of 16.2 images a second, and 23.4
    instead of 27.1 were decoded.

    Raises BackendUnavailable where onnxruntime, the GPU or kernels for the model's types are
    missing, RexdeployError where a GPU that is there does not take the model, UsageError where
    onnxruntime cannot run such a model.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise BackendUnavailable(
            "onnxruntime is not installed: pip install 'rexdeploy[cpu]', or 'rexdeploy[gpu]' "
            "on a machine with an NVIDIA GPU"
        ) from None
    options = ort.SessionOptions()
    options.log_severity_level = 4  # its warnings are about its own work, its errors are raised
    if threads is not None:
        options.intra_op_num_threads = threads
        # Threads that spin on after a run would take the cores from whatever runs next.
        if spin:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        else:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    elif (own := _own_cores()) is not None:
        options.intra_op_num_threads = own
    if cuda:
        return open_session(ort, model, options, cuda_graph)
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no public base class
        raise UsageError(
            f"not an ONNX model that onnxruntime can load ({first_line(error)})"
        ) from None


def fused(model: bytes) -> bytes:
    """The graph that ONNX Runtime makes of a model for this CPU, in its own operators.

    Raises RexdeployError where it cannot load the model.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fused.onnx"
        options.optimized_model_filepath = str(path)
        with _named_errors("onnxruntime cannot load the graph"):
            ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return path.read_bytes()


def _own_cores() -> int | None:
    """How many cores this process may run on, where it may not use all of the machine's.

    onnxruntime starts a thread for each of the machine's: two that wait for each other by spinning
    on one core took V1 1.5 0.80 s of CPU time for 20 images, and one took 0.51 s.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    own = len(os.sched_getaffinity(0))
    return own if own < (os.cpu_count() or 1) else None


class GraphSession:
    """An ONNX graph with any outputs on the CPU.

    Raises BackendUnavailable without onnxruntime, RexdeployError where it cannot load the graph.
    """

    def __init__(self, model: bytes, threads: int | None = None) -> None:
        try:
            self._session = load_session(model, threads=threads)
        except UsageError as error:  # a copy that we made, not somebody's file
            raise RexdeployError(str(error)) from None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Their names, in the graph's order."""
        return tuple(value.name for value in self._session.get_inputs())

    @property
    def outputs(self) -> tuple[str, ...]:
        """Their names, in the graph's order."""
        return tuple(value.name for value in self._session.get_outputs())

    def run(self, feeds: Mapping[str, Images], outputs: Sequence[str]) -> dict[str, Float32]:
        """The tensors `outputs` as float32; what is fed is cast to the type of the graph's input.

        Raises RexdeployError where the graph fails.
        """
        for value in self._session.get_inputs():
            if value.type not in _NUMPY_TYPES:
                raise RexdeployError(f"the graph takes {value.name} as {value.type}")
        with np.errstate(over="ignore"):  # what float16 cannot hold is infinite
            typed = {
                value.name: feeds[value.name].astype(_NUMPY_TYPES[value.type])
                for value in self._session.get_inputs()
            }
        with _named_errors("onnxruntime cannot run the graph"):
            values = self._session.run(list(outputs), typed)
        return {
            name: np.asarray(value, np.float32) for name, value in zip(outputs, values, strict=True)
        }


@contextmanager
def _named_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnxruntime's errors share no public base class
        raise RexdeployError(f"{what} ({first_line(error)})") from None


def _check_signature(inputs: Sequence[Any], outputs: Sequence[Any], spec: ModelSpec) -> None:
    """Raises UsageError unless the model takes and gives what the spec says."""
    size = spec.input_shape
    kind = "tensor(uint8)" if spec.input == "uint8" else "tensor(float)"
    if (
        len(inputs) == len(outputs) == 1
        and inputs[0].type == kind
        and _fits(inputs[0].shape, (None, *size))
        and _fits(outputs[0].shape, (None, spec.num_classes))
    ):
        return
    got = [f"{value.type} {value.shape}" for value in (*inputs, *outputs)]
    raise UsageError(
        f"the model has inputs and outputs {', '.join(got)}; expected one {kind} input "
        f"[N, {size[0]}, {size[1]}, {size[2]}] and one output [N, {spec.num_classes}]"
    )


def _fits(shape: Sequence[object], wanted: Sequence[int | None]) -> bool:
    """Whether every fixed dimension is the wanted one; None, and a named dimension, are open."""
    return len(shape) == len(wanted) and all(
        size is None or not isinstance(got, int) or got == size
        for got, size in zip(shape, wanted, strict=True)
    )
