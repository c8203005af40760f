"""rexdeploy sign: its words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rexdeploy.cli.console import say
from rexdeploy.cli.shared import BundleArgument, Quiet


def sign(
    private_key: Annotated[
        Path, typer.Option(metavar="FILE", help="An EC key (P-256, P-384 or P-521), PEM.")
    ],
    bundle: BundleArgument = None,
    quiet: Quiet = False,
) -> None:
    """Sign a bundle: its manifest and every file that it names.

    Whatever changes the bundle afterwards drops the signature ('verify' stores its result in it):
    sign last. --require-signature of predict, serve and verify then takes the public key.

    \b
    Example:
    rexdeploy sign rexnet_1.5 --private-key key.pem
    rexdeploy predict cat.jpg --bundle rexnet_1.5 --require-signature key.pub
    """
    from rexdeploy.bundle.manifest import TASKS
    from rexdeploy.bundle.signing import sign as run
    from rexdeploy.bundle.store import SIGNATURE, Bundle

    opened = Bundle.find(bundle, tasks=TASKS)
    count = run(opened, private_key=private_key)
    if not quiet:
        say(f"{opened.path / SIGNATURE}: of {count} files; whatever changes the bundle drops it")
