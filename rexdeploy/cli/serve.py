"""rexdeploy serve: its words."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rexdeploy.cli.console import progress, say
from rexdeploy.cli.shared import Quiet, RequireSignature, taken_back_on_ctrl_c

if TYPE_CHECKING:
    from rexdeploy.serving.server import Service


def serve(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            metavar="[BUNDLE]",
            help="A bundle to add first, as 'rexdeploy triton' does [default: none; to an empty "
            "repository the latest one].",
            show_default=False,
        ),
    ] = None,
    repository: Annotated[
        Path, typer.Option(metavar="DIR", help="Model repository to serve.")
    ] = Path("artifacts/triton"),
    backend: Annotated[
        str,
        typer.Option(help="Of the bundle: tensorrt, onnxruntime or python; auto: as in triton."),
    ] = "auto",
    tritonserver: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The server [default: the one on PATH, or nvidia-pytriton's, of the extra serve].",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP; gRPC and metrics take the next two.")] = 8000,
    max_request: Annotated[
        int | None,
        typer.Option(
            metavar="MIB",
            help="Largest request [default: 16, or a full batch of tensors if that is more].",
        ),
    ] = None,
    open_api: Annotated[
        list[str] | None,
        typer.Option(
            "--open",
            metavar="API",
            help="Let every client use shared-memory, model-repository, trace or logging.",
        ),
    ] = None,
    show_log: Annotated[bool, typer.Option("--log", help="Show all of Triton's log.")] = False,
    require_signature: RequireSignature = None,
    quiet: Quiet = False,
) -> None:
    """Serve a model repository with a real Triton Inference Server, until Ctrl-C or SIGTERM.

    New versions and models that 'rexdeploy triton' adds to the repository are taken up within
    seconds. A server that fails is started again. An asked-for end is exit code 0, and what is in
    flight is answered first; a second Ctrl-C ends at once.

    \b
    Example:
    rexdeploy serve
    rexdeploy serve rexnet_1.5 --port 9000
    """
    from rexdeploy.serving.front import Address
    from rexdeploy.serving.processes import stop_signals
    from rexdeploy.serving.server import prepare, running

    address = Address(host, port)
    log_line = partial(say, to_stderr=True)
    with taken_back_on_ctrl_c():
        service = prepare(
            bundle,
            repository,
            backend,
            tritonserver,
            address,
            max_request,
            open_api or (),
            require_signature,
        )
    with (
        stop_signals() as stop,
        running(
            service.binary, repository, address, log_line, show_log, service.guard, stop
        ) as process,
    ):
        with progress(quiet) as report:
            report("starting tritonserver")
            ready = process.wait_until_ready(service.names)
        if ready and not quiet:
            show_serving(service)
        process.wait(service.model.image_name)


def show_serving(service: Service) -> None:
    """Where a server answers, which other models it has, what it exposes, a command to try it."""
    result, others, address, guard = service.model, service.others, service.address, service.guard
    beside = ", ".join(f"{other.image_name} (version {other.version})" for other in others)
    output = result.signature.output_name
    header = (
        f'{{"inputs":[{{"name":"image","datatype":"UINT8","shape":[1,\'$n\'],'
        f'"parameters":{{"binary_data_size":\'$n\'}}}}],'
        f'"outputs":[{{"name":"{output}","parameters":{{"classification":5}}}}]}}'
    )
    opened = f"; open to every client: {', '.join(guard.opened)}" if guard.opened else ""
    say(
        f"{service.title}, tritonserver {service.binary.origin}",
        f"  HTTP     {service.url}",
        f"  gRPC     {address.grpc}",
        f"  metrics  {address.metrics}",
        f"  and      {beside}" if others else None,
        f"  limit    {guard.request_bytes / 2**20:.0f} MiB a request{opened}",
    )
    if not address.is_local:
        say(
            f"  exposed  whoever reaches {address.host} can classify images and read models' "
            "configurations, statistics and metrics, without a password and unencrypted"
        )
    say(
        "the five best classes of photo.jpg:",
        f"  n=$(wc -c < photo.jpg); h='{header}'",
        '  { printf %s "$h"; cat photo.jpg; } | curl -s --data-binary @- \\',
        "  -H 'Content-Type: application/octet-stream' \\",
        f'  -H "Inference-Header-Content-Length: ${{#h}}" {service.url}/infer',
        "Ctrl-C ends it",
    )
