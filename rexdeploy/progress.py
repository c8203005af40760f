"""How a long step tells what it is doing."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str], None]
"""Takes a short phrase, such as "simplifying", when that part of a step begins."""


def silent(message: str) -> None:
    """A report that nobody listens to."""
    del message
