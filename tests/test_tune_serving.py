"""The best way of serving within a latency: how it is chosen, and a small sweep for real."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rexdeploy.bundle.manifest import BatchRange
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import RexdeployError
from rexdeploy.serving import tuning
from rexdeploy.serving.config import DEFAULTS, Settings
from rexdeploy.serving.deploy import deploy
from rexdeploy.serving.repository import deployed
from rexdeploy.serving.tuning import Load, Row, candidates, choose, climb, measure
from rexdeploy.triton_backend import _share
from tests.helpers import assert_refused, run_cli
from tests.test_repository import tree
from tests.test_serve import needs_server
from tests.test_triton import with_changed_weights

ALONE, BATCHED, TWO = Settings(batch=1), DEFAULTS, Settings(instances=2)


def loads(*numbers: tuple[int, float, float]) -> tuple[Load, ...]:
    return tuple(Load(count, 400, rate, 0.7 * p99, p99) for count, rate, p99 in numbers)


# Made up, in the shape of a sweep: connections, images a second, p99 ms.
RECORDED = (
    Row(BATCHED, loads((1, 38.1, 34.0), (2, 47.9, 55.2), (4, 54.0, 97.1), (3, 50.2, 80.4))),
    Row(ALONE, loads((1, 39.5, 31.8), (2, 45.1, 58.3), (4, 46.8, 112.0))),
    Row(TWO, loads((1, 26.4, 49.0), (2, 49.2, 61.7), (4, 55.6, 93.5), (8, 57.9, 171.0))),
    Row(Settings(batch=4, delay_us=5000), (), "tritonserver ended while starting: no memory"),
)


@pytest.mark.parametrize(
    ("bound", "kept", "rate"),
    [
        (31.0, None, 0.0),
        (32.0, ALONE, 39.5),
        (34.0, ALONE, 39.5),
        (56.0, BATCHED, 47.9),
        (62.0, TWO, 49.2),
        (90.0, BATCHED, 50.2),
        (95.0, TWO, 55.6),
        (1000.0, TWO, 57.9),
    ],
)
def test_the_most_images_within_the_bound_are_chosen(
    bound: float, kept: Settings | None, rate: float
) -> None:
    assert choose(RECORDED, bound) == kept
    best = [load for row in RECORDED if (load := row.best(bound)) is not None]
    assert max((load.per_second for load in best), default=0.0) == rate
    assert all(load.p99_ms <= bound for load in best)


def test_of_equal_ones_the_first_is_kept() -> None:
    equal = loads((1, 50.0, 20.0))
    assert choose([Row(BATCHED, equal), Row(TWO, equal)], 20.0) == BATCHED


@pytest.mark.parametrize(
    ("latency", "visited"),
    [
        (lambda count: 100.0 * count, [1]),
        (lambda count: 40.0 * count, [1, 2]),
        (lambda count: 20.0 * count, [1, 2, 4, 3]),
        (lambda count: 5.0 * count, [1, 2, 4, 8, 16, 12]),
        (lambda count: 0.5 * count, [1, 2, 4, 8, 16, 32, 64]),
    ],
)
def test_more_connections_are_tried_until_the_bound_is_left(
    latency: object, visited: list[int]
) -> None:
    assert callable(latency)
    tried = climb(lambda count: loads((count, 1.0, latency(count)))[0], 65.0)
    assert [load.connections for load in tried] == visited


def test_the_usual_way_is_tried_first_and_none_twice() -> None:
    for batch, cores, count in (
        (BatchRange(1, 8, 64), 2, 10),
        (BatchRange(1, 8, 64), 16, 15),
        (BatchRange(1, 2, 8), 2, 6),
        (BatchRange(1, 1, 1), 2, 2),
    ):
        tried = candidates(batch, 50.0, cores)
        assert tried[0] == DEFAULTS
        assert len(tried) == len(set(tried)) == count
    delays = {settings.delay_us for settings in candidates(BatchRange(1, 8, 64), 50.0, 2)}
    assert delays == {0, 5000}


def test_instances_share_the_cores() -> None:
    def threads(count: int) -> int:
        return _share({"model_config": json.dumps({"instance_group": [{"count": count}]})})

    assert threads(1) >= 1
    assert threads(2) == max(1, threads(1) // 2)
    assert threads(1000) == 1


@contextlib.contextmanager
def answering(status: int, text: bytes, seconds: float = 0.0) -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers every request so; gives its host, and what it was sent."""
    bodies: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            header = int(self.headers["Inference-Header-Content-Length"])
            bodies.append(self.rfile.read(int(self.headers["Content-Length"]))[header:])
            time.sleep(seconds)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}", bodies
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_WARM_S", 0.05)
    monkeypatch.setattr(tuning, "_SECONDS", 0.2)
    monkeypatch.setattr(tuning, "_LEAST", 10)
    monkeypatch.setattr(tuning, "_MOST_CONNECTIONS", 2)


def test_a_load_is_what_the_server_was_sent_and_took(quick: None) -> None:
    with answering(200, b"{}", seconds=0.02) as (host, bodies):
        load = measure(host, "x_image", "logits", [b"one", b"two", b"three"], 3)
    assert set(bodies) == {b"one", b"two", b"three"}
    assert load.connections == 3
    assert 10 <= load.requests <= len(bodies)
    assert 20 <= load.p50_ms <= load.p99_ms
    assert 0 < load.per_second <= 3 / 0.02


@pytest.mark.parametrize(
    ("status", "text", "part"),
    [
        (400, b'{"error":"image 0: not an image"}', "answered 400: .*image 0: not an image"),
        (500, b"\xff" * 1000, "answered 500"),
    ],
)
def test_a_refused_request_ends_the_load(quick: None, status: int, text: bytes, part: str) -> None:
    with answering(status, text) as (host, _), pytest.raises(RexdeployError, match=part):
        measure(host, "x_image", "logits", [b"one"], 2)


def test_a_server_that_is_gone_is_told(quick: None) -> None:
    with answering(200, b"") as (host, _):
        pass
    with pytest.raises(RexdeployError, match="the server did not answer .*refused"):
        measure(host, "x_image", "logits", [b"one"], 2)


@needs_server
@pytest.mark.slow
def test_the_best_of_two_ways_is_kept_by_later_versions(
    small_v1: Bundle, photos: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "artifacts" / "triton"
    deploy(small_v1, repository, "python")
    ways: Sequence[Settings] = (Settings(batch=1), Settings(batch=2, delay_us=1000))
    result = tuning.tune_serving(
        small_v1, p99=10_000.0, repository=repository, images=photos, ways=ways
    )
    assert [row.settings for row in result.rows] == list(ways)
    assert all(row.fault is None and row.loads for row in result.rows)
    best = {row.settings: row.best(10_000.0) for row in result.rows}
    assert result.kept in ways
    assert result.kept is not None
    assert best[result.kept] == max(best.values(), key=lambda load: load.per_second if load else 0)
    (model,) = deployed(repository)
    assert (model.settings, model.version) == (result.kept, 1)
    assert [path.name for path in repository.parent.iterdir() if path.name.startswith(".")] == []
    assert run_cli("triton", with_changed_weights(small_v1).path, cwd=tmp_path).code == 0
    (model,) = deployed(repository)
    assert (model.settings, model.version) == (result.kept, 2)

    from rexdeploy.cli.tune_serving import show_sweep

    show_sweep("rexnet", result)
    printed = capsys.readouterr().out
    assert "2 files of " in printed
    lines = [line.split() for line in printed.splitlines()]
    assert sorted(line[-1] for line in lines if "instance" in line) == ["kept", "within"]
    assert "batches of 2 after up to 1 ms, 1 instance" in printed


@needs_server
@pytest.mark.slow
def test_a_bound_that_nothing_keeps_changes_nothing(
    small_v1: Bundle, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "candidates", lambda *_: [DEFAULTS])
    deploy(small_v1, tmp_path / "artifacts" / "triton", "python", settings=TWO)
    before = tree(tmp_path / "artifacts")
    arguments = ["small_v1", "--p99", "0.1", "--plot", "ways.svg", "--json", "ways.json"]
    result = run_cli("tune-serving", *arguments, cwd=tmp_path)
    assert result.code == 3, result.err
    assert "no way of serving answers 99 of 100 requests within 0.1 ms" in result.error_lines[-1]
    assert "nothing was changed" in result.error_lines[-1]
    assert [line.split()[-1] for line in result.out.splitlines() if "instance " in line] == ["over"]
    assert tree(tmp_path / "artifacts") == before
    answer = json.loads((tmp_path / "ways.json").read_text())
    assert answer["kept"] is None
    assert answer["rows"][0]["loads"][0]["connections"] == 1
    picture = (tmp_path / "ways.svg").read_text()
    assert "the bound" in picture
    assert "images a second" in picture


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--p99", "0"], "p99: got 0, expected 0.1 to 60000 milliseconds"),
        (["--p99", "nan"], "p99: got nan"),
        (["--p99", "50", "--images", "nowhere"], "images: got nowhere"),
        (["--p99", "50", "--images", "broken"], "broken/photo.jpg"),
        (["--p99", "50", "--plot", "ways.txt"], "plot: got 'ways.txt'"),
        ([], "p99"),
    ],
)
@needs_server
def test_unusable_arguments_are_refused(
    arguments: list[str], part: str, small_v1: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "photo.jpg").write_bytes(b"no photograph")
    result = run_cli("tune-serving", "small_v1", *arguments, "--quiet", cwd=tmp_path)
    assert_refused(result, part)
    assert not (tmp_path / "artifacts" / "triton").exists()
