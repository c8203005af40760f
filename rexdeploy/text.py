"""Text that somebody else wrote (file names, labels, libraries' messages), made fit to print."""

from __future__ import annotations

import re

STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff]")
"""Control characters: what moves a cursor, changes colours, ends a line, or turns the direction of
the text around it; and the byte order mark, which shows nothing at all."""

_SCREEN = 1600  # characters: 20 lines of a terminal of 80 columns
_WORD = 300  # characters: of a path that is longer, both ends are shown
_LEFT_OUT = " ... "


def plain(text: str) -> str:
    r"""The text with control characters as escapes such as `\x1b`, and as `printable` gives it."""
    return printable(STEERING.sub(_escape, text))


def printable(name: str) -> str:
    r"""A file's name as text that can be written: bytes that are not UTF-8 as `\udcNN`."""
    return name.encode("utf-8", "backslashreplace").decode()


def one_line(text: str, most: int = _SCREEN) -> str:
    """Plain text on one line of `most` characters, cut in its middle: the end has the reason."""
    words = (_cut(word, _WORD) for word in plain(" ".join(text.split())).split(" "))
    return _cut(" ".join(words), most)


def json_text(document: str) -> str:
    """A JSON document of the same values, whose strings hold no raw control characters."""
    return STEERING.sub(lambda found: _json_escape(found[0]), document)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    half = (most - len(_LEFT_OUT)) // 2
    return text[:half] + _LEFT_OUT + text[len(text) - half :]


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def _json_escape(character: str) -> str:
    # Line breaks between the values are the document's own: strings cannot hold them raw.
    return character if character == "\n" else f"\\u{ord(character):04x}"
