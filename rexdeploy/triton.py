"""Writes a bundle into a Triton model repository: the network, its preprocessing, an ensemble."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec

from rexdeploy.backends import engines
from rexdeploy.bundle import Bundle, is_bundle, sha256
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.manifest import (
    DEFAULT_BATCH,
    Artifact,
    BatchRange,
    InputForm,
    Manifest,
    OutputForm,
    Preprocess,
    to_json,
)
from rexdeploy.metadata import check_preprocess

TritonBackend = Literal["tensorrt", "onnxruntime", "python"]
Role = Literal["network", "preprocess", "ensemble"]
BACKENDS: tuple[TritonBackend, ...] = ("tensorrt", "onnxruntime", "python")

_MODEL_NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_.+-]*")
_MARKER = "rexdeploy_"  # and a role: the parameter of config.pbtxt by which we know our own models
_CONFIG = "config.pbtxt"
_LABELS = "labels.txt"
_MODEL_PY = """import os
import sys

# Triton's Python does not heed PYTHONPATH.
sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))

from rexdeploy.triton_backend import {} as TritonPythonModel
"""


@dataclass(frozen=True)
class Signature:
    """What the clients of a model rely on: equal in every version that has its name."""

    backend: TritonBackend
    input: InputForm
    input_name: str
    output: OutputForm
    output_name: str
    num_classes: int
    preprocess: Preprocess
    labels: str | None  # the SHA-256 of their file


@dataclass(frozen=True)
class Deployment:
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


def deploy(
    bundle: Bundle, repository: Path, backend: str = "auto", name: str | None = None
) -> Deployment:
    """Adds the bundle to the repository as the next version of the model `name`.

    Each of the three models appears, and each version is added, by one rename: a server that polls
    the repository never sees a part of one. `backend` is one of BACKENDS or "auto". Raises
    UsageError where the bundle lacks what was asked for, where the name is somebody else's model,
    and where the model of that name has another signature.
    """
    name = name or bundle.manifest.name
    if not _MODEL_NAME.fullmatch(name):
        raise UsageError(f"name: got '{name}', expected letters, digits, _, ., + and -")
    chosen, files, reason = _choose(bundle.manifest, backend)
    batch = next((file.batch for file in files if file.batch), DEFAULT_BATCH)
    graph = bundle.manifest.find("onnx")
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
    labels = bundle.read(labels_file) if labels_file else None
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
    shared = {_LABELS: labels} if labels else {}
    models = [
        _Model(
            "preprocess",
            f"{name}_preprocess",
            _preprocess_config(f"{name}_preprocess", signature, batch),
            {},
            _python_files("Preprocess", bundle.manifest, {}),
        ),
        _Model(
            "network",
            name,
            _network_config(name, signature, batch),
            shared,
            _network_files(bundle, chosen, files),
        ),
        _Model(
            "ensemble",
            f"{name}_image",
            _ensemble_config(name, signature, batch),
            shared,
            {".keep": b""},
        ),
    ]
    _check(repository, models, signature)
    try:
        repository.mkdir(parents=True, exist_ok=True)
        # Beside the repository: Triton takes every folder inside for a model.
        with tempfile.TemporaryDirectory(
            prefix=f".{repository.name}.", dir=repository.resolve().parent
        ) as staging:
            published = [_publish(model, repository, Path(staging)) for model in models]
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # a rename to what was not there before
            raise RexdeployError(
                f"{repository} was changed by another command meanwhile; run this one again"
            ) from None
        raise RexdeployError(
            f"cannot write the model repository {repository} ({error.strerror}); expected a folder "
            "in a folder of the same disk that can be written: models appear by a rename from there"
        ) from None
    version, added = published[1]
    return Deployment(
        repository, name, models[2].name, version, added, chosen, reason, batch, spec.output_name
    )


@dataclass(frozen=True)
class _Model:
    """One model of the repository; `shared` and `version` are files' bytes by name.

    Only the network has more than one version: what decodes images is the same by the signature.
    """

    role: Role
    name: str
    config: str
    shared: Mapping[str, bytes]
    version: Mapping[str, bytes]


def _choose(manifest: Manifest, wanted: str) -> tuple[TritonBackend, list[Artifact], str]:
    """The backend, the files that it may run (best first), and why it was chosen."""
    if wanted not in ("auto", *BACKENDS):
        raise UsageError(f"backend: got '{wanted}', expected one of auto, {', '.join(BACKENDS)}")
    known = engines(manifest)
    built = [engine for engine in known if engine.proof_fault is None]
    unproven = "; ".join(
        f"{engine.file} is passed over: {engine.proof_fault}"
        for engine in known
        if engine.proof_fault is not None
    )
    plans = [engine for engine in built if engine.built_with.get("flavor") == "tensorrt"]
    graph = manifest.find("onnx")
    if wanted == "tensorrt" and not plans:
        has = "only TensorRT-RTX engines, which Triton cannot run" if built else "no engine"
        has += f" ({unproven})" if unproven else ""
        raise UsageError(
            f"--backend tensorrt: the bundle has {has}; run 'rexdeploy build-trt --flavor "
            "tensorrt', or take --backend python or onnxruntime"
        )
    if wanted == "onnxruntime" and graph is None:
        raise UsageError("--backend onnxruntime: the bundle has no ONNX graph; export it again")
    because = f"; {unproven}" if unproven else ""
    if wanted == "tensorrt" or (wanted == "auto" and plans):
        reason = "asked for" if wanted != "auto" else "the bundle's engine"
        return "tensorrt", plans[:1], reason + because
    if graph is not None and wanted in ("auto", "onnxruntime"):
        reason = "asked for" if wanted != "auto" else "the bundle has no engine that Triton runs"
        return "onnxruntime", [graph], reason + because
    runnable = [*built, *([graph] if graph else [])]
    if not runnable:
        raise UsageError("the bundle has neither an engine nor an ONNX graph; export it again")
    reason = "asked for" if wanted != "auto" else "the bundle has TensorRT-RTX engines only"
    return "python", runnable, reason + because


def _network_files(
    bundle: Bundle, backend: TritonBackend, files: list[Artifact]
) -> dict[str, bytes]:
    """A version of the network; of the Python backend's, a bundle of what it may run."""
    data = {artifact.file: bundle.read(artifact) for artifact in files}
    if backend == "tensorrt":
        return {"model.plan": data[files[0].file]}
    if backend == "onnxruntime":
        return {"model.onnx": data[files[0].file]}
    cut = tuple(replace(artifact, parent_sha256=None) for artifact in files)
    return _python_files("Network", replace(bundle.manifest, artifacts=cut), data)


def _python_files(kind: str, manifest: Manifest, data: Mapping[str, bytes]) -> dict[str, bytes]:
    kept = tuple(item for item in manifest.artifacts if item.file in data)
    manifest = replace(manifest, artifacts=kept, updated_at="")  # equal files, equal bytes
    return {
        "model.py": _MODEL_PY.format(kind).encode(),
        # In place of the folder that Python would make, which a polling server takes for a change.
        "__pycache__": b"",
        "manifest.json": to_json(manifest),
        **data,
    }


def _network_config(name: str, signature: Signature, batch: BatchRange) -> str:
    image = _image_tensor(signature)
    preferred = sorted({batch.opt, batch.max} - {1})
    batching = f"preferred_batch_size: {preferred}" if preferred else ""
    warmup = "".join(
        f"""
model_warmup {{
  name: "batch {size}"
  batch_size: {size}
  inputs {{ key: {_quoted(signature.input_name)} value {{ {image} zero_data: true }} }}
}}"""
        for size in sorted({1, batch.opt})
    )
    # The Python backend's model looks for a GPU itself; for the others Triton places instances.
    kind = {"python": "KIND_CPU", "tensorrt": "KIND_GPU", "onnxruntime": "KIND_AUTO"}
    accelerator = (
        """
# TensorFloat-32 rounds products to 10 bits: not the network's logits.
optimization { execution_accelerators { gpu_execution_accelerator [
  { name: "cuda" parameters { key: "use_tf32" value: "0" } }
] } }"""
        if signature.backend == "onnxruntime"
        else ""
    )
    return f"""name: {_quoted(name)}
backend: "{signature.backend}"
max_batch_size: {batch.max}
input [ {{ name: {_quoted(signature.input_name)} {image} }} ]
{_output(signature)}
# Only the newest version answers; an older one is a folder to go back to, by removing newer ones.
version_policy {{ latest {{ num_versions: 1 }} }}
instance_group [ {{ kind: {kind[signature.backend]} count: 1 }} ]
# No delay: while one batch runs, the next one forms, and a lone request waits for nobody.
dynamic_batching {{ {batching} }}{warmup}{accelerator}
{_marker("network", signature)}
"""


def _preprocess_config(name: str, signature: Signature, batch: BatchRange) -> str:
    return f"""name: {_quoted(name)}
backend: "python"
max_batch_size: {batch.max}
# The bytes of one image file, and zeros after it.
input [ {{ name: "image" data_type: TYPE_UINT8 dims: [ -1 ] allow_ragged_batch: true }} ]
output [ {{ name: "preprocessed" {_image_tensor(signature)} }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
# What has queued up is decoded in parallel, and reaches the network together.
dynamic_batching {{ }}
{_marker("preprocess", signature)}
"""


def _ensemble_config(name: str, signature: Signature, batch: BatchRange) -> str:
    return f"""name: {_quoted(name + "_image")}
platform: "ensemble"
max_batch_size: {batch.max}
# The bytes of one image file; the shorter ones of a batch are filled up with zeros.
input [ {{ name: "image" data_type: TYPE_UINT8 dims: [ -1 ] }} ]
{_output(signature)}
ensemble_scheduling {{
  step [
    {{
      model_name: {_quoted(name + "_preprocess")}
      model_version: -1
      input_map {{ key: "image" value: "image" }}
      output_map {{ key: "preprocessed" value: "preprocessed" }}
    }},
    {{
      model_name: {_quoted(name)}
      model_version: -1
      input_map {{ key: {_quoted(signature.input_name)} value: "preprocessed" }}
      output_map {{
        key: {_quoted(signature.output_name)} value: {_quoted(signature.output_name)}
      }}
    }}
  ]
}}
{_marker("ensemble", signature)}
"""


def _image_tensor(signature: Signature) -> str:
    kind = "TYPE_UINT8" if signature.input == "uint8" else "TYPE_FP32"
    return f"data_type: {kind} dims: {list(signature.preprocess.shape(signature.input))}"


def _output(signature: Signature) -> str:
    labels = f' label_filename: "{_LABELS}"' if signature.labels else ""
    return (
        f"output [ {{ name: {_quoted(signature.output_name)} data_type: TYPE_FP32 "
        f"dims: [ {signature.num_classes} ]{labels} }} ]"
    )


def _marker(role: Role, signature: Signature) -> str:
    text = msgspec.json.encode(signature).decode()
    return f'parameters {{ key: "{_MARKER}{role}" value {{ string_value: {_quoted(text)} }} }}'


def _quoted(text: str) -> str:
    """Text as protobuf's text format writes it, whose escapes are JSON's."""
    return json.dumps(text, ensure_ascii=False)


def _signature(role: Role, config: str) -> Signature | None:
    """The signature in a config.pbtxt of ours; None if it is not ours, or of another role."""
    found = re.search(rf'key: "{_MARKER}{role}" value {{ string_value: ("(?:[^"\\]|\\.)*")', config)
    if found is None:
        return None
    try:
        return msgspec.json.decode(json.loads(found[1]), type=Signature)
    except (ValueError, msgspec.DecodeError):
        return None


def _check(repository: Path, models: list[_Model], signature: Signature) -> None:
    """Raises UsageError where a model would meet one that is not ours or has another signature."""
    if repository.exists() and not repository.is_dir():
        raise UsageError(f"repository: {repository} is a file, expected a folder of models")
    if is_bundle(repository):
        raise UsageError(
            f"repository: {repository} is a bundle, expected a folder of models; choose another"
        )
    for model in sorted(models, key=lambda model: model.role != "network"):
        folder = repository / model.name
        if not os.path.lexists(folder):
            continue
        try:
            there = _signature(model.role, (folder / _CONFIG).read_text(errors="replace"))
        except OSError:
            there = None
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
                f"model share one configuration; {same}choose another --name or --repository"
            )


def _publish(model: _Model, repository: Path, staging: Path) -> tuple[int, bool]:
    """Adds the model or its next version by one rename; its latest version, whether it is new."""
    folder = repository / model.name
    staged = staging / model.name
    latest = max(
        (int(path.name) for path in folder.glob("[1-9]*") if path.name.isdecimal()), default=0
    )
    is_new = not latest or (
        model.role == "network" and not _holds(folder / str(latest), model.version)
    )
    version = latest + is_new
    if is_new:
        _write_all(staged / str(version), model.version)
    _write_all(staged, {_CONFIG: model.config.encode(), **model.shared})
    if not folder.exists():
        staged.rename(folder)
        return version, True
    if is_new:
        (staged / str(version)).rename(folder / str(version))
    for name in (*model.shared, _CONFIG):
        if not _is(folder / name, (staged / name).read_bytes()):
            os.replace(staged / name, folder / name)
    return version, is_new


def _holds(folder: Path, files: Mapping[str, bytes]) -> bool:
    """Whether these are the folder's files."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    return names == set(files) and all(_is(folder / name, data) for name, data in files.items())


def _is(path: Path, data: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


def _write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        with open(folder / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
