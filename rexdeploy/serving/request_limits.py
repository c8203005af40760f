"""What clients may do, and what the front refuses: too large bodies, JSON that ends Triton."""

from __future__ import annotations

import asyncio
import math
import os
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
_LEAST_ROOM = 2**25


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


class Gate:
    """What every request passes: counts them, and lets in no more bytes than there is room for."""

    def __init__(self, limit: int, room: int) -> None:
        self.limit = limit  # bytes of one request's body, or of one message
        self.in_flight = 0  # requests that are not answered yet
        self.draining = False
        self._room = room  # bytes that may still come in
        self._turn = asyncio.Lock()
        self._given = asyncio.Event()

    async def take(self, size: int) -> None:
        """Waits for `size` bytes, the whole room at most; who asks first is served first."""
        if not size:
            return
        async with self._turn:
            while self._room < size:
                self._given.clear()
                await self._given.wait()
            self._room -= size

    def give(self, size: int) -> None:
        """Gives back what was taken."""
        self._room += size
        self._given.set()


def shared_room(limit: int) -> int:
    """Bytes of requests that may be in the server together, of which one may have `limit`.

    Triton's Python backend copies them to /dev/shm, never makes that smaller again, and fails
    everybody's requests when it is full: a small one takes fewer of them.
    """
    try:
        status = os.statvfs("/dev/shm")
        shared = status.f_bavail * status.f_frsize
    except OSError:
        shared = _LEAST_ROOM
    return max(limit, min(max(_LEAST_ROOM, 2 * limit), shared // 4))


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
