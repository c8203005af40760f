"""What several tests share: golden weights, checkpoints that react to their input, the CLI."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import torch
from onnx import ModelProto, numpy_helper

from rexdeploy import cli
from rexdeploy.arrays import Float32
from rexdeploy.bundle.manifest import Preprocess
from rexdeploy.bundle.store import Bundle
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


def run_python(
    code: str, *arguments: str | Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a snippet in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        timeout=300,
        check=False,
    )


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


def graph_of(bundle: Bundle, file: str) -> ModelProto:
    """The ONNX graph of that name in the bundle."""
    artifact = bundle.manifest.find_file(file)
    assert artifact is not None
    return onnx.load_from_string(bundle.read(artifact))


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
