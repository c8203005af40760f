"""The journal of a long run: whole lines survive a kill, and only the same run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from rexdeploy.journal import Journal


@dataclass(frozen=True)
class Entry:
    number: int


def written(path: Path, *numbers: int, header: str = "a run") -> list[int]:
    journal = Journal(path, header, Entry)
    for number in numbers:
        journal.append(Entry(number))
    journal.close()
    return [entry.number for entry in journal.entries]


def test_the_same_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    assert written(path, 1, 2) == []
    assert written(path, 3) == [1, 2]
    assert written(path) == [1, 2, 3]


@pytest.mark.parametrize("left", [b"", b'{"number":', b'{"number":3}', b"\xff\xff\n", b"[]\n"])
def test_a_torn_line_is_cut_off(tmp_path: Path, left: bytes) -> None:
    path = tmp_path / "journal"
    written(path, 1, 2)
    with open(path, "ab") as file:
        file.write(left)
    assert written(path, 4) == [1, 2]
    assert written(path) == [1, 2, 4]


@pytest.mark.parametrize("left", [b"", b'"a ru', b'"another run"\n{"number":1}\n', b"\0" * 99])
def test_another_run_begins_anew(tmp_path: Path, left: bytes) -> None:
    path = tmp_path / "journal"
    path.write_bytes(left)
    assert written(path, 5) == []
    assert written(path) == [5]


def test_a_journal_in_use_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    first = Journal(path, "a run", Entry)
    first.append(Entry(1))
    with pytest.raises(BlockingIOError):
        Journal(path, "another run", Entry)
    first.append(Entry(2))
    first.close()
    assert written(path) == [1, 2]
    Journal(path, "a run", Entry).remove()
    assert not path.exists()
