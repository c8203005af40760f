"""Class names: one rule for their file, at export and wherever a bundle is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexdeploy.bundle.labels import parse_labels
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import UsageError
from rexdeploy.inference.classifier import load
from tests.helpers import assert_refused, run_cli
from tests.test_triton import with_labels

MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (b"cat\ndog", ["cat", "dog"]),
        (b"cat\ndog\n", ["cat", "dog"]),
        (b"cat\r\ndog\r\n", ["cat", "dog"]),
        (MARK + b"cat\ndog\n", ["cat", "dog"]),
        (b" cat, tabby \n  dog", [" cat, tabby ", "  dog"]),  # as they stand
        ("New\u00a0York\nقط\u200f\n👩\u200d🔬\n東\u3000京".encode(), None),
    ],
)
def test_a_line_is_a_name_as_it_stands(data: bytes, names: list[str] | None) -> None:
    assert parse_labels(data, "f") == (names or data.decode().split("\n"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "f is empty, expected one class name a line"),
        (MARK, "f is empty"),
        (b"\n", "f: line 1 is blank"),
        (b"cat\n\ndog\n", "f: line 2 is blank"),
        (b"cat\n   \ndog\n", "f: line 2 is blank"),
        (b"cat\ndog\n\n", "f: line 3 is blank"),
        (b"cat\nd\0g\n", r"f: line 2 holds the control character U\+0000, expected class names wi"),
        (b"n01\tcat\n", r"line 1 holds the control character U\+0009"),
        (b"\x1b[31mcat\n", r"line 1 holds the control character U\+001B"),
        (b"cat\rdog\n", r"U\+000D"),
        ("cat\x85dog".encode(), r"U\+0085"),
        ("cat\n\x9b31m".encode(), r"line 2 .* U\+009B"),
        ("cat\u2028dog".encode(), r"U\+2028"),
        ("\u202egod".encode(), r"U\+202E"),
        (b"cat\n" + MARK + b"dog\n", r"line 2 .* U\+FEFF"),  # two files in a row
        (b"cat\n\xe9lan\n", "f: byte 4 is not UTF-8, expected text in UTF-8; save it as that"),
        ("cat\ndog\n".encode("utf-16"), "f: byte 0 is not UTF-8"),
    ],
)
def test_anything_else_is_refused_with_its_line(data: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_labels(data, "f")


@given(st.lists(st.text(st.characters(blacklist_categories=["Cc", "Cs"]), min_size=1), min_size=1))
def test_what_is_taken_is_the_same_when_it_is_read_again(names: list[str]) -> None:
    try:
        taken = parse_labels("\n".join(names).encode(), "f")
    except UsageError:
        return
    assert taken in (names, [names[0].removeprefix("\ufeff"), *names[1:]])
    assert parse_labels(("\n".join(taken) + "\n").encode(), "f") == taken


def test_an_export_keeps_no_mark_and_refuses_what_breaks_the_rule(tmp_path: Path) -> None:
    """Into a folder whose name is no text, either: its bytes are escaped where they are written."""
    file = tmp_path / "labels.txt"
    command = (
        "export", "--width", "0.3", "--num-classes", "2", "--image-size", "32", "--no-simplify",
        "--batch", "1", "--labels", "labels.txt", "--out", os.fsdecode(b"\xff"), "--json", "-",
        "--name",
    )  # fmt: skip
    for data, message in (
        (b"cat\n\n", "labels labels.txt: line 2 is blank"),
        (b"cat\n", "got 1 lines, expected one for each of the 2 classes"),
    ):
        file.write_bytes(data)
        assert_refused(run_cli(*command, "b", cwd=tmp_path), message)
    refused = run_cli(*command, "a\x1bb", cwd=tmp_path)
    assert_refused(refused, r"name: got 'a\x1bb', expected a plain folder name")
    file.write_bytes(MARK + b"cat\r\ndog\r\n")
    result = run_cli(*command, "b", cwd=tmp_path)
    assert result.code == 0, result.err
    answer = json.loads(result.out)
    assert answer["bundle"] == r"\udcff/b"
    assert r"--out '\udcff'" in answer["manifest"]["artifacts"][0]["command"]
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff/b"))
    assert (folder / "labels.txt").read_bytes() == b"cat\ndog\n"


def test_a_bundle_of_before_the_rule_is_read_by_it(small_v1: Bundle) -> None:
    good = b"\n".join(f"kind {index}".encode() for index in range(37))
    with load(with_labels(small_v1, MARK + good), "onnxruntime") as classifier:
        assert classifier.labels[0] == "kind 0"
    with pytest.raises(UsageError, match="labels.txt: line 8 holds the control character U.001B"):
        load(with_labels(small_v1, good.replace(b"kind 7", b"\x1b[2Jkind 7")))


def test_verify_says_that_the_labels_are_damaged(small_v1: Bundle, tmp_path: Path) -> None:
    bundle = with_labels(small_v1)
    file = bundle.path / "labels.txt"
    good = file.read_bytes()
    file.write_bytes(good.replace(b"kind 7", b"kind 6"))
    command = ("verify", bundle.path, "--samples", "2", "--quiet")
    assert_refused(run_cli(*command, cwd=tmp_path), "labels.txt is not the file the manifest")
    file.unlink()
    assert_refused(run_cli(*command, cwd=tmp_path), "labels.txt cannot be read")
    with_labels(small_v1, b"one\ntwo\n")
    assert_refused(run_cli(*command, cwd=tmp_path), "labels.txt: got 2 labels, expected 37")
