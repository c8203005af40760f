"""TensorRT and TensorRT-RTX engines on an NVIDIA GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError
from rexdeploy.images import Images
from rexdeploy.manifest import BatchRange, ModelSpec
from rexdeploy.tensorrt_api import Flavor, Log, captured_log, load, read_header, start

Float32 = npt.NDArray[np.float32]


class TensorRTBackend:
    """Runs a serialised engine with one image input and one output."""

    def __init__(self, plan: bytes, spec: ModelSpec, flavor: Flavor) -> None:
        self.name = "tensorrt-rtx" if flavor == "rtx" else "tensorrt"
        trt = load(flavor)
        header = read_header(plan)
        # Full TensorRT decides by itself: it runs engines of some neighbouring versions.
        if header.flavor == "rtx" and header.version != trt.__version__:
            raise BackendUnavailable(
                f"the engine was built by TensorRT-RTX {header.version} and this machine has "
                f"{trt.__version__}; build it again: rexdeploy build-trt"
            )
        gpu = _Gpu()
        self._gpu: _Gpu | None = gpu
        try:
            with captured_log(trt) as log:
                if flavor == "rtx":
                    _check_validity(trt, start(trt.Runtime, log), plan, log)
                # The engine must be destroyed before its runtime: keep both, in this order.
                self._runtime = start(trt.Runtime, log)
                self._engine = self._runtime.deserialize_cuda_engine(plan)
                if self._engine is None:
                    raise BackendUnavailable(f"the engine cannot be loaded: {log.first_error()}")
                self._context = self._engine.create_execution_context()
                if self._context is None:
                    raise BackendUnavailable(f"the engine cannot be started: {log.first_error()}")
            self._trt = trt
            self._bind(spec, gpu)
        except BaseException:
            self.close()
            raise

    def run(self, images: Images) -> Float32:
        if self._gpu is None:
            raise RexdeployError("this engine was closed; load it again")
        if not self.batch.min <= len(images) <= self.batch.max:
            raise UsageError(
                f"the engine takes batches of {self.batch.min} to {self.batch.max}, got "
                f"{len(images)}; build one with --batch {min(len(images), self.batch.min)}"
                f":{self.batch.opt}:{max(len(images), self.batch.max)}"
            )
        images = np.ascontiguousarray(images, dtype=self._input_type)
        logits = np.empty((len(images), self._classes), dtype=self._output_type)
        with captured_log(self._trt) as log:
            self._gpu.activate()
            self._set_shape(images.shape, log)
            self._gpu.upload(images, self._device_input)
            self._enqueue(log)
            self._gpu.download(self._device_output, logits)
        return logits.astype(np.float32, copy=False)

    def resident(self, images: Images, cuda_graph: bool) -> Callable[[], None]:
        """Runs the images from device memory and waits, without copies."""
        self.run(images)  # uploads them, and lets TensorRT allocate what must not be recorded
        gpu, trt = self._gpu, self._trt
        assert gpu is not None

        def enqueue() -> None:
            with captured_log(trt) as log:
                self._set_shape(images.shape, log)
                self._enqueue(log)

        launch = gpu.record(enqueue) if cuda_graph else enqueue

        def run() -> None:
            gpu.activate()
            launch()
            gpu.synchronize()

        return run

    def _set_shape(self, shape: tuple[int, ...], log: Log) -> None:
        if not self._context.set_input_shape(self._input, shape):
            raise RexdeployError(f"the engine refuses {shape}: {log.first_error()}")

    def _enqueue(self, log: Log) -> None:
        assert self._gpu is not None
        if not self._context.execute_async_v3(self._gpu.stream_handle):
            raise RexdeployError(f"the engine failed: {log.first_error()}")

    def close(self) -> None:
        self._context = self._engine = self._runtime = None
        if self._gpu is not None:
            self._gpu.close()
            self._gpu = None

    def _bind(self, spec: ModelSpec, gpu: _Gpu) -> None:
        """Checks the engine's input and output against the spec, and gives them device memory."""
        trt, engine = self._trt, self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        shapes = [tuple(engine.get_tensor_shape(name)) for name in inputs + outputs]
        size = spec.input_shape
        kind = trt.uint8 if spec.input == "uint8" else trt.float32
        if (
            len(inputs) != 1
            or len(outputs) != 1
            or shapes[0][1:] != size
            or shapes[1][1:] != (spec.num_classes,)
            or engine.get_tensor_dtype(inputs[0]) != kind
            or engine.get_tensor_dtype(outputs[0]) not in (trt.float32, trt.float16)
        ):
            raise UsageError(
                f"the engine maps {shapes[:1]} to {shapes[1:]}; expected one {spec.input} input "
                f"[N, {size[0]}, {size[1]}, {size[2]}] and one output [N, {spec.num_classes}]"
            )
        fixed = shapes[0][0]
        if fixed > 0:
            self.batch = BatchRange(fixed, fixed, fixed)
        else:
            low, opt, high = engine.get_tensor_profile_shape(inputs[0], 0)
            self.batch = BatchRange(low[0], opt[0], high[0])
        self._input, self._classes = inputs[0], spec.num_classes
        self._output_type = np.dtype(trt.nptype(engine.get_tensor_dtype(outputs[0])))
        self._input_type = np.dtype(spec.input)
        self._device_input = gpu.allocate(
            self._input_type.itemsize * self.batch.max * math.prod(size)
        )
        self._device_output = gpu.allocate(
            self._output_type.itemsize * self.batch.max * spec.num_classes
        )
        for name, pointer in ((inputs[0], self._device_input), (outputs[0], self._device_output)):
            if not self._context.set_tensor_address(name, int(pointer)):
                raise RexdeployError(f"the engine refuses a buffer for its tensor {name}")


class _Gpu:
    """The first GPU's primary context, one stream, and the memory taken from it."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError:
            raise BackendUnavailable(
                "running an engine needs cuda-bindings: pip install 'rexdeploy[rtx]'"
            ) from None
        self._driver: Any = driver
        try:
            self._call(driver.cuInit, 0)
        except (RuntimeError, OSError):  # cuda-bindings finds no driver library
            raise BackendUnavailable("no NVIDIA GPU driver on this machine") from None
        self._device = self._call(driver.cuDeviceGet, 0)
        self._context = self._call(driver.cuDevicePrimaryCtxRetain, self._device)
        self._pointers: list[Any] = []
        self.activate()
        self._stream = self._call(driver.cuStreamCreate, 1)  # CU_STREAM_NON_BLOCKING

    @property
    def stream_handle(self) -> int:
        return int(self._stream)

    def activate(self) -> None:
        """Makes the context current in the calling thread."""
        self._call(self._driver.cuCtxSetCurrent, self._context)

    def allocate(self, size_bytes: int) -> Any:
        pointer = self._call(self._driver.cuMemAlloc, size_bytes)
        self._pointers.append(pointer)
        return pointer

    def upload(self, array: npt.NDArray[Any], pointer: Any) -> None:
        """Enqueues a copy to the device."""
        self._call(
            self._driver.cuMemcpyHtoDAsync, pointer, array.ctypes.data, array.nbytes, self._stream
        )

    def download(self, pointer: Any, array: npt.NDArray[Any]) -> None:
        """Copies from the device, after everything enqueued before; waits for it."""
        self._call(
            self._driver.cuMemcpyDtoHAsync, array.ctypes.data, pointer, array.nbytes, self._stream
        )
        self.synchronize()

    def synchronize(self) -> None:
        """Waits for everything enqueued before."""
        self._call(self._driver.cuStreamSynchronize, self._stream)

    def record(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """What `enqueue` puts into the stream, as a CUDA graph: returns how to launch it."""
        driver = self._driver
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call(driver.cuStreamBeginCapture, self._stream, mode)
        enqueue()
        graph = self._call(driver.cuStreamEndCapture, self._stream)
        executable = self._call(driver.cuGraphInstantiate, graph, 0)

        def launch() -> None:
            self._call(driver.cuGraphLaunch, executable, self._stream)

        return launch

    def close(self) -> None:
        self.activate()
        for pointer in self._pointers:
            self._call(self._driver.cuMemFree, pointer)
        self._call(self._driver.cuStreamDestroy, self._stream)
        self._call(self._driver.cuDevicePrimaryCtxRelease, self._device)

    def _call(self, function: Any, *arguments: Any) -> Any:
        """Calls the driver; returns its value, or raises with the driver's own error name."""
        status, *values = function(*arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise BackendUnavailable(f"{function.__name__} failed: {status.name}")
        return values[0] if values else None


def _check_validity(trt: Any, runtime: Any, plan: bytes, log: Any) -> None:
    """RTX's own preflight: whether this engine runs on this GPU and this version."""
    validity, diagnostics = runtime.get_engine_validity(plan)
    if validity == trt.EngineValidity.INVALID:
        raise BackendUnavailable(
            f"this GPU cannot run the engine (diagnostics {diagnostics:#x}): {log.first_error()}; "
            "build one for it: rexdeploy build-trt --target"
        )
