"""Loads a real Triton server with requests, good and bad, and checks every answer.

    python scripts/load_test.py --out artifacts/benchmarks/serving-cpu.json

Needs the extras cpu and serve, and tritonclient[http,grpc]. First, in turns: the same JPEG files
through `rexdeploy.load` in this process (one by one, and in batches), through a server that batches
requests, and through one that does not. Then good requests, broken images, wrong shapes and wrong
types, mixed, over all connections, while a second version takes the first one's place. Exit code 1:
an answer was wrong, or a request was lost.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tritonclient.utils import InferenceServerException

from rexdeploy import Classifier, load
from rexdeploy.arrays import Float32, UInt8
from rexdeploy.bundle.manifest import DEFAULT_BATCH, Preprocess
from rexdeploy.bundle.store import Bundle
from rexdeploy.images import sets
from rexdeploy.machine import machine
from rexdeploy.serving.deploy import deploy
from rexdeploy.serving.front import Address, free_port
from rexdeploy.serving.processes import find_server
from rexdeploy.serving.server import running
from rexdeploy.steps.export import export

NAME, ALONE = "rexnet", "rexnet_one_by_one"
POOL = 32  # different images
ROUNDS = 3
LIMIT = 0.001  # of the signal, as `verify` has it for float32
TIMEOUT_S = 60
SWAP_AT = 0.3  # of the mixed requests


def main() -> int:
    """Runs it, writes the result, and says how many answers were right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=4000, help="of the mixed load")
    parser.add_argument("--timed", type=int, default=960, help="images for each way of serving")
    parser.add_argument("--connections", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), options.requests, options.timed, options.connections)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    mixed = result["mixed"]
    for way in result["ways"]:
        print(
            f"{way['way']:28} {way['images_per_second']:7.1f} images/s, "
            f"p50 {way['p50_ms']:7.1f} ms, p99 {way['p99_ms']:7.1f} ms"
        )
    print("mixed:", json.dumps({key: mixed[key] for key in mixed if key != "examples"}))
    return 0 if mixed["wrong"] == mixed["lost"] == 0 else 1


def run(folder: Path, requests: int, timed: int, connections: int) -> dict[str, Any]:
    """The whole result."""
    first = export(width=1.0, name="first", out=folder).bundle
    second = export(lite=True, name="second", out=folder).bundle
    repository = folder / "models"
    deploy(first, repository, "python", NAME)
    deploy(first, repository, "python", ALONE)
    config = repository / ALONE / "config.pbtxt"
    config.write_text(re.sub(r"dynamic_batching \{.*\}\n", "", config.read_text(), count=1))
    files = [_jpeg(pixels) for pixels in sets.synthetic_pixels(POOL, Preprocess(), seed=5)]
    address, cores = Address(port=free_port()), len(os.sched_getaffinity(0))
    with (
        # With the threads that the served network has, which do not spin while they wait.
        load(first, "onnxruntime", cores) as old,
        load(second, "onnxruntime", cores) as new,
        running(find_server(), repository, address) as server,
    ):
        if not server.wait_until_ready([NAME, f"{NAME}_image", ALONE, f"{ALONE}_image"]):
            raise SystemExit("interrupted")
        pool = Pool(files, old, new)
        ways = {
            "in process, one by one": lambda: in_process(old, pool, timed // ROUNDS, 1),
            "in process, batches of 8": lambda: in_process(
                old, pool, timed // ROUNDS, DEFAULT_BATCH.opt
            ),
            "served, dynamic batching": lambda: served(
                NAME, address, pool, timed // ROUNDS, connections
            ),
            "served, one by one": lambda: served(
                ALONE, address, pool, timed // ROUNDS, connections
            ),
        }
        samples: dict[str, list[Timed]] = {way: [] for way in ways}
        for way in itertools.chain(*[ways] * ROUNDS):
            samples[way].append(ways[way]())
        batches = {name: _batches(address, name) for name in (NAME, ALONE)}
        mixed = mix(address, pool, requests, connections, lambda: _swap(second, repository))
        version = _client("http", address).get_server_metadata()["version"]
    return {
        "command": f"scripts/load_test.py --requests {requests} --timed {timed} "
        f"--connections {connections}",
        "machine": {**machine(), "tritonserver": version},
        "network": first.manifest.model.title,
        "connections": connections,
        "ways": [_summary(way, timings) for way, timings in samples.items()],
        "batches": batches,
        "mixed": mixed,
    }


@dataclass(frozen=True)
class Timed:
    """One round of one way of serving: each request's milliseconds, and the round's seconds."""

    images: int
    seconds: float
    samples_ms: list[float]


class Pool:
    """Image files, their pixels, and what each version of the network says of them."""

    def __init__(self, files: list[bytes], old: Classifier, new: Classifier) -> None:
        self.files = files
        self.tensors = old.prepare([Image.open(BytesIO(file)) for file in files])
        self.expected = {"1": old.run(self.tensors), "2": new.run(self.tensors)}

    def version_of(self, index: int, answer: Float32) -> str | None:
        """The version whose answer this is, or None."""
        for version, expected in self.expected.items():
            signal = float(expected.std(axis=0).mean())
            if np.abs(answer - expected[index]).max() < LIMIT * signal:
                return version
        return None


def in_process(classifier: Classifier, pool: Pool, count: int, batch: int) -> Timed:
    """Decodes and classifies `count` image files, `batch` at a time, in this process."""
    samples = []
    started = time.perf_counter()
    for start in range(0, count, batch):
        before = time.perf_counter()
        some = [Image.open(BytesIO(pool.files[(start + n) % POOL])) for n in range(batch)]
        classifier.run(classifier.prepare(some))
        samples.append((time.perf_counter() - before) * 1000)
    return Timed(len(samples) * batch, time.perf_counter() - started, samples)


def served(model: str, address: Address, pool: Pool, count: int, connections: int) -> Timed:
    """Sends `count` image files over HTTP, one a request; a wrong answer ends the run."""
    samples: list[float] = []

    def ask(client: Any, number: int) -> None:
        index = number % POOL
        before = time.perf_counter()
        answer = _infer(client, "http", f"{model}_image", "image", _bytes_tensor(pool.files[index]))
        samples.append((time.perf_counter() - before) * 1000)
        if pool.version_of(index, answer[0]) != "1":
            raise SystemExit(f"{model} gave a wrong answer")

    started = time.perf_counter()
    _over_connections(ask, count, connections, lambda _: _client("http", address))
    return Timed(count, time.perf_counter() - started, samples)


@dataclass
class Tally:
    """What became of the mixed requests."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # one text a kind of refusal

    def add(self, outcome: str, kind: str, text: str = "") -> int:
        """Counts it; how many there are now."""
        with self.lock:
            self.counts[outcome] += 1
            self.counts["sent"] += 1
            if outcome != "right":
                self.examples.setdefault(f"{outcome}: {kind}", text)
            return self.counts["sent"]


def mix(
    address: Address, pool: Pool, count: int, connections: int, swap: Callable[[], None]
) -> dict[str, Any]:
    """Sends good and bad requests over HTTP and gRPC, and swaps the version meanwhile."""
    tally = Tally()
    swapping = threading.Thread(target=swap)
    once = threading.Lock()
    seen: list[tuple[float, str]] = []  # when which version answered

    def ask(client: tuple[str, Any], number: int) -> None:
        protocol, connection = client
        kind, model, name, tensor, refusal = _request(pool, number)
        index = number % POOL
        try:
            answer = _infer(connection, protocol, model, name, tensor)
        except InferenceServerException as error:
            text = error.message() or ""
            refused = refusal is not None and re.search(refusal, text)
            lost = "timeout" in text.lower() or "unavailable" in (error.status() or "").lower()
            sent = tally.add("refused" if refused else "lost" if lost else "wrong", kind, text)
        except (
            Exception
        ) as error:  # a connection that broke: the libraries' errors have no common base
            sent = tally.add("lost", kind, repr(error))
        else:
            version = pool.version_of(index, answer[0]) if refusal is None else None
            sent = tally.add("right" if version else "wrong", kind, "an answer of no version")
            if version:
                seen.append((time.perf_counter(), version))
        if sent >= SWAP_AT * count and once.acquire(blocking=False):
            swapping.start()

    def connect(number: int) -> tuple[str, Any]:
        protocol = ("http", "grpc")[number % 2]
        return protocol, _client(protocol, address)

    _over_connections(ask, count, connections, connect)
    swapping.join()
    versions = Counter(version for _, version in seen)
    # Whatever the order in which answers arrived: old, then for a moment both, then new only.
    last = [version for _, version in sorted(seen)[-connections:]]
    if set(last) != {"2"}:
        raise SystemExit(
            "the old version still answered at the end: the swap failed, or came after the load; "
            "give more --requests"
        )
    return {
        **{kind: tally.counts[kind] for kind in ("sent", "right", "refused", "wrong", "lost")},
        "answers_by_version": dict(sorted(versions.items())),
        "examples": tally.examples,
    }


def _request(pool: Pool, number: int) -> tuple[str, str, str, Any, str | None]:
    """The kind of a request, its model, input and tensor, and how it is to be refused, if it is."""
    index = number % POOL
    tensor, file = pool.tensors[index : index + 1], pool.files[index]
    kinds: list[tuple[str, str, str, Any, str | None]] = [
        ("image", f"{NAME}_image", "image", _bytes_tensor(file), None),
        ("tensor", NAME, "input", tensor, None),
        ("image", f"{NAME}_image", "image", _bytes_tensor(file), None),
        (
            "truncated image",
            f"{NAME}_image",
            "image",
            _bytes_tensor(file[:-900]),
            "image 0: cannot",
        ),
        ("tensor", NAME, "input", tensor, None),
        (
            "no image",
            f"{NAME}_image",
            "image",
            _bytes_tensor(b"GIF89a?"),
            "image 0: (cannot|not)",
        ),
        ("image", f"{NAME}_image", "image", _bytes_tensor(file), None),
        ("wrong shape", NAME, "input", tensor[:, :, :-1], "unexpected shape"),
        ("tensor", NAME, "input", tensor, None),
        ("wrong type", NAME, "input", tensor.astype(np.float64), "(data-type|datatype|data type)"),
        ("image", f"{NAME}_image", "image", _bytes_tensor(file), None),
        ("bomb", f"{NAME}_image", "image", _bytes_tensor(_bomb()), "too large to decode safely"),
    ]
    return kinds[number % len(kinds)]


def _over_connections(
    ask: Callable[[Any, int], None], count: int, connections: int, connect: Callable[[int], Any]
) -> None:
    """Calls `ask(connection, number)` for all numbers, from one thread a connection."""
    numbers = iter(range(count))
    taking = threading.Lock()

    def work(place: int) -> None:
        client = connect(place)
        while True:
            with taking:
                number = next(numbers, None)
            if number is None:
                return
            ask(client, number)

    with ThreadPoolExecutor(connections) as threads:
        for done in [threads.submit(work, place) for place in range(connections)]:
            done.result()


def _client(protocol: str, address: Address) -> Any:
    if protocol == "grpc":
        return tritonclient.grpc.InferenceServerClient(address.grpc)
    host = address.http.removeprefix("http://")
    return tritonclient.http.InferenceServerClient(
        host, connection_timeout=TIMEOUT_S, network_timeout=TIMEOUT_S
    )


def _infer(client: Any, protocol: str, model: str, name: str, tensor: Any) -> Float32:
    library = tritonclient.grpc if protocol == "grpc" else tritonclient.http
    kind = {"uint8": "UINT8", "float32": "FP32", "float64": "FP64"}[str(tensor.dtype)]
    value = library.InferInput(name, list(tensor.shape), kind)
    value.set_data_from_numpy(tensor)
    limits = {"client_timeout": TIMEOUT_S} if protocol == "grpc" else {}
    logits: Float32 = client.infer(model, [value], **limits).as_numpy("logits")
    return logits


def _batches(address: Address, model: str) -> dict[str, int]:
    """How often the network ran at each batch size, by the server's own statistics."""
    statistics = _client("http", address).get_inference_statistics(model)["model_stats"][0]
    return {
        str(entry["batch_size"]): int(entry["compute_infer"]["count"])
        for entry in statistics["batch_stats"]
    }


def _swap(bundle: Bundle, repository: Path) -> None:
    deploy(bundle, repository, "python", NAME)


def _summary(way: str, rounds: Sequence[Timed]) -> dict[str, Any]:
    samples = [sample for timed in rounds for sample in timed.samples_ms]
    return {
        "way": way,
        "images_per_second": round(
            sum(timed.images for timed in rounds) / sum(timed.seconds for timed in rounds), 2
        ),
        "p50_ms": round(float(np.percentile(samples, 50)), 2),
        "p99_ms": round(float(np.percentile(samples, 99)), 2),
        "rounds_images_per_second": [round(timed.images / timed.seconds, 2) for timed in rounds],
        "samples_ms": [round(sample, 2) for sample in samples],
    }


def _bytes_tensor(file: bytes) -> UInt8:
    return np.frombuffer(file, np.uint8)[None]


def _jpeg(pixels: UInt8) -> bytes:
    """A photograph's size as a camera's preview has it, so that decoding costs what it does."""
    file = BytesIO()
    Image.fromarray(pixels).resize((640, 480)).save(file, "JPEG")
    return file.getvalue()


def _bomb() -> bytes:
    """A PNG file of a few bytes whose header promises 30,000 x 30,000 pixels."""
    file = BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (30000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


if __name__ == "__main__":
    sys.exit(main())
