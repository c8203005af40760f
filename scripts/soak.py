"""Serves for long, while everything that can go wrong goes wrong, and accounts for every request.

    python scripts/soak.py --requests 100000 --out artifacts/limits/soak.json

Needs what load_test.py needs, whose requests it sends to a `rexdeploy serve` over HTTP and gRPC.
Meanwhile versions are deployed, processes of the server are killed and stopped, a deployment meets
a full disk (where a tmpfs can be mounted), and bodies are too large. A request may be refused while
the server is started again, and those that a killed process held may fail: both are counted by the
event. Exit code 1: an answer was wrong, or a request was lost for no such reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from load_test import (
    NAME,
    POOL,
    Pool,
    _bytes_tensor,
    _client,
    _infer,
    _jpeg,
    _over_connections,
    _request,
)

from rexdeploy import load
from rexdeploy.bundle.manifest import Preprocess
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import RexdeployError
from rexdeploy.images import sets
from rexdeploy.machine import machine
from rexdeploy.serving.deploy import deploy
from rexdeploy.serving.front import Address, free_port
from rexdeploy.serving.health import stubs
from rexdeploy.serving.processes import SHARED_MEMORY
from rexdeploy.steps.export import export

LARGE_EVERY = 200  # requests
LARGE = np.zeros((1, 2**24 + 1), np.uint8)
DISK_MIB = 256
PAUSE_S = 0.25  # of a client that was refused because the server is started again
IMAGE = f"{NAME}_image"
HELD = "ended while it had|not healthy|Stub process"  # what is said of a process that is gone


@dataclass
class Account:
    """What became of the requests; `event` is the fault that the server is recovering from."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter)
    by_event: dict[str, Counter[str]] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    event: str | None = None
    recovered: float = 0.0  # when the last one was over
    last_event: str = ""

    def add(self, outcome: str, text: str = "") -> None:
        """Counts a request."""
        with self.lock:
            self.counts[outcome] += 1
            if outcome not in ("right", "refused"):
                self.examples.setdefault(outcome, text)

    def add_failure(self, started: float, text: str) -> None:
        """Counts a request that failed: a fault's, if one was there while it was under way."""
        event = self.event or (self.last_event if started <= self.recovered else None)
        if event is None:
            self.add("lost", text)
            return
        with self.lock:
            held = re.search(HELD, text)
            kind = "held by the process" if held else "refused meanwhile"
            self.by_event.setdefault(event, Counter())[kind] += 1
            self.counts["failed by an event"] += 1


def main() -> int:
    """Runs it, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, disk(Path(folder) / "disk") as skipped:
        result = run(Path(folder), skipped, options.requests, options.connections)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("requests", "by_event", "events", "drain")}))
    counts = result["requests"]
    return 0 if not counts.get("wrong") and not counts.get("lost") and result["drain"] else 1


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[str | None]:
    """A folder on a small disk of its own; why not, where none can be mounted."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        yield None if mounted.returncode == 0 else f"skipped: {mounted.stderr.strip()}"
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)


def run(folder: Path, skipped: str | None, requests: int, connections: int) -> dict[str, Any]:
    """The whole result."""
    first = export(width=1.0, name=NAME, out=folder, image_size=64).bundle
    second = export(lite=True, name="second", out=folder, image_size=64).bundle
    files = [_jpeg(pixels) for pixels in sets.synthetic_pixels(POOL, Preprocess(), seed=5)]
    with load(first, "onnxruntime") as old, load(second, "onnxruntime") as new:
        pool = Pool(files, old, new)
    repository = folder / "disk" / "models"
    address = Address(port=free_port())
    account = Account()
    with open(folder / "errors", "w+") as errors:
        serving = subprocess.Popen(
            [sys.executable, "-m", "rexdeploy", "serve", str(first.path), "--repository",
             str(repository), "--port", str(address.port)],
            stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        for line in serving.stdout or ():
            if line.startswith("Ctrl-C"):
                break
        began = time.time()
        memory: dict[str, Any] = {}
        events = Events(serving.pid, repository, (second, first), account, address, skipped)
        plan: list[tuple[float, Callable[[], None]]] = [
            (0.02, lambda: memory.update(start=measure(serving.pid))),
            (0.08, events.deploy),
            (0.16, lambda: events.signal_stub(NAME, signal.SIGKILL)),
            (0.28, events.deploy),
            (0.36, lambda: events.signal_stub(f"{NAME}_preprocess", signal.SIGSTOP)),
            (0.46, events.deploy_on_full_disk),
            (0.5, lambda: memory.update(middle=measure(serving.pid))),
            (0.56, events.kill_server),
            (0.68, events.deploy),
            (0.76, lambda: events.signal_stub(f"{NAME}_preprocess", signal.SIGKILL)),
            (0.88, events.deploy),
        ]

        def ask(client: list[Any], number: int) -> None:
            send(client, number, pool, account, address)

        with ThreadPoolExecutor(1) as other:
            following = other.submit(follow, plan, requests, account)
            _over_connections(
                ask, requests, connections, lambda n: connect(("http", "grpc")[n % 2], address)
            )
            following.result()
        memory["end"] = measure(serving.pid)
        seconds = time.time() - began
        drained = drain(serving, pool, address, connections)
        errors.seek(0)
        told = [
            line for line in errors.read().splitlines() if "starting" in line or "again" in line
        ]
    return {
        "command": f"scripts/soak.py --requests {requests} --connections {connections}",
        "machine": machine(),
        "network": f"{first.manifest.model.title} and {second.manifest.model.title}, 64 pixels",
        "seconds": round(seconds, 1),
        "requests": {"sent": requests, **dict(sorted(account.counts.items()))},
        "by_event": {name: dict(counts) for name, counts in account.by_event.items()},
        "events": events.done,
        "full_disk": skipped or "done",
        "drain": drained,
        "memory_bytes": memory,
        "examples": account.examples,
        "said_by_serve": told,
    }


def connect(protocol: str, address: Address) -> list[Any]:
    """A connection that `send` may replace."""
    return [protocol, _client(protocol, address)]


def send(client: list[Any], number: int, pool: Pool, account: Account, address: Address) -> None:
    """Sends a request, good or bad, and accounts for it."""
    kind, model, name, tensor, refusal = _request(pool, number)
    if number % LARGE_EVERY == 0:
        kind, model, name, tensor, refusal = "large", IMAGE, "image", LARGE, "bytes that are taken|"
        refusal += "larger than max"
    started = time.monotonic()
    try:
        answer = _infer(client[1], client[0], model, name, tensor)
    except Exception as error:  # the libraries' errors have no common base
        text = f"{kind}: {error}"
        if refusal is not None and re.search(refusal, text):
            account.add("refused")
            return
        account.add_failure(started, text)
        time.sleep(PAUSE_S)
        if client[0] == "http":
            client[:] = connect("http", address)
        return
    version = pool.version_of(number % POOL, answer[0]) if refusal is None else None
    account.add("right" if version else "wrong", f"{kind}: an answer of no version")


def follow(plan: list[tuple[float, Callable[[], None]]], requests: int, account: Account) -> None:
    """Does what is planned for when a share of the requests has been sent."""
    for share, work in plan:
        while sum(account.counts.values()) < share * requests:
            time.sleep(0.05)
        work()


@dataclass
class Events:
    """What goes wrong, and what is deployed."""

    serve: int
    repository: Path
    bundles: tuple[Bundle, Bundle]
    account: Account
    address: Address
    skipped: str | None
    done: Counter[str] = field(default_factory=Counter)

    def deploy(self) -> None:
        """Adds a version, of the other network than the last one."""
        deploy(self.bundles[self.done["deployed"] % 2], self.repository, "python", NAME)
        self.done["deployed"] += 1

    def deploy_on_full_disk(self) -> None:
        """A deployment that cannot be written is refused, and harms nothing."""
        if self.skipped:
            return
        full = self.repository.parent / "full"
        before = sorted(path.name for path in (self.repository / NAME).iterdir())
        try:
            with contextlib.suppress(OSError), open(full, "wb", buffering=0) as file:
                while True:
                    file.write(b"\0" * 2**20)
            with contextlib.suppress(RexdeployError):
                deploy(self.bundles[self.done["deployed"] % 2], self.repository, "python", NAME)
                raise SystemExit("a deployment on a full disk was taken for done")
        finally:
            full.unlink()
        if sorted(path.name for path in (self.repository / NAME).iterdir()) != before:
            raise SystemExit("a deployment on a full disk left something")
        self.done["refused on a full disk"] += 1

    def signal_stub(self, model: str, number: signal.Signals) -> None:
        """Sends a signal to the process of a model."""
        (pid,) = [stub.pid for stub in stubs(server_of(self.serve)) if stub.model == model][-1:]
        self._hurt(f"{number.name} to the process of {model}", pid, number)

    def kill_server(self) -> None:
        """Kills the server itself."""
        self._hurt("SIGKILL to tritonserver", server_of(self.serve), signal.SIGKILL)

    def _hurt(self, name: str, pid: int, number: signal.Signals) -> None:
        """Does it, and waits until another server serves."""
        before = server_of(self.serve)
        self.account.event = self.account.last_event = name
        os.kill(pid, number)
        deadline = time.monotonic() + 120
        while server_of(self.serve) in (before, 0) or not self._is_ready():
            if time.monotonic() > deadline:
                raise SystemExit(f"{name}: not served again after 120 s")
            time.sleep(0.1)
        self.account.recovered = time.monotonic() + 1  # gRPC's clients wait before they connect
        self.account.event = None
        self.done[name] += 1

    def _is_ready(self) -> bool:
        with contextlib.suppress(Exception):
            return bool(_client("http", self.address).is_model_ready(IMAGE))
        return False


def drain(serving: subprocess.Popen[str], pool: Pool, address: Address, count: int) -> bool:
    """Asks for the end while requests are in flight.

    Whether all were answered right, it ended well, and it left nothing.
    """
    triton = server_of(serving.pid)
    name = Path(f"/proc/{triton}/cmdline").read_bytes()
    found = re.search(rb"unix:([^\0]*)/start-\d+/http", name)
    folder = Path(os.fsdecode(found[1])) if found else Path("unknown")
    begun = threading.Barrier(count + 1)

    def one(number: int) -> bool:
        protocol, client = connect(("http", "grpc")[number % 2], address)  # of this thread only
        client.is_server_live()
        begun.wait()
        file = _bytes_tensor(pool.files[number % POOL])
        try:
            answer = _infer(client, protocol, IMAGE, "image", file)[0]
        except Exception as error:  # the libraries' errors have no common base
            print(f"not answered at the end, over {protocol}: {error}", file=sys.stderr)
            return False
        return pool.version_of(number % POOL, answer) is not None

    with ThreadPoolExecutor(count) as threads:
        asking = [threads.submit(one, number) for number in range(count)]
        begun.wait()
        time.sleep(0.02)
        serving.send_signal(signal.SIGTERM)
        right = [future.result() for future in asking]
    code = serving.wait(60)
    left = [*SHARED_MEMORY.glob(f"*{folder.name[-8:]}*"), *([folder] if folder.exists() else [])]
    return all(right) and code == 0 and not left


def server_of(serve: int) -> int:
    """The tritonserver of a `rexdeploy serve`; 0: it has none now."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{serve}/task/{serve}/children").read_text().split()
        return int(children[0]) if children else 0
    return 0


def measure(serve: int) -> dict[str, int]:
    """Bytes in memory of each process, and of the shared memory that they keep."""
    triton = server_of(serve)
    pids = {"serve": serve, "tritonserver": triton}
    pids |= {stub.model: stub.pid for stub in stubs(triton)}
    memory = {}
    for name, pid in pids.items():
        with contextlib.suppress(OSError):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            memory[name] = pages * os.sysconf("SC_PAGE_SIZE")
    memory["shared memory"] = sum(
        file.stat().st_blocks * 512 for file in SHARED_MEMORY.glob("rexdeploy_serve_*")
    )
    return memory


if __name__ == "__main__":
    sys.exit(main())
