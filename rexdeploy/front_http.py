"""One HTTP client of a served network: a request is checked, read whole, passed on and answered.

Triton 2.51 itself reads bodies of any size, unpacks gzip without a bound, and copies a form's
fields to the stack of a thread, whose end is the server's; `front_json` has what JSON does to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from rexdeploy.front_json import checked

HEAD_BYTES = 2**16
CLOSED = b"Connection: close\r\n"
# What a proxy does not pass on (RFC 9110, 7.6.1), and what is written anew here.
_NOT_PASSED = frozenset(
    b"connection content-length expect keep-alive proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)
_REQUEST = re.compile(rb"([A-Z]+) ([!-~]+) HTTP/1\.([01])")
_ANSWER = re.compile(rb"HTTP/1\.[01] ([2-5][0-9][0-9])(?: .*)?")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*)")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")
_JSON_BYTES = b"inference-header-content-length"  # of the body's first part; tensors follow it
_FORM = b"application/x-www-form-urlencoded"
_BODY_S = 60.0  # a body must have come by then
_WAIT_S = 30.0  # how long a body waits for others to be answered before it is read
_DISCARD_S = 5.0  # how long what a refused client still sends is read, so that it gets the answer
_PIECE = 2**18

Headers = list[tuple[bytes, bytes]]


class Budget:
    """How many bytes of requests may be in memory together; who asks first is served first."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size: int) -> None:
        """Waits for `size` bytes, which must be at most the whole."""
        if not self._waiting and self._free >= size:
            self._free -= size
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came at the same moment
                self.give(size)
            raise

    def give(self, size: int) -> None:
        """Gives back what was taken."""
        self._free += size
        while self._waiting:
            size, turn = self._waiting[0]
            if not turn.cancelled():
                if self._free < size:
                    return
                self._free -= size
                turn.set_result(None)
            self._waiting.popleft()


@dataclass
class Gate:
    """What all connections share."""

    limit: int  # bytes of one request's body
    budget: Budget
    sockets: Path | None = None  # the folder of the server's sockets; None: no server runs
    draining: bool = False
    busy: set[Connection] = field(default_factory=set)  # those that have a request
    streams: int = 0  # gRPC's requests that are not answered yet


class Refused(Exception):
    """A request that is answered here."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class _Request:
    method: bytes
    target: bytes
    headers: Headers  # as they are passed on
    size: int | None  # of the body; None: it comes in chunks
    keeps: bool  # the connection, after the answer
    waits: bool  # for "100 Continue" before it sends the body


class Connection:
    """A client, and the connection to the server that its requests go over."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: Gate, socket: str
    ) -> None:
        self._reader, self._writer = reader, writer
        self._gate = gate
        self._socket = socket
        self._server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self) -> None:
        """Answers requests until either side ends."""
        try:
            keeps = True
            while keeps:
                try:
                    head = await self._reader.readuntil(b"\r\n\r\n")
                except asyncio.LimitOverrunError:
                    await self._refuse(
                        Refused("431 Request Header Fields Too Large", "the headers are too long")
                    )
                    return
                self._gate.busy.add(self)
                try:
                    keeps = await self._answer(head) and not self._gate.draining
                except Refused as refused:
                    await self._refuse(refused)
                    keeps = False
                finally:
                    self._gate.busy.discard(self)
        except (OSError, EOFError):  # one of them is gone; EOFError: in the middle of something
            pass
        finally:
            self._writer.close()
            if self._server is not None:
                self._server[1].close()

    async def _answer(self, head: bytes) -> bool:
        """Passes a request on, and its answer back; whether the connection stays."""
        request = _request(head)
        limit = self._gate.limit
        if request.size is not None and request.size > limit:
            raise _too_large(limit)
        if self._gate.sockets is None:
            raise _starting()
        held = limit if request.size is None else request.size
        try:
            await asyncio.wait_for(self._gate.budget.take(held), _WAIT_S)
        except asyncio.TimeoutError:
            raise Refused("503 Service Unavailable", "too many large requests at once") from None
        try:
            if request.waits:
                self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await self._body(request)
            if body:
                body = _checked(request.headers, body)
            reader, status, headers = await self._pass_on(request, body)
        finally:
            self._gate.budget.give(held)
        keeps = request.keeps and not self._gate.draining
        await self._relay(reader, request, status, headers, keeps)
        return keeps

    async def _body(self, request: _Request) -> bytes:
        if request.size is None:
            reading = _chunked(self._reader, self._gate.limit)
        else:
            reading = self._reader.readexactly(request.size)
        try:
            return await asyncio.wait_for(reading, _BODY_S)
        except asyncio.TimeoutError:
            raise Refused(
                "408 Request Timeout", f"the body did not come within {_BODY_S:.0f} s"
            ) from None
        except asyncio.LimitOverrunError:
            raise Refused("400 Bad Request", "a chunk's size is no number") from None

    async def _pass_on(
        self, request: _Request, body: bytes
    ) -> tuple[asyncio.StreamReader, bytes, Headers]:
        """Sends the request; the server's connection, and its answer's first line and headers."""
        reader, writer = await self._connected()
        try:
            first = b"%b %b HTTP/1.1\r\n" % (request.method, request.target)
            headers = [*request.headers]
            if body or request.method not in (b"GET", b"HEAD"):
                headers.append((b"Content-Length", b"%d" % len(body)))
            writer.write(first + _joined(headers) + b"\r\n")
            writer.write(body)
            await writer.drain()
            status, *lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
            return reader, status, _headers(lines)
        except (OSError, EOFError, asyncio.LimitOverrunError):
            raise Refused(
                "503 Service Unavailable", "the server ended while it had this request"
            ) from None

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._server is None or self._server[0].at_eof():
            try:
                if self._gate.sockets is None:
                    raise FileNotFoundError
                self._server = await asyncio.open_unix_connection(
                    self._gate.sockets / self._socket, limit=HEAD_BYTES
                )
            except OSError:
                raise _starting() from None
        return self._server

    async def _relay(
        self,
        reader: asyncio.StreamReader,
        request: _Request,
        status: bytes,
        headers: Headers,
        keeps: bool,
    ) -> None:
        """Writes the answer to the client as the server gives it."""
        known = {name.lower(): value for name, value in headers}
        passed = [pair for pair in headers if pair[0].lower() not in (b"connection", b"keep-alive")]
        head = status + b"\r\n" + _joined(passed) + (b"" if keeps else CLOSED) + b"\r\n"
        self._writer.write(head)
        number = _ANSWER.fullmatch(status)
        if number is None:
            raise ConnectionError("the server's answer is not HTTP")
        if request.method == b"HEAD" or number[1] in (b"204", b"304"):
            pass
        elif known.get(b"transfer-encoding", b"").lower() == b"chunked":
            while True:
                line = await reader.readuntil(b"\r\n")
                size = int(line.split(b";")[0], 16)
                self._writer.write(line)
                if size == 0:
                    self._writer.write(await reader.readuntil(b"\r\n"))
                    break
                await self._copy(reader, size + 2)
        else:
            await self._copy(reader, int(known.get(b"content-length", b"0")))
        await self._writer.drain()

    async def _copy(self, reader: asyncio.StreamReader, left: int) -> None:
        while left:
            piece = await reader.read(min(left, _PIECE))
            if not piece:
                raise ConnectionError("the server ended in the middle of an answer")
            self._writer.write(piece)
            await self._writer.drain()
            left -= len(piece)

    async def _refuse(self, refused: Refused) -> None:
        """Answers as Triton does; what the client still sends is read, or it gets no answer."""
        body = json.dumps({"error": str(refused)}).encode()
        headers = [(b"Content-Type", b"application/json"), (b"Content-Length", b"%d" % len(body))]
        status = b"HTTP/1.1 " + refused.status.encode()
        self._writer.write(status + b"\r\n" + _joined(headers) + CLOSED + b"\r\n" + body)
        await self._writer.drain()
        if self._writer.can_write_eof():
            self._writer.write_eof()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_discard(self._reader), _DISCARD_S)


def _checked(headers: Headers, body: bytes) -> bytes:
    """The body with its JSON checked and written anew; its size in the headers is kept right."""
    places = [n for n, (name, _) in enumerate(headers) if name.lower() == _JSON_BYTES]
    size = len(body)
    if places:
        value = headers[places[0]][1]
        if len(places) > 1 or not re.fullmatch(rb"[0-9]{1,9}", value) or int(value) > size:
            raise Refused(
                "400 Bad Request", "Inference-Header-Content-Length: expected bytes of this body"
            )
        size = int(value)
    if not size:  # the file alone
        return body
    try:
        text = checked(body[:size])
    except ValueError as error:
        raise Refused("400 Bad Request", str(error)) from None
    if places:
        headers[places[0]] = (headers[places[0]][0], b"%d" % len(text))
    return text + body[size:]


async def _discard(reader: asyncio.StreamReader) -> None:
    while await reader.read(_PIECE):
        pass


async def _chunked(reader: asyncio.StreamReader, limit: int) -> bytes:
    """A body in chunks, put together."""
    body = bytearray()
    while True:
        found = _CHUNK.fullmatch(await reader.readuntil(b"\r\n"))
        if found is None:
            raise Refused("400 Bad Request", "a chunk's size is no number")
        size = int(found[1], 16)
        if len(body) + size > limit:
            raise _too_large(limit)
        if size == 0:
            if await reader.readuntil(b"\r\n") != b"\r\n":
                raise Refused("400 Bad Request", "trailers after a body are not taken")
            return bytes(body)
        body += await reader.readexactly(size)
        if await reader.readexactly(2) != b"\r\n":
            raise Refused("400 Bad Request", "a chunk is not as long as it says")


def _request(head: bytes) -> _Request:
    """Reads a request's first line and headers; raises Refused.

    Whatever two programs could read in two ways is refused.
    """
    first, *lines = head[:-4].lstrip(b"\r\n").split(b"\r\n")
    found = _REQUEST.fullmatch(first)
    if found is None:
        raise Refused("400 Bad Request", "the request's first line is not HTTP/1.1's")
    headers = _headers(lines)
    named: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        named.setdefault(name.lower(), []).append(value)
    lengths, codings = named.get(b"content-length", []), named.get(b"transfer-encoding", [])
    size: int | None = 0
    if codings:
        if lengths or [value.lower() for value in codings] != [b"chunked"]:
            raise Refused("400 Bad Request", "Transfer-Encoding: expected chunked, and no length")
        size = None
    elif lengths:
        if len(lengths) > 1 or not re.fullmatch(rb"[0-9]{1,18}", lengths[0]):
            raise Refused("400 Bad Request", "Content-Length: expected one number")
        size = int(lengths[0])
    if any(value.lower() != b"identity" for value in named.get(b"content-encoding", [])):
        raise Refused(
            "415 Unsupported Media Type", "compressed requests are not taken; send it as it is"
        )
    connection = b",".join(named.get(b"connection", [])).lower()
    keeps = b"close" not in connection and (found[3] == b"1" or b"keep-alive" in connection)
    return _Request(
        found[1],
        found[2],
        [_safe(pair) for pair in headers if pair[0].lower() not in _NOT_PASSED],
        size,
        keeps,
        waits=named.get(b"expect", [b""])[0].lower() == b"100-continue",
    )


def _safe(header: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """A form's type, which curl sends unless told otherwise, ends Triton; nothing here is one."""
    name, value = header
    if name.lower() == b"content-type" and value.lower().startswith(_FORM):
        return name, b"application/octet-stream"
    return header


def _headers(lines: list[bytes]) -> Headers:
    headers = []
    for line in lines:
        found = _HEADER.fullmatch(line)
        if found is None:
            raise Refused("400 Bad Request", "a header is not of the form NAME: VALUE")
        headers.append((found[1], found[2].rstrip(b" \t")))
    return headers


def _joined(headers: Headers) -> bytes:
    return b"".join(b"%b: %b\r\n" % pair for pair in headers)


def _starting() -> Refused:
    return Refused("503 Service Unavailable", "the server is being started")


def _too_large(limit: int) -> Refused:
    return Refused(
        "413 Content Too Large", f"the request has more than the {limit} bytes that are taken"
    )
