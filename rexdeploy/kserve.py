"""A Kubernetes manifest that serves a model repository with KServe and its Triton runtime."""

from __future__ import annotations

import re

from rexdeploy.errors import UsageError

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

    `storage_uri` is where the cluster finds the repository, `image` the server's container image:
    both as `check_place` takes them.
    """
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
