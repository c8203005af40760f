"""What the front's protocols share: a limit, and a budget of bytes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

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
