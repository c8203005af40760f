"""Adding to a model repository: all or nothing, whatever fails, is killed or comes second."""

from __future__ import annotations

import io
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from rexdeploy import files
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import RexdeployError
from rexdeploy.serving import repository as repository_module
from rexdeploy.serving.repository import Model, changing, deployed, publish
from tests.helpers import run_cli, run_python

PARTS = (
    Model("preprocess", "x_preprocess", "decode", {}, {"model.py": b"1"}),
    Model("network", "x", "batch: 1", {"labels.txt": b"a\nb"}, {"model.onnx": b"one" * 100}),
    Model("ensemble", "x_image", "both", {"labels.txt": b"a\nb"}, {".keep": b""}),
)
NEXT = (
    replace(PARTS[0], config="decode more"),
    replace(PARTS[1], config="batch: 2", version={"model.onnx": b"two" * 100}),
    replace(PARTS[2], config="both more"),
)
CHANGES = ("mkdir", "rename", "fsync", "open", "write", "copy2")
STARTS = ("no folder", "an empty folder", "the version before")


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here looks at what a power cut leaves, and disks take their time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Files with their bytes, and folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def add(models: tuple[Model, ...], repository: Path) -> list[tuple[int, bool]]:
    with changing(repository) as staging:
        return publish(models, repository, staging)


def started(start: str, root: Path) -> Path:
    """A repository as a deployment finds it."""
    repository = root / "far" / "models"
    if start == "an empty folder":
        repository.mkdir(parents=True)
    if start == "the version before":
        add(PARTS, repository)
    return repository


@contextmanager
def failing_at(
    place: int, fail: Callable[[], NoReturn], among: Sequence[str] = CHANGES
) -> Iterator[list[str]]:
    """Calls `fail` at that one of the calls that change a disk; yields what was called."""
    called: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if name in among:
                called.append(name)
                if len(called) - 1 == place:
                    fail()
            return real(*arguments, **options)

        return call

    class Writer(io.BufferedWriter):
        def write(self, data: Any) -> int:
            return int(counted("write", super().write)(data))

    def opened(path: Path, mode: str) -> Any:
        assert mode == "wb"
        return Writer(counted("open", io.FileIO)(path, "w"))

    with pytest.MonkeyPatch.context() as patch:
        for place_of, name in (
            (Path, "mkdir"), (Path, "rename"), (os, "fsync"), (os, "open"), (shutil, "copy2")
        ):  # fmt: skip
            patch.setattr(place_of, name, counted(name, getattr(place_of, name)))
        patch.setattr(files, "open", opened, raising=False)
        yield called


def full() -> NoReturn:
    raise OSError(28, "No space left on device")


def interrupted() -> NoReturn:
    raise KeyboardInterrupt


def killed() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("survived")


@pytest.mark.parametrize("fail", [full, interrupted])
@pytest.mark.parametrize("start", STARTS)
def test_whatever_fails_the_repository_is_the_old_one_and_nothing_is_left(
    start: str, fail: Callable[[], NoReturn], tmp_path: Path
) -> None:
    models = NEXT if start == "the version before" else PARTS
    assert add(models, started(start, tmp_path / "done"))[1] == (2 if models is NEXT else 1, True)
    final = tree(tmp_path / "done")
    for place in range(200):
        root = tmp_path / str(place)
        root.mkdir()
        repository = started(start, root)
        before = tree(root)
        with failing_at(place, fail) as called:
            try:
                add(models, repository)
            except OSError:
                assert tree(root) == before, called
            except KeyboardInterrupt:  # which may come when all is done
                assert tree(root) in (before, final), called
            else:
                break
        add(models, repository)
        assert tree(root) == final
    assert place > 20
    assert {"mkdir", "rename", "fsync", "open", "write"} <= set(called)


@pytest.mark.parametrize("start", STARTS)
def test_a_killed_command_shows_whole_models_and_the_next_one_clears_up(
    start: str, tmp_path: Path
) -> None:
    """Killed before every change of a name; a new repository is there or it is not."""
    models = NEXT if start == "the version before" else PARTS
    add(models, started(start, tmp_path / "done"))
    final = tree(tmp_path / "done" / "far" / "models")
    appearing = ["x/2"] if models is NEXT else [model.name for model in models]
    for place in range(200):
        repository = started(start, tmp_path / str(place))
        before = tree(repository)
        child = os.fork()
        if child == 0:  # nothing but this, and never back into the tests
            try:
                with failing_at(place, killed, ("mkdir", "rename", "copy2")):
                    add(models, repository)
            finally:
                os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        after = tree(repository)
        if start == "no folder":
            assert after in ({}, final)
        assert all(after[name] in (data, final[name]) for name, data in before.items())
        assert all(data in (before.get(name), final[name]) for name, data in after.items())
        for folder in appearing:  # never a part of one
            parts = {name for name in final if name.startswith(f"{folder}/")}
            assert parts & after.keys() in (set(), parts)
        add(models, repository)
        assert tree(repository) == final
        assert [path.name for path in repository.parent.iterdir()] == ["models"]
    assert place > 5


def test_two_at_once_come_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of one that lives is left alone; the other says that it waits no longer."""
    monkeypatch.setattr(repository_module, "_WAIT_SECONDS", 0.2)
    repository = tmp_path / "models"
    with changing(repository) as staging:
        (staging / "half").write_bytes(b"written")
        with pytest.raises(RexdeployError, match="another command has been changing .*models"):
            add(NEXT, repository)
        assert (staging / "half").read_bytes() == b"written"
        publish(PARTS, repository, staging)
    assert add(NEXT, repository)[1] == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_what_is_not_ours_beside_the_repository_stays(tmp_path: Path) -> None:
    for name in (".models.original", ".models.12345678"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"theirs")
    add(PARTS, tmp_path / "models")
    assert (tmp_path / ".models.original" / "file").read_bytes() == b"theirs"
    assert (tmp_path / ".models.12345678" / "file").read_bytes() == b"theirs"
    (tmp_path / ".models.rexdeploy").symlink_to(".models.original")
    with pytest.raises(RexdeployError, match="is a link, expected nothing there"):
        add(NEXT, tmp_path / "models")
    assert (tmp_path / ".models.original" / "file").read_bytes() == b"theirs"


def test_a_linked_repository_is_filled_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "disk" / "models").mkdir(parents=True)
    (tmp_path / "models").symlink_to("disk/models")
    assert add(PARTS, tmp_path / "models")[1] == (1, True)
    assert add(NEXT, tmp_path / "models")[1] == (2, True)
    assert (tmp_path / "models").is_symlink()
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"models"}


def test_what_is_no_network_of_ours_is_not_counted(tmp_path: Path) -> None:
    assert deployed(tmp_path / "models") == []
    add(PARTS, tmp_path / "models")  # its configurations have no mark
    os.mkfifo(tmp_path / "models" / "config.pbtxt")
    (tmp_path / "models" / "pipe").mkdir()
    os.mkfifo(tmp_path / "models" / "pipe" / "config.pbtxt")
    assert deployed(tmp_path / "models") == []


LIMITED = """
import resource, sys
from rexdeploy import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv[:2] = ["rexdeploy"]
cli.main()
"""


@pytest.mark.parametrize("limit", [1000, 2**20])
def test_a_full_disk_leaves_nothing_of_a_first_deployment(
    limit: int, small_v1: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command itself: no file may grow beyond the limit, and the network's does."""
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    done = run_python(LIMITED, str(limit), "triton", "small_v1", "--repository", "served/models")
    assert done.returncode == 2, done
    assert done.stderr.startswith("error: cannot write the model repository served/models (")
    assert "nothing was changed" in done.stderr
    assert done.stderr.count("\n") == 1
    assert tree(tmp_path) == before
    assert run_cli("triton", "small_v1", "--repository", "served/models", cwd=tmp_path).code == 0


CTRL_C = """
import os, signal, sys
from rexdeploy import cli
fsync, left = os.fsync, iter(range(int(sys.argv[1])))
def interrupting(descriptor):
    fsync(descriptor)
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGINT)
os.fsync = interrupting
sys.argv[:2] = ["rexdeploy"]
cli.main()
"""


@pytest.mark.parametrize("command", ["triton", "serve"])
def test_ctrl_c_leaves_nothing(
    command: str, small_v1: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "serve":
        from rexdeploy.serving.front import free_port
        from tests.test_serve import _missing

        if _missing():
            pytest.skip(_missing())
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    port = ["--port", str(free_port())] if command == "serve" else []
    done = run_python(CTRL_C, "5", command, "small_v1", *port)
    assert done.stderr == "error: interrupted; no model is left half written\n"
    assert done.returncode == 130
    assert tree(tmp_path) == before
