"""Named pipes, devices and links to them are refused, never waited for; and unclear words."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rexdeploy.backends.tensorrt_api import read_header
from rexdeploy.bundle.labels import labels_for
from rexdeploy.bundle.precision import PrecisionProof
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import UsageError, VerificationFailed
from rexdeploy.files import open_plain, read_plain, sha256_of
from rexdeploy.steps.build_trt import _check_precision
from tests.helpers import assert_refused, run_cli, run_python

PIPE = "it is a named pipe, expected a plain file"
DEVICE = "it is a device, expected a plain file"


@pytest.fixture(autouse=True)
def _no_test_waits() -> Iterator[None]:
    """A reader that waits, or reads on without end, fails its test and not the whole run."""
    assert threading.current_thread() is threading.main_thread()

    def stop(number: int, frame: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def odd(tmp_path: Path) -> dict[str, str]:
    """Names of what is no plain file, and how each is called."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe").symlink_to(tmp_path / "pipe")
    (tmp_path / "to_zero").symlink_to("/dev/zero")
    return {"pipe": PIPE, "to_pipe": PIPE, "to_zero": DEVICE}


def test_what_is_no_plain_file_is_never_opened_for_long(
    odd: dict[str, str], tmp_path: Path
) -> None:
    for name, reason in odd.items():
        for read in (open_plain, read_plain, sha256_of):
            with pytest.raises(OSError, match=reason):
                read(tmp_path / name)
    (tmp_path / "hole").write_bytes(b"")
    os.truncate(tmp_path / "hole", 1 << 40)
    with pytest.raises(OSError, match="it has 1099511627776 bytes, expected at most"):
        read_plain(tmp_path / "hole")
    (tmp_path / "plain").write_bytes(b"words")
    (tmp_path / "to_plain").symlink_to(tmp_path / "plain")
    assert read_plain(tmp_path / "to_plain") == b"words"
    assert len(read_plain(Path("/proc/self/pagemap"))) == 0  # it says that it has none


def test_no_command_reads_them(odd: dict[str, str], tmp_path: Path) -> None:
    for name, reason in odd.items():
        path = tmp_path / name
        for arguments in (("inspect",), ("build-trt", "--onnx"), ("export", "--weights")):
            assert_refused(run_cli(*arguments, path, cwd=tmp_path), name, reason)
        with pytest.raises(UsageError, match=reason):
            labels_for(path, 2)


@pytest.mark.parametrize("target", ["pipe", "to_pipe", "to_zero"])
def test_no_file_of_a_bundle_is_one(
    target: str, odd: dict[str, str], small_lite: Bundle, tmp_path: Path
) -> None:
    for name in ("fp32.onnx", "manifest.json"):
        path = small_lite.path / name
        path.unlink()
        path.symlink_to(tmp_path / target)
        result = run_cli("verify", small_lite.path, cwd=tmp_path)
        assert_refused(result, name, odd[target])


def test_a_candidate_is_a_plain_file_with_something_in_it(
    odd: dict[str, str], small_lite_original: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "empty.engine").write_bytes(b"")
    (tmp_path / "noise.engine").write_bytes(b"\x01\x02\x03\x04" * 100)
    expected = odd | {
        "empty.engine": "is empty; copy it again",
        "noise.engine": "begins as no engine of TensorRT or TensorRT-RTX does; copy or build it",
    }
    for name, reason in expected.items():
        result = run_cli(
            "verify", small_lite_original.path, "--candidate", tmp_path / name, cwd=tmp_path
        )
        assert_refused(result, name, reason)
        assert "pip install" not in result.err


# Words


def test_an_engine_without_a_header_is_told_what_a_header_takes() -> None:
    with pytest.raises(UsageError, match="got 4 bytes, expected at least 64; copy or build it"):
        read_header(b"vtrt")


def test_products_that_no_layer_names_are_no_other_precision() -> None:
    proof = PrecisionProof("Float", {"Float": 2}, not_found=("node_conv",))
    with pytest.raises(VerificationFailed) as said:
        _check_precision(proof)
    assert str(said.value) == (
        "the engine cannot be proven to be FP32: of the graph's convolutions and matrix "
        "products, 1 are in no layer that its build reported (first: node_conv); nothing was "
        "written"
    )
    with pytest.raises(VerificationFailed, match="the engine is not FP16: 1 of 2 layers in Half"):
        _check_precision(PrecisionProof("Half", {"Half": 1, "Float": 1}, differing=("conv",)))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["verify", "--candidate", ""], "--candidate: got ''"),
        (["export", "--weights="], "--weights: got ''"),
        (["build-trt", ""], "an argument: got ''"),
        (["models", "--json", ""], "--json: got ''"),
    ],
)
def test_an_empty_argument_is_not_the_current_folder(
    arguments: list[str], named: str, tmp_path: Path
) -> None:
    assert_refused(run_cli(*arguments, cwd=tmp_path), named, "variable of the shell")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("models", "error: interrupted\n"),
        ("build-trt", "error: interrupted; no bundle is left half written\n"),
    ],
)
def test_only_what_writes_bundles_speaks_of_them_when_it_is_interrupted(
    command: str, expected: str, tmp_path: Path
) -> None:
    code = (
        "import os, signal, sys, rexdeploy.cli as cli, rexdeploy.models.zoo as zoo\n"
        "from rexdeploy.bundle.store import Bundle\n"
        "def interrupted(*arguments, **named): os.kill(os.getpid(), signal.SIGINT)\n"
        "zoo.published = Bundle.find = interrupted\n"
        "cli.main()\n"
    )
    answer = run_python(code, command)
    assert answer.returncode == 130, answer
    assert answer.stderr == expected
