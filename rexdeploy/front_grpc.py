"""gRPC's part of the front: any method's messages passed on, both ways, and large ones refused.

Triton 2.51 takes messages of 2 GiB and unpacks compressed ones.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from rexdeploy.front_gate import STARTING, Gate

# Read when it is imported: else what a client does wrong is written to stderr.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
import grpc

_ANY_SIZE = -1
_NO_COMPRESSION = 1  # a set of algorithms, of which bit 0 is "identity"
_AS_LONG_AS_IT_TAKES = 1e6  # s; who waits gives up before
_SETTLE_S = 0.2  # less than Front.drain's grace


class GrpcProxy(grpc.GenericRpcHandler):  # type: ignore[misc]  # it has no types
    """Listens at a port; passes calls on to a socket."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._channel: Any = None
        self._server: Any = None

    async def listen(self, host: str, port: int) -> None:
        """Raises OSError where it cannot."""
        self._server = grpc.aio.server(
            handlers=[self],
            options=[
                ("grpc.max_receive_message_length", self._gate.limit),
                ("grpc.max_send_message_length", _ANY_SIZE),
                ("grpc.compression_enabled_algorithms_bitset", _NO_COMPRESSION),
                ("grpc.so_reuseport", 0),  # a port that somebody has is refused
            ],
        )
        try:
            self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            raise OSError(errno.EADDRINUSE, "gRPC's port cannot be had") from None
        await self._server.start()

    async def connect(self, socket: Path | None) -> None:
        """Passes calls on to this socket from now on; None: to nobody."""
        self._channel = None  # calls that still have it end with their server
        if socket is not None:
            self._channel = grpc.aio.insecure_channel(
                f"unix:{socket}",
                [
                    ("grpc.max_receive_message_length", _ANY_SIZE),
                    ("grpc.max_send_message_length", _ANY_SIZE),
                ],
            )

    async def drain(self) -> None:
        """Takes no new call; returns when all are answered and their connections have ended."""
        # stop() cancels the calls that have come and that no handler has begun: now they begin.
        await asyncio.sleep(_SETTLE_S)
        await self._server.stop(_AS_LONG_AS_IT_TAKES)

    async def end(self) -> None:
        """Ends every call and connection."""
        if self._server is not None:
            await self._server.stop(None)
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a method; on the wire, one message is a stream of one."""

        async def relay(requests: AsyncIterator[bytes], context: Any) -> None:
            self._gate.in_flight += 1
            context.add_done_callback(self._count_down)
            await self._relay(handler_call_details.method, requests, context)

        return grpc.stream_stream_rpc_method_handler(relay)

    def _count_down(self, context: Any) -> None:
        del context
        self._gate.in_flight -= 1

    async def _relay(self, method: str, requests: AsyncIterator[bytes], context: Any) -> None:
        if self._channel is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, STARTING)
        held = 0  # bytes of the last message that is not answered

        def hold(size: int) -> None:
            nonlocal held
            self._gate.budget.give(held)
            held = size

        async def messages() -> AsyncIterator[bytes]:
            async for message in requests:
                hold(0)
                await self._gate.budget.take(len(message))
                hold(len(message))
                yield message

        call = self._channel.stream_stream(method)(
            messages(),
            timeout=context.time_remaining(),
            metadata=[pair for pair in context.invocation_metadata() if pair[0] != "user-agent"],
        )
        try:
            await context.send_initial_metadata(await call.initial_metadata())
            async for answer in call:
                hold(0)
                await context.write(answer)
        except grpc.aio.AioRpcError:
            pass  # its status is passed on
        finally:
            call.cancel()
            hold(0)
        context.set_trailing_metadata(await call.trailing_metadata())
        context.set_code(await call.code())
        context.set_details(await call.details())
