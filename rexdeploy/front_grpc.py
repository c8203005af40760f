"""One gRPC client of a served network: HTTP/2's frames passed on, and large messages refused.

Triton 2.51 takes messages of 2 GiB and unpacks compressed ones. A message's first five bytes say
how long it is and whether it is compressed, so that it is refused before any more of it is read.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from rexdeploy.front_http import Gate

# RFC 9113: types of frames, flags, codes of errors.
_DATA, _HEADERS, _RST_STREAM, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 7, 8
_END_STREAM, _END_HEADERS, _PADDED = 0x1, 0x4, 0x8
_NO_ERROR, _CANCEL, _ENHANCE_YOUR_CALM = 0, 8, 11
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_EVERY_STREAM = 2**31 - 1
_RESOURCE_EXHAUSTED, _UNIMPLEMENTED = 8, 12  # of gRPC
_SOCKET_BYTES = 2**18
_START_S, _LOOK_S = 15.0, 0.05


@dataclass
class _Stream:
    """A request: where in its messages it is."""

    prefix: bytearray = field(default_factory=bytearray)  # of the next message, up to 5 bytes
    left: int = 0  # bytes of the current message that are still to come
    answered: bool = False  # the server has sent its first headers

    def fault(self, data: bytes, limit: int) -> tuple[int, str] | None:
        """Takes the next bytes; gRPC's code and text if a message among them is refused."""
        place = 0
        while place < len(data):
            if self.left:
                taken = min(self.left, len(data) - place)
                self.left -= taken
                place += taken
                continue
            missing = 5 - len(self.prefix)
            self.prefix += data[place : place + missing]
            place += missing
            if len(self.prefix) == 5:
                if self.prefix[0]:
                    return _UNIMPLEMENTED, "compressed requests are not taken; send it as it is"
                self.left = int.from_bytes(self.prefix[1:], "big")
                self.prefix.clear()
                if self.left > limit:
                    return (
                        _RESOURCE_EXHAUSTED,
                        f"the request has {self.left} bytes, more than the {limit} that are taken",
                    )
        return None


class Connection:
    """A client and its connection to the server; each frame is written in one piece."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: Gate, socket: str
    ) -> None:
        self._reader, self._writer = reader, writer
        self._gate = gate
        self._socket = socket
        self._streams: dict[int, _Stream] = {}
        self._refused: set[int] = set()  # their data is read and dropped until the client ends them

    async def run(self) -> None:
        """Passes frames on, both ways, until either side ends."""
        server: asyncio.StreamWriter | None = None
        try:
            reader, server = await self._connected()
            ways = [
                asyncio.ensure_future(way)
                for way in (self._to_server(server), self._to_client(reader))
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                    with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
                        await way
        except OSError:  # no server
            pass
        finally:
            for number in list(self._streams):
                self._close(number)
            self._writer.close()
            if server is not None:
                server.close()

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Waits for a server that is being started; raises OSError if there is none in time.

        A client of gRPC that is sent away fails for seconds after the server is there again.
        """
        looks = int(_START_S / _LOOK_S)
        while True:
            try:
                if self._gate.sockets is None:
                    raise FileNotFoundError
                return await asyncio.open_unix_connection(
                    self._gate.sockets / self._socket, limit=_SOCKET_BYTES
                )
            except OSError:
                looks -= 1
                if self._gate.draining or looks < 0:
                    raise
                await asyncio.sleep(_LOOK_S)

    def go_away(self) -> None:
        """Tells the client to make no new request here; those under way are answered."""
        self._writer.write(
            _frame(_GOAWAY, 0, 0, _EVERY_STREAM.to_bytes(4, "big") + _NO_ERROR.to_bytes(4, "big"))
        )

    async def _to_server(self, server: asyncio.StreamWriter) -> None:
        preface = await self._reader.readexactly(len(_PREFACE))
        if preface != _PREFACE:
            return
        server.write(preface)
        if self._gate.draining:  # it came while the others are answered
            self.go_away()
        while True:
            kind, flags, number, frame = await self._read(self._reader)
            if kind == _DATA and not self._may_pass(server, flags, number, frame[9:]):
                continue
            if kind == _HEADERS and number not in self._streams and number not in self._refused:
                self._streams[number] = _Stream()
                self._gate.streams += 1
            elif kind == _RST_STREAM:
                self._close(number)
                if number in self._refused:  # the server knows already
                    self._refused.discard(number)
                    continue
            server.write(frame)
            await server.drain()

    async def _to_client(self, reader: asyncio.StreamReader) -> None:
        while True:
            kind, flags, number, frame = await self._read(reader)
            if kind == _HEADERS and number in self._streams:
                self._streams[number].answered = True
            self._writer.write(frame)
            if kind == _RST_STREAM or (kind in (_DATA, _HEADERS) and flags & _END_STREAM):
                self._close(number)
            await self._writer.drain()

    async def _read(self, reader: asyncio.StreamReader) -> tuple[int, int, int, bytes]:
        """A frame's type, flags and stream, and all its bytes."""
        head = await reader.readexactly(9)
        length = int.from_bytes(head[:3], "big")
        payload = await reader.readexactly(length) if length else b""
        return head[3], head[4], int.from_bytes(head[5:], "big") & _EVERY_STREAM, head + payload

    def _may_pass(
        self, server: asyncio.StreamWriter, flags: int, number: int, payload: bytes
    ) -> bool:
        """Whether the server gets this data; refuses the stream whose message is too large."""
        stream = self._streams.get(number)
        if stream is not None:
            data = payload
            if flags & _PADDED:
                data = payload[1 : len(payload) - payload[0]] if payload else b""
            fault = stream.fault(data, self._gate.limit)
            if fault is None:
                return True
            self._refuse(server, number, stream.answered, *fault)
            self._refused.add(number)
        elif number not in self._refused:
            return True  # of a stream that the server has ended
        # The server does not know of these bytes, and will not make room for as many again.
        if payload:
            self._writer.write(_frame(_WINDOW_UPDATE, 0, 0, len(payload).to_bytes(4, "big")))
        if flags & _END_STREAM:
            self._refused.discard(number)
        return False

    def _refuse(
        self, server: asyncio.StreamWriter, number: int, answered: bool, code: int, text: str
    ) -> None:
        server.write(_frame(_RST_STREAM, 0, number, _CANCEL.to_bytes(4, "big")))
        error = _NO_ERROR
        if answered:  # its answer has begun
            error = _ENHANCE_YOUR_CALM
        else:
            fields = {
                "content-type": "application/grpc",
                "grpc-status": str(code),
                "grpc-message": text,
            }
            block = b"\x88"  # HPACK: ":status: 200", then literals without an index
            for pair in fields.items():
                block += b"\0" + b"".join(bytes([len(part)]) + part.encode() for part in pair)
            self._writer.write(_frame(_HEADERS, _END_HEADERS | _END_STREAM, number, block))
        self._writer.write(_frame(_RST_STREAM, 0, number, error.to_bytes(4, "big")))
        self._close(number)

    def _close(self, number: int) -> None:
        if self._streams.pop(number, None) is not None:
            self._gate.streams -= 1


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return (
        len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
    )
