"""The public functions: one for each command, imported late, with the command's defaults."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

import rexdeploy
from rexdeploy.bundle.store import Bundle
from rexdeploy.cli.export import export as export_command
from rexdeploy.cli.finetune import finetune as finetune_command
from rexdeploy.cli.tune_precision import tune_precision as tune_command
from rexdeploy.cli.verify import verify as verify_command
from tests.helpers import run_cli, run_python


def test_nothing_heavy_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, rexdeploy\n"
        "print([name for name in ('numpy', 'torch', 'onnx', 'onnxruntime') if name in sys.modules])"
    )
    assert run_python(code).stdout == "[]\n"


@pytest.mark.parametrize(
    ("command", "function"),
    [
        (export_command, rexdeploy.export),
        (finetune_command, rexdeploy.finetune),
        (tune_command, rexdeploy.tune_precision),
        (verify_command, rexdeploy.verify),
    ],
)
def test_a_command_and_its_function_have_the_same_defaults(
    command: object, function: object
) -> None:
    assert callable(command)
    assert callable(function)
    wanted = inspect.signature(function).parameters
    shared = [
        (option.name, option.default or (), wanted[option.name].default or ())
        for option in inspect.signature(command).parameters.values()
        if option.name in wanted
    ]
    assert len(shared) >= 5
    assert [(name, own, its) for name, own, its in shared if own != its] == []


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
