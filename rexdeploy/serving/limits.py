"""What the front refuses: bodies beyond its memory, and JSON that ends Triton."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

import msgspec
from msgspec import Raw, json

STARTING = "the server is being started"


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
