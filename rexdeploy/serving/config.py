"""The config.pbtxt texts of the three models, what is read back from them, and KServe's YAML."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Annotated, Literal, TypeVar

import msgspec

from rexdeploy.bundle.manifest import BatchRange, InputForm, OutputForm, Preprocess
from rexdeploy.errors import UsageError

TritonBackend = Literal["tensorrt", "onnxruntime", "python"]
Role = Literal["preprocess", "network", "ensemble"]
SUFFIXES: dict[Role, str] = {"preprocess": "_preprocess", "network": "", "ensemble": "_image"}
"""What the name of each of the three models adds to the network's."""
CONFIG = "config.pbtxt"
DEFAULT_STORAGE, DEFAULT_IMAGE = "pvc://models", "tritonserver-rexdeploy"  # of a KServe cluster
LABELS = "labels.txt"
_MARKER = "rexdeploy_"  # and a role: the parameter of config.pbtxt by which we know our own models
_SETTINGS = "settings"  # of a network, in the place of a role
_Positive = Annotated[int, msgspec.Meta(ge=1)]


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
class Settings:
    """How Triton puts requests together: what a version may change without its clients noticing."""

    batch: _Positive | None = None  # to run together where as many wait; None: the file's best
    delay_us: Annotated[int, msgspec.Meta(ge=0)] = 0  # for which a request may wait for others
    instances: _Positive = 1  # copies of the network that run side by side


DEFAULTS = Settings()
_NO_TF32 = """
# TensorFloat-32 rounds products to 10 bits: not the network's logits.
optimization { execution_accelerators { gpu_execution_accelerator [
  { name: "cuda" parameters { key: "use_tf32" value: "0" } }
] } }"""


def configurations(
    name: str, signature: Signature, batch: BatchRange, settings: Settings
) -> dict[Role, str]:
    """The config.pbtxt of each of the three models; `batch` is what the network's file takes."""
    kinds = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8"}
    dims = list(signature.preprocess.shape(signature.input))
    image = f"data_type: {kinds[signature.input]} dims: {dims}"
    labels = f' label_filename: "{LABELS}"' if signature.labels else ""
    warmups = (
        f"""
model_warmup {{
  name: "batch {size}"
  batch_size: {size}
  inputs {{ key: {_quoted(signature.input_name)} value {{ {image} zero_data: true }} }}
}}"""
        for size in sorted({1, batch.opt})
    )
    # The Python backend's model looks for a GPU itself; for the others Triton places instances.
    places = {"python": "KIND_CPU", "tensorrt": "KIND_GPU", "onnxruntime": "KIND_AUTO"}
    common = {
        **{f"{role}_name": _quoted(name + suffix) for role, suffix in SUFFIXES.items()},
        "input_name": _quoted(signature.input_name),
        "output_name": _quoted(signature.output_name),
        "backend": signature.backend,
        "max_batch": batch.max,
        "image": image,
        "output": f"{{ name: {_quoted(signature.output_name)} data_type: TYPE_FP32 "
        f"dims: [ {signature.num_classes} ]{labels} }}",
        "kind": places[signature.backend],
        "instances": settings.instances,
        "batching": _batching(batch, settings),
        "warmups": "".join(warmups),
        "accelerator": _NO_TF32 if signature.backend == "onnxruntime" else "",
        "kept": "" if settings == DEFAULTS else "\n" + _marker(_SETTINGS, settings),
    }
    return {
        role: _filled(f"triton_{role}.pbtxt", marker=_marker(role, signature), **common)
        for role in SUFFIXES
    }


def _batching(batch: BatchRange, settings: Settings) -> str:
    """How requests become batches, within what the network's file takes."""
    if settings.batch == 1:
        return "# Each request runs by itself, as tune-serving found best."
    best = min(settings.batch or batch.opt, batch.max)
    preferred = sorted({best, batch.max} - {1})
    sizes = f" preferred_batch_size: {preferred}" if preferred else ""
    if settings.delay_us:
        delay = f"max_queue_delay_microseconds: {settings.delay_us}"
        return f"# As tune-serving found best.\ndynamic_batching {{{sizes} {delay} }}"
    return (
        "# No delay: while one batch runs, the next one forms, and a lone request waits for nobody."
        f"\ndynamic_batching {{{sizes} }}"
    )


def _filled(template: str, **values: object) -> str:
    """A template of the package's data, with its $names replaced."""
    text = resources.files("rexdeploy").joinpath(f"data/{template}").read_text(encoding="utf-8")
    return Template(text).substitute(values)


def _marker(what: str, value: Signature | Settings) -> str:
    text = msgspec.json.encode(value).decode()
    return f'parameters {{ key: "{_MARKER}{what}" value {{ string_value: {_quoted(text)} }} }}'


def _quoted(text: str) -> str:
    """Text as protobuf's text format writes it, whose escapes are JSON's."""
    return json.dumps(text, ensure_ascii=False)


def signature_in(config: str, role: Role) -> Signature | None:
    """The signature in a config.pbtxt of ours; None if it is not ours, or of another role."""
    return _marked(config, role, Signature)


def settings_in(config: str) -> Settings:
    """The settings in a network's config.pbtxt; the usual ones where none can be read there."""
    return _marked(config, _SETTINGS, Settings) or DEFAULTS


def max_batch_in(config: str) -> int:
    """The largest batch in a network's config.pbtxt; 1 where none can be read there."""
    found = re.search(r"^max_batch_size: ([0-9]{1,6})$", config, re.MULTILINE)
    return int(found[1]) if found else 1


_Marked = TypeVar("_Marked", Signature, Settings)


def _marked(config: str, what: str, kind: type[_Marked]) -> _Marked | None:
    found = re.search(rf'key: "{_MARKER}{what}" value {{ string_value: ("(?:[^"\\]|\\.)*")', config)
    if found is None:
        return None
    try:
        return msgspec.json.decode(json.loads(found[1]), type=kind)
    except (ValueError, msgspec.DecodeError):
        return None


def image_request(file: bytes, output: str | None = None) -> tuple[bytes, dict[str, str]]:
    """The body and headers of a request with one image file, for an ensemble's `output` or all."""
    size = len(file)
    wanted: dict[str, object] = {
        "inputs": [
            {
                "name": "image",
                "datatype": "UINT8",
                "shape": [1, size],
                "parameters": {"binary_data_size": size},
            }
        ]
    }
    if output is not None:
        wanted["outputs"] = [{"name": output, "parameters": {"binary_data": True}}]
    header = json.dumps(wanted).encode()
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(header)),
    }
    return header + file, headers


_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@:+-]*")  # no quote, no escape, no white space
_MAX_NAME = 63 - len("-predictor")  # KServe makes a Kubernetes Service NAME-predictor
_SCHEMES = ("s3://", "gs://", "pvc://", "https://", "http://", "hdfs://", "hf://", "oci://")


def check_place(storage_uri: str, image: str) -> None:
    """Raises UsageError for a repository's place or a container image that cannot be meant."""
    if not storage_uri.startswith(_SCHEMES) or not _PLAIN.fullmatch(storage_uri):
        raise UsageError(
            f"storage-uri: got '{storage_uri}', expected a place that KServe reads, such as "
            "s3://BUCKET/FOLDER or pvc://CLAIM/FOLDER"
        )
    if not _PLAIN.fullmatch(image):
        raise UsageError(f"image: got '{image}', expected a container image's name")


def inference_service(name: str, backend: str, storage_uri: str, image: str) -> str:
    """The YAML of an InferenceService for the model `name` and its backend in the repository.

    `storage_uri` is where the cluster finds the repository, `image` the server's container image.
    Raises UsageError for what cannot be either (`check_place`).
    """
    check_place(storage_uri, image)
    # A Kubernetes name: lower case, letters, digits and -, beginning with a letter.
    service = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    service = (service if service[:1].isalpha() else f"model-{service}")[:_MAX_NAME].rstrip("-")
    python = backend == "python"
    return _filled(
        "kserve.yaml",
        service=service,
        storage_uri=storage_uri,
        image=image,
        network=" and the network" if python else "",
        packages=" onnxruntime" if python else "",
        gpu='\n          nvidia.com/gpu: "1"' if backend == "tensorrt" else "",
    )
