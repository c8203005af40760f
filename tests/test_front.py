"""The front of a served network: what reaches the server, and what does not."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import json
import re
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import web

from rexdeploy.errors import BackendUnavailable
from rexdeploy.serving.front import SOCKETS, Front, free_port
from rexdeploy.serving.request_limits import Gate, checked, shared_room
from tests.helpers import listens, wait_until

LIMIT = 100_000
GZIP = grpc.Compression.Gzip
LONG = 5.0  # s; how long a test waits for what must happen


class StandIn:
    """A server that says what it got, at a folder's sockets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.slow = threading.Semaphore(0)  # released: a slow request is answered
        self.reached = threading.Semaphore(0)  # acquired: a slow request has come
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self._start())

    def close(self) -> None:
        """Ends at once, as a killed server."""
        if self._loop.is_closed():
            return
        self._run(self._stop())
        self.slow.release(99)  # to nobody: the threads that wait for it end
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(LONG)

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, auto_decompress=False)
        await self._runner.setup()
        for name in ("http", "metrics"):
            await web.UnixSite(self._runner, str(self.folder / SOCKETS[name])).start()
        self._grpc = grpc.aio.server(
            handlers=[_Methods(self)], options=[("grpc.max_receive_message_length", -1)]
        )
        self._grpc.add_insecure_port(f"unix:{self.folder / SOCKETS['grpc']}")
        await self._grpc.start()

    async def _stop(self) -> None:
        await self._grpc.stop(None)
        await self._runner.cleanup()

    async def wait(self) -> None:
        self.reached.release()
        await asyncio.get_running_loop().run_in_executor(None, self.slow.acquire)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if request.path == "/slow":
            await self.wait()
        elif request.path == "/torn":
            torn = web.StreamResponse(headers={"Content-Length": "100"})
            await torn.prepare(request)
            await torn.write(b"half")
            assert request.transport is not None
            request.transport.close()
            return torn
        elif request.path == "/ends":
            assert request.transport is not None
            request.transport.close()
        elif request.path == "/chunks":
            chunks = web.StreamResponse()
            await chunks.prepare(request)
            for part in (b"[1", b"]"):
                await chunks.write(part)
            return chunks
        elif request.path == "/error":
            return web.json_response({"error": "its own"}, status=418, headers={"X-Its": "own"})
        elif request.path == "/large":
            return web.Response(body=bytes(5_000_000))
        return web.json_response(
            {
                "method": request.method,
                "target": request.raw_path,
                "headers": [[name.lower(), value] for name, value in request.headers.items()],
                "size": len(body),
                "start": body[:200].decode(errors="replace"),
            }
        )


class _Methods(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, server: StandIn) -> None:
        self._server = server

    def service(self, handler_call_details: Any) -> Any:
        method = handler_call_details.method

        async def answer(requests: AsyncIterator[bytes], context: Any) -> None:
            seen = dict(context.invocation_metadata())
            await context.send_initial_metadata(
                [("first", seen.get("asked", "")), ("b-bin", b"\0")]
            )
            context.set_trailing_metadata([("last", "trailer")])
            async for message in requests:
                if method == "/test/Slow":
                    await self._server.wait()
                if method == "/test/Fail":
                    await context.abort(grpc.StatusCode.NOT_FOUND, "its own", (("last", "failed"),))
                await context.write(message)

        return grpc.stream_stream_rpc_method_handler(answer)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandIn]:
    server = StandIn(tmp_path)
    yield server
    server.close()


def started(server: StandIn) -> Front:
    front = Front("127.0.0.1", free_port(), LIMIT)
    front.start()
    front.serve_from(server.folder)
    return front


@pytest.fixture
def front(server: StandIn) -> Iterator[Front]:
    with contextlib.closing(started(server)) as front:
        yield front


def _port(front: Front) -> int:
    port: int = front._port
    return port


@contextlib.contextmanager
def connected(front: Front, port: int = 0) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("127.0.0.1", _port(front) + port, timeout=LONG)
    with contextlib.closing(connection):
        yield connection


def ask(
    front: Front, path: str = "/x", body: Any = b"", method: str = "", port: int = 0, **headers: str
) -> tuple[int, Any]:
    """The status, and what the JSON of the answer says."""
    with connected(front, port) as connection:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        method = method or ("POST" if body else "GET")
        chunked = not isinstance(body, bytes)
        connection.request(method, path, body or None, named, encode_chunked=chunked)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def raw(front: Front, *pieces: bytes, ends: bool = False) -> bytes:
    """What is answered to these bytes until the connection ends."""
    with socket.create_connection(("127.0.0.1", _port(front)), LONG) as client:
        for piece in pieces:
            client.sendall(piece)
        if ends:
            client.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := client.recv(65536):
                answer += piece
        return answer


def document(size: int) -> bytes:
    """JSON as it comes out of the check, of so many bytes."""
    return b'{"id":"' + b"x" * (size - 9) + b'"}'


# HTTP


@pytest.mark.parametrize("chunked", [False, True])
def test_the_limit_is_met_at_the_byte(front: Front, chunked: bool) -> None:
    def body(size: int) -> Any:
        text = document(size)
        return iter([text[:7], text[7:]]) if chunked else text

    assert ask(front, body=body(LIMIT))[1]["size"] == LIMIT
    status, answer = ask(front, body=body(LIMIT + 1))
    assert status == 413
    assert answer["error"] == f"the request has more than the {LIMIT} bytes that are taken"


def test_the_parts_of_a_body_are_put_together(front: Front) -> None:
    head = b"POST /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = raw(front, head + b"1\r\n{\r\n1;a=b\r\n}\r\n0\r\n\r\n")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["start"] == "{}"


def test_a_body_that_is_far_too_large_is_answered(front: Front) -> None:
    """The client goes on sending, and gets its answer nevertheless."""
    assert ask(front, body=bytes(30_000_000))[0] == 413
    assert ask(front)[0] == 200


def test_expect_is_answered_before_the_body_comes(front: Front) -> None:
    head = b"POST /x HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nConnection: close\r\n"
    with socket.create_connection(("127.0.0.1", _port(front)), LONG) as client:
        client.sendall(head + b"Content-Length: 999999\r\n\r\n")
        assert client.recv(9999).startswith(b"HTTP/1.1 413 ")
    answer = raw(front, head + b"Content-Length: 2\r\n\r\n", b"{}")
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")


def test_a_request_is_passed_on_as_it_is(front: Front) -> None:
    headers: dict[str, Any] = {
        "X_Own": "a, b",
        "Accept": "x/y",
        "Connection": "x-hop",
        "Content_Type": "a/b",
    }
    status, got = ask(front, "/v2/a%20b/?q=%2F+&q=2", b"{}", "PUT", **headers)
    assert (status, got["method"], got["target"]) == (200, "PUT", "/v2/a%20b/?q=%2F+&q=2")
    assert dict(got["headers"]) == {
        "host": f"127.0.0.1:{_port(front)}",
        "accept-encoding": "identity",  # of Python's client
        "content-length": "2",
        "x-own": "a, b",
        "accept": "x/y",
        "content-type": "a/b",
    }
    status, got = ask(front)
    assert [name for name, _ in got["headers"]] == ["host", "accept-encoding"]
    assert ask(front, "/metrics", port=2)[1]["target"] == "/metrics"


def test_an_answer_is_passed_back_as_it_is(front: Front) -> None:
    with connected(front) as connection:
        connection.request("GET", "/error")
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("X-Its")) == (418, "own")
        assert json.loads(answer.read()) == {"error": "its own"}
        connection.request("GET", "/chunks")
        assert json.loads(connection.getresponse().read()) == [1]
        connection.request("GET", "/large")
        assert len(connection.getresponse().read()) == 5_000_000
        connection.request("HEAD", "/x")
        assert connection.getresponse().read() == b""


def test_compressed_requests_are_refused(front: Front) -> None:
    status, answer = ask(front, body=gzip.compress(bytes(10**6)), Content_Encoding="gzip")
    assert status == 415
    assert "compressed requests are not taken" in answer["error"]
    assert ask(front, body=b"{}", Content_Encoding="identity")[0] == 200


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        ("application/x-www-form-urlencoded; charset=UTF-8", "application/octet-stream"),
        ("Application/X-WWW-form-urlencoded", "application/octet-stream"),
        ("application/json", "application/json"),
    ],
)
def test_a_form_becomes_bytes(front: Front, sent: str, got: str) -> None:
    """A form is what curl sends unless told otherwise, and Triton 2.51 ends of its fields."""
    assert dict(ask(front, body=b"{}", Content_Type=sent)[1]["headers"])["content-type"] == got


def test_json_is_checked_and_its_size_kept_right(front: Front) -> None:
    text = b'{ "inputs": [], "inputs": [] }'
    got = ask(front, body=text + b"\xff\xfe", Inference_Header_Content_Length=str(len(text)))[1]
    assert got["start"].encode() == b'{"inputs":[]}' + "\ufffd\ufffd".encode()
    assert dict(got["headers"])["inference-header-content-length"] == "13"
    assert ask(front, body=b"\xff", Inference_Header_Content_Length="0")[1]["size"] == 1
    for size in ("2", "-1", "1e1", "99999999999"):
        status, got = ask(front, body=b"{", Inference_Header_Content_Length=size)
        assert (status, got["error"][:31]) == (400, "Inference-Header-Content-Length")
    shape = b'{"inputs":[{"name":"x","shape":[1000000000000],"data":[1]}]}'
    assert "data that cannot have it" in ask(front, body=shape)[1]["error"]
    assert "nested" in ask(front, body=b'{"x":' + b"[" * 9999 + b"]" * 9999 + b"}")[1]["error"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b'{"inputs":[', "not JSON"),
        (b"[1]", "not JSON"),
        (b"\xff", "not JSON"),
        (b'{"inputs":5}', "not JSON"),
        (b'{"inputs":[{"data":[1],"shape":[1,8000000000]}]}', "got [1, 8000000000]"),
        (b'{"inputs":[{"data":[1],"shape":[9223372036854775807,9]}]}', "shape: got"),
        (b'{"inputs":[{"data":[1],"shape":[-1,-1]}]}', "shape: got"),
        (b'{"inputs":[{"data":[1],"shape":[1,1],"sh\\u0061pe":[1,9999]}]}', "got [1, 9999]"),
        (b'{"inputs":[{"data":' + b"[" * 2**20, "nested too deeply"),
        (b'{"a":' * 2**20, "nested too deeply"),
    ],
)
def test_json_that_would_end_the_server_is_refused(text: bytes, part: str) -> None:
    with pytest.raises(ValueError, match=re.escape(part)):
        checked(text)


def test_json_is_written_anew_with_each_key_once() -> None:
    """Triton reads the first of two equal keys, the check here the last."""
    twice = b'{"inputs":[{"shape":[1,8000000000],"data":[1.50],"shape":[1]}],"id":"a"}'
    assert checked(twice) == b'{"inputs":[{"shape":[1],"data":[1.50]}],"id":"a"}'


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"no colon", b""),
        (b"X: " + b"x" * 99_999, b""),
        (b"A: b\r\n folded", b""),
        (b"Content-Length: -1", b""),
        (b"Content-Length: +2", b"{}"),
        (b"Content-Length : 2", b"{}"),
        (b"Content-Length: 2\r\nContent-Length: 3", b"{}"),
        (b"Content-Length: 2\r\nTransfer-Encoding: chunked", b"2\r\n{}\r\n0\r\n\r\n"),
        (b"Transfer-Encoding: gzip, chunked", b"0\r\n\r\n"),
        (b"Transfer-Encoding: chunked", b"zz\r\n{}\r\n0\r\n\r\n"),
        (b"Transfer-Encoding: chunked", b"2\r\n{}}}\r\n0\r\n\r\n"),
        (b"Inference-Header-Content-Length: 9\r\nContent-Length: 1", b"{"),
    ],
)
def test_what_two_programs_could_read_in_two_ways_is_refused(
    front: Front, head: bytes, body: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = raw(front, b"POST /x HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n" + body)
    assert re.match(rb"HTTP/1\.[01] 400 ", answer), answer
    assert ask(front)[0] == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
        b"nonsense\r\n\r\n",
        b"POST /x y HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(
    front: Front, request_: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    assert raw(front, request_).startswith(b"HTTP/1.0 400 ")
    assert ask(front)[0] == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("head", [b"Content-Length: 50", b"Transfer-Encoding: chunked"])
def test_a_torn_body_reaches_nobody(
    front: Front, head: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    torn = b"POST /slow HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n3\r\n{}"
    assert b"200 OK" not in raw(front, torn, ends=True)
    wait_until(lambda: front.in_flight == 0, LONG)
    assert ask(front)[0] == 200
    assert capfd.readouterr().err == ""


def test_a_slow_body_holds_up_nobody(front: Front) -> None:
    with socket.create_connection(("127.0.0.1", _port(front)), LONG) as client:
        client.sendall(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\n")
        for piece in (b"{", b'"id"', b":"):
            client.sendall(piece)
            assert ask(front, body=b"{}")[0] == 200
        client.sendall(b"1}")
        assert client.recv(9999).startswith(b"HTTP/1.1 200 OK")


def test_a_body_has_to_come(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rexdeploy.serving.front_http_grpc._BODY_S", 0.05)
    answer = raw(front, b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\n{", ends=True)
    assert answer.startswith(b"HTTP/1.1 408 ") or not answer
    with socket.create_connection(("127.0.0.1", _port(front)), LONG) as client:
        client.sendall(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\n{")
        assert client.recv(9999).startswith(b"HTTP/1.1 408 ")


def test_a_connection_takes_one_request_after_another(front: Front) -> None:
    with connected(front) as connection:
        ports = set()
        for number in range(5):
            connection.request("POST", "/x", document(100 + number))
            assert json.loads(connection.getresponse().read())["size"] == 100 + number
            ports.add(connection.sock.getsockname()[1])
        assert len(ports) == 1
    two = (
        b"GET /x HTTP/1.1\r\nHost: x\r\n\r\nGET /y HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    answer = raw(front, two)
    assert answer.index(b'"/x"') < answer.index(b'"/y"')


def test_large_bodies_wait_for_each_other(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that there is no room for, the server sees none; small ones pass."""
    monkeypatch.setattr("rexdeploy.serving.front.shared_room", lambda limit: limit)
    monkeypatch.setattr("rexdeploy.serving.front_http_grpc._WAIT_S", 0.2)
    with contextlib.closing(started(server)) as front, ThreadPoolExecutor(2) as threads:
        first = threads.submit(ask, front, "/slow", document(LIMIT))
        assert server.reached.acquire(timeout=LONG)
        assert ask(front, body=document(LIMIT))[0] == 503
        assert ask(front)[0] == 200  # a health check has no body
        with channel(front) as client:
            waiting = unary(client, "Slow").future(document(LIMIT), timeout=LONG)
            assert not server.reached.acquire(timeout=0.1)
            server.slow.release(2)
            assert first.result()[0] == 200
            assert len(waiting.result()) == LIMIT
        assert ask(front, body=document(LIMIT))[0] == 200


def test_the_gate_serves_who_asked_first() -> None:
    async def all_of_it() -> list[str]:
        gate, order = Gate(10, 10), list[str]()

        async def take(name: str, size: int) -> None:
            await gate.take(size)
            order.append(name)

        await take("first", 8)
        tasks = [asyncio.ensure_future(take(f"{size}", size)) for size in (9, 5, 1)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
        assert order == ["first"]
        await take("nothing", 0)
        gate.give(8)
        await asyncio.gather(*tasks, return_exceptions=True)
        return order

    assert asyncio.run(all_of_it()) == ["first", "nothing", "9", "1"]


def test_bodies_share_a_budget_that_holds_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small:
        f_bavail, f_frsize = 2**14, 2**12  # Docker's 64 MiB

    monkeypatch.setattr("os.statvfs", lambda path: Small)
    assert shared_room(2**20) == 2**24
    assert shared_room(2**25) == 2**25


# The server behind it


def test_without_a_server_it_says_so(front: Front, server: StandIn) -> None:
    for nobody in (server.folder / "gone", None):
        front.serve_from(nobody)
        assert ask(front) == (503, {"error": "the server is being started"})
    with channel(front) as client, pytest.raises(grpc.RpcError) as failure:
        unary(client, "Echo")(b"x")
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    front.serve_from(server.folder)
    assert ask(front)[0] == 200
    with channel(front) as client:
        assert unary(client, "Echo")(b"x", timeout=LONG) == b"x"


def test_a_server_that_dies_takes_no_client_with_it(
    front: Front, server: StandIn, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for path in ("/torn", "/ends"):
        assert ask(front, path) == (503, {"error": "the server ended while it had this request"})
    with ThreadPoolExecutor(1) as threads, channel(front) as client:
        asked = threads.submit(ask, front, "/slow", b"{}")
        called = unary(client, "Slow").future(b"x", timeout=LONG)
        assert all(server.reached.acquire(timeout=LONG) for _ in range(2))
        server.close()
        assert asked.result()[0] == 503
        assert called.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert ask(front) == (503, {"error": "the server is being started"})
        again = StandIn(tmp_path_factory.mktemp("again"))
        front.serve_from(again.folder)
        assert ask(front)[0] == 200
        assert unary(client, "Echo")(b"x", timeout=LONG) == b"x"
        again.close()


def test_a_port_that_somebody_has_is_an_oserror(front: Front) -> None:
    for port in range(3):
        with pytest.raises(OSError, match="cannot be had|in use"):
            Front("127.0.0.1", _port(front) + port, LIMIT).start()


@pytest.mark.parametrize("library", ["aiohttp", "grpc"])
def test_without_a_library_the_extra_is_named(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "rexdeploy.serving.front_http_grpc")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BackendUnavailable, match="pip install 'rexdeploy.serve.'"):
        Front("127.0.0.1", 8000, LIMIT)


# The end


def test_the_end_waits_for_what_is_in_flight(front: Front, server: StandIn) -> None:
    with ThreadPoolExecutor(3) as threads, channel(front) as client, connected(front) as idle:
        idle.request("GET", "/x")
        idle.getresponse().read()
        asked = threads.submit(ask, front, "/slow", b"{}")
        called = unary(client, "Slow").future(b"x", timeout=LONG)
        assert all(server.reached.acquire(timeout=LONG) for _ in range(2))
        ended = threads.submit(front.drain, lambda seconds: seconds > LONG)
        wait_until(lambda: not listens(_port(front)), LONG)
        idle.request("GET", "/x")  # it was there before, and may ask once more
        answer = idle.getresponse()
        assert (answer.status, answer.getheader("Connection")) == (200, "close")
        time.sleep(0.7)
        assert not ended.done()
        assert front.in_flight == 2
        server.slow.release(2)
        assert asked.result()[0] == 200
        assert called.result() == b"x"
        assert ended.result() == 0
    front.close()
    front.close()


def test_the_end_can_be_hurried(front: Front, server: StandIn) -> None:
    with ThreadPoolExecutor(1) as threads, channel(front) as client:
        asked = threads.submit(raw, front, b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        called = unary(client, "Slow").future(b"x", timeout=LONG)
        assert all(server.reached.acquire(timeout=LONG) for _ in range(2))
        assert front.drain(lambda seconds: seconds > 0.1) == 2
        front.close()
        assert b"200 OK" not in asked.result()
        assert called.code() is not grpc.StatusCode.OK


def test_many_small_requests_lose_nothing_at_the_end(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each connection's last answer says that it is the last, if the client is not too slow."""
    monkeypatch.setattr("rexdeploy.serving.front._GRACE_S", 2.0)
    problems: list[str] = []
    started = threading.Barrier(5)

    def load() -> None:
        with connected(front) as connection:
            for number in range(10**6):
                try:
                    connection.request("POST", "/x", b"{}")
                    answer = connection.getresponse()
                    answer.read()
                except OSError as error:
                    problems.append(repr(error))
                    return
                if answer.will_close:
                    return
                if number == 10:
                    started.wait()

    with ThreadPoolExecutor(4) as threads:
        loads = [threads.submit(load) for _ in range(4)]
        started.wait(LONG)
        assert front.drain(lambda seconds: seconds > LONG) == 0
        front.close()
        for one in loads:
            one.result()
    assert problems == []


# gRPC


@contextlib.contextmanager
def channel(front: Front) -> Iterator[Any]:
    unbounded = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{_port(front) + 1}", unbounded) as client:
        yield client


def unary(client: Any, method: str) -> Any:
    return client.unary_unary(f"/test/{method}")


def test_calls_that_no_handler_has_begun_are_answered_at_the_end(front: Front) -> None:
    """The end of gRPC's server cancels them: on a busy machine one of 16 was lost."""
    with channel(front) as client:
        unary(client, "Echo")(b"x")
        front._loop.call_soon_threadsafe(time.sleep, 0.6)  # it has other things to do
        time.sleep(0.05)
        called = [unary(client, "Echo").future(bytes([n]), timeout=LONG) for n in range(8)]
        time.sleep(0.1)
        assert front.drain(lambda seconds: seconds > LONG) == 0
        assert [call.result() for call in called] == [bytes([n]) for n in range(8)]


def test_grpc_is_passed_on_and_back(front: Front) -> None:
    with channel(front) as client:
        answer, call = unary(client, "Echo").with_call(b"x", metadata=[("asked", "this")])
        assert answer == b"x"
        assert dict(call.initial_metadata()) == {"first": "this", "b-bin": b"\0"}
        assert dict(call.trailing_metadata()) == {"last": "trailer"}
        stream = client.stream_stream("/test/Echo")
        sent = threading.Semaphore(1)

        def messages() -> Iterator[bytes]:
            for number in range(20):  # each is sent when the last one is answered
                assert sent.acquire(timeout=LONG)
                yield b"%d" % number

        got = []
        for answer in stream(messages(), timeout=LONG):
            got.append(int(answer))
            sent.release()
        assert got == list(range(20))
        assert list(stream(iter([]))) == []


def test_grpc_errors_are_the_servers_own(front: Front, server: StandIn) -> None:
    with channel(front) as client:
        with pytest.raises(grpc.RpcError) as failure:
            unary(client, "Fail")(b"x")
        assert failure.value.code() is grpc.StatusCode.NOT_FOUND
        assert failure.value.details() == "its own"
        assert dict(failure.value.trailing_metadata()) == {"last": "failed"}
        with pytest.raises(grpc.RpcError) as failure:
            unary(client, "Slow")(b"x", timeout=0.2)
        assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_until(lambda: front.in_flight == 0, LONG)
        call = unary(client, "Slow").future(b"x")
        wait_until(lambda: front.in_flight == 1, LONG)
        assert call.cancel()
        wait_until(lambda: front.in_flight == 0, LONG)


def test_a_grpc_message_over_the_limit_is_refused(
    front: Front, capfd: pytest.CaptureFixture[str]
) -> None:
    with channel(front) as client:
        assert unary(client, "Echo")(bytes(LIMIT)) == bytes(LIMIT)
        for size in (LIMIT + 1, 30_000_000):
            with pytest.raises(grpc.RpcError) as failure:
                unary(client, "Echo")(bytes(size))
            assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert f"({size} vs. {LIMIT})" in failure.value.details()
        with pytest.raises(grpc.RpcError) as failure:
            list(client.stream_stream("/test/Echo")(iter([b"x", bytes(LIMIT + 1)])))
        assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert unary(client, "Echo")(b"x") == b"x"
    wait_until(lambda: front.in_flight == 0, LONG)
    assert capfd.readouterr().err == ""


def test_compressed_grpc_is_refused(front: Front) -> None:
    with channel(front) as client:
        with pytest.raises(grpc.RpcError) as failure:
            unary(client, "Echo")(bytes(10**7), compression=GZIP)
        assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert unary(client, "Echo")(b"x") == b"x"
