"""A stand-in of CUDA's driver: `cuda.bindings.driver` on host memory, by CUDA's own rules.

What is put into a stream runs when somebody waits for it, not before. During a capture nothing
runs: what is illegal then (to allocate, to wait) is refused and invalidates the capture, which
stays so until it is ended. A graph that is launched does what was captured, with the addresses of
then. A fault inside a kernel is sticky: every later call reports it.
"""

# ruff: noqa: ARG002, N802 - the driver's own names and parameters

from __future__ import annotations

import ctypes
import threading
import types
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

Work = Callable[[], None]


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_ILLEGAL_STATE = 401
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class CUdeviceAttribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class CUstreamCaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_GLOBAL = 0
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1
    CU_STREAM_CAPTURE_MODE_RELAXED = 2


@dataclass
class Uuid:
    bytes: bytes


@dataclass
class _Stream:
    queue: list[Work] = field(default_factory=list)
    captured: list[Work] | None = None  # None: it is not in a capture
    is_invalid: bool = False


class IllegalAddress(Exception):
    """Raised inside a kernel: it reads or writes where nothing is allocated."""


OK = CUresult.CUDA_SUCCESS
Answer = tuple[Any, ...]


class Driver(types.ModuleType):
    """The module; what a test sets before or between calls comes first."""

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.CUresult = CUresult
        self.CUdevice_attribute = CUdeviceAttribute
        self.CUstreamCaptureMode = CUstreamCaptureMode
        self.devices = 1
        self.capability = (8, 9)
        self.uuid = uuid.UUID(int=7)
        self.fail: dict[str, CUresult] = {}  # what a function answers instead of doing it
        self.launches_do_nothing = False  # of graphs
        self.sticky: CUresult | None = None
        self.calls: list[str] = []
        self._initialised = False
        self._retained = 0
        self._current = threading.local()
        self._memory: dict[int, tuple[Any, int, bool]] = {}  # buffer, size, whether it is pinned
        self._streams: dict[int, _Stream] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._executables: dict[int, list[Work]] = {}
        self._next = 1000

    # Devices and the context

    def cuInit(self, flags: int) -> Answer:
        if (fault := self._fault("cuInit")) is not None:
            return (fault,)
        if not self.devices:
            return (CUresult.CUDA_ERROR_NO_DEVICE,)
        self._initialised = True
        return (OK,)

    def cuDeviceGet(self, ordinal: int) -> Answer:
        if (fault := self._fault("cuDeviceGet")) is not None:
            return fault, None
        if ordinal >= self.devices:
            return CUresult.CUDA_ERROR_INVALID_DEVICE, None
        return OK, ordinal

    def cuDeviceGetName(self, size: int, device: int) -> Answer:
        return OK, b"Stand-in GPU".ljust(size, b"\0")

    def cuDeviceGetUuid(self, device: int) -> Answer:
        return OK, Uuid(self.uuid.bytes)

    def cuDeviceGetAttribute(self, attribute: CUdeviceAttribute, device: int) -> Answer:
        return OK, self.capability[attribute - 75]

    def cuDriverGetVersion(self) -> Answer:
        return OK, 13000

    def cuDevicePrimaryCtxRetain(self, device: int) -> Answer:
        if (fault := self._fault("cuDevicePrimaryCtxRetain")) is not None:
            return fault, None
        self._retained += 1
        return OK, "context"

    def cuDevicePrimaryCtxRelease(self, device: int) -> Answer:
        if (fault := self._fault("cuDevicePrimaryCtxRelease")) is not None:
            return (fault,)
        if not self._retained:
            return (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        self._retained -= 1
        return (OK,)

    def cuCtxSetCurrent(self, context: Any) -> Answer:
        if (fault := self._fault("cuCtxSetCurrent")) is not None:
            return (fault,)
        self._current.context = context
        return (OK,)

    # Memory

    def cuMemAlloc(self, size: int) -> Answer:
        return self._allocate("cuMemAlloc", size, is_pinned=False)

    def cuMemHostAlloc(self, size: int, flags: int) -> Answer:
        return self._allocate("cuMemHostAlloc", size, is_pinned=True)

    def cuMemFree(self, pointer: int) -> Answer:
        return self._free("cuMemFree", pointer, is_pinned=False)

    def cuMemFreeHost(self, pointer: int) -> Answer:
        return self._free("cuMemFreeHost", pointer, is_pinned=True)

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> Answer:
        if (fault := self._fault("cuMemcpyHtoDAsync")) is not None:
            return (fault,)
        if self._is_pinned(source):
            return (self.put(stream, lambda: self._copy(target, source, size)),)
        staged = ctypes.create_string_buffer(ctypes.string_at(source, size), size)
        return (self.put(stream, lambda: self._copy(target, ctypes.addressof(staged), size)),)

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> Answer:
        if (fault := self._fault("cuMemcpyDtoHAsync")) is not None:
            return (fault,)

        def copy() -> None:
            self.check_address(source, size)
            ctypes.memmove(target, source, size)

        return (self.put(stream, copy),)

    def cuMemsetD8Async(self, target: int, value: int, size: int, stream: int) -> Answer:
        if (fault := self._fault("cuMemsetD8Async")) is not None:
            return (fault,)

        def fill() -> None:
            self.check_address(target, size)
            ctypes.memset(target, value, size)

        return (self.put(stream, fill),)

    # Streams and graphs

    def cuStreamCreate(self, flags: int) -> Answer:
        if (fault := self._fault("cuStreamCreate")) is not None:
            return fault, None
        handle = self._handle()
        self._streams[handle] = _Stream()
        return OK, handle

    def cuStreamDestroy(self, handle: int) -> Answer:
        if (fault := self._fault("cuStreamDestroy")) is not None:
            return (fault,)
        if self._streams.pop(handle, None) is None:
            return (CUresult.CUDA_ERROR_INVALID_HANDLE,)
        return (OK,)

    def cuStreamSynchronize(self, handle: int) -> Answer:
        if (fault := self._fault("cuStreamSynchronize")) is not None:
            return (fault,)
        stream = self._streams[handle]
        if stream.captured is not None:
            stream.is_invalid = True
            return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        self._drain(stream)
        return (self.sticky or OK,)

    def cuStreamBeginCapture(self, handle: int, mode: CUstreamCaptureMode) -> Answer:
        if (fault := self._fault("cuStreamBeginCapture")) is not None:
            return (fault,)
        stream = self._streams[handle]
        if stream.captured is not None:
            return (CUresult.CUDA_ERROR_ILLEGAL_STATE,)
        stream.captured = []
        return (OK,)

    def cuStreamEndCapture(self, handle: int) -> Answer:
        if (fault := self._fault("cuStreamEndCapture")) is not None:
            return fault, None
        stream = self._streams[handle]
        if stream.captured is None:
            return CUresult.CUDA_ERROR_ILLEGAL_STATE, None
        nodes, was_invalid = stream.captured, stream.is_invalid
        stream.captured, stream.is_invalid = None, False
        if was_invalid:
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        graph = self._handle()
        self._graphs[graph] = nodes
        return OK, graph

    def cuGraphInstantiate(self, graph: int, flags: int) -> Answer:
        if (fault := self._fault("cuGraphInstantiate")) is not None:
            return fault, None
        executable = self._handle()
        self._executables[executable] = list(self._graphs[graph])
        return OK, executable

    def cuGraphLaunch(self, executable: int, handle: int) -> Answer:
        if (fault := self._fault("cuGraphLaunch")) is not None:
            return (fault,)
        for node in [] if self.launches_do_nothing else self._executables[executable]:
            if (status := self.put(handle, node)) != OK:
                return (status,)
        return (OK,)

    def cuGraphDestroy(self, graph: int) -> Answer:
        return self._forget("cuGraphDestroy", self._graphs, graph)

    def cuGraphExecDestroy(self, executable: int) -> Answer:
        return self._forget("cuGraphExecDestroy", self._executables, executable)

    # For the engine's runtime, and for tests

    def put(self, handle: int, work: Work) -> CUresult:
        """Puts work into a stream: to be done, or to be captured."""
        stream = self._streams[handle]
        if stream.captured is None:
            stream.queue.append(work)
        elif stream.is_invalid:
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
        else:
            stream.captured.append(work)
        return OK

    def check_address(self, address: int, size: int) -> None:
        """Raises IllegalAddress unless all of it is in one allocation on the device."""
        for start, (_, length, is_pinned) in self._memory.items():
            if not is_pinned and start <= address and address + size <= start + length:
                return
        raise IllegalAddress

    def leaks(self) -> list[object]:
        """What was taken and not given back."""
        held = (*self._memory, *self._streams, *self._graphs, *self._executables)
        return [*held, *["context"] * self._retained]

    def _fault(self, name: str) -> CUresult | None:
        """Why a call does nothing: an error that sticks, what a test wants, or no context."""
        self.calls.append(name)
        if self.sticky is not None:
            return self.sticky
        if name in self.fail:
            return self.fail[name]
        if name == "cuInit":
            return None
        if not self._initialised:
            return CUresult.CUDA_ERROR_NOT_INITIALIZED
        needs_none = name.startswith(("cuDevice", "cuCtx"))
        has_context = getattr(self._current, "context", None) is not None and self._retained
        return None if needs_none or has_context else CUresult.CUDA_ERROR_INVALID_CONTEXT

    def _allocate(self, name: str, size: int, is_pinned: bool) -> Answer:
        if (fault := self._fault(name)) is not None:
            return fault, None
        if size <= 0:
            return CUresult.CUDA_ERROR_INVALID_VALUE, None
        if self._spoils_captures():
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, None
        buffer = ctypes.create_string_buffer(b"\xcd" * size, size)
        address = ctypes.addressof(buffer)
        self._memory[address] = buffer, size, is_pinned
        return OK, address

    def _free(self, name: str, pointer: int, is_pinned: bool) -> Answer:
        if (fault := self._fault(name)) is not None:
            return (fault,)
        if self._spoils_captures():
            return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        for stream in self._streams.values():
            self._drain(stream)  # a free waits
        if pointer not in self._memory or self._memory[pointer][2] != is_pinned:
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)
        del self._memory[pointer]
        return (OK,)

    def _spoils_captures(self) -> bool:
        """Whether a stream of this thread is in a capture, which such a call invalidates."""
        capturing = [stream for stream in self._streams.values() if stream.captured is not None]
        for stream in capturing:
            stream.is_invalid = True
        return bool(capturing)

    def _drain(self, stream: _Stream) -> None:
        queue, stream.queue = stream.queue, []
        for work in queue:
            try:
                work()
            except IllegalAddress:
                self.sticky = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
                return

    def _copy(self, target: int, source: int, size: int) -> None:
        self.check_address(target, size)
        ctypes.memmove(target, source, size)

    def _is_pinned(self, address: int) -> bool:
        return any(
            is_pinned and start <= address < start + size
            for start, (_, size, is_pinned) in self._memory.items()
        )

    def _forget(self, name: str, table: dict[int, list[Work]], handle: int) -> Answer:
        if (fault := self._fault(name)) is not None:
            return (fault,)
        if table.pop(handle, None) is None:
            return (CUresult.CUDA_ERROR_INVALID_HANDLE,)
        return (OK,)

    def _handle(self) -> int:
        self._next += 1
        return self._next
