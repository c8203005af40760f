"""`rexdeploy serve` under faults: killed and stopped processes, large bodies, the end with requests
in flight, what is left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rexdeploy import load
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.images import sets
from rexdeploy.serving.front import Address, free_port
from rexdeploy.serving.health import stubs
from rexdeploy.serving.processes import SHARED_MEMORY, find_server, workplace
from rexdeploy.serving.repository import DEFAULT_REPOSITORY
from rexdeploy.serving.request_limits import Guard
from rexdeploy.serving.server import running
from tests.helpers import assert_refused, run_cli, wait_until
from tests.test_serve import Served, file_tensor, grpc, http, infer, needs_server, serving

pytestmark = [needs_server, pytest.mark.slow]

# A model that answers when it may, and tells of how many requests it has begun with.
SLOW_CONFIG = """name: "slow"
backend: "python"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 1 ] } ]
dynamic_batching { }
"""
SLOW_MODEL = """import pathlib, time
import triton_python_backend_utils as utils

class TritonPythonModel:
    def execute(self, requests):
        folder = pathlib.Path(__file__).parents[4]
        (folder / "begun").write_text(str(len(requests)))
        while not (folder / "go").exists():
            time.sleep(0.05)
        tensors = [utils.get_input_tensor_by_name(request, "x") for request in requests]
        return [utils.InferenceResponse([utils.Tensor.from_dlpack("y", tensor.to_dlpack())])
                for tensor in tensors]
"""


@pytest.fixture(scope="module")
def served(small_pixels_original: Bundle, session_dir: Path) -> Iterator[Served]:
    with serving(small_pixels_original, session_dir / "faults") as server:
        yield server


def triton_of(served: Served) -> int:
    """The tritonserver's process."""
    text = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text()
    (pid,) = map(int, text.split())
    return pid


def folder_of(pid: int) -> Path:
    """The folder that a tritonserver has for itself."""
    found = re.search(rb"unix:([^\0]*)/start-\d+/http\0", Path(f"/proc/{pid}/cmdline").read_bytes())
    assert found is not None
    return Path(os.fsdecode(found[1]))


def traces(folder: Path) -> list[str]:
    """What is left on the machine of a server with this folder."""
    left = [str(path) for path in (folder,) if path.exists()]
    left += [path.name for path in SHARED_MEMORY.glob(f"*{folder.name[-8:]}*")]
    for entry in Path("/proc").glob("[1-9]*/cmdline"):
        try:
            text = entry.read_bytes()
        except OSError:
            continue
        if os.fsencode(folder.name[-8:]) in text:
            left.append(text.replace(b"\0", b" ").decode())
    return left


def live(served: Served) -> bool:
    try:
        served.get("/v2/health/live")
    except (urllib.error.URLError, ConnectionError):
        return False
    return True


@pytest.fixture(scope="module")
def photograph(session_dir: Path) -> Path:
    """A JPEG of more than 4 MB."""
    path = session_dir / "large" / "photo.jpg"
    path.parent.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (1700, 1700, 3), np.uint8)
    Image.fromarray(noise).save(path, quality=98)
    assert path.stat().st_size > 4e6
    return path


def test_the_printed_command_works_with_a_photograph(served: Served, photograph: Path) -> None:
    """Without a Content-Type it ended Triton; a client that still sends a form is answered too."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    header = "  -H 'Content-Type: application/octet-stream' \\\n"
    assert header in served.command
    with load(served.bundle, "onnxruntime") as classifier:
        best = classifier.classify([photograph])[0]
    before = triton_of(served)
    for command in (served.command, served.command.replace(header, "")):
        answer = subprocess.check_output(["sh", "-c", command], cwd=photograph.parent)
        data = json.loads(answer)["outputs"][0]["data"]
        assert [int(text.split(":")[1]) for text in data] == [item.index for item in best]
    assert triton_of(served) == before


def test_a_form_leaves_triton_itself_alive(served: Served, photograph: Path) -> None:
    """Past the front, by the larger stack: at Triton's own socket."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    pid = triton_of(served)
    (sockets,) = folder_of(pid).glob("start-*")
    subprocess.run(
        ["curl", "-s", "--unix-socket", sockets / "http", "--data-binary", f"@{photograph}",
         "http://localhost/v2/models/small_pixels_image/infer"],
        capture_output=True, check=True,
    )  # fmt: skip
    assert triton_of(served) == pid
    assert live(served)


def test_only_inference_health_and_descriptions_are_open(served: Served) -> None:
    for client in (served.http, served.grpc):
        for closed in (
            partial(client.register_system_shared_memory, "a", "/x", 8),
            client.get_system_shared_memory_status,
            client.get_model_repository_index,
            partial(client.update_trace_settings, settings={"trace_level": "OFF"}),
            partial(client.update_log_settings, {"log_verbose_level": 1}),
        ):
            with pytest.raises(Exception, match="restricted"):
                closed()
        assert client.is_server_live()
        assert client.is_model_ready("small_pixels_image")
        assert client.get_model_config("small_pixels")
        assert client.get_inference_statistics("small_pixels")


def test_large_and_packed_requests_are_refused(served: Served, photos: Path) -> None:
    """With gRPC, the connection goes on; memory does not grow by what was refused."""
    good = file_tensor(sets.find(photos)[0].read_bytes())
    large = np.zeros((1, 2**24 + 1), np.uint8)
    for client, part in ((served.http, "413.* bytes"), (served.grpc, "EXHAUSTED.*16777216")):
        expected = infer(client, "small_pixels_image", "image", good)
        before = resident(triton_of(served))
        for _ in range(3):
            with pytest.raises(Exception, match=f"(?s){part}"):
                infer(client, "small_pixels_image", "image", large)
        np.testing.assert_allclose(infer(client, "small_pixels_image", "image", good), expected)
        assert resident(triton_of(served)) - before < 2**23
    value = grpc.InferInput("image", [1, 2**16], "UINT8")
    value.set_data_from_numpy(np.zeros((1, 2**16), np.uint8))  # gRPC packs what gets smaller
    with pytest.raises(Exception, match="algorithm .gzip. is disabled"):
        served.grpc.infer("small_pixels_image", [value], compression_algorithm="gzip")


def resident(pid: int) -> int:
    """A process's memory in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "the process of small_pixels(_preprocess)?, version 1 .* has ended"),
        (signal.SIGSTOP, "the process of small_pixels(_preprocess)?, version 1 .* is stopped"),
    ],
)
def test_a_dead_or_stopped_process_is_told_and_replaced(
    served: Served, photos: Path, number: int, said: str
) -> None:
    file = file_tensor(sets.find(photos)[0].read_bytes())
    before = infer(served.http, "small_pixels_image", "image", file)
    pid = triton_of(served)
    folder, told = folder_of(pid), len(served.said)
    victim = next(stub.pid for stub in stubs(pid) if stub.model == "small_pixels")
    os.kill(victim, number)
    wait_until(lambda: not live(served))  # else health would go on saying 200
    wait_until(lambda: live(served))
    assert re.search(said, served.said[told:])
    after = infer(served.http, "small_pixels_image", "image", file)
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert triton_of(served) != pid
    assert (
        not Path(f"/proc/{victim}/cmdline").exists()
        or not Path(f"/proc/{victim}/cmdline").read_bytes()
    )
    assert len(list(SHARED_MEMORY.glob(f"*{folder.name[-8:]}*"))) == len(stubs(triton_of(served)))


def test_what_killed_commands_leave_is_cleared(
    served: Served, small_pixels_original: Bundle, tmp_path: Path
) -> None:
    """A server and its command die at once, by force; one that runs keeps what it has."""
    with serving(small_pixels_original, tmp_path) as dying:
        pid = triton_of(dying)
        folder = folder_of(pid)
        assert len(traces(folder)) > 4  # the folder, two processes' memory, processes
        for each in (dying.process.pid, pid):
            os.kill(each, signal.SIGKILL)
        dying.process.wait()
        assert folder.exists()
        with workplace() as place:
            assert traces(folder) == []
            mine = place.folder
            (SHARED_MEMORY / f"{place.mark}x").write_bytes(b"x")
        assert traces(mine) == []
    assert live(served)
    assert folder_of(triton_of(served)).exists()


def test_the_end_answers_what_is_in_flight_and_leaves_nothing(
    small_pixels_original: Bundle, tmp_path: Path
) -> None:
    """Eight requests, which take more seconds than Triton waits by itself."""
    slow = tmp_path / DEFAULT_REPOSITORY / "slow"
    (slow / "1").mkdir(parents=True)
    (slow / "config.pbtxt").write_text(SLOW_CONFIG)
    (slow / "1" / "model.py").write_text(SLOW_MODEL)
    with serving(small_pixels_original, tmp_path) as server:
        folder = folder_of(triton_of(server))
        idle = server.http
        assert idle.is_server_live()

        def ask(number: int) -> float:
            client = server.grpc
            if number % 2:
                address = f"127.0.0.1:{server.port}"
                client = http.InferenceServerClient(
                    address, network_timeout=60, connection_timeout=60
                )
            x = np.full((1, 1), number, np.float32)
            return float(infer(client, "slow", "x", x, gives="y")[0, 0])

        last: list[float] = [0, 0]  # how many requests there were, and since when

        def has_all() -> bool:
            """The server: it runs some, and the others wait.

            Or it has had as many for five seconds: a batch that waits for its instance is neither.
            """
            metric = r'nv_inference_pending_request_count{model="slow",version="1"} (\d+)'
            waiting = re.search(metric, server.get("/metrics", port=2))
            begun = tmp_path / "begun"
            if waiting is None or not begun.exists():
                return False
            count, now = int(waiting[1]) + int(begun.read_text() or 0), time.monotonic()
            if count != last[0]:
                last[:] = count, now
            return count == 8 or now - last[1] > 5

        with ThreadPoolExecutor(8) as threads:
            asking = [threads.submit(ask, number) for number in range(8)]
            try:
                wait_until(has_all)
                server.process.send_signal(signal.SIGTERM)
                wait_until(lambda: "answering what is in flight (8)" in server.said)
                time.sleep(6)
            finally:
                (tmp_path / "go").touch()
            answers = [future.result() for future in asking]
        assert answers == list(range(8))
        assert server.process.wait(30) == 0
        wait_until(lambda: not traces(folder))


def test_a_server_that_fails_again_and_again_is_left_to_who_started_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("rexdeploy.serving.server._STARTS", 1)
    said: list[str] = []
    (tmp_path / "models").mkdir()
    address = Address(port=free_port())
    with running(find_server(), tmp_path / "models", address, said.append) as server:
        assert server.wait_until_ready([])

        def kill() -> None:
            first = server.pid
            os.kill(first, signal.SIGSEGV)
            wait_until(lambda: server.pid != first)
            wait_until(lambda: any("serves again" in line for line in said))
            os.kill(server.pid, signal.SIGKILL)

        killing = threading.Thread(target=kill)
        killing.start()
        with pytest.raises(RexdeployError, match="killed by SIGKILL.* was started again 1 times"):
            server.wait("none")
        killing.join()
    assert "killed by SIGSEGV" in said[0]
    assert "its last error: Signal (11) received." in said[0]


def test_unknown_apis_and_sizes_are_refused(small_pixels_original: Bundle, tmp_path: Path) -> None:
    arguments = ("serve", small_pixels_original.path, "--port", str(free_port()))
    result = run_cli(*arguments, "--open", "everything", cwd=tmp_path)
    assert_refused(result, "open: got 'everything'", "shared-memory, model-repository")
    result = run_cli(*arguments, "--max-request", "0", cwd=tmp_path)
    assert_refused(result, "max-request: got 0, expected 1 to 1024")
    assert not (tmp_path / DEFAULT_REPOSITORY).exists()
    assert Guard(opened=("trace",)).closed == ["shared-memory", "model-repository", "logging"]
    with pytest.raises(UsageError, match="open: got 'x'"):
        Guard(opened=("x",))


def test_a_place_that_cannot_be_had_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(RexdeployError, match="cannot make a folder in .*gone"), workplace():
        pass
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(RexdeployError, match="too long a name .* set TMPDIR"), workplace():
        pass
    assert list(long.iterdir()) == []
