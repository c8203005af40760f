"""JSON that every reader takes for the same; cpp/src/manifest.cpp has the same rules."""

from __future__ import annotations

import codecs
import json
from typing import Any, NoReturn

MAX_DEPTH = 32
MAX_NUMBER = 2**53  # beyond it a double is not every whole number, and readers round


def check(data: bytes) -> None:
    """Raises ValueError for JSON of which readers make different things, also where none looks.

    These are: a name twice in one object, numbers beyond 2**53, NaN and infinity, half a surrogate
    pair, a byte order mark, text that is not UTF-8, and nesting deeper than 32.
    """
    if data.startswith(codecs.BOM_UTF8):
        raise ValueError("it begins with a byte order mark")
    try:
        document = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_refuse)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    _check(document, 0)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name is twice in one object")
    return values


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _check(value: Any, depth: int) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair") from None
    elif isinstance(value, (int, float)):
        if abs(value) > MAX_NUMBER:
            raise ValueError(f"a number beyond {MAX_NUMBER}")
    elif isinstance(value, (dict, list)):
        if depth == MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        for item in value:
            _check(item, depth + 1)
            if isinstance(value, dict):
                _check(value[item], depth + 1)
