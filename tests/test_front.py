"""The front of a served network: what it lets through, refuses and answers itself."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

import pytest

from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import UsageError
from rexdeploy.serving.front import Front, budget, free_port
from rexdeploy.serving.request_limits import checked
from rexdeploy.triton_backend import decoded

LIMIT = 1000


class Behind(BaseHTTPRequestHandler):
    """A server that says what it was sent, and answers /slow when it is told to."""

    protocol_version = "HTTP/1.1"
    go = threading.Event()
    got = threading.Semaphore(0)  # requests that have come

    def do_POST(self) -> None:
        self.got.release()
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        if self.path == "/ends":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if self.path == "/slow":
            self.go.wait(20)
        answer = json.dumps({"headers": dict(self.headers), "body": body.decode("latin-1")})
        if self.path == "/chunks":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in (answer[:5], answer[5:], ""):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part.encode()))
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *arguments: Any) -> None:
        pass

    def address_string(self) -> str:
        return "local"


class _Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True


@contextmanager
def fronted(folder: Path) -> Iterator[tuple[Front, int]]:
    port = free_port()
    front = Front("127.0.0.1", port, LIMIT)
    front.start()
    Behind.go.clear()
    with _Server(str(folder / "http"), Behind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            front.serve_from(folder)
            yield front, port
        finally:
            Behind.go.set()
            front.close()
            server.shutdown()


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    with fronted(tmp_path) as (_, number):
        yield number


def ask(
    port: int, body: bytes = b"", path: str = "/x", headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", path, body, headers or {})
    answer = connection.getresponse()
    status, text = answer.status, answer.read()
    connection.close()
    return status, json.loads(text)


def raw(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(request)
        parts = []
        while part := client.recv(65536):
            parts.append(part)
        return b"".join(parts)


JSON_FIRST = {"Inference-Header-Content-Length": "2"}


@pytest.mark.parametrize("path", ["/x", "/chunks"])
def test_a_request_and_its_answer_pass(port: int, path: str) -> None:
    status, got = ask(port, b"{}" + b"\0" * (LIMIT - 2), path, JSON_FIRST | {"X-Y": "z"})
    assert (status, got["body"]) == (200, "{}" + "\0" * (LIMIT - 2))
    assert got["headers"]["X-Y"] == "z"


def test_a_connection_serves_one_request_after_the_other(port: int) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    for number in range(3):
        connection.request("POST", "/x", f'{{"id":"{number}"}}')
        assert json.loads(connection.getresponse().read())["body"] == f'{{"id":"{number}"}}'
    connection.close()


def test_what_curl_sends_without_being_told_is_no_form_any_more(port: int) -> None:
    """A form's fields are what Triton 2.51 copies to a thread's stack."""
    for kind in ("application/x-www-form-urlencoded", "Application/X-WWW-form-urlencoded; q=1"):
        _, got = ask(port, b"{}", headers={"Content-Type": kind})
        assert got["headers"]["Content-Type"] == "application/octet-stream"
    _, got = ask(port, b"{}", headers={"Content-Type": "application/json"})
    assert got["headers"]["Content-Type"] == "application/json"


def test_a_large_body_is_refused_before_it_is_read(port: int) -> None:
    status, got = ask(port, b"\0" * (LIMIT + 1), headers={"Inference-Header-Content-Length": "0"})
    assert (status, got["error"]) == (
        413,
        "the request has more than the 1000 bytes that are taken",
    )
    waiting = b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(waiting)
        assert client.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_body_in_chunks_is_counted_and_put_together(port: int) -> None:
    head = b"POST /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = raw(port, head + b"1\r\n{\r\n1;a=b\r\n}\r\n0\r\n\r\n")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["body"] == "{}"
    many = b"".join(b"64\r\n%b\r\n" % (b" " * 100) for _ in range(11))
    assert raw(port, head + many + b"0\r\n\r\n").startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST /x HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
        (b"POST /x HTTP/1.1\r\nContent-Length: +2\r\n\r\n{}", 400),
        (b"POST /x HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", 400),
        (b"POST /x HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nContent-Length : 2\r\n\r\n{}", 400),
        (b"POST /x HTTP/1.1\r\nA: b\r\n folded\r\n\r\n", 400),
        (b"POST /x y HTTP/1.1\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n0\r\n\r\n", 400),
        (b"A / HTTP/1.1\r\nInference-Header-Content-Length: 9\r\nContent-Length: 1\r\n\r\n{", 400),
        (b"POST /x HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", 415),
        (b"POST /x HTTP/1.1\r\nA: " + b"b" * 2**17 + b"\r\n\r\n", 400),
    ],
)  # fmt: skip
def test_what_two_programs_could_read_in_two_ways_is_refused(
    port: int, request_: bytes, status: int
) -> None:
    answer = raw(port, request_.replace(b" HTTP/1.1\r\n", b" HTTP/1.1\r\nHost: x\r\n"))
    assert re.match(rb"HTTP/1\.[01] %d " % status, answer), answer


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


def test_the_length_of_json_is_kept_right(port: int) -> None:
    text = b'{ "id" : "a" }'
    size = {"Inference-Header-Content-Length": str(len(text))}
    _, got = ask(port, text + b"file", headers=size)
    assert got["body"] == '{"id":"a"}file'
    assert got["headers"]["Inference-Header-Content-Length"] == "10"


def test_without_a_server_nothing_is_healthy(tmp_path: Path) -> None:
    with fronted(tmp_path) as (front, port):
        assert ask(port, b"{}")[0] == 200
        front.serve_from(None)
        assert ask(port, path="/v2/health/live")[0] == 503
        front.serve_from(tmp_path / "gone")
        assert ask(port, path="/v2/health/live") == (503, {"error": "the server is being started"})


def test_a_server_that_ends_with_a_request_is_told(port: int) -> None:
    status, got = ask(port, b"{}", "/ends")
    assert (status, got["error"]) == (503, "the server ended while it had this request")


def test_draining_answers_what_is_there_and_nobody_else(tmp_path: Path) -> None:
    with fronted(tmp_path) as (front, port):
        idle = HTTPConnection("127.0.0.1", port, timeout=20)
        idle.request("POST", "/x", "{}")
        assert idle.getresponse().read()
        Behind.got = threading.Semaphore(0)
        answers: list[int] = []
        asking = [
            threading.Thread(target=lambda: answers.append(ask(port, b"{}", "/slow")[0]))
            for _ in range(4)
        ]
        for thread in asking:
            thread.start()
        for _ in asking:
            assert Behind.got.acquire(timeout=20)
        left: list[int] = []
        draining = threading.Thread(target=lambda: left.append(front.drain(lambda s: s > 20)))
        draining.start()
        while True:  # until it listens no more
            try:
                socket.create_connection(("127.0.0.1", port), timeout=20).close()
            except ConnectionResetError:
                continue  # it was in the queue of the socket that closed
            except ConnectionRefusedError:
                break
        assert draining.is_alive()
        assert front.in_flight == 4
        Behind.go.set()
        for thread in (*asking, draining):
            thread.join(20)
        assert (answers, left) == ([200] * 4, [0])
        idle.close()


def test_what_is_never_answered_is_counted(tmp_path: Path) -> None:
    with fronted(tmp_path) as (front, port):
        Behind.got = threading.Semaphore(0)
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            client.sendall(b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
            assert Behind.got.acquire(timeout=20)
            assert front.drain(lambda seconds: seconds > 0.1) == 1


def test_bodies_share_a_budget_that_holds_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small:
        f_bavail, f_frsize = 2**14, 2**12  # Docker's 64 MiB

    monkeypatch.setattr("os.statvfs", lambda path: Small)
    assert budget(2**20) == 2**24
    assert budget(2**25) == 2**25


def test_a_file_of_too_many_bytes_is_not_decoded(
    monkeypatch: pytest.MonkeyPatch, small_pixels_original: Bundle
) -> None:
    """For servers without this front."""
    monkeypatch.setattr("rexdeploy.triton_backend._MOST_BYTES", 10)
    spec = small_pixels_original.manifest.model
    with pytest.raises(UsageError, match="image 3: got 11 bytes, expected at most 10"):
        decoded(b"x" * 11, 3, spec)
    with pytest.raises(UsageError, match="image 3: not an image"):
        decoded(b"x" * 10, 3, spec)
