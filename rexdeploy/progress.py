"""What commands' functions share: one value or several, progress, and what a result can give."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Report = Callable[[str], None]
"""Takes a short phrase, such as "simplifying", when that part of a step begins."""


def silent(message: str) -> None:
    """A report that nobody listens to."""
    del message


def several(given: Any) -> tuple[Any, ...]:
    """An argument's values, where one or several may be given: a string is one, not letters."""
    if given is None:
        return ()
    is_one = isinstance(given, str) or not isinstance(given, Iterable)
    return (given,) if is_one else tuple(given)


class Result:
    """What a command gives: a dataclass whose `repr` is one line, with the verdict in it."""

    def to_dict(self) -> dict[str, Any]:
        """What the command writes with --json, as dictionaries, lists and plain values."""
        import msgspec  # `--help` needs none

        found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self._document()))
        return found

    def _document(self) -> Any:
        """What `to_dict` is made of, where it is not the fields themselves."""
        return self
