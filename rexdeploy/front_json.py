"""Checks the JSON of a request before Triton reads it.

Triton 2.51 makes room for what a shape promises before it looks at the data (8 GB for a request of
100 bytes; with more it aborts), and runs out of stack on deeply nested JSON. It reads the first of
two equal keys, and others read the last: what is passed on has been written anew.
"""

from __future__ import annotations

import math

import msgspec
from msgspec import Raw, json

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
