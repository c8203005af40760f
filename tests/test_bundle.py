"""The bundle folder: atomic under kill -9, full disks, damage, and two writers at once."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from rexdeploy.bundle.manifest import FORMAT, Artifact, Manifest
from rexdeploy.bundle.store import Bundle, check_writable, commit, sha256
from rexdeploy.errors import RexdeployError, UsageError
from tests.helpers import folder_state, run_python
from tests.test_manifest import SPEC


def _make(path: Path, **contents: bytes) -> Bundle:
    """A bundle with a file for each keyword."""
    artifacts = tuple(Artifact("onnx", name, sha256(data)) for name, data in contents.items())
    return commit(path, lambda _: Manifest(FORMAT, path.name, SPEC, artifacts), contents)


def _commit(path: Path, killed_at: int) -> int:
    """Commits in a child that kills itself before that rename, flush or removal.

    Its exit code: the number of these calls, or the signal's, negative.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls = 0

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **keywords: object) -> object:
            nonlocal calls
            calls += 1
            if calls == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call

    try:
        for name in ("replace", "fsync", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        _make(path, a=b"new a", c=b"new c")
    finally:
        os._exit(calls)  # whatever happens: no child of pytest's goes on as pytest


def _with_tests() -> dict[str, str]:
    return {"PYTHONPATH": str(Path(__file__).parents[1])}


def test_a_commit_killed_at_any_moment_leaves_the_old_bundle_or_the_new(tmp_path: Path) -> None:
    """SIGKILL before each rename, flush and removal in turn; then the next command opens it."""
    outcomes = []
    _make(tmp_path / "counted", a=b"old a", b=b"old b")
    points = _commit(tmp_path / "counted", killed_at=0)
    assert points >= 7
    assert Bundle.open(tmp_path / "counted").manifest.find_file("c")
    for point in range(1, points + 1):
        path = tmp_path / f"killed-{point}"
        _make(path, a=b"old a", b=b"old b")
        assert _commit(path, point) == -signal.SIGKILL
        bundle = Bundle.open(path)
        contents = {item.file: bundle.read(item) for item in bundle.manifest.artifacts}
        assert contents in ({"a": b"old a", "b": b"old b"}, {"a": b"new a", "c": b"new c"}), point
        outcomes.append("c" in contents)
        # Nothing is left over, and the bundle can be written again.
        assert set(folder_state(path)) == {*contents, "manifest.json"}
        _make(path, a=b"newer a")
        assert bundle.path.joinpath("a").read_bytes() == b"newer a"
    assert outcomes == sorted(outcomes)
    assert {False, True} == set(outcomes)


def test_a_full_disk_leaves_the_bundle_as_it_was(tmp_path: Path) -> None:
    _make(tmp_path / "b", a=b"old a")
    before = folder_state(tmp_path / "b")
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from tests.test_bundle import _make\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from rexdeploy.errors import RexdeployError\n"
        "try:\n"
        "    _make(Path(sys.argv[1]), a=b'x' * 1_000_000)\n"
        "except RexdeployError as error:\n"
        "    print(error)\n"
    )
    answer = run_python(code, tmp_path / "b", env=_with_tests())
    assert "cannot write the bundle" in answer.stdout, answer.stderr
    assert "nothing was changed" in answer.stdout
    assert folder_state(tmp_path / "b") == before


def test_two_writers_at_once_do_not_mix(tmp_path: Path) -> None:
    """Four processes commit pairs of files of equal content; no pair is ever torn."""
    path = tmp_path / "b"
    _make(path, a=b"0", b=b"0")

    def write(number: int) -> None:
        for turn in range(25):
            text = f"{number} {turn}".encode()
            _make(path, a=text, b=text)

    # Forked: four interpreters that import what the tests do would take ten seconds.
    writers = [
        multiprocessing.get_context("fork").Process(target=write, args=(n,)) for n in range(4)
    ]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        bundle = Bundle.open(path)
        try:
            pair = [bundle.read(item) for item in bundle.manifest.artifacts]
        except UsageError:  # changed by another command since it was opened
            continue
        if bundle.manifest == Bundle.open(path).manifest:
            assert pair[0] == pair[1]
            seen.add(pair[0])
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert len(seen) > 1


def test_an_update_of_a_bundle_that_was_replaced_meanwhile_is_refused(tmp_path: Path) -> None:
    old = _make(tmp_path / "b", a=b"old")
    parent = old.manifest.artifacts[0].sha256
    _make(tmp_path / "b", a=b"new")
    child = Artifact("engine", "e", sha256(b"e"), parent_sha256=parent)
    with pytest.raises(UsageError, match="changed by another command"):
        old.update(child, files={"e": b"e"})
    assert not (tmp_path / "b" / "e").exists()


def test_two_updates_of_one_bundle_both_stay(tmp_path: Path) -> None:
    """Neither knows of the other's file; the second keeps the first's."""
    bundle = _make(tmp_path / "b", a=b"a")
    parent = bundle.manifest.artifacts[0].sha256
    for name in ("fp16.engine", "fp32.engine"):
        bundle.update(
            Artifact("engine", name, sha256(b"e"), parent_sha256=parent), files={name: b"e"}
        )
    files = {item.file for item in Bundle.open(bundle.path).manifest.artifacts}
    assert files == {"a", "fp16.engine", "fp32.engine"}


def test_files_of_others_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    _make(tmp_path / "b", a=b"a", b=b"b")
    (tmp_path / "b" / "notes.txt").write_text("mine")
    _make(tmp_path / "b", a=b"a2")
    assert set(folder_state(tmp_path / "b")) == {"a", "manifest.json", "notes.txt"}


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    bundle = _make(tmp_path / "b", a=b"content")
    (bundle.path / "a").write_bytes(b"c0ntent")
    with pytest.raises(UsageError, match="not the file the manifest describes"):
        bundle.read(bundle.manifest.artifacts[0])
    (bundle.path / "a").unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        bundle.read(bundle.manifest.artifacts[0])


def _no_folder(path: Path) -> None:
    pass


def _a_file(path: Path) -> None:
    path.write_text("x")


def _an_empty_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [_no_folder, _a_file, _an_empty_folder])
def test_what_is_no_bundle_is_said_to_be_none(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "b")
    with pytest.raises(UsageError, match="is not a bundle: expected a folder with a manifest"):
        Bundle.open(tmp_path / "b")


def test_a_corrupt_manifest_is_left_as_it_is(tmp_path: Path) -> None:
    _make(tmp_path / "b", a=b"a")
    (tmp_path / "b" / "manifest.json").write_text('{"format": 1, "name"')
    before = folder_state(tmp_path / "b")
    with pytest.raises(UsageError, match="not a readable manifest"):
        Bundle.open(tmp_path / "b")
    with pytest.raises(UsageError, match="not a readable manifest"):
        _make(tmp_path / "b", a=b"2")
    assert folder_state(tmp_path / "b") == before


def test_the_latest_bundle_is_the_one_changed_last(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no bundle in .*run 'rexdeploy export' first"):
        Bundle.find(None, tmp_path / "nowhere")
    _make(tmp_path / "z", a=b"a")
    _make(tmp_path / "y", a=b"a")
    (tmp_path / "not-a-bundle").mkdir()
    assert Bundle.find(None, tmp_path).path.name == "y"
    _make(tmp_path / "z", a=b"b")
    assert Bundle.find(None, tmp_path).path.name == "z"
    shutil.copytree(tmp_path / "y", tmp_path / "copy")  # copying does not make it newer
    assert Bundle.find(None, tmp_path).path.name == "z"
    assert Bundle.find(Path("y"), tmp_path).path.name == "y"


def test_a_damaged_bundle_is_not_passed_over_for_an_older_one(tmp_path: Path) -> None:
    _make(tmp_path / "old", a=b"a")
    _make(tmp_path / "new", a=b"a")
    (tmp_path / "new" / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match="new/manifest.json is not a readable manifest"):
        Bundle.find(None, tmp_path)


def test_an_unwritable_folder_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot write to the folder"):
        check_writable(tmp_path / "file" / "sub")
    with pytest.raises(RexdeployError, match="cannot write the bundle"):
        _make(tmp_path / "file" / "sub", a=b"a")
    check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_reading_needs_no_right_to_write() -> None:
    """A bundle on read-only storage opens, for a user who is not root."""
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from rexdeploy.bundle.store import Bundle\n"
        "if os.geteuid() == 0:\n"
        "    os.setuid(65534)\n"
        "assert not os.access(sys.argv[1], os.W_OK)\n"
        "bundle = Bundle.open(Path(sys.argv[1]))\n"
        "print(bundle.read(bundle.manifest.artifacts[0]))\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = _make(Path(folder) / "b", a=b"a").path
        path.chmod(0o555)
        answer = run_python(code, path)
        path.chmod(0o755)
    assert answer.stdout == "b'a'\n", answer.stderr


def test_readers_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """A shared lock is all that reading needs: NFS gives no exclusive one on a folder."""
    bundle = _make(tmp_path / "b", a=b"a")
    descriptor = os.open(bundle.path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from rexdeploy.bundle.store import Bundle\n"
        "bundle = Bundle.open(Path(sys.argv[1]))\n"
        "print(bundle.read(bundle.manifest.artifacts[0]))\n"
    )
    try:
        answer = run_python(code, bundle.path)
    finally:
        os.close(descriptor)
    assert answer.stdout == "b'a'\n", answer.stderr


def test_a_folder_where_a_file_belongs_stops_the_commit_before_it_happens(tmp_path: Path) -> None:
    _make(tmp_path / "b", a=b"a")
    (tmp_path / "b" / "c").mkdir()
    before = folder_state(tmp_path / "b")
    with pytest.raises(UsageError, match="c is a folder where the bundle needs a file"):
        _make(tmp_path / "b", a=b"a", c=b"c")
    assert folder_state(tmp_path / "b") == before
    Bundle.open(tmp_path / "b")


def test_somebody_elses_folder_is_not_made_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").write_text("precious")
    with pytest.raises(UsageError, match="a folder with other files in it, not a bundle"):
        _make(tmp_path / "mine", a=b"new")
    assert (tmp_path / "mine" / "a").read_text() == "precious"


def test_a_folder_of_the_same_name_does_not_hide_a_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make(tmp_path / "artifacts" / "net", a=b"a")
    (tmp_path / "net").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Bundle.find(Path("net")).path == Path("artifacts/net")
