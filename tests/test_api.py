"""The public functions: one for each command, imported late, with the command's defaults."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rexdeploy
from rexdeploy.bundle.manifest import BatchRange
from rexdeploy.bundle.store import Bundle
from rexdeploy.cli.app import COMMANDS
from rexdeploy.progress import several
from rexdeploy.serving.config import Settings
from rexdeploy.serving.tuning import Row, Sweep
from rexdeploy.steps.build_trt import BuildResult
from rexdeploy.steps.export import ExportResult
from rexdeploy.timing.configurations import Latency
from rexdeploy.timing.harness import Benchmark
from tests.helpers import ROOT, run_cli, run_python


def test_nothing_heavy_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, rexdeploy\n"
        "print([name for name in ('numpy', 'torch', 'onnx', 'onnxruntime') if name in sys.modules])"
    )
    assert run_python(code).stdout == "[]\n"


ONLY_IN_A_TERMINAL = {
    "quiet",
    "json",
    "plot",
    "show_log",
    *("task", "draw", "score", "max_detections"),  # detectors' functions have them
    *("onnx", "storage_uri", "image"),  # of import_onnx, and of Deployment.inference_service
}
RENAMED = {"no_simplify": "simplify", "open_api": "open", "models": "published_models"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_a_command_and_its_function_have_the_same_defaults(command: Callable[..., None]) -> None:
    function = getattr(rexdeploy, RENAMED.get(command.__name__, command.__name__))
    own = inspect.signature(command).parameters
    parameters = {**inspect.signature(function).parameters}
    if command.__name__ == "build_trt":
        parameters["out"] = inspect.signature(rexdeploy.import_onnx).parameters["out"]
    for name in {*own} - (ONLY_IN_A_TERMINAL - {*parameters}):
        its, default = parameters[RENAMED.get(name, name)].default, own[name].default
        if name == "no_simplify":
            its = not its
        if name != "kserve":  # a file to write, or whether a cluster will serve
            assert [*map(str, several(default))] == [*map(str, several(its))], name


FUNCTIONS = [name for name in rexdeploy.__all__ if inspect.isfunction(getattr(rexdeploy, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_documented_with_an_example_and_takes_keywords(name: str) -> None:
    function = getattr(rexdeploy, name)
    assert f"rexdeploy.{name}(" in (function.__doc__ or "").partition("Example: ")[2]
    assert f"rexdeploy.{name}(" in (ROOT / "docs" / "python.md").read_text()
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


def test_one_string_is_one_name_and_not_its_letters(small_v1_original: Bundle) -> None:
    assert several("sm89") == ("sm89",)
    assert several(Path("a")) == (Path("a"),)
    assert several(["sm89", "sm90"]) == ("sm89", "sm90")
    assert several(None) == ()
    for call in (
        lambda: rexdeploy.verify(small_v1_original, backend="wrong"),
        lambda: rexdeploy.verify(small_v1_original, require="wrong"),
        lambda: rexdeploy.bench(small_v1_original, backend="wrong"),
        lambda: rexdeploy.bench(small_v1_original, compare="wrong"),
        lambda: rexdeploy.bench(small_v1_original, batch="wrong"),  # type: ignore[arg-type]
        lambda: rexdeploy.build_trt(small_v1_original, flavor="rtx", target="wrong"),
    ):
        with pytest.raises(rexdeploy.UsageError, match="got '?wrong"):
            call()


def test_a_benchmark_without_rows_has_a_repr() -> None:
    empty = Benchmark({}, 0, (), (), ("a: no GPU",), interrupted=True)
    assert repr(empty) == "<Benchmark of 0 rows, 0 rounds; interrupted>"


def test_results_are_one_line_and_what_the_command_writes(
    small_v1: Bundle, photos: Path, tmp_path: Path
) -> None:
    calls: dict[tuple[str | Path, ...], Callable[[], Any]] = {
        ("predict", photos): lambda: rexdeploy.predict(photos, small_v1),
        ("verify", "--samples", "2"): lambda: rexdeploy.verify(small_v1, samples=2),
        ("triton", "--repository", "models"): lambda: rexdeploy.triton(
            small_v1, repository=tmp_path / "models"
        ),
        ("models",): rexdeploy.published_models,
        ("doctor",): rexdeploy.doctor,
    }
    for words, call in calls.items():
        assert run_cli(*words, "--json", "found.json", cwd=tmp_path).code == 0, words
        written = json.loads((tmp_path / "found.json").read_text())
        result = call()
        given = [one.to_dict() for one in result] if isinstance(result, list) else result.to_dict()
        if words[0] == "triton":
            written |= {"added": False, "repository": str(tmp_path / "models")}
        assert given == written, words
        assert "\n" not in repr(result)


def test_a_dictionary_holds_what_json_does(small_v1_original: Bundle) -> None:
    batch = BatchRange(1, 2, 8)
    sweep = Sweep(50.0, "1 image", batch, (Row(Settings(), ()),), None)
    engine = small_v1_original.manifest.find("engine")
    assert engine is not None
    for result in (
        ExportResult(small_v1_original, 1, 1, ()),
        BuildResult(small_v1_original, engine, reused=True),
        sweep,
        Benchmark(
            {}, 1, (Latency("a", "a", "own", "f", "b", "fp32", "host", 1, 1),), (), (), False
        ),
    ):
        found = result.to_dict()
        assert json.loads(json.dumps(found)) == found


def test_inspect_gives_what_the_command_writes(small_v1_original: Bundle, tmp_path: Path) -> None:
    file = small_v1_original.path / "fp32.onnx"
    result = rexdeploy.inspect(str(file))
    assert run_cli("inspect", file, "--json", "found.json", cwd=tmp_path).code == 0
    assert result.to_dict() == json.loads((tmp_path / "found.json").read_text())
    assert repr(result).startswith(f"<Inspection of {file}: ONNX graph; ")


def test_predict_gives_a_row_for_each_image(small_v1_original: Bundle, photos: Path) -> None:
    result = rexdeploy.predict(str(photos), small_v1_original, top=2, backend="onnxruntime")
    assert [len(row.predictions) for row in result.images or ()] == [2, 2]
    assert result.errors == 0
    assert "\n" not in repr(result)
    assert sorted(result.to_dict()) == ["backend", "images", "model", "passed_over"]


def test_unusable_arguments_are_one_line(small_v1_original: Bundle, photos: Path) -> None:
    for call in (
        lambda: rexdeploy.verify(small_v1_original, samples=1),
        lambda: rexdeploy.verify(small_v1_original, precision="fp16"),
        lambda: rexdeploy.export(batch="many"),
        lambda: rexdeploy.build_trt(small_v1_original, fp16=True, bf16=True),
        lambda: rexdeploy.predict(photos, small_v1_original, force=True),
        lambda: rexdeploy.bench(table="journal"),
        lambda: rexdeploy.tune_precision(small_v1_original, max_blocks=0),
    ):
        with pytest.raises(rexdeploy.UsageError) as refused:
            call()
        assert "\n" not in str(refused.value)
