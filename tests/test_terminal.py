"""What a terminal gets to see: no control characters, no endless lines, no lost exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from rexdeploy.bundle.store import Bundle
from rexdeploy.cli.console import print_table, say
from rexdeploy.text import STEERING, one_line, plain
from tests.helpers import on_a_terminal, run_cli, run_program
from tests.test_triton import with_labels

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202etxt.exe"

# A command that says something, and ends with the exit code that it is given.
COMMAND = """
import os, sys
import typer
from rexdeploy.cli.app import app, main
from rexdeploy.cli.console import progress, say
from rexdeploy.errors import VerificationFailed
@app.command()
def work(code: int) -> None:
    with progress(False) as report:
        report("working")
    say("a result")
    with open(os.devnull) as file:
        assert file.fileno() > 2
    if code == 3:
        raise VerificationFailed("it is not so")
    raise typer.Exit(code)
main()
"""
PROGRESS, RESULT, FAILURE = "working ...\n", "a result\n", "error: it is not so\n"
LOST = "error: output: No space left on device\n"


def _shell(code: int, redirection: str) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of the command behind a shell's redirection."""
    line = f'"$0" -c "$1" work {code} {redirection}'
    done = run_program("bash", "-o", "pipefail", "-c", line, sys.executable, COMMAND)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("redirection", "out", "err", "codes"),
    [
        (">&-", "", PROGRESS, {0: 0, 3: 3, 130: 130}),
        ("2>&-", RESULT, "", {0: 0, 3: 3}),
        (">&- 2>&- <&-", "", "", {0: 0, 3: 3}),
        ("2>/dev/full", RESULT, "", {0: 0, 3: 3}),
        (">/dev/full", "", PROGRESS, {0: 2, 3: 3, 130: 130}),  # fine, and its results are lost
        (">/dev/full 2>&1", "", "", {0: 2, 3: 3}),
        ("| head -c 0", "", PROGRESS, {0: 0, 3: 3}),
    ],
)
def test_the_exit_code_is_the_works(
    redirection: str, out: str, err: str, codes: dict[int, int]
) -> None:
    for code, expected in codes.items():
        got, printed, told = _shell(code, redirection)
        said = err + FAILURE * (code == 3 and bool(err))
        said += LOST * (code != 3 and ">/dev/full" in redirection and bool(err))
        assert (got, printed, told) == (expected, out, said), (code, redirection)


def test_help_behind_a_closed_pipe_is_no_error() -> None:
    line = '"$0" -m rexdeploy --help | head -c 0'
    shell = ["bash", "-o", "pipefail", "-c", line, sys.executable]
    done = run_program(*shell)
    assert (done.returncode, done.stderr) == (0, "")


def test_letters_that_stdout_lacks_are_escaped() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND.replace("a result", "grün 犬"), "work", "0"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"gr\xfcn \\u72ac\n")


def test_plain_text_keeps_what_people_write() -> None:
    for text in ("grün", "New\u00a0York", "東\u3000京", "👩\u200d🔬", "a\\b [red] :cat:"):
        assert plain(text) == text
    assert plain(HOSTILE) == r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202etxt.exe"
    assert plain("a\nb\t\udcfc") == r"a\nb\t\udcfc"


def test_a_long_line_keeps_its_reason() -> None:
    path = "/a" * 3000
    line = one_line(f"cannot write {path} (No space left on device); {path}.partial keeps it all")
    assert len(line) <= 1600
    assert "(No space left on device)" in line
    assert line.endswith("keeps it all")
    many = one_line(" ".join(f"word{n}" for n in range(5000)) + ": the reason")
    assert len(many) <= 1600
    assert many.startswith("word0 ")
    assert many.endswith(": the reason")


def test_file_names_and_labels_steer_no_terminal(
    small_v1: Bundle, photos: Path, tmp_path: Path
) -> None:
    """A name that a file system takes, in a line of classes, of an error, and in a file."""
    folder = tmp_path / "folder"
    folder.mkdir()
    names = [f"{HOSTILE}.png", "two\nlines.png", f"gone {HOSTILE}.png"]
    for name in names[:2]:
        Image.open(photos / "china.png").resize((64, 64)).save(folder / name)
    (folder / names[2]).write_bytes(b"no image")
    with_labels(small_v1, "\n".join(f"[/red] :cat: {n}" for n in range(37)).encode())
    for out in ((), ("--json", "-"), ("--out", f"{HOSTILE}.csv")):
        result = run_cli("predict", "folder", "--top", "1", *out, cwd=tmp_path)
        for line in (result.out + result.err).split("\n"):
            assert not STEERING.search(line), out
        if out[:1] == ("--json",):
            files = [row["file"] for row in json.loads(result.out)["images"]]
            assert files == [f"folder/{name}" for name in sorted(names)]
        elif not out:
            assert result.out.splitlines()[1] == f"folder/{plain(names[0])}"
            assert "[/red] :cat: " in result.out
            assert f"error: folder/{plain(names[2])}: not an image" in result.err
        else:
            assert f"  {plain(HOSTILE)}.csv, 3 rows" in result.out


def test_a_name_of_any_length_and_letters_is_refused_in_a_screen(tmp_path: Path) -> None:
    for arguments in (
        ("verify", "x" * 5000),
        ("verify", "/".join(["y" * 100] * 40)),
        ("export", "--batch", HOSTILE * 100),
        ("frobnicate" * 1000,),
        ("export", "--weights", f"{HOSTILE}.pth"),
    ):
        result = run_cli(*arguments, cwd=tmp_path)
        assert result.code == 2
        assert len(result.error_lines) == 1
        assert len(result.error_lines[0]) < 1620
        assert not STEERING.search(result.error_lines[0])


def test_a_table_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "n"), [("[bold]:cat: \x1b[2J\nrow", "1")])
    say("one", None, "two\nlines")
    printed = capsys.readouterr().out
    assert r"[bold]:cat: \x1b[2J\nrow" in printed
    assert printed.endswith("one\ntwo\\nlines\n")


def test_a_spinner_shows_names_as_they_are() -> None:
    code = (
        "import sys, time\n"
        "from rexdeploy.cli.console import progress\n"
        "with progress(False) as report:\n"
        "    report('writing a[/b]\\x1b]0;owned\\x07')\n"
        "    time.sleep(0.3)\n"
    )
    shown = on_a_terminal(code)
    assert re.search(rb"writing a\[/b\]\\x1b\]0;owned\\x07 \.\.\.", shown), shown
