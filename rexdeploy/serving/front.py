"""Stands in front of a Triton server, at its address: bounds what reaches it, ends without loss.

The server listens at sockets in a private folder only, so that nobody goes round. The front says
503 while no server runs, and so do the health checks.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import secrets
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rexdeploy.errors import BackendUnavailable, UsageError
from rexdeploy.serving.request_limits import Gate, shared_room

if TYPE_CHECKING:
    from rexdeploy.serving.front_http_grpc import GrpcProxy, HttpProxy


# Files in the server's folder; Triton adds the port's number to gRPC's.
SOCKETS = {"http": "http", "grpc": "grpc:1", "metrics": "metrics"}
_GRACE_S = 0.5  # who has just had an answer may send the next request meanwhile, and gets its own
_LOOK_S = 0.02


class Front:
    """Listens at a host's port (HTTP) and the next two (gRPC, metrics), in a thread of its own.

    Raises BackendUnavailable where the libraries are missing.
    """

    def __init__(self, host: str, port: int, limit: int) -> None:
        try:
            from rexdeploy.serving.front_http_grpc import GrpcProxy, HttpProxy
        except ImportError as error:
            raise BackendUnavailable(
                f"{error.name} is not installed: pip install 'rexdeploy[serve]'"
            ) from None
        self._host, self._port = host, port
        self._gate = gate = Gate(limit, shared_room(limit))
        self._proxies: dict[str, HttpProxy | GrpcProxy] = {  # in the order of their ports
            "http": HttpProxy(gate),
            "grpc": GrpcProxy(gate),
            "metrics": HttpProxy(gate),
        }
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> None:
        """Listens; raises OSError where it cannot."""
        self._thread.start()
        try:
            for port, proxy in enumerate(self._proxies.values(), self._port):
                self._run(proxy.listen(self._host, port))
        except BaseException:
            self.close()
            raise

    def serve_from(self, sockets: Path | None) -> None:
        """Passes requests on to the sockets in this folder from now on; None: to nobody."""
        for name, proxy in self._proxies.items():
            self._run(proxy.connect(sockets and sockets / SOCKETS[name]))

    @property
    def in_flight(self) -> int:
        """Requests that are not answered yet."""
        return self._gate.in_flight

    def drain(self, give_up: Callable[[float], bool]) -> int:
        """Stops listening, and returns when all is answered, or `give_up(seconds)` says so.

        How many requests are left without an answer.
        """
        self._gate.draining = True
        ways = [
            asyncio.run_coroutine_threadsafe(proxy.drain(), self._loop)
            for proxy in self._proxies.values()
        ]
        began = time.monotonic()
        while not give_up(seconds := time.monotonic() - began):
            if seconds > _GRACE_S and not self.in_flight:
                break
            time.sleep(_LOOK_S)
        for way in ways:
            way.cancel()
        return self.in_flight

    def close(self) -> None:
        """Ends every connection and the thread; again, it does nothing."""
        if self._loop.is_closed():
            return
        for proxy in self._proxies.values():
            self._run(proxy.end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()


@dataclass(frozen=True)
class Address:
    """Where the server listens; gRPC and metrics are at the two ports after HTTP's."""

    host: str = "127.0.0.1"
    port: int = 8000

    @property
    def http(self) -> str:
        """The base of HTTP's URLs."""
        return f"http://{self._reached}:{self.port}"

    @property
    def grpc(self) -> str:
        """What a gRPC client takes."""
        return f"{self._reached}:{self.port + 1}"

    @property
    def metrics(self) -> str:
        """The URL of the Prometheus metrics."""
        return f"http://{self._reached}:{self.port + 2}/metrics"

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def _reached(self) -> str:
        """The host by which a client on this machine reaches the server."""
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host


def check_ports(address: Address) -> None:
    """Raises UsageError unless all three ports are free."""
    if not 1 <= address.port <= 65533:
        raise UsageError(f"port: got {address.port}, expected 1 to 65533, for it and the next two")
    if ":" in address.host:  # Triton's HTTP and gRPC want it spelt differently
        raise UsageError(f"host: got '{address.host}', expected an IPv4 address or a name")
    for port, what in enumerate(("HTTP", "gRPC", "metrics"), address.port):
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(
                address.host, port, type=socket.SOCK_STREAM
            )[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
                probe.bind(where)
        except (OSError, UnicodeError) as error:  # a name with an empty or a long part
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"cannot listen on {address.host}:{port} for {what} ({reason}); "
                "choose another --port (it and the next two are used) or --host"
            ) from None


def free_port() -> int:
    """The first of three ports in a row that are free on this machine now, for an `Address`.

    It is below those that Linux gives to connections, of which one could take it the next moment.
    """
    while True:
        port = secrets.choice(range(10_000, 32_000))
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for place in range(3):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port + place))
            return port
