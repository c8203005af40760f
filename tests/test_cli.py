"""The command line: exit codes, one-line errors, JSON, help, and being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rexdeploy.bundle.store import Bundle
from tests.helpers import assert_refused, folder_state, run_cli, run_program, run_python

COMMANDS = (
    *("finetune", "export", "build-trt", "verify", "predict", "bench"),
    *("triton", "serve", "tune-serving", "models", "doctor"),
)


def test_help_loads_nothing_heavy() -> None:
    """`rexdeploy --help` costs what `import typer` costs; a library would show in sys.modules."""
    code = (
        "import sys, atexit\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'PIL', 'rich', 'msgspec', 'tensorrt'}\n"
        "atexit.register(lambda: print('heavy:', sorted(heavy & set(sys.modules))))\n"
        "sys.argv = ['rexdeploy', *sys.argv[1:]]\n"
        "from rexdeploy.cli import main\n"
        "main()\n"
    )
    for arguments in (["--help"], ["verify", "--help"], ["--version"]):
        answer = run_python(code, *arguments)
        assert answer.returncode == 0
        assert answer.stdout.endswith("heavy: []\n"), answer.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, tmp_path: Path) -> None:
    result = run_cli(command, "--help", cwd=tmp_path)
    assert result.code == 0
    assert f"Example:\n  rexdeploy {command}" in result.out


def test_it_runs_as_a_module() -> None:
    answer = run_program(sys.executable, "-m", "rexdeploy", "--version")
    assert answer.stdout.startswith("rexdeploy "), answer.stderr


def test_no_arguments_print_the_help(tmp_path: Path) -> None:
    result = run_cli(cwd=tmp_path)
    assert result.code == 0
    assert result.out.startswith("Usage: rexdeploy")
    assert all(command in result.out for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["frobnicate"], ["No such command 'frobnicate'", "rexdeploy --help"]),
        (["export", "--widht", "1"], ["--widht", "--width", "rexdeploy export --help"]),
        (["export", "--width", "wide"], ["--width", "valid"]),
        (["export", "--width", "0"], ["width multiplier: got 0", "0.1 to 10"]),
        (["export", "--width", "-1"], ["width multiplier: got -1"]),
        (["export", "--width", "nan"], ["width multiplier: got nan"]),
        (["export", "--width", "1e9"], ["width multiplier: got 1e+09"]),
        (["export", "--batch", "some"], ["batch: got 'some', expected 'dynamic' or a number"]),
        (["export", "--weights", "gone.pth"], ["gone.pth: no file there"]),
        (["export", "--out", "/dev/null/x"], ["cannot write to the folder", "--out"]),
        (["build-trt"], ["no bundle in artifacts/", "rexdeploy export"]),
        (["build-trt", "nowhere"], ["nowhere is not a bundle"]),
        (["build-trt", "--batch", "8:1:4"], ["batch range: got '8:1:4', expected min:opt:max"]),
        (["build-trt", "x", "--onnx", "y"], ["got a bundle and --onnx, expected one of them"]),
        (["verify"], ["no bundle in artifacts/"]),
        (["predict"], ["Missing argument 'IMAGE...'"]),
        (["predict", "a.jpg"], ["no bundle in artifacts/"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_get_one_line_and_exit_2(
    arguments: list[str], parts: list[str], tmp_path: Path
) -> None:
    assert_refused(run_cli(*arguments, cwd=tmp_path), *parts)
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"artifacts"}
    assert not (tmp_path / "artifacts").exists() or not list((tmp_path / "artifacts").iterdir())


def test_a_hostile_manifest_is_refused(small_v1: Bundle, tmp_path: Path) -> None:
    manifest = small_v1.path / "manifest.json"
    good = manifest.read_text()
    (tmp_path / "secret.onnx").write_bytes(b"outside")
    for hostile, part in (
        (good.replace('"fp32.onnx"', '"../../secret.onnx"'), "not a plain name inside"),
        (good.replace('"fp32.onnx"', '"/etc/passwd"'), "not a plain name inside"),
        (good[: len(good) // 2], "not a readable manifest"),
        ("[]", "not a readable manifest"),
        ("", "not a readable manifest"),
    ):
        manifest.write_text(hostile)
        before = folder_state(small_v1.path)
        for command in (["build-trt"], ["verify"], ["predict", "a.jpg", "--bundle"]):
            assert_refused(run_cli(*command, "artifacts/small_v1", cwd=tmp_path), part)
        assert folder_state(small_v1.path) == before


def test_json_goes_to_a_file_or_alone_to_stdout(small_v1: Bundle, tmp_path: Path) -> None:
    build = ["build-trt", "--fp16", "--batch", "1:2:8", "--flavor", "rtx", "--target", "sm89"]
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    result = run_cli(*build, "--json", "-", cwd=tmp_path)
    answer = json.loads(result.out)
    assert answer["reused"] is True
    assert answer["engine"]["batch"] == {"min": 1, "opt": 2, "max": 8}
    result = run_cli("verify", "--samples", "3", "--quiet", "--json", "v.json", cwd=tmp_path)
    assert (result.code, result.out, result.err) == (0, "", "")
    assert json.loads((tmp_path / "v.json").read_text())["failures"] == []
    result = run_cli("models", "--json", "no/such/folder.json", cwd=tmp_path)
    assert_refused(result, "cannot write no/such/folder.json")


def test_quiet_says_nothing_when_all_is_well(small_v1: Bundle, tmp_path: Path) -> None:
    result = run_cli("verify", "--samples", "2", "--quiet", cwd=tmp_path)
    assert (result.code, result.out, result.err) == (0, "", "")


def test_verify_prints_the_table_and_what_was_skipped(small_v1: Bundle, tmp_path: Path) -> None:
    result = run_cli("verify", "--samples", "2", cwd=tmp_path)
    assert result.code == 0
    assert "torch -> fp32.onnx (onnxruntime)" in result.out
    assert "fp32.tensorrt.onnx -> fp16.onnx (onnxruntime)" in result.out
    assert "passed: " in result.out
    if "skipped fp16.rtx-sm89.engine" in result.out:
        assert "passed: 4 edges are within their limits; NOT verified: 1 skipped" in result.out


def test_models_prints_eleven_networks_and_six_detectors_that_agree(tmp_path: Path) -> None:
    result = run_cli("models", "--json", "models.json", cwd=tmp_path)
    assert result.code == 0
    assert result.out.count("agrees\n") + result.out.count("agrees ") >= 17
    assert "DIFFERS" not in result.out
    assert "which is width 2.2" in result.out
    assert "their '1200x800' is 1280 x 800" in result.out
    rows = [row["published"] for row in json.loads((tmp_path / "models.json").read_text())]
    assert ["detector" in row for row in rows] == [False] * 11 + [True] * 6
    assert (rows[1]["top1"], rows[11]["box_ap"]) == (77.9, 38.0)


@pytest.mark.parametrize("step", ["loading", "exporting", "comparing"])
def test_a_killed_export_leaves_nothing_that_stops_the_next(
    step: str, small_lite: Bundle, tmp_path: Path, narrow_lite_checkpoint: Path
) -> None:
    """SIGKILL in the middle of the work; the commit itself is cut at every step in test_bundle."""
    before = folder_state(small_lite.path)
    command = ["export", "--name", "small_lite", "--weights", str(narrow_lite_checkpoint)]
    command += ["--image-size", "64"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rexdeploy", *command],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(step):
            break
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert folder_state(small_lite.path) == before
    assert run_cli("verify", "--samples", "2", cwd=tmp_path).code == 0


@pytest.mark.parametrize("delay_s", [0.0, 1.0, 2.0])
def test_ctrl_c_is_one_line(delay_s: float, tmp_path: Path, v1_checkpoint: Path) -> None:
    """At moments that a KeyboardInterrupt would turn into a crash inside torch, too."""
    command = ["export", "--weights", str(v1_checkpoint)]
    process = subprocess.Popen(
        [sys.executable, "-c", "from rexdeploy.cli import main; main()", *command],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("exporting"):
            break
    time.sleep(delay_s)
    os.kill(process.pid, signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 130
    assert rest.splitlines()[-1] == "error: interrupted; no bundle is left half written"
    assert "Traceback" not in rest
    assert not list((tmp_path / "artifacts").iterdir())


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [
        ("torch", ["export"], "cpu"),
        ("onnx", ["export"], "cpu"),
        (
            "onnxsim",
            ["export", "--lite", "--width", "0.1", "--image-size", "32", "--batch", "1"],
            "cpu",
        ),
        ("onnx", ["build-trt"], "cpu"),
        ("tensorrt_rtx", ["build-trt", "--flavor", "rtx"], "rtx"),
        ("tensorrt_rtx", ["build-trt"], "rtx"),
        ("torch", ["verify"], "cpu"),
        ("onnxruntime", ["predict", "--backend", "onnxruntime"], "cpu"),
        ("timm", ["finetune", "photos"], "train"),
        ("torchvision", ["finetune", "photos"], "train"),
        ("huggingface_hub", ["export", "--weights", "pretrained"], "cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_missing_package_names_its_extra(
    package: str, command: list[str], extra: str, small_lite: Bundle, photos: Path
) -> None:
    if command[0] == "predict":
        command = [*command, str(photos / "china.png")]
    code = (
        "import os, sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "os.chdir(sys.argv.pop(1))\n"
        "from rexdeploy.cli import main\n"
        "main()\n"
    )
    answer = run_python(code, small_lite.path.parents[1], *command)
    errors = [line for line in answer.stderr.splitlines() if not line.endswith(" ...")]
    assert answer.returncode == 2, answer.stderr
    assert f"pip install 'rexdeploy[{extra}]'" in errors[-1]
    assert "Traceback" not in answer.stderr


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        answer = run_program(sys.executable, "-m", "rexdeploy", "doctor", stdout=full)
    assert (answer.returncode, answer.stderr) == (2, "error: output: No space left on device\n")


def test_a_closed_pipe_is_no_error() -> None:
    shell = f"{sys.executable} -m rexdeploy doctor | head -1"
    answer = run_program("bash", "-c", f"set -o pipefail; {shell}")
    assert "Traceback" not in answer.stderr
    assert answer.returncode == 0


def test_ctrl_c_during_a_benchmark_prints_what_it_has(small_v1: Bundle, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rexdeploy", "bench", "--rounds", "100000"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stdout is not None
    for line in process.stderr:
        if line.startswith("timing"):
            break
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    printed = process.stdout.read()
    assert process.wait() == 130, process.stderr.read()
    assert "onnxruntime" in printed
    assert "interrupted after " in printed
