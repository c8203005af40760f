"""The config.pbtxt texts of the three models, what is read back from them, and KServe's YAML."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import msgspec

from rexdeploy.bundle.manifest import BatchRange, InputForm, OutputForm, Preprocess
from rexdeploy.errors import UsageError

TritonBackend = Literal["tensorrt", "onnxruntime", "python"]
Role = Literal["network", "preprocess", "ensemble"]
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


def network_config(name: str, signature: Signature, batch: BatchRange, settings: Settings) -> str:
    """Of the network itself; `batch` is what its file takes."""
    image = _image_tensor(signature)
    warmup = "".join(
        f"""
model_warmup {{
  name: "batch {size}"
  batch_size: {size}
  inputs {{ key: {_quoted(signature.input_name)} value {{ {image} zero_data: true }} }}
}}"""
        for size in sorted({1, batch.opt})
    )
    kept = "" if settings == DEFAULTS else "\n" + _marker(_SETTINGS, settings)
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
instance_group [ {{ kind: {kind[signature.backend]} count: {settings.instances} }} ]
{_batching(batch, settings)}{warmup}{accelerator}
{_marker("network", signature)}{kept}
"""


def _batching(batch: BatchRange, settings: Settings) -> str:
    """How requests become batches, within what the network's file takes."""
    best = min(settings.batch or batch.opt, batch.max)
    if settings.batch == 1:
        return "# Each request runs by itself, as tune-serving found best."
    preferred = sorted({best, batch.max} - {1})
    sizes = f" preferred_batch_size: {preferred}" if preferred else ""
    if settings.delay_us:
        delay = f"max_queue_delay_microseconds: {settings.delay_us}"
        return f"# As tune-serving found best.\ndynamic_batching {{{sizes} {delay} }}"
    return (
        "# No delay: while one batch runs, the next one forms, and a lone request waits for nobody."
        f"\ndynamic_batching {{{sizes} }}"
    )


def preprocess_config(name: str, signature: Signature, batch: BatchRange) -> str:
    """Of what makes the network's input of image files."""
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


def ensemble_config(name: str, signature: Signature, batch: BatchRange) -> str:
    """Of the two in a row; `name` is the network's."""
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
    labels = f' label_filename: "{LABELS}"' if signature.labels else ""
    return (
        f"output [ {{ name: {_quoted(signature.output_name)} data_type: TYPE_FP32 "
        f"dims: [ {signature.num_classes} ]{labels} }} ]"
    )


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


_TEMPLATE = """\
# Serves the model repository at storageUri: the folder that 'rexdeploy triton' wrote, copied there.
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: "{service}"
spec:
  predictor:
    minReplicas: 1
    model:
      modelFormat:
        name: triton
      runtime: kserve-tritonserver
      protocolVersion: v2
      storageUri: "{storage_uri}"
      # Triton's image with what its Python runs (the preprocessing{network}):
      # pip install rexdeploy{packages}
      image: "{image}"
      resources:
        requests:
          cpu: "2"
          memory: 4Gi
        limits:
          memory: 4Gi{gpu}
      volumeMounts:
        - name: shared-memory
          mountPath: /dev/shm
    volumes:
      # Tensors go to and from Triton's Python through it, and a container's own is 64 MiB.
      - name: shared-memory
        emptyDir:
          medium: Memory
          sizeLimit: 1Gi
"""
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
    return _TEMPLATE.format(
        service=service,
        storage_uri=storage_uri,
        image=image,
        network=" and the network" if python else "",
        packages=" onnxruntime" if python else "",
        gpu='\n          nvidia.com/gpu: "1"' if backend == "tensorrt" else "",
    )
