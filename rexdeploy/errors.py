"""The exceptions that rexdeploy raises on purpose, and the exit code of each.

    RexdeployError (2)
    ├── UsageError (2)           what the user gave cannot be used: got, expected, what to do
    ├── BackendUnavailable (2)   a library, driver or GPU is missing, or another than the file
    │                            is for; the caller may skip. What is refused although nothing is
    │                            missing is a RexdeployError, which `verify` counts as a failure
    └── VerificationFailed (3)   it ran, and the logits or the precision are not what they must be

Anything else that escapes is our bug: a traceback and exit code 1.
"""

from __future__ import annotations


class RexdeployError(Exception):
    """An expected failure. Its text is one line: what was got, what was expected, what to do."""

    exit_code = 2


class UsageError(RexdeployError):
    """An argument, a file or a combination of them cannot be used."""


class BackendUnavailable(RexdeployError):
    """A model cannot be run (or built) here; the text says what is missing and how to get it."""


class VerificationFailed(RexdeployError):
    """A check ran and failed."""

    exit_code = 3


def first_line(error: Exception, otherwise: str | None = None) -> str:
    """The first line of a library's message; `otherwise`, or the error's type, if it has none."""
    return (str(error).strip().splitlines() or [otherwise or type(error).__name__])[0]
