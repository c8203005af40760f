"""The command line: one file a command, each with its options and what it prints."""

from typing import NoReturn


def main() -> NoReturn:
    """Runs the command line."""
    from rexdeploy.cli.app import main as run

    run()
