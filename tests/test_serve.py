"""A real Triton server: its answers, its batches, its versions, how it starts and ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from rexdeploy import load
from rexdeploy.arrays import UInt8
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import BackendUnavailable
from rexdeploy.images import sets
from rexdeploy.serving.deploy import deploy
from rexdeploy.serving.front import free_port
from rexdeploy.serving.processes import find_server
from rexdeploy.serving.repository import DEFAULT_REPOSITORY
from tests.helpers import ROOT, assert_refused, listens, run_cli, wait_until
from tests.hostile_images import encoded, png
from tests.test_triton import with_changed_weights, with_labels

http = pytest.importorskip("tritonclient.http")
grpc = pytest.importorskip("tritonclient.grpc")
TYPES = {"uint8": "UINT8", "float32": "FP32"}


def _missing() -> str:
    try:
        find_server()
    except BackendUnavailable as error:
        return str(error)
    return ""


needs_server = pytest.mark.skipif(bool(_missing()), reason=_missing() or "there is one")
pytestmark = [needs_server, pytest.mark.slow]


@dataclass(frozen=True)
class Served:
    """A `rexdeploy serve` that runs in a folder."""

    folder: Path
    bundle: Bundle
    port: int
    process: subprocess.Popen[str]
    printed: str

    @property
    def repository(self) -> Path:
        return self.folder / DEFAULT_REPOSITORY

    @property
    def said(self) -> str:
        """What it has written to stderr by now."""
        return (self.folder / "stderr").read_text()

    @property
    def command(self) -> str:
        """The command that it prints to try it."""
        lines = self.printed.splitlines()
        return "\n".join(lines[lines.index("the five best classes of photo.jpg:") + 1 : -1])

    @property
    def http(self) -> Any:
        return http.InferenceServerClient(f"127.0.0.1:{self.port}")

    @property
    def grpc(self) -> Any:
        return grpc.InferenceServerClient(f"127.0.0.1:{self.port + 1}")

    def get(self, path: str, port: int = 0) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port + port}{path}") as answer:
            text: str = answer.read().decode()
            return text


@contextlib.contextmanager
def serving(bundle: Bundle, folder: Path, adds: bool = True) -> Iterator[Served]:
    """`rexdeploy serve` as a user starts it, ended at the end if it still runs.

    It `adds` the bundle first, or serves what is there.
    """
    port, argument = free_port(), [str(bundle.path)] if adds else []
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "stderr", "w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "rexdeploy", "serve", *argument, "--port", str(port)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        lines: list[str] = []
        for line in process.stdout or ():
            lines.append(line)
            if line.startswith("Ctrl-C"):
                break
        else:
            pytest.fail((folder / "stderr").read_text())
        yield Served(folder, bundle, port, process, "".join(lines))
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def served(small_pixels_original: Bundle, session_dir: Path) -> Iterator[Served]:
    folder = session_dir / "served"
    bundle = with_labels(
        Bundle.open(shutil.copytree(small_pixels_original.path, folder / "small_pixels"))
    )
    with serving(bundle, folder) as server:
        yield server


def infer(
    client: Any,
    model: str,
    name: str,
    tensor: npt.NDArray[Any],
    classes: int = 0,
    gives: str = "probabilities",
) -> Any:
    library = http if isinstance(client, http.InferenceServerClient) else grpc
    value = library.InferInput(name, list(tensor.shape), TYPES[tensor.dtype.name])
    value.set_data_from_numpy(tensor)
    output = library.InferRequestedOutput(gives, class_count=classes)
    return client.infer(model, [value], outputs=[output]).as_numpy(gives)


def is_like(answer: Any, known: Any) -> bool:
    return np.allclose(answer, known, rtol=0, atol=1e-5)


def file_tensor(*files: bytes) -> UInt8:
    """Files as rows, the shorter ones filled up with zeros."""
    longest = max(map(len, files))
    return np.stack([np.frombuffer(file.ljust(longest, b"\0"), np.uint8) for file in files])


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_answers_are_those_of_the_library(served: Served, photos: Path, protocol: str) -> None:
    client = getattr(served, protocol)
    paths = sets.find(photos)
    files = file_tensor(*(path.read_bytes() for path in paths))
    with load(served.bundle, "onnxruntime") as classifier:
        batch = classifier.prepare(paths)
        expected = classifier.run(batch)
    np.testing.assert_allclose(infer(client, "small_pixels", "pixels", batch), expected, atol=1e-6)
    np.testing.assert_allclose(
        infer(client, "small_pixels_image", "image", files), expected, atol=1e-6
    )
    for index in range(len(paths)):  # files of another batch size, and of their own length
        row = infer(client, "small_pixels_image", "image", file_tensor(paths[index].read_bytes()))
        np.testing.assert_allclose(row, expected[index : index + 1], atol=1e-5)
    assert 'nv_inference_request_success{model="small_pixels"' in served.get("/metrics", port=2)


@pytest.mark.parametrize("model", ["small_pixels", "small_pixels_image"])
def test_the_classification_extension_gives_the_labels(
    served: Served, photos: Path, model: str
) -> None:
    path = sets.find(photos)[0]
    with load(served.bundle, "onnxruntime") as classifier:
        tensor = classifier.prepare([path])
        expected = classifier.classify([path], top=3)[0]
    if model == "small_pixels_image":
        answer = infer(served.http, model, "image", file_tensor(path.read_bytes()), classes=3)
    else:
        answer = infer(served.http, model, "pixels", tensor, classes=3)
    got = [text.decode().split(":") for text in answer.reshape(-1)]
    assert [(int(index), label) for _, index, label in got] == [
        (best.index, best.label) for best in expected
    ]


def test_requests_are_batched_and_broken_ones_harm_only_themselves(
    served: Served, photos: Path
) -> None:
    """Many connections at once: every request gets its own answer or its own error."""
    good = file_tensor(sets.find(photos)[0].read_bytes())
    with Image.open(sets.find(photos)[0]) as photo:
        jpeg = encoded(photo, "JPEG")
    bad = {
        "image 0: cannot be decoded": file_tensor(jpeg[: len(jpeg) // 2]),
        "image 0: not an image": file_tensor(b""),
        "image 0: too large": file_tensor(png(30_000, 30_000, rows=bytes(100))),
        "image 1: not an image": file_tensor(jpeg, b"\0" * 9),
    }
    expected = infer(served.http, "small_pixels_image", "image", good)
    wrong: list[str] = []

    def ask(number: int) -> None:
        client = served.http if number % 2 else served.grpc
        kinds: list[tuple[str, UInt8]] = [("", good)] * 6 + list(bad.items())
        part, tensor = kinds[number % len(kinds)]
        try:
            answer = infer(client, "small_pixels_image", "image", tensor)
        except Exception as error:  # the clients' errors, and whatever else comes
            if not part or part not in str(error):
                wrong.append(f"{part}: {error}")
            return
        if part or np.abs(answer - expected).max() > 1e-5:
            wrong.append(f"{part}: answered")

    before = _joined(served)
    with ThreadPoolExecutor(12) as threads:
        list(threads.map(ask, range(120)))
    assert wrong == []
    # By the server's own count, the network ran on several requests together.
    assert _joined(served) > before
    assert served.http.is_server_live()


def _joined(served: Served) -> int:
    """How often the network has run on more than one image; no request above had more to run."""
    statistics = json.loads(served.get("/v2/models/small_pixels/stats"))["model_stats"][0]
    return sum(
        entry["compute_infer"]["count"]
        for entry in statistics["batch_stats"]
        if entry["batch_size"] > 1
    )


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        (np.zeros((1, 64, 63, 3), np.uint8), "unexpected shape"),
        (np.zeros((9, 64, 64, 3), np.uint8), "batch-size must be <= 8"),
        (np.zeros((1, 64, 64, 3), np.float32), "data-type is 'FP32'"),
    ],
)
def test_wrong_tensors_are_refused(served: Served, tensor: Any, part: str) -> None:
    with pytest.raises(Exception, match=part):
        infer(served.http, "small_pixels", "pixels", tensor)


def test_a_new_version_takes_over_under_load(served: Served, photos: Path) -> None:
    """Nobody is refused meanwhile, and every answer is the old network's or the new one's."""
    path = sets.find(photos)[0]
    file = file_tensor(path.read_bytes())
    changed = with_changed_weights(served.bundle)
    with load(changed, "onnxruntime") as classifier:
        new = classifier.run(classifier.prepare([path]))
    old = infer(served.http, "small_pixels_image", "image", file)
    assert np.abs(old - new).max() > 1e-3
    answers: list[str] = []
    done = threading.Event()

    def ask() -> None:
        client = served.http
        while not done.is_set():
            answer = infer(client, "small_pixels_image", "image", file)
            known = [name for name, one in (("old", old), ("new", new)) if is_like(answer, one)]
            answers.append(known[0] if known else "neither")

    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask) for _ in range(4)]
        assert deploy(changed, served.repository, "python").version == 2
        try:
            wait_until(lambda: answers[-20:] == ["new"] * 20)
        finally:
            done.set()
        for future in asking:
            future.result()  # raises if a request was refused
    assert set(answers) == {"old", "new"}
    assert answers[-1] == "new"
    versions = {
        entry["version"]
        for entry in json.loads(served.get("/v2/models/small_pixels/stats"))["model_stats"]
    }
    assert "2" in versions


def test_a_damaged_version_is_told_and_the_last_one_goes_on(served: Served, photos: Path) -> None:
    file = file_tensor(sets.find(photos)[0].read_bytes())
    before = infer(served.http, "small_pixels_image", "image", file)
    latest = max(int(path.name) for path in (served.repository / "small_pixels").glob("[1-9]*"))
    damaged = served.repository / "small_pixels" / str(latest + 1)
    shutil.copytree(damaged.with_name(str(latest)), served.repository.parent / "damaged")
    (served.repository.parent / "damaged" / "fp32.onnx").write_bytes(b"damaged")
    (served.repository.parent / "damaged").rename(damaged)
    wait_until(lambda: "is not the file" in served.said)
    assert f"failed to load 'small_pixels' version {latest + 1}" in served.said
    assert is_like(infer(served.http, "small_pixels_image", "image", file), before)
    shutil.rmtree(damaged)


def test_float32_gives_logits_ports_are_checked_and_sigterm_ends_it_cleanly(
    small_v1_original: Bundle, photos: Path, tmp_path: Path
) -> None:
    paths = sets.find(photos)
    with load(small_v1_original, "onnxruntime") as classifier:
        batch = classifier.prepare(paths)
        expected = classifier.logits(batch)
    files = file_tensor(*(path.read_bytes() for path in paths))
    with serving(small_v1_original, tmp_path) as server:
        for client in (server.http, server.grpc):
            for model, name, tensor in (
                ("small_v1", "input", batch),
                ("small_v1_image", "image", files),
            ):
                logits = infer(client, model, name, tensor, gives="logits")
                np.testing.assert_allclose(logits, expected, atol=1e-4)
        for port in (server.port, server.port - 1):  # its own HTTP port, and as gRPC's
            result = run_cli("serve", small_v1_original.path, "--port", str(port), cwd=tmp_path)
            assert_refused(result, f"cannot listen on 127.0.0.1:{server.port}", "--port")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert not listens(server.port)


def test_a_killed_command_leaves_no_server(small_pixels_original: Bundle, tmp_path: Path) -> None:
    with serving(small_pixels_original, tmp_path) as server:
        server.process.kill()
        server.process.wait()
        wait_until(lambda: not listens(server.port))


def test_a_server_that_cannot_start_says_why(small_pixels_original: Bundle, tmp_path: Path) -> None:
    theirs = tmp_path / "models" / "theirs"
    (theirs / "1").mkdir(parents=True)
    (theirs / "config.pbtxt").write_text('name: "theirs"\nbackend: "python"\nmax_batch_size: 1\n')
    (theirs / "1" / "model.py").write_text("import a_module_that_is_not_there\n")
    result = run_cli(
        "serve", small_pixels_original.path, "--repository", "models", "--port", str(free_port()),
        cwd=tmp_path,
    )  # fmt: skip
    assert_refused(result, "tritonserver ended while starting", "a_module_that_is_not_there")
