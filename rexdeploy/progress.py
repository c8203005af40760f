"""How a step tells what it is doing, and what its result can give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Report = Callable[[str], None]
"""Takes a short phrase, such as "simplifying", when that part of a step begins."""


def silent(message: str) -> None:
    """A report that nobody listens to."""
    del message


class Result:
    """What a command gives: a dataclass whose `repr` is one line, with the verdict in it."""

    def to_dict(self) -> dict[str, Any]:
        """What the command writes with --json, as dictionaries, lists and plain values."""
        import msgspec  # `--help` needs none

        found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return found
