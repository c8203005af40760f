"""A stand-in of the engine's runtime, of TensorRT-RTX or of full TensorRT, on `cuda_standin`.

An engine is an ONNX graph behind a real header; ONNX Runtime on the CPU does its arithmetic, when
the stream comes to it. By the rules of the real one: a context compiles and allocates when a shape
runs for the first time; an engine that was not built to be captured allocates at every run; a graph
that was captured is no good once its context has another shape.
"""

from __future__ import annotations

import ctypes
import json
import math
import types
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import onnxruntime as ort

from tests.cuda_standin import OK, Driver

VERSION = {"tensorrt_rtx": "1.7.1.116", "tensorrt": "10.13.3.9"}
_MAGIC = {"tensorrt_rtx": b"vtrt", "tensorrt": b"ftrt"}
SM89 = 8


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1


class TensorIOMode(IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class EngineValidity(IntEnum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    OLD_CUDA_RUNTIME = 8
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32
    CUDA_ERROR = 64


class DynamicShapesKernelSpecializationStrategy(IntEnum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class ILogger:
    pass


def plan(
    graph: bytes,
    batch: tuple[int, int, int] = (1, 2, 8),
    *,
    module: str = "tensorrt_rtx",
    targets: int = SM89,
    is_capturable: bool = True,
) -> bytes:
    """A serialised engine of the graph."""
    notes = {"batch": batch, "is_capturable": is_capturable}
    payload = json.dumps(notes).encode() + b"\n" + graph
    header = bytearray(64)
    header[:4] = _MAGIC[module]
    header[16:24] = (64 + len(payload)).to_bytes(8, "little")
    header[24:28] = bytes(int(part) for part in VERSION[module].split("."))
    header[32:36] = targets.to_bytes(4, "little")
    if module == "tensorrt":
        header[4:8] = bytes(4)  # its format
    return bytes(header) + payload


class Module(types.ModuleType):
    """`tensorrt_rtx`, or `tensorrt`; what a test sets decides what the engines do."""

    def __init__(self, name: str, driver: Driver) -> None:
        super().__init__(name)
        self.__version__ = VERSION[name]
        self.driver = driver
        self.validity: tuple[EngineValidity, int] | None = None  # None: it is looked at
        self.refuses_to_load: str | None = None  # what it logs
        self.wrong_kernels: set[str] = set()  # "specialised", "fallback"
        self.bad_address = False  # kernels write where they must not
        self.says_capturable: bool | None = None  # None: what is true of the engine
        self.strategies: list[str] = []  # of the contexts that were made
        self.ILogger = ILogger
        self.TensorIOMode = TensorIOMode
        self.float32, self.float16, self.uint8 = "float32", "float16", "uint8"
        self.nptype = np.dtype
        self.Runtime = lambda logger: Runtime(self, logger)
        if name == "tensorrt_rtx":
            self.EngineValidity = EngineValidity
            self.EngineInvalidityDiagnostics = EngineInvalidityDiagnostics
            self.DynamicShapesKernelSpecializationStrategy = (
                DynamicShapesKernelSpecializationStrategy
            )
            self.ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy


class Runtime:
    def __init__(self, module: Module, logger: Any) -> None:
        self._module, self._logger = module, logger
        if module.__name__ == "tensorrt_rtx":
            self.get_engine_validity = self._validity

    def _validity(self, data: bytes) -> tuple[EngineValidity, int]:
        if self._module.validity is not None:
            return self._module.validity
        major, minor = self._module.driver.capability
        bits = {(7, 5): 1, (8, 0): 2, (8, 6): 4, (8, 9): 8, (12, 0): 16, (12, 1): 32}
        if data[:4] != b"vtrt":
            return EngineValidity.INVALID, int(EngineInvalidityDiagnostics.MALFORMED_ENGINE)
        if not int.from_bytes(data[32:36], "little") & bits.get((major, minor), 0):
            return EngineValidity.INVALID, int(EngineInvalidityDiagnostics.UNSUPPORTED_CC)
        return EngineValidity.VALID, 0

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        if self._module.refuses_to_load is not None:
            self._logger.log(Severity.ERROR, self._module.refuses_to_load)
            return None
        notes, _, graph = data[64:].partition(b"\n")
        return Engine(self._module, self._logger, json.loads(notes), graph)


class Engine:
    num_io_tensors = 2
    device_memory_size_v2 = 4096

    def __init__(self, module: Module, logger: Any, notes: dict[str, Any], graph: bytes) -> None:
        self.module, self.logger = module, logger
        self.batch: list[int] = notes["batch"]
        self.is_capturable: bool = notes["is_capturable"]
        self.session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.input, self.output = self.session.get_inputs()[0], self.session.get_outputs()[0]

    def get_tensor_name(self, index: int) -> str:
        return str((self.input.name, self.output.name)[index])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == self.input.name else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = (self.input if name == self.input.name else self.output).shape
        return tuple(size if isinstance(size, int) else -1 for size in shape)

    def get_tensor_dtype(self, name: str) -> str:
        kind = (self.input if name == self.input.name else self.output).type
        return {"tensor(float)": "float32", "tensor(uint8)": "uint8"}[kind]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert (name, profile) == (self.input.name, 0)
        return [(size, *self.get_tensor_shape(name)[1:]) for size in self.batch]

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: RuntimeConfig | None = None) -> Context:
        return Context(self, config or RuntimeConfig())


@dataclass
class RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy: DynamicShapesKernelSpecializationStrategy = (
        DynamicShapesKernelSpecializationStrategy.LAZY
    )
    allocation: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self.allocation = strategy


@dataclass
class Context:
    engine: Engine
    config: RuntimeConfig
    addresses: dict[str, int] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    shapes_set: int = 0
    compiled: set[tuple[int, ...]] = field(default_factory=set)
    memory: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        strategy = self.config.dynamic_shapes_kernel_specialization_strategy
        self.engine.module.strategies.append(strategy.name)

    def set_device_memory(self, memory: int, size: int) -> None:
        self.memory = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.batch
        wanted = self.engine.get_tensor_shape(name)[1:]
        if not low <= shape[0] <= high or tuple(shape[1:]) != wanted:
            self._log(f"{shape} is not in the profile")
            return False
        if tuple(shape) != self.shape:
            self.shape, self.shapes_set = tuple(shape), self.shapes_set + 1
        return True

    def is_stream_capturable(self, stream: int) -> bool:  # noqa: ARG002
        said = self.engine.module.says_capturable
        return self.engine.is_capturable if said is None else said

    def execute_async_v3(self, stream: int) -> bool:
        module, driver = self.engine.module, self.engine.module.driver
        if self.shape is None or len(self.addresses) != 2:
            return self._log("a tensor has no shape or address")
        is_ours = self.config.allocation == ExecutionContextAllocationStrategy.USER_MANAGED
        given = self.memory[1] if self.memory else 0
        if is_ours and given < self.engine.device_memory_size_v2:
            return self._log("the context has too little device memory")
        is_new = self.shape not in self.compiled
        if is_new or not self.engine.is_capturable:
            status, scratch = driver.cuMemAlloc(512)
            if status != OK:
                return self._log(f"CUDA error: {status.name}")
            driver._memory.pop(scratch)  # the runtime's own, freed without waiting
        strategy = self.config.dynamic_shapes_kernel_specialization_strategy.name
        kernels = "fallback"
        if strategy == "EAGER" or (strategy == "LAZY" and not is_new):
            kernels = "specialised"
        self.compiled.add(self.shape)
        shape, generation = self.shape, self.shapes_set
        source = self.addresses[self.engine.input.name]
        target = 8 if module.bad_address else self.addresses[self.engine.output.name]

        def kernel() -> None:
            kind = np.dtype(self.engine.get_tensor_dtype(self.engine.input.name))
            size = math.prod(shape) * kind.itemsize
            driver.check_address(source, size)
            images = np.frombuffer(ctypes.string_at(source, size), kind).reshape(shape)
            (outputs,) = self.engine.session.run(None, {self.engine.input.name: images})
            if kernels in module.wrong_kernels:
                outputs = np.roll(outputs, 1, axis=1)
            if generation != self.shapes_set:  # what it knows of its shape is another's by now
                outputs = np.zeros_like(outputs)
            data = np.ascontiguousarray(outputs).tobytes()
            driver.check_address(target, len(data))
            ctypes.memmove(target, data, len(data))

        status = driver.put(stream, kernel)
        return status == OK or self._log(f"CUDA error: {status.name}")

    def _log(self, text: str) -> bool:
        self.engine.logger.log(Severity.ERROR, text)
        return False
