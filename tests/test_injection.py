"""Every call that writes fails in turn: the old state or the new one, one line, nothing left."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rexdeploy.bundle.manifest import FORMAT, VERIFICATION, Artifact, Manifest
from rexdeploy.bundle.store import Bundle, commit, sha256
from rexdeploy.cli.console import write_text
from rexdeploy.errors import RexdeployError
from rexdeploy.inference.results_file import Results, partial_of
from rexdeploy.serving.deploy import deploy
from tests.helpers import assert_refused, folder_state, run_cli
from tests.injection import ERRORS, SHORT, failing
from tests.test_bundle import _make
from tests.test_results import HEADER, ROWS

LONG = "x" * 20_000  # more than any buffer


@dataclass(frozen=True)
class Step:
    """Something that writes in a folder."""

    before: Callable[[Path], object]  # what is there already
    act: Callable[[Path], object]
    kept: tuple[str, ...] = ()  # begins what a failure may leave to the same command's next run


def _nothing(folder: Path) -> None:
    pass


def _old_bundle(folder: Path) -> None:
    _make(folder / "b", a=b"old a", b=b"old b")


def _updated(folder: Path) -> None:
    """As `verify` stores its report."""
    bundle = Bundle.open(folder / "b")
    report = Artifact("report", VERIFICATION, sha256(b"{}"), bundle.manifest.artifacts[0].sha256)
    bundle.update(report, files={VERIFICATION: b"{}"})


def _dropping(folder: Path) -> None:
    """As `export` over a bundle with an engine that is of the old weights."""
    manifest = Manifest(
        FORMAT, "b", Bundle.open(folder / "b").manifest.model, (_artifact("a", b"new a"),)
    )
    commit(folder / "b", lambda _: manifest, {"a": b"new a"})


def _artifact(name: str, data: bytes) -> Artifact:
    return Artifact("onnx", name, sha256(data))


def _classified(name: str) -> Callable[[Path], None]:
    """As `predict --out`."""

    def act(folder: Path) -> None:
        with Results(folder / name, HEADER, force=False) as results:
            for row in ROWS:
                results.append([row] if row.file not in results.done else [])
            results.finish()

    return act


def _deployed(change: bytes, backend: str) -> Callable[[Path], object]:
    """As `triton` adds a bundle, or its next version, to a repository."""

    def act(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as outside:
            deploy(_make(Path(outside) / "net", graph=change), folder / "models", backend)

    return act


STEPS = {
    "a file": Step(_nothing, lambda folder: write_text(folder / "r.json", LONG)),
    "a file again": Step(
        lambda folder: (folder / "r.json").write_text("old"),
        lambda folder: write_text(folder / "r.json", LONG),
    ),
    "a bundle": Step(_nothing, lambda folder: _make(folder / "b", a=LONG.encode(), c=b"new c")),
    "a bundle again": Step(
        _old_bundle, lambda folder: _make(folder / "b", a=LONG.encode(), c=b"new c")
    ),
    "a report": Step(_old_bundle, _updated),
    "a bundle of less": Step(_old_bundle, _dropping),
    **{
        name: Step(_nothing, _classified(name), (f"{name}.partial",))
        for name in ("r.csv", "r.jsonl", "r.parquet")
    },
    **{
        f"{backend}, {name}": Step(before, _deployed(b"\x08\x01", backend), (".models.rexdeploy",))
        for backend in ("onnxruntime", "python")
        for name, before in (("a repository", _nothing), ("a version", _deployed(b"", backend)))
    },
}


def _state(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every folder; a manifest without its time."""
    state = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        state[name] = b"" if path.is_dir() else path.read_bytes()
        if path.name == "manifest.json":
            state[name] = b"\n".join(
                line for line in state[name].splitlines() if b"updated_at" not in line
            )
    return state


def _left(folder: Path, step: Step) -> dict[str, bytes]:
    return {
        name: data
        for name, data in _state(folder).items()
        if not step.kept or not name.startswith(step.kept)
    }


def _failures(step: Step, folder: Path) -> int:
    """Every failure of every call in turn; how many there were."""

    def fresh(name: str) -> Path:
        made = folder / name
        made.mkdir()
        with failing(made, 0):  # nothing fails, and nothing waits for the disk
            step.before(made)
        return made

    old = _state(fresh("old"))
    complete = fresh("new")
    with failing(complete, 0) as counted:
        step.act(complete)
    new = _state(complete)
    assert {"write", "fsync", "rename", "open"} <= set(counted.calls)
    injected = 0
    for number, kind in enumerate(counted.calls, start=1):
        ways = [*((error, False) for error in ERRORS), (ERRORS[0], True)]
        if kind == "write":
            ways.append((SHORT, False))
        for error, lasting in ways:
            case = fresh(f"{number}-{error}-{lasting}")
            message = None
            with failing(case, number, error, lasting=lasting) as disk:
                try:
                    step.act(case)
                except RexdeployError as raised:
                    message = str(raised)
            injected += len(disk.injected)
            what = (number, error, lasting, disk.injected, message)
            assert disk.injected, what
            if error == SHORT:
                assert message is None, what
            if message is None:
                assert _left(case, step) == new, what
            else:
                assert "\n" not in message, what
                assert len(message) < 1000, what
            # A step that is past its point of no return is finished by whoever opens it next.
            with contextlib.suppress(RexdeployError):
                Bundle.open(case / "b")
            assert _left(case, step) in (old, new), what
            with failing(case, 0), contextlib.suppress(RexdeployError):
                step.act(case)  # which refuses a results file that is there already
            assert _state(case) == new, what
            shutil.rmtree(case)
    return injected


@pytest.mark.parametrize("name", STEPS)
def test_every_failure_leaves_the_old_state_or_the_new(name: str, tmp_path: Path) -> None:
    if name == "r.parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    assert _failures(STEPS[name], tmp_path) >= 15


def test_the_injection_finds_what_is_not_atomic(tmp_path: Path) -> None:
    """What `--json` did before: the file is cut at its opening, and stays so."""
    step = Step(
        lambda folder: (folder / "r.json").write_text("old"),
        lambda folder: _write_in_place(folder / "r.json"),
    )
    with pytest.raises(AssertionError):
        _failures(step, tmp_path)


def _write_in_place(file: Path) -> None:
    try:
        with open(file, "wb") as out:
            out.write(LONG.encode())
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise RexdeployError(f"cannot write {file} ({error.strerror})") from None


# One whole run of each command, with a failure late in it


def test_an_export_that_fails_late_is_finished_by_a_verification_that_cannot_be_stored(
    tmp_path: Path,
) -> None:
    """The failure is behind the point of no return; one before it is the next test's."""
    path = tmp_path / "artifacts" / "tiny"
    number, error = random.Random("export").randint(2, 4), random.Random("late").choice(ERRORS)
    with failing(path, number, error, ["rename"]) as disk:
        result = run_cli(
            "export", "--width", "0.3", "--num-classes", "5", "--image-size", "64",
            "--name", "tiny", "--no-simplify", "--quiet", cwd=tmp_path,
        )  # fmt: skip
    assert disk.injected
    assert_refused(result, os.strerror(error), "the next command that opens it does it")
    (tmp_path / "v.json").write_text("old")
    command = ("verify", "tiny", "--samples", "2", "--quiet", "--json", "v.json")
    with failing(tmp_path, 1, ERRORS[0], ["write"], lasting=True) as disk:
        result = run_cli(*command, cwd=tmp_path)
    assert len(disk.injected) >= 2
    warning, failure = result.err.splitlines()
    assert warning.startswith("warning: verify.json is not stored: cannot write the bundle")
    assert failure.startswith("error: cannot write v.json (No space left on device); what was ")
    assert result.code == 2
    assert set(folder_state(path)) == {"fp32.onnx", "manifest.json", "weights.safetensors"}
    assert (tmp_path / "v.json").read_text() == "old"


def test_a_build_that_fails_late_keeps_the_bundle(small_v1: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    before = folder_state(small_v1.path)
    command = ("build-trt", small_v1.path, "--flavor", "rtx", "--target", "sm86", "--quiet")
    for number, error in ((1, ERRORS[0]), (2, ERRORS[1])):
        with failing(small_v1.path, number, error, ["fsync"]) as disk:
            result = run_cli(*command, cwd=tmp_path)
        assert disk.injected
        assert_refused(result, os.strerror(error), "nothing was changed")
        assert folder_state(small_v1.path) == before


def test_a_prediction_that_fails_late_goes_on(
    small_v1: Bundle, photos: Path, tmp_path: Path
) -> None:
    command = ("predict", photos, "--bundle", small_v1.path, "--out", "out/r.csv", "--quiet")
    (tmp_path / "out").mkdir()
    with failing(tmp_path / "out", 3, ERRORS[0], ["write"], lasting=True) as disk:
        result = run_cli(*command, cwd=tmp_path)
    assert disk.injected
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "out/r.csv.partial keeps what is done" in errors[0]
    assert result.code == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["r.csv.partial"]
    assert run_cli(*command, cwd=tmp_path).code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["r.csv"]
    assert not partial_of(tmp_path / "out" / "r.csv").exists()
