"""rexdeploy triton: its words."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rexdeploy.cli.console import check_json, emit, say, write_text
from rexdeploy.cli.shared import BundleArgument, Json, Quiet, taken_back_on_ctrl_c

if TYPE_CHECKING:
    from rexdeploy.serving.deploy import Deployment


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
    from rexdeploy.serving.config import check_place
    from rexdeploy.serving.deploy import triton as run

    check_place(storage_uri, image)
    opened = Bundle.find(bundle)
    with taken_back_on_ctrl_c():
        result = run(
            opened, repository=repository, backend=backend, name=name, kserve=kserve is not None
        )
    if kserve is not None:
        write_text(kserve, result.inference_service(storage_uri, image))
    emit(json, result)
    if not quiet and Path("-") not in (json, kserve):
        show_deployment(opened.manifest.model.title, result)


def show_deployment(title: str, result: Deployment) -> None:
    """Where a bundle went in a model repository, and how to serve it here, or why it cannot be."""
    from rexdeploy.errors import BackendUnavailable
    from rexdeploy.serving.processes import find_server
    from rexdeploy.serving.repository import DEFAULT_REPOSITORY

    try:
        server = find_server()
    except BackendUnavailable as error:
        step = f"not served here: {error}"
    else:
        folder = shlex.quote(str(result.repository))
        option = "" if result.repository == DEFAULT_REPOSITORY else f" --repository {folder}"
        step = f"next: rexdeploy serve{option}"
        if server.lacks(result.backend):
            step = (
                f"not served here: no {result.backend} backend in the tritonserver {server.origin}"
            )
    unchanged = "" if result.added else "unchanged, "
    say(
        f"{title} in {result.repository}: {unchanged}version {result.version}",
        f"  {result.name}: {result.backend} backend ({result.reason}), batches up to "
        f"{result.batch.max}",
        f"  {result.image_name}: the same, of image files",
        step,
    )
