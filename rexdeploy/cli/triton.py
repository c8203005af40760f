"""rexdeploy triton: its words."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rexdeploy.cli.console import check_json, emit, say, write_text
from rexdeploy.cli.shared import BundleArgument, Json, Quiet, taken_back_on_ctrl_c
from rexdeploy.text import printable

if TYPE_CHECKING:
    from rexdeploy.serving.deploy import Deployment
    from rexdeploy.serving.processes import Binary


def triton(
    bundle: BundleArgument = None,
    repository: Annotated[
        Path, typer.Option(metavar="DIR", help="Model repository to add it to.")
    ] = Path("artifacts/triton"),
    backend: Annotated[
        str,
        typer.Option(
            help="tensorrt, onnxruntime or python; auto: what the model has there, else what this "
            "machine's tritonserver can run, else the bundle's TensorRT engine or its graph."
        ),
    ] = "auto",
    name: Annotated[
        str | None, typer.Option(help="Name of the model [default: the bundle's].")
    ] = None,
    kserve: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write a KServe InferenceService, as YAML."),
    ] = None,
    storage_uri: Annotated[
        str, typer.Option(help="Where the cluster will find the repository.")
    ] = "pvc://models",
    image: Annotated[
        str, typer.Option(help="Container image of the cluster's Triton, with rexdeploy in it.")
    ] = "tritonserver-rexdeploy",
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Add a bundle to a model repository of NVIDIA's Triton Inference Server.

    Three models: the network (NAME), the decoding of image files (NAME_preprocess), and both in a
    row (NAME_image). A changed bundle becomes the next version, in one atomic step, which a server
    that polls, as 'rexdeploy serve' does, takes up without a pause.

    \b
    Example:
    rexdeploy triton rexnet_1.5
    """
    check_json(json)
    check_json(kserve)
    from rexdeploy.bundle.store import Bundle
    from rexdeploy.errors import BackendUnavailable
    from rexdeploy.serving.deploy import backend_here, check_place, deploy, inference_service
    from rexdeploy.serving.processes import Binary, find_server

    check_place(storage_uri, image)
    opened = Bundle.find(bundle)
    try:
        server: Binary | str = find_server()
    except BackendUnavailable as error:
        server = str(error)
    # A cluster's server is another one.
    here = server if isinstance(server, Binary) and kserve is None else None
    with taken_back_on_ctrl_c():
        chosen, why = backend_here(backend, repository, name or opened.manifest.name, here)
        result = deploy(opened, repository, chosen, name, why=why)
    if kserve is not None:
        write_text(kserve, inference_service(result.name, result.backend, storage_uri, image))
    emit(
        json,
        lambda: {
            "repository": printable(str(result.repository)),
            "network": result.name,
            "ensemble": result.image_name,
            "version": result.version,
            "added": result.added,
            "backend": result.backend,
            "batch": result.batch,
        },
    )
    if not quiet and Path("-") not in (json, kserve):
        show_deployment(opened.manifest.model.title, result, server)


def show_deployment(title: str, result: Deployment, server: Binary | str) -> None:
    """Where a bundle went in a model repository, and how to serve it.

    `server` is this machine's, or why there is none.
    """
    from rexdeploy.serving.repository import DEFAULT_REPOSITORY

    if isinstance(server, str):
        step = f"not served here: {server}"
    elif server.backends and result.backend not in server.backends:
        step = f"not served here: no {result.backend} backend in the tritonserver {server.origin}"
    elif result.repository == DEFAULT_REPOSITORY:
        step = "next: rexdeploy serve"
    else:
        step = f"next: rexdeploy serve --repository {shlex.quote(str(result.repository))}"
    version = (
        f"version {result.version}" if result.added else f"unchanged, version {result.version}"
    )
    say(
        f"{title} in {result.repository}: {version}",
        f"  {result.name}: {result.backend} backend ({result.reason}), batches up to "
        f"{result.batch.max}",
        f"  {result.image_name}: the same, of image files",
        step,
    )
