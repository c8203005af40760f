"""Writes a bundle into a Triton model repository: the network, its preprocessing, an ensemble."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rexdeploy import machine
from rexdeploy.backends import engines
from rexdeploy.bundle.manifest import (
    DEFAULT_BATCH,
    MANIFEST,
    Artifact,
    BatchRange,
    Manifest,
    to_json,
)
from rexdeploy.bundle.metadata import check_preprocess
from rexdeploy.bundle.store import Bundle, is_bundle, sha256
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError
from rexdeploy.inference.classifier import int8_here
from rexdeploy.progress import Result
from rexdeploy.serving.config import (
    DEFAULT_IMAGE,
    DEFAULT_STORAGE,
    LABELS,
    SUFFIXES,
    Role,
    Settings,
    Signature,
    TritonBackend,
    configurations,
    inference_service,
    settings_in,
    signature_in,
)
from rexdeploy.serving.processes import Binary, find_server
from rexdeploy.serving.repository import (
    DEFAULT_REPOSITORY,
    Deployed,
    Model,
    changing,
    config_of,
    deployed,
    publish,
)
from rexdeploy.text import printable

_MODEL_NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_.+-]*")
_MODEL_PY = """import os
import sys

# Triton's Python does not heed PYTHONPATH.
sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))

from rexdeploy.triton_backend import {} as TritonPythonModel
"""


@dataclass(frozen=True, repr=False)
class Deployment(Result):
    """A bundle as it stands in a model repository."""

    repository: Path
    name: str  # the network: a tensor of images in, logits or probabilities out
    image_name: str  # the ensemble: the bytes of JPEG or PNG files in
    version: int
    added: bool  # False: the latest version was the same already
    backend: TritonBackend
    reason: str  # why that backend
    batch: BatchRange
    output: str  # the output's name, the same for both

    def __repr__(self) -> str:
        how = "added" if self.added else "unchanged"
        what = f"version {self.version}, {self.backend} backend: {how}"
        return f"<Deployment {self.repository / self.name}: {what}>"

    def _document(self) -> dict[str, Any]:
        return {
            "repository": printable(str(self.repository)),
            "network": self.name,
            "ensemble": self.image_name,
            "version": self.version,
            "added": self.added,
            "backend": self.backend,
            "batch": self.batch,
        }

    def inference_service(
        self, storage_uri: str = DEFAULT_STORAGE, image: str = DEFAULT_IMAGE
    ) -> str:
        """The YAML of a KServe InferenceService for it; raises UsageError.

        `storage_uri` is where the cluster will find the repository, and `image` its container image
        of Triton, with rexdeploy in it.
        """
        return inference_service(self.name, self.backend, storage_uri, image)


def triton(
    bundle: Bundle | Path | str | None = None,
    *,
    repository: Path | str = DEFAULT_REPOSITORY,
    backend: str = "auto",
    name: str | None = None,
    kserve: bool = False,
) -> Deployment:
    """Adds a bundle to a model repository of NVIDIA's Triton Inference Server.

    `bundle` is one, its folder, its name in artifacts/, or None: the latest one there. `backend` is
    "tensorrt", "onnxruntime", "python" or "auto", which looks at this machine's server unless
    `kserve` says that a cluster's will serve it. `name` is the model's, else the bundle's. All of
    it is there at once or nothing is.

    Raises UsageError where the bundle lacks what was asked for or the name is another model's,
    RexdeployError where the repository cannot be written.

    Example: `rexdeploy.triton("rexnet_1.5", backend="onnxruntime")`
    """
    bundle, repository = Bundle.find(bundle), Path(repository)
    try:
        server = None if kserve else find_server()
    except BackendUnavailable:
        server = None
    chosen, why = backend_here(backend, repository, name or bundle.manifest.name, server)
    return deploy(bundle, repository, chosen, name, why=why)


def deploy(
    bundle: Bundle,
    repository: Path,
    backend: str = "auto",
    name: str | None = None,
    settings: Settings | None = None,
    why: str = "asked for",
) -> Deployment:
    """Adds the bundle to the repository as the next version of the model `name`.

    All of it is there at once or, if anything fails, nothing (`publish`). `backend` is one of
    Triton's, and `why` the reason to tell for it, or "auto": what the bundle is best at. The
    `settings` are those that the model has in the repository, unless others are given. Raises
    UsageError where the bundle lacks what was asked for, where the name is somebody else's model,
    and where the model of that name has another signature; RexdeployError where it cannot be
    written.
    """
    name = name or bundle.manifest.name
    if not _MODEL_NAME.fullmatch(name):
        raise UsageError(f"name: got '{name}', expected letters, digits, _, ., + and -")
    chosen, files, reason = _choose(bundle.manifest, backend, why)
    batch = next((file.batch for file in files if file.batch), DEFAULT_BATCH)
    graph = bundle.manifest.graph
    if graph is not None:
        check_preprocess(bundle, graph, bundle.read(graph))
    is_fixed = graph is not None and graph.batch is not None  # a dimension of 1 is no open one
    if chosen != "python" and (is_fixed or batch.min > 1):
        raise UsageError(
            f"{files[0].file} takes batches of {batch.min} to {batch.max}, and Triton's {chosen} "
            "backend wants any from 1 on; take --backend python, which fills batches up, or export "
            "with --batch dynamic"
        )
    labels_file = bundle.manifest.find("labels")
    labels = bundle.read(labels_file) if labels_file else b""
    spec = bundle.manifest.model
    signature = Signature(
        backend=chosen,
        input=spec.input,
        input_name=spec.input_name,
        output=spec.output,
        output_name=spec.output_name,
        num_classes=spec.num_classes,
        preprocess=spec.preprocess,
        labels=sha256(labels) if labels else None,
    )
    named = {LABELS: labels} if labels else {}
    shared: dict[Role, dict[str, bytes]] = {"preprocess": {}, "network": named, "ensemble": named}
    versions: dict[Role, dict[str, bytes]] = {
        "preprocess": _python_files("Preprocess", replace(bundle.manifest, artifacts=())),
        "network": _network_files(bundle, chosen, files),
        "ensemble": {".keep": b""},
    }
    if repository.exists() and not repository.is_dir():
        raise UsageError(f"repository: {repository} is a file, expected a folder of models")
    if is_bundle(repository):
        raise UsageError(
            f"repository: {repository} is a bundle, expected a folder of models; choose another"
        )
    try:
        with changing(repository) as staging:
            if settings is None:  # read where no other command can change them meanwhile
                settings = settings_in(config_of(repository / name) or "")
            configs = configurations(name, signature, batch, settings)
            models = [
                Model(role, name + suffix, configs[role], shared[role], versions[role])
                for role, suffix in SUFFIXES.items()
            ]
            _check(repository, models, signature)
            published = publish(models, repository, staging)
    except OSError as error:
        raise RexdeployError(
            f"cannot write the model repository {repository} ({error.strerror}); nothing was "
            "changed: free some space, or give as --repository a folder in a folder of the same "
            "disk that can be written, for models appear by a rename from there"
        ) from None
    number, added = published[1]
    return Deployment(
        repository, name, models[2].name, number, added, chosen, reason, batch, spec.output_name
    )


def backend_here(
    wanted: str, repository: Path, name: str, server: Binary | None
) -> tuple[str, str]:
    """The backend to deploy the model `name` for, as `deploy` takes it, and why.

    Of "auto": the one that the model has in the repository; then one that the `server` of this
    machine has; without a server, what the bundle is best at.
    """
    if wanted != "auto":
        return wanted, "asked for"
    for model in deployed(repository):
        if model.name == name:
            return model.signature.backend, "as its versions before"
    if server is None:
        return "auto", ""
    if machine.detect() is None:
        return "python", "no NVIDIA GPU on this machine"
    if not server.backends >= {"tensorrt", "onnxruntime"}:
        return "python", f"the tritonserver {server.origin} lacks TensorRT's or ONNX Runtime's"
    return "auto", ""


def servable(repository: Path, server: Binary) -> list[Deployed]:
    """Our models in the repository; raises UsageError for one that the server could not load."""
    models = deployed(repository)
    for model in models:
        backend = model.signature.backend
        if server.lacks(backend):
            known = ", ".join(sorted(server.backends))
            raise UsageError(
                f"{repository / model.name} is for Triton's {backend} backend, and the "
                f"tritonserver {server.origin} has only {known}; add the bundle to another "
                "--repository with --backend python, or give another --tritonserver"
            )
        for suffix in SUFFIXES.values():
            part = model.name + suffix
            if config_of(repository / part) is None:
                raise UsageError(
                    f"{repository} has {model.name} but not {part}, which belongs to it; run "
                    "'rexdeploy triton' on its bundle again"
                )
    return models


def _choose(manifest: Manifest, wanted: str, why: str) -> tuple[TritonBackend, list[Artifact], str]:
    """The backend, the files that it may run (best first), and why it was chosen."""
    known = engines(manifest)
    proven = [engine for engine in known if engine.proof_fault is None]
    plans = [engine for engine in proven if engine.flavor == "tensorrt"]
    graphs = [graph for graph in (manifest.graph,) if graph is not None]
    int8 = [graph for graph in (int8_here(manifest),) if graph is not None]
    passed_over = "; ".join(
        f"{engine.file} is passed over: {engine.proof_fault}"
        for engine in known
        if engine not in proven
    )
    if wanted == "auto" and plans:
        wanted, why = "tensorrt", "the bundle's engine"
    elif wanted == "auto" and graphs:
        wanted, why = "onnxruntime", "the bundle has no engine that Triton runs"
    elif wanted == "auto":
        wanted, why = "python", "the bundle has TensorRT-RTX engines only"
    choices: dict[str, tuple[TritonBackend, list[Artifact]]] = {
        "tensorrt": ("tensorrt", plans[:1]),
        # Triton's onnxruntime asks for no VNNI where it is served, and may take a GPU.
        "onnxruntime": ("onnxruntime", graphs),
        "python": ("python", [*proven, *graphs, *int8]),  # the first graph of a bundle is its root
    }
    if wanted not in choices:
        raise UsageError(f"backend: got '{wanted}', expected one of auto, {', '.join(choices)}")
    backend, files = choices[wanted]
    if files:
        return backend, files, "; ".join(filter(None, (why, passed_over)))
    if backend == "tensorrt":
        has = "only TensorRT-RTX engines, which Triton cannot run" if proven else "no engine"
        has += f" ({passed_over})" if passed_over else ""
        raise UsageError(
            f"--backend tensorrt: the bundle has {has}; run 'rexdeploy build-trt --flavor "
            "tensorrt', or take --backend python or onnxruntime"
        )
    if backend == "onnxruntime":
        raise UsageError("--backend onnxruntime: the bundle has no ONNX graph; export it again")
    raise UsageError("the bundle has neither an engine nor an ONNX graph; export it again")


def _network_files(
    bundle: Bundle, backend: TritonBackend, files: list[Artifact]
) -> dict[str, bytes]:
    """A version of the network; of the Python backend's, a bundle of what it may run."""
    data = {artifact.file: bundle.read(artifact) for artifact in files}
    if backend == "python":
        cut = tuple(replace(artifact, parent_sha256=None) for artifact in files)
        return _python_files("Network", replace(bundle.manifest, artifacts=cut)) | data
    return {"model.plan" if backend == "tensorrt" else "model.onnx": data[files[0].file]}


def _python_files(kind: str, manifest: Manifest) -> dict[str, bytes]:
    return {
        "model.py": _MODEL_PY.format(kind).encode(),
        # In place of the folder that Python would make, which a polling server takes for a change.
        "__pycache__": b"",
        MANIFEST: to_json(replace(manifest, updated_at="")),  # equal files, equal bytes
    }


def _check(repository: Path, models: list[Model], signature: Signature) -> None:
    """Raises UsageError where a model would meet one that is not ours or has another signature."""
    name = next(model.name for model in models if model.role == "network")
    for model in sorted(models, key=lambda model: model.role != "network"):
        folder = repository / model.name
        if not os.path.lexists(folder):
            continue
        there = signature_in(config_of(folder) or "", model.role)
        if there is None:
            raise UsageError(
                f"{folder} is no {model.role} that rexdeploy has written; choose another --name "
                "or --repository"
            )
        before, after = asdict(there), asdict(signature)
        changed = [field for field in after if before[field] != after[field]]
        if changed:
            same = f"take --backend {there.backend}, or " if changed == ["backend"] else ""
            raise UsageError(
                f"{folder} has versions with another {', '.join(changed)}, and all versions of a "
                f"model share one configuration; {same}choose another --repository, or --name of "
                f"'rexdeploy triton', or remove {name}, {name}_preprocess and {name}_image there"
            )
