"""What several tests share: golden weights, checkpoints that react to their input, the CLI."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
from onnx import ModelProto, helper, numpy_helper

from rexdeploy import cli
from rexdeploy.arrays import Float32
from rexdeploy.bundle.manifest import Artifact, Preprocess
from rexdeploy.bundle.store import Bundle, sha256
from rexdeploy.images.sets import varied
from rexdeploy.models.rexnet import recalibrate_batch_norms

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parents[1]


def golden_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the golden logits, by the rule of the entries' names and shapes."""
    return {name: _golden_value(name, tuple(tensor.shape)) for name, tensor in state.items()}


def golden_input(size: int) -> torch.Tensor:
    """The two images of the golden logits: float32 `[2, 3, size, size]`."""
    values = np.random.default_rng(7).standard_normal((2, 3, size, size))
    return torch.from_numpy(values.astype(np.float32))


def _golden_value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith(("running_mean", ".bias")):
        values = 0.1 * rng.standard_normal(shape)
    elif name.endswith("running_var") or len(shape) != 4:
        values = rng.uniform(0.8, 1.2, shape)
    else:
        values = rng.standard_normal(shape) * np.sqrt(2 / (shape[1] * shape[2] * shape[3]))
    return torch.from_numpy(values.astype(np.float32))


def reacting(model: torch.nn.Module, size: int = 224) -> torch.nn.Module:
    """The model with batch norms set so that its logits vary: a stand-in for a trained one."""
    pool = varied(16, Preprocess(height=size, width=size), seed=11)
    recalibrate_batch_norms(model, torch.from_numpy(pool))
    return model.eval()


@dataclass(frozen=True)
class CliResult:
    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        """What stderr holds beside the progress lines."""
        return [line for line in self.err.splitlines() if not line.endswith(" ...")]


def run_cli(*arguments: str | Path, cwd: Path) -> CliResult:
    """Runs the command line in this process, so that torch is imported once for all tests."""
    out, err = io.StringIO(), io.StringIO()
    before, on_interrupt = Path.cwd(), signal.getsignal(signal.SIGINT)
    os.chdir(cwd)
    try:
        with (
            mock.patch.object(sys, "argv", ["rexdeploy", *map(str, arguments)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                cli.main()
            except SystemExit as leaving:
                code = int(leaving.code or 0)
    finally:
        os.chdir(before)
        signal.signal(signal.SIGINT, on_interrupt)
    return CliResult(code, out.getvalue(), err.getvalue())


def assert_refused(result: CliResult, *parts: str, code: int = 2) -> None:
    """One line on stderr that holds every part, nothing on stdout, and the exit code."""
    assert result.code == code, result
    assert len(result.error_lines) == 1, result.err
    line = result.error_lines[0]
    assert line.startswith("error: ")
    for part in parts:
        assert part in line, line
    # An error is passed on by several hands: each may add the file's name, and one is enough.
    paths = re.findall(r"/[^\s'\",;:()]+/[^\s'\",;:()]+", line)
    assert len(paths) == len(set(paths)), line
    assert not re.search(r"pydantic|Myelin|\[type=|<class '|Traceback|object at 0x", line), line


def run_program(
    *command: str | Path, env: Mapping[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs a program, in this environment and `env`: what it said, and how it ended."""
    defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": 300}
    env = {**os.environ, **(env or {})}
    return subprocess.run(command, env=env, check=False, **defaults | options)


def run_python(
    code: str, *arguments: str | Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a snippet in a fresh interpreter."""
    return run_program(sys.executable, "-c", code, *arguments, env=env)


_MEASURED = """
import contextlib, io, json, resource, sys
import onnxruntime
from rexdeploy import cli
import rexdeploy.steps.build_trt, rexdeploy.steps.export
import rexdeploy.steps.inspect, rexdeploy.steps.verify
resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))  # the machine's, where a bound fails
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
answers = []
for arguments in json.load(sys.stdin):
    before, said, code = peak(), io.StringIO(), 0
    sys.argv = ["rexdeploy", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            cli.main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        except BaseException as error:
            code, _ = 1, said.write(repr(error))
    lines = [line for line in said.getvalue().splitlines() if not line.endswith(" ...")]
    answers.append([code, lines, peak() - before])
json.dump(answers, sys.stdout)
"""


@dataclass(frozen=True)
class Measured:
    """What a command said, and the MiB by which it raised its process's peak."""

    code: int
    lines: list[str]  # on stderr, beside the progress
    grown_mib: int


def run_measured(*commands: Sequence[str | Path]) -> list[Measured]:
    """Runs command lines one after the other in one fresh process, which may take 12 GiB."""
    answer = subprocess.run(
        [sys.executable, "-c", _MEASURED],
        input=json.dumps([[str(argument) for argument in command] for command in commands]),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return [Measured(*item) for item in json.loads(answer.stdout)]


def wait_until(is_so: Callable[[], object], seconds: float = 60.0) -> None:
    """Waits until it is so, and fails where it does not become so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.02)


def listens(port: int) -> bool:
    """Whether somebody takes connections at a port of this machine."""
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 5).close()
        return True
    return False


def entry(bundle: Bundle, file: str) -> Artifact:
    """A bundle's artifact by its file's name, which must be there."""
    found = bundle.manifest.find_file(file)
    assert found is not None, f"{file} is not in {bundle}"
    return found


def graph(bundle: Bundle, file: str = "fp32.onnx") -> ModelProto:
    return onnx.load_from_string(bundle.read(entry(bundle, file)))


def with_file(bundle: Bundle, file: str, data: bytes, **changes: Any) -> Bundle:
    """The bundle with other bytes in one file and `changes` in its entry; the manifest agrees."""
    edited = replace(entry(bundle, file), sha256=sha256(data), **changes)
    return bundle.update(edited, files={file: data})


def with_notes(bundle: Bundle, file: str, **changes: Any) -> Bundle:
    """The bundle with another entry for a file, whose bytes stay."""
    return bundle.update(replace(entry(bundle, file), **changes), files={})


def copied(bundle: Bundle, folder: Path) -> Bundle:
    return Bundle.open(shutil.copytree(bundle.path, folder))


def saved(model: ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def folder_state(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, to see that nothing changed."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def edit_weights(
    model: ModelProto, names: Sequence[str], change: Callable[[Float32], Float32]
) -> ModelProto:
    """A copy of an ONNX model with `change` applied to the initializers `names`."""
    edited = ModelProto()
    edited.CopyFrom(model)
    for tensor in edited.graph.initializer:
        if tensor.name in names:
            old = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(change(old).astype(old.dtype), tensor.name))
    return edited


def small_graph(
    nodes: Sequence[onnx.NodeProto],
    shape: Sequence[int | str | None],
    weights: Mapping[str, Any],
    output: str = "y",
    output_shape: Sequence[int | str] | None = None,
    output_type: int = onnx.TensorProto.FLOAT,
) -> ModelProto:
    """A graph of one's own from `x` (float32, of this shape) to one output."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, output_type, output_shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def nodes_of(model: ModelProto, op_type: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op_type]


def on_a_terminal(code: str, **environment: str) -> bytes:
    """What Python code, which must end well, writes to a stderr that is a terminal."""
    own, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=its, env={**os.environ, **environment}
    )
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # as Linux ends a terminal that nobody else holds
        while data := os.read(own, 4096):
            shown += data
    os.close(own)
    assert process.wait() == 0
    return shown
