"""Stands in front of a Triton server, at its address: bounds what reaches it, ends without loss.

The server listens at sockets in a private folder only, so that nobody goes round. The front says
503 while no server runs, and so do the health checks.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rexdeploy import front_grpc, front_http
from rexdeploy.front_http import Budget, Gate

# Files in the server's folder; Triton adds the port's number to gRPC's.
SOCKETS = {"http": "http", "grpc": "grpc:1", "metrics": "metrics"}
_LEAST_BUDGET = 2**25
_GRACE_S = 0.5  # who has just had an answer may send the next request meanwhile, and gets its own
_LOOK_S = 0.02


class Front:
    """Listens at a host's port (HTTP) and the next two (gRPC, metrics), in a thread of its own."""

    def __init__(self, host: str, port: int, limit: int) -> None:
        self.limit = limit
        self._host, self._port = host, port
        self._gate = Gate(limit, Budget(budget(limit)))
        self._loop = asyncio.new_event_loop()
        self._listeners: list[asyncio.Server] = []
        self._connections: dict[asyncio.Task[Any], Any] = {}
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> None:
        """Listens; raises OSError where it cannot."""
        self._thread.start()
        try:
            self._run(self._listen())
        except BaseException:
            self.close()
            raise

    def serve_from(self, sockets: Path | None) -> None:
        """Passes requests on to the sockets in this folder from now on; None: to nobody."""
        self._gate.sockets = sockets

    @property
    def in_flight(self) -> int:
        """Requests that are not answered yet."""
        return len(self._gate.busy) + self._gate.streams

    def drain(self, give_up: Callable[[float], bool]) -> int:
        """Stops listening, and returns when all is answered, or `give_up(seconds)` says so.

        How many requests are left without an answer.
        """
        self._run(self._stop_listening())
        began = time.monotonic()
        while not give_up(seconds := time.monotonic() - began):
            if seconds > _GRACE_S and not self.in_flight:
                break
            time.sleep(_LOOK_S)
        return self.in_flight

    def close(self) -> None:
        """Ends every connection and the thread; again, it does nothing."""
        if self._loop.is_closed():
            return
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self) -> None:
        kinds: tuple[tuple[str, type[front_http.Connection] | type[front_grpc.Connection]], ...] = (
            ("http", front_http.Connection),
            ("grpc", front_grpc.Connection),
            ("metrics", front_http.Connection),
        )
        for port, (name, kind) in enumerate(kinds, self._port):

            async def connected(
                reader: asyncio.StreamReader,
                writer: asyncio.StreamWriter,
                name: str = name,
                kind: type[front_http.Connection] | type[front_grpc.Connection] = kind,
            ) -> None:
                connection = kind(reader, writer, self._gate, SOCKETS[name])
                task = asyncio.current_task(self._loop)
                if task is not None:
                    self._connections[task] = connection
                    task.add_done_callback(self._forget)
                await connection.run()

            self._listeners.append(
                await asyncio.start_server(
                    connected, self._host, port, limit=front_http.HEAD_BYTES, backlog=1024
                )
            )

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._connections.pop(task, None)

    async def _stop_listening(self) -> None:
        self._gate.draining = True
        for listener in self._listeners:
            listener.close()
        for connection in list(self._connections.values()):
            if isinstance(connection, front_grpc.Connection):
                connection.go_away()

    async def _end(self) -> None:
        for listener in self._listeners:
            listener.close()
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def budget(limit: int) -> int:
    """Bytes of HTTP bodies that may be in the server together, of which one may have `limit`.

    Triton's Python backend copies them to /dev/shm, never makes that smaller again, and fails
    everybody's requests when it is full: a small one takes fewer of them.
    """
    try:
        status = os.statvfs("/dev/shm")
        shared = status.f_bavail * status.f_frsize
    except OSError:
        shared = _LEAST_BUDGET
    return max(limit, min(max(_LEAST_BUDGET, 2 * limit), shared // 4))
