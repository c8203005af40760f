"""The CUDA driver: the first GPU, one stream, memory on both sides, and recorded graphs."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from rexdeploy.errors import BackendUnavailable, RexdeployError

_ALL_ONES = 0xFF  # as every byte of a float16, bfloat16 or float32: NaN


class Gpu:
    """The first GPU's primary context, one stream, and everything that was taken from them.

    Raises BackendUnavailable where bindings, driver or device are missing. What fails from then on
    is refused here, with the GPU there: RexdeployError.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError:
            raise BackendUnavailable(
                "running an engine needs cuda-bindings: pip install 'rexdeploy[rtx]'"
            ) from None
        self._driver: Any = driver
        self._owned: list[tuple[Any, Any]] = []  # what frees it, and the handle; freed backwards
        try:
            self._call(driver.cuInit, 0)
            self._device = self._call(driver.cuDeviceGet, 0)
        except (RuntimeError, OSError):  # cuda-bindings finds no driver library
            raise BackendUnavailable("no NVIDIA GPU driver on this machine") from None
        except RexdeployError as error:
            raise BackendUnavailable(f"no usable NVIDIA GPU on this machine ({error})") from None
        self._context = self._call(driver.cuDevicePrimaryCtxRetain, self._device)
        self._owned.append((driver.cuDevicePrimaryCtxRelease, self._device))
        try:
            self.activate()
            # 1: CU_STREAM_NON_BLOCKING
            self._stream = self._own(driver.cuStreamDestroy, driver.cuStreamCreate, 1)
        except RexdeployError:
            self.close()
            raise

    @property
    def stream_handle(self) -> int:
        return int(self._stream)

    def activate(self) -> None:
        """Makes the context current in the calling thread."""
        self._call(self._driver.cuCtxSetCurrent, self._context)

    def allocate(self, size_bytes: int) -> Any:
        """Device memory, until `close`."""
        return self._own(self._driver.cuMemFree, self._driver.cuMemAlloc, max(size_bytes, 1))

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Page-locked host memory, until `close`: the driver copies any other one twice."""
        size = int(np.prod(shape)) * dtype.itemsize
        address = self._own(self._driver.cuMemFreeHost, self._driver.cuMemHostAlloc, size, 0)
        memory: Any = (ctypes.c_char * size).from_address(int(address))
        flat: npt.NDArray[Any] = np.frombuffer(memory, dtype)
        return flat.reshape(shape)

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

    def spoil(self, pointer: Any, size_bytes: int) -> None:
        """Fills device memory with NaN, and waits: what is read there later was written later."""
        self._call(self._driver.cuMemsetD8Async, pointer, _ALL_ONES, size_bytes, self._stream)
        self.synchronize()

    def synchronize(self) -> None:
        """Waits for everything enqueued before."""
        self._call(self._driver.cuStreamSynchronize, self._stream)

    def record(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """What `enqueue` puts into the stream, as a CUDA graph: returns how to launch it.

        A failure ends the capture: a stream that is left in one refuses all that comes after.
        """
        driver = self._driver
        # Thread-local: what another thread does with the GPU cannot spoil the capture.
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call(driver.cuStreamBeginCapture, self._stream, mode)
        try:
            enqueue()
        except BaseException:
            with contextlib.suppress(RexdeployError):  # it says that the capture is invalid
                self._end_capture()
            raise
        graph = self._end_capture()
        try:
            executable = self._own(driver.cuGraphExecDestroy, driver.cuGraphInstantiate, graph, 0)
        finally:
            driver.cuGraphDestroy(graph)

        def launch() -> None:
            self._call(driver.cuGraphLaunch, executable, self._stream)

        return launch

    def close(self) -> None:
        """Gives everything back; twice does no harm.

        Never raises: after an error that is sticky, such as an illegal address, each of these calls
        reports that error again, and it would hide where it came from.
        """
        with contextlib.suppress(RexdeployError):
            self.activate()
        while self._owned:
            free, handle = self._owned.pop()
            with contextlib.suppress(RexdeployError):
                self._call(free, handle)

    def _end_capture(self) -> Any:
        return self._call(self._driver.cuStreamEndCapture, self._stream)

    def _own(self, free: Any, function: Any, *arguments: Any) -> Any:
        """Calls the driver, and has `close` free what it gives."""
        handle = self._call(function, *arguments)
        self._owned.append((free, handle))
        return handle

    def _call(self, function: Any, *arguments: Any) -> Any:
        """Calls the driver; returns its value, or raises with the driver's own error name."""
        status, *values = function(*arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise RexdeployError(f"{function.__name__} failed: {status.name}")
        return values[0] if values else None
