"""`python -m rexdeploy`."""

from rexdeploy.cli import main

main()
