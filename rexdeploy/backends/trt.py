"""TensorRT and TensorRT-RTX engines on an NVIDIA GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rexdeploy.arrays import Float32, Images
from rexdeploy.backends import Kernels, Resident
from rexdeploy.backends.cuda import Gpu
from rexdeploy.backends.tensorrt_api import BACKENDS, Flavor, Log, captured_log, load, start
from rexdeploy.backends.trt_load import check_version, deserialize
from rexdeploy.bundle.manifest import MAX_BATCH, BatchRange, ModelSpec
from rexdeploy.errors import RexdeployError, UsageError


class TensorRTBackend:
    """Runs a serialised engine with one image input and one output."""

    def __init__(
        self, plan: bytes, spec: ModelSpec, flavor: Flavor, kernels: Kernels = "lazy"
    ) -> None:
        self.name = BACKENDS[flavor]
        self._trt = trt = load(flavor)
        check_version(plan, trt)
        self._gpu: Gpu | None = Gpu()
        self._kernels = kernels if flavor == "rtx" else None
        self._executions: list[_Execution] = []
        self._runtime = self._engine = None
        try:
            with captured_log(trt) as log:
                # The engine must be destroyed before its runtime: keep both, in this order.
                self._runtime = start(trt.Runtime, log)
                self._engine = deserialize(trt, self._runtime, plan, flavor, log)
            self._tensors = _read_tensors(trt, self._engine, spec)
            self.batch = self._tensors.batch
            self._served = self._execution(self._gpu, self.batch.max)
        except BaseException:
            self.close()
            raise

    def run(self, images: Images) -> Float32:
        gpu = self._check(images)
        gpu.activate()
        with captured_log(self._trt) as log:
            self._served.load(images, log)
            self._served.enqueue(log)
        return self._served.outputs()

    def resident(self, images: Images, cuda_graph: bool) -> Resident:
        """How to run the images from device memory, without copies.

        A context, memory and shape of its own: what the backend runs meanwhile changes neither what
        a recorded graph reads nor what it does. Raises RexdeployError where it cannot be recorded.
        """
        gpu = self._check(images)
        gpu.activate()
        execution = self._execution(gpu, len(images))
        with captured_log(self._trt) as log:
            execution.load(images, log)
            execution.enqueue(log)  # TensorRT compiles and allocates what must not be recorded
        gpu.synchronize()

        def enqueue() -> None:
            with captured_log(self._trt) as log:
                execution.enqueue(log)

        launch = enqueue
        if cuda_graph:
            execution.check_capturable()
            launch = gpu.record(enqueue)
        execution.spoil()

        def run() -> None:
            gpu.activate()
            launch()
            gpu.synchronize()

        return Resident(run, execution.outputs)

    def close(self) -> None:
        for execution in self._executions:
            execution.close()
        self._engine = None
        self._runtime = None
        if self._gpu is not None:
            self._gpu.close()
            self._gpu = None

    def _check(self, images: Images) -> Gpu:
        if self._gpu is None:
            raise RexdeployError("this engine was closed; load it again")
        if not self.batch.min <= len(images) <= self.batch.max:
            raise UsageError(
                f"the engine takes batches of {self.batch.min} to {self.batch.max}, got "
                f"{len(images)}; build one with --batch {min(len(images), self.batch.min)}"
                f":{self.batch.opt}:{max(len(images), self.batch.max)}"
            )
        return self._gpu

    def _execution(self, gpu: Gpu, rows: int) -> _Execution:
        execution = _Execution(self._trt, self._engine, self._tensors, gpu, rows, self._kernels)
        self._executions.append(execution)
        return execution


@dataclass(frozen=True)
class _Tensors:
    """An engine's input and output."""

    input: str
    output: str
    batch: BatchRange
    image: tuple[int, ...]  # the shape of one
    input_type: np.dtype[Any]
    output_type: np.dtype[Any]
    classes: int


class _Execution:
    """An execution context with buffers for `rows` images at the most."""

    def __init__(
        self,
        trt: Any,
        engine: Any,
        tensors: _Tensors,
        gpu: Gpu,
        rows: int,
        kernels: Kernels | None,
    ) -> None:
        self._tensors, self._gpu = tensors, gpu
        with captured_log(trt) as log:
            self._context = _create_context(trt, engine, gpu, kernels, log)
        self._kernels = kernels
        self._inputs = gpu.pinned((rows, *tensors.image), tensors.input_type)
        self._outputs = gpu.pinned((rows, tensors.classes), tensors.output_type)
        self._device_inputs = gpu.allocate(self._inputs.nbytes)
        self._device_outputs = gpu.allocate(self._outputs.nbytes)
        self._rows = 0
        for name, pointer in (
            (tensors.input, self._device_inputs),
            (tensors.output, self._device_outputs),
        ):
            if not self._context.set_tensor_address(name, int(pointer)):
                raise RexdeployError(f"the engine refuses a buffer for its tensor {name}")

    def load(self, images: Images, log: Log) -> None:
        """Sets the shape, and enqueues the upload."""
        if not self._context.set_input_shape(self._tensors.input, images.shape):
            raise RexdeployError(f"the engine refuses {images.shape}: {log.first_error()}")
        self._rows = len(images)
        staged = self._inputs[: self._rows]
        staged[...] = images
        self._gpu.upload(staged, self._device_inputs)

    def enqueue(self, log: Log) -> None:
        if not self._context.execute_async_v3(self._gpu.stream_handle):
            raise RexdeployError(f"the engine failed: {log.first_error()}")

    def check_capturable(self) -> None:
        """Raises RexdeployError where TensorRT-RTX itself says that it cannot be captured."""
        # Full TensorRT is not asked: it has no such question, and its engines of one shape can be.
        if self._kernels and not self._context.is_stream_capturable(self._gpu.stream_handle):
            raise RexdeployError(
                "TensorRT-RTX says that this engine cannot be captured as a CUDA graph; "
                "build it again: rexdeploy build-trt"
            )

    def outputs(self) -> Float32:
        """What the last run gave, after waiting for it."""
        answer = self._outputs[: self._rows]
        self._gpu.download(self._device_outputs, answer)
        return answer.astype(np.float32)  # a copy: the next run writes there

    def spoil(self) -> None:
        """Makes the outputs NaN, so that only what runs from here on can be read."""
        self._gpu.spoil(self._device_outputs, self._outputs.nbytes)

    def close(self) -> None:
        self._context = None


def _create_context(trt: Any, engine: Any, gpu: Gpu, kernels: Kernels | None, log: Log) -> Any:
    """A context; `kernels` is TensorRT-RTX's choice, None for full TensorRT."""
    if kernels is None:
        context = engine.create_execution_context()
    else:
        runtime_config = engine.create_runtime_config()
        runtime_config.dynamic_shapes_kernel_specialization_strategy = {
            "lazy": trt.DynamicShapesKernelSpecializationStrategy.LAZY,
            "eager": trt.DynamicShapesKernelSpecializationStrategy.EAGER,
            "none": trt.DynamicShapesKernelSpecializationStrategy.NONE,
        }[kernels]
        # Engines built with REQUIRE_USER_ALLOCATION ask for it; others may have it, too.
        runtime_config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        context = engine.create_execution_context(runtime_config)
    if context is None:
        raise RexdeployError(f"the engine cannot be started: {log.first_error()}")
    if kernels is not None:
        size = engine.device_memory_size_v2
        context.set_device_memory(int(gpu.allocate(size)), size)
    return context


def _read_tensors(trt: Any, engine: Any, spec: ModelSpec) -> _Tensors:
    """The engine's input and output; raises UsageError where they are not the spec's."""
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
            f"[N, {', '.join(map(str, size))}] and one output [N, {spec.num_classes}]"
        )
    fixed = shapes[0][0]
    sizes = [fixed] * 3
    if fixed <= 0:
        sizes = [shape[0] for shape in engine.get_tensor_profile_shape(inputs[0], 0)]
    if not 1 <= sizes[0] <= sizes[1] <= sizes[2] <= MAX_BATCH:
        raise UsageError(
            f"the engine takes batches of {':'.join(map(str, sizes))}, expected 1 to {MAX_BATCH}; "
            "build another"
        )
    return _Tensors(
        input=inputs[0],
        output=outputs[0],
        batch=BatchRange(*sizes),
        image=size,
        input_type=np.dtype(spec.input),
        output_type=np.dtype(trt.nptype(engine.get_tensor_dtype(outputs[0]))),
        classes=spec.num_classes,
    )
