"""What clients may do, and what the front refuses: too large bodies, JSON that ends Triton."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from msgspec import Raw, json

from rexdeploy.errors import UsageError

STARTING = "the server is being started"
REQUEST_BYTES = 2**24  # a photograph of 16 MiB
# What lets a client read and write other programs' memory, load models, or change what is logged.
CLOSED_APIS = ("shared-memory", "model-repository", "trace", "logging")
_MOST_MIB = 1024


@dataclass(frozen=True)
class Guard:
    """What clients may do."""

    request_bytes: int = REQUEST_BYTES  # the most that one request may have
    opened: tuple[str, ...] = ()  # of CLOSED_APIS

    def __post_init__(self) -> None:
        unknown = [name for name in self.opened if name not in CLOSED_APIS]
        if unknown:
            raise UsageError(f"open: got '{unknown[0]}', expected one of {', '.join(CLOSED_APIS)}")

    @property
    def closed(self) -> list[str]:
        """The APIs that nobody can use."""
        return [name for name in CLOSED_APIS if name not in self.opened]


def request_bytes(wanted_mib: int | None, full_batches: Sequence[int]) -> int:
    """The most that a request may have: what is wanted, or what photographs and tensors need.

    `full_batches` are the bytes of the largest batch of each model. Raises UsageError where what is
    wanted is no size.
    """
    if wanted_mib is None:
        return max(REQUEST_BYTES, *(size + 2**16 for size in full_batches), 0)
    if not 1 <= wanted_mib <= _MOST_MIB:
        raise UsageError(f"max-request: got {wanted_mib}, expected 1 to {_MOST_MIB}, in mebibytes")
    return wanted_mib * 2**20


class Budget:
    """How many bytes of requests may be in the server together; who asks first is served first."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._turn = asyncio.Lock()
        self._given = asyncio.Event()

    async def take(self, size: int) -> None:
        """Waits for `size` bytes, which must be at most the whole; nothing is there at once."""
        if not size:
            return
        async with self._turn:
            while self._free < size:
                self._given.clear()
                await self._given.wait()
            self._free -= size

    def give(self, size: int) -> None:
        """Gives back what was taken."""
        self._free += size
        self._given.set()


@dataclass
class Gate:
    """What every request passes."""

    limit: int  # bytes of one request's body, or of one message
    budget: Budget
    in_flight: int = 0  # requests that are not answered yet
    draining: bool = False


_OBJECT = json.Decoder(dict[str, Raw])
_INPUTS = json.Decoder(list[dict[str, Raw]])
_SHAPE = json.Decoder(list[int])
_DIMENSIONS = 32


def checked(text: bytes) -> bytes:
    """The same request with each key once; raises ValueError, whose text is for the client."""
    try:
        request = _OBJECT.decode(text)
        if "inputs" in request:
            inputs = _INPUTS.decode(request["inputs"])
            for tensor in inputs:
                _check(tensor, len(text))
            request["inputs"] = Raw(json.encode(inputs))
        return json.encode(request)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the request is not JSON of an inference ({error})") from None
    except RecursionError:
        raise ValueError("the request's JSON is nested too deeply") from None


def _check(tensor: dict[str, Raw], most: int) -> None:
    """Refuses a tensor in JSON whose shape promises more numbers than there are characters."""
    if "data" not in tensor or "shape" not in tensor:
        return
    shape = _SHAPE.decode(tensor["shape"])
    if len(shape) > _DIMENSIONS or min(shape, default=0) < 0 or math.prod(shape) > most:
        raise ValueError(f"shape: got {str(shape)[:100]}, and data that cannot have it")
