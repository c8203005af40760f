"""Output files: the old one or the new one, whole, whatever the disk or another command does."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rexdeploy.backends.doctor import Finding
from rexdeploy.cli.console import emit, write_text
from rexdeploy.cli.plot import plot_localizations
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.files import check_replaceable, replacing
from tests.helpers import assert_refused, run_cli, run_python
from tests.injection import failing
from tests.test_bundle import _make


@contextlib.contextmanager
def _full_after(size: int) -> Iterator[None]:
    """A disk that takes so many bytes of a file and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS: dict[str, Callable[[Path], None]] = {
    "r.json": lambda file: emit(file, Finding("x" * 9999, "ok", "", "")),
    "service.yaml": lambda file: write_text(file, "x" * 9999),
    "p.svg": lambda file: plot_localizations([], file),
    "p.png": lambda file: plot_localizations([], file),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_keeps_the_last_files_content(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text("the last run's")
    with (
        _full_after(200),
        pytest.raises(RexdeployError, match=f"{name} .File too large.; what was there before is"),
    ):
        WRITERS[name](file)
    assert file.read_text() == "the last run's"
    assert os.listdir(tmp_path) == [name]  # noqa: PTH208 - hidden ones, too
    WRITERS[name](file)
    assert file.stat().st_size > 200
    assert os.listdir(tmp_path) == [name]  # noqa: PTH208


def test_the_command_lines_files_are_kept(tmp_path: Path) -> None:
    bundle = _make(tmp_path / "artifacts" / "b", graph=b"")
    (tmp_path / "out").mkdir()
    for file, command in (
        ("out/d.json", ("doctor", "--json")),
        ("out/t.json", ("triton", bundle.path, "--json")),
        ("out/s.yaml", ("triton", bundle.path, "--kserve")),
    ):
        (tmp_path / file).write_text("the last run's")
        with failing(tmp_path / "out", 1, errno.ENOSPC, ["write"]):
            refused = run_cli(*command, file, cwd=tmp_path)
        assert_refused(refused, f"cannot write {file} (No space left on device)")
        assert (tmp_path / file).read_text() == "the last run's"
        run_cli(*command, file, cwd=tmp_path)
        assert (tmp_path / file).read_text() != "the last run's"
    assert len(os.listdir(tmp_path / "out")) == 3  # noqa: PTH208


def test_the_mode_stays_and_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("secret")
    (tmp_path / "real.json").chmod(0o600)
    (tmp_path / "link.json").symlink_to("real.json")
    write_text(tmp_path / "link.json", "new secret")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new secret"
    assert stat.S_IMODE((tmp_path / "real.json").stat().st_mode) == 0o600
    write_text(tmp_path / "new.json", "x")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "new.json").stat().st_mode) == 0o666 & ~umask


def test_a_pipe_and_a_device_are_written_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RexdeployError, match="pipe .No such device or address"):
        write_text(tmp_path / "pipe", "x")  # nobody reads it: refused, and not waited for
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "x" * 10_000)
    assert os.read(reader, 20_000) == b"x" * 10_000
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    check_replaceable(Path("/dev/null"))
    write_text(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()


def test_what_a_killed_command_left_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from rexdeploy.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half')\n"
        "    file.flush()\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    (tmp_path / "r.json").write_text("old")
    assert run_python(code, tmp_path / "r.json").returncode == -9
    assert (tmp_path / "r.json").read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2  # noqa: PTH208
    write_text(tmp_path / "r.json", "new")
    assert os.listdir(tmp_path) == ["r.json"]  # noqa: PTH208
    assert (tmp_path / "r.json").read_text() == "new"


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    texts = [letter * 50_000 for letter in "abcd"]

    def write(text: str) -> None:
        for _ in range(5):
            write_text(file, text)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        if file.exists():
            seen.add(file.read_text())
    assert seen
    assert seen <= set(texts)
    assert os.listdir(tmp_path) == ["r.json"]  # noqa: PTH208


def test_a_link_that_somebody_laid_in_the_way_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".r.json.staged").symlink_to("precious")
    with pytest.raises(OSError, match="symbolic links"), replacing(tmp_path / "r.json"):
        raise AssertionError("opened")
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", ["folder", "gone/r.json", "file/r.json", "x" * 250, "x" * 300])
def test_what_cannot_be_written_is_found_before_the_work(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="expected a file in a folder that can be written"):
        check_replaceable(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
