"""The front's HTTP and gRPC halves: every request passes one of them."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from rexdeploy.serving.request_limits import STARTING, Gate, checked

# What a proxy does not pass on (RFC 9110, 7.6.1), and what is written anew here.
_NOT_PASSED = (
    *("connection", "content-length", "expect", "keep-alive", "proxy-connection"),
    *("te", "trailer", "transfer-encoding", "upgrade"),
)
_JSON_BYTES = "Inference-Header-Content-Length"  # of the body's first part; tensors follow it
_FORM = "application/x-www-form-urlencoded"
_BODY_S = 60.0  # a body must have come by then
_WAIT_S = 30.0  # how long a body waits for others to be answered before it is read
_END_S = 0.1  # what is in flight when the end does not wait for it
# aiohttp logs a traceback for every client that sends no HTTP.
_LOGGER = logging.getLogger("rexdeploy.serving.front")
_LOGGER.setLevel(logging.CRITICAL)


class _Refused(Exception):
    """A request that is answered here."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class HttpProxy:
    """Listens at a port; passes requests on to a socket."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._server: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None

    async def listen(self, host: str, port: int) -> None:
        """Raises OSError where it cannot."""
        app = web.Application(client_max_size=self._gate.limit)
        app.router.add_route("*", "/{path:.*}", self._answer, expect_handler=_later)
        self._runner = web.AppRunner(
            app, access_log=None, logger=_LOGGER, auto_decompress=False, shutdown_timeout=_END_S
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port, backlog=1024).start()

    async def connect(self, socket: Path | None) -> None:
        """Passes requests on to this socket from now on; None: to nobody."""
        before, self._server = self._server, None
        if before is not None:
            await before.close()
        if socket is not None:
            self._server = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(socket), limit=0),
                timeout=aiohttp.ClientTimeout(total=None),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            )

    async def drain(self) -> None:
        """Stops listening; open connections may send one more request."""
        for site in self._runner.sites if self._runner else ():
            await site.stop()

    async def end(self) -> None:
        """Ends every connection."""
        if self._runner is not None:
            await self._runner.cleanup()
        await self.connect(None)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self._gate.in_flight += 1
        try:
            try:
                answer = await self._checked(request)
            except _Refused as refused:
                answer = web.json_response({"error": str(refused)}, status=refused.status)
                answer.force_close()
            if self._gate.draining:
                answer.force_close()
            await answer.prepare(request)
            await answer.write_eof()
            return answer
        finally:
            self._gate.in_flight -= 1

    async def _checked(self, request: web.Request) -> web.Response:
        """Reads a request within the limits and passes it on; raises _Refused."""
        limit, size = self._gate.limit, request.content_length
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise _Refused(415, "compressed requests are not taken; send it as it is")
        if request.headers.get("Transfer-Encoding", "chunked").lower() != "chunked":
            raise _Refused(400, "Transfer-Encoding: expected chunked")
        if size is not None and size > limit:
            raise _too_large(limit)
        if self._server is None:
            raise _Refused(503, STARTING)
        held = (limit if size is None else size) if request.body_exists else 0
        try:
            await asyncio.wait_for(self._gate.take(held), _WAIT_S)
        except asyncio.TimeoutError:
            raise _Refused(503, "too many large requests at once") from None
        try:
            return await self._pass_on(request, await self._body(request))
        finally:
            self._gate.give(held)

    async def _body(self, request: web.Request) -> bytes:
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # the answer has not begun
        try:
            return await asyncio.wait_for(request.read(), _BODY_S)
        except web.HTTPRequestEntityTooLarge:
            raise _too_large(self._gate.limit) from None
        except asyncio.TimeoutError:
            raise _Refused(408, f"the body did not come within {_BODY_S:.0f} s") from None
        except web.RequestPayloadError:
            raise _Refused(400, "the body is not as its headers say") from None

    async def _pass_on(self, request: web.Request, body: bytes) -> web.Response:
        headers = _passed(request.headers)
        if headers.get("Content-Type", "").lower().startswith(_FORM):
            # What curl sends unless told otherwise ends Triton; nothing here is one.
            headers["Content-Type"] = "application/octet-stream"
        if body:
            body = _with_checked_json(headers, body)
        if self._server is None:
            raise _Refused(503, STARTING)
        try:
            async with self._server.request(
                request.method,
                URL("http://localhost" + request.rel_url.raw_path_qs, encoded=True),
                headers=headers,
                data=body or None,
                allow_redirects=False,
            ) as answer:
                content = await answer.read()
        except aiohttp.ClientConnectorError:
            raise _Refused(503, STARTING) from None
        except (aiohttp.ClientError, OSError):
            raise _Refused(503, "the server ended while it had this request") from None
        return web.Response(
            status=answer.status,
            reason=answer.reason,
            headers=_passed(answer.headers),
            body=content,
        )


async def _later(request: web.Request) -> None:
    """Lets the client wait with the body until its size is checked."""
    del request


def _passed(headers: aiohttp.typedefs.LooseHeaders) -> CIMultiDict[str]:
    return CIMultiDict(
        (name, value)
        for name, value in CIMultiDict(headers).items()
        if name.lower() not in _NOT_PASSED
    )


def _with_checked_json(headers: CIMultiDict[str], body: bytes) -> bytes:
    """The body with its JSON checked and written anew; its size in the headers is kept right."""
    sizes = headers.getall(_JSON_BYTES, [])
    size = len(body)
    if sizes:
        if len(sizes) > 1 or not re.fullmatch(r"[0-9]{1,9}", sizes[0]) or int(sizes[0]) > size:
            raise _Refused(400, f"{_JSON_BYTES}: expected bytes of this body")
        size = int(sizes[0])
    if not size:  # the file alone
        return body
    try:
        text = checked(body[:size])
    except ValueError as error:
        raise _Refused(400, str(error)) from None
    if sizes:
        headers[_JSON_BYTES] = str(len(text))
    return text + body[size:]


def _too_large(limit: int) -> _Refused:
    return _Refused(413, f"the request has more than the {limit} bytes that are taken")


# Read when it is imported: else what a client does wrong is written to stderr.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
_ANY_SIZE = {"grpc.max_receive_message_length": -1, "grpc.max_send_message_length": -1}
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
        options = _ANY_SIZE | {
            "grpc.max_receive_message_length": self._gate.limit,
            "grpc.compression_enabled_algorithms_bitset": _NO_COMPRESSION,
            "grpc.so_reuseport": 0,  # a port that somebody has is refused
        }
        self._server = grpc.aio.server(handlers=[self], options=[*options.items()])
        try:
            self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            raise OSError(errno.EADDRINUSE, "gRPC's port cannot be had") from None
        await self._server.start()

    async def connect(self, socket: Path | None) -> None:
        """Passes calls on to this socket from now on; None: to nobody."""
        self._channel = None  # calls that still have it end with their server
        if socket is not None:
            self._channel = grpc.aio.insecure_channel(f"unix:{socket}", [*_ANY_SIZE.items()])

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
            self._gate.give(held)
            held = size

        async def messages() -> AsyncIterator[bytes]:
            async for message in requests:
                hold(0)
                await self._gate.take(len(message))
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
