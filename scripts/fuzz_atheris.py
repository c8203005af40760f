"""Starts tests/fuzz_targets.py with atheris watching which of our code and Pillow's is reached."""

import atheris

with atheris.instrument_imports(include=["rexdeploy", "PIL"]):
    from tests import fuzz_targets

fuzz_targets.main()
