"""One adapter for TensorRT 10.13 and later, TensorRT 11 and TensorRT-RTX: parse, build, report.

The two flavours share an API, and all of it that is used here exists in every supported version
(a test checks that against the real bindings of 10.13, 10.16 and 11.4).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from rexdeploy.errors import BackendUnavailable, UsageError

Flavor = Literal["tensorrt", "rtx"]
FLAVORS: tuple[Flavor, ...] = ("tensorrt", "rtx")
BACKENDS: dict[Flavor, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt-rtx"}
"""The backend that runs each flavour's engines."""
TITLES: dict[Flavor, str] = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}
RTX_MAGIC = b"vtrt"
MIN_VERSION = (10, 13)  # of full TensorRT; the first release tested
_MODULES: dict[Flavor, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
# Observed in engines of TensorRT-RTX 1.7 (the format is not documented).
_RTX_TARGET_BITS = {"sm75": 1, "sm80": 2, "sm86": 4, "sm89": 8, "sm120": 16, "sm121": 32}
_RTX_HEADER_BYTES = 64
# trtexec.cpp of TensorRT 10: the tag, a format of 0, and the version at byte 24.
_FULL_MAGIC = b"ftrt"
_FULL_HEADER_BYTES = 28


@dataclass(frozen=True)
class PlanHeader:
    """What can be read off a plan without a GPU."""

    flavor: Flavor
    version: str | None  # None where the plan is of no format that we know
    targets: tuple[str, ...]  # RTX only


def load(flavor: Flavor) -> Any:
    """The flavour's Python module; raises BackendUnavailable if it is missing or too old."""
    title, module_name = TITLES[flavor], _MODULES[flavor]
    extra = "rtx" if flavor == "rtx" else "tensorrt"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        # A library that does not load is an ImportError of the same name: only the type tells.
        if isinstance(error, ModuleNotFoundError) and error.name == module_name:
            reason = f"{title} is not installed"
        else:
            reason = f"{title} cannot be loaded ({error})"
        raise BackendUnavailable(f"{reason}: pip install 'rexdeploy[{extra}]'") from None
    except (OSError, RuntimeError) as error:  # its libraries are missing: no wheel on PyPI
        raise BackendUnavailable(
            f"{title}'s libraries cannot be loaded ({error}): pip install 'rexdeploy[{extra}]'"
        ) from None
    version = tuple(int(part) for part in module.__version__.split(".")[:2])
    if flavor == "tensorrt" and version < MIN_VERSION:
        raise BackendUnavailable(
            f"got TensorRT {module.__version__}, expected "
            f"{'.'.join(map(str, MIN_VERSION))} or later: pip install 'rexdeploy[{extra}]'"
        )
    return module


@contextmanager
def captured_log(trt: Any) -> Iterator[Log]:
    """Yields the flavour's logger with an empty log; what TensorRT says meanwhile lands in it."""
    log = _loggers.get(trt.__name__)
    if log is None:
        log = _loggers[trt.__name__] = _make_logger(trt)
    log.messages.clear()
    yield log


class Log:
    """TensorRT's messages as (severity, text): 0 internal error, 1 error, ... 4 verbose."""

    def __init__(self, title: str) -> None:
        self.title = title  # of the flavour
        self.messages: list[tuple[int, str]] = []

    def first_error(self) -> str:
        """The first error, which names the cause; later ones are its echoes."""
        errors = [text for severity, text in self.messages if severity <= 1]
        return " ".join(errors[0].split()) if errors else "TensorRT gave no reason"


def start(factory: Any, log: Log) -> Any:
    """A Builder or Runtime; raises BackendUnavailable with TensorRT's reason if there is none."""
    try:
        return factory(log)
    except TypeError:  # what the bindings make of a null pointer, such as without a GPU
        raise BackendUnavailable(f"{log.title} cannot start here: {log.first_error()}") from None


def is_plan(data: bytes) -> bool:
    """Whether the bytes begin as an engine of either flavour does."""
    return data[:4] in (RTX_MAGIC, _FULL_MAGIC)


def read_header(plan: bytes) -> PlanHeader:
    """Flavour, version and targets of a serialised engine, without a GPU.

    Whatever is not RTX's is taken for full TensorRT's, whose own trtexec (--getPlanVersionOnly)
    reads the version at the same place. Raises UsageError for a plan that is cut short.
    """
    version = ".".join(str(byte) for byte in plan[24:28])
    if plan[:4] != RTX_MAGIC:
        is_known = plan[:8] == _FULL_MAGIC + bytes(4)
        if is_known and len(plan) < _FULL_HEADER_BYTES:
            raise UsageError(
                f"a truncated TensorRT engine: got {len(plan)} bytes; copy or build it again"
            )
        return PlanHeader("tensorrt", version if is_known else None, ())
    if len(plan) < _RTX_HEADER_BYTES:
        raise UsageError(
            f"a truncated TensorRT-RTX engine: got {len(plan)} bytes, expected at "
            f"least {_RTX_HEADER_BYTES}; copy or build it again"
        )
    size = int.from_bytes(plan[16:24], "little")
    if len(plan) != size:
        raise UsageError(
            f"a truncated TensorRT-RTX engine: got {len(plan)} bytes, expected {size}; "
            "copy or build it again"
        )
    mask = int.from_bytes(plan[32:36], "little")
    targets = tuple(name for name, bit in _RTX_TARGET_BITS.items() if mask & bit)
    return PlanHeader("rtx", version, targets)


def target_names() -> tuple[str, ...]:
    """The compute capabilities that --target takes."""
    return tuple(_RTX_TARGET_BITS)


_loggers: dict[str, Any] = {}  # TensorRT keeps the first logger it sees for the whole process


def _make_logger(trt: Any) -> Any:
    class Logger(Log, trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            Log.__init__(self, "TensorRT-RTX" if trt.__name__ == "tensorrt_rtx" else "TensorRT")

        def log(self, severity: Any, text: str) -> None:
            self.messages.append((int(severity), text))

    return Logger()
