"""`python -m rexdeploy`."""

from rexdeploy.cli.main import main

main()
