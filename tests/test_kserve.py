"""The KServe manifest against the published schema of an InferenceService."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from rexdeploy.errors import UsageError
from rexdeploy.serving.config import check_place, inference_service
from tests.helpers import DATA

yaml = pytest.importorskip("yaml")
SCHEMA = json.loads((DATA / "kserve_inferenceservice.json").read_text())["schema"]


def violations(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """What a Kubernetes API server would refuse, and the fields that it would silently drop."""
    if schema.get("x-cut"):
        return [f"{path}: the schema in tests/data was cut here"]
    if schema.get("x-kubernetes-int-or-string"):
        fits = re.search(schema.get("pattern", ""), str(value)) is not None
        return [] if fits and isinstance(value, int | str) else [f"{path}: {value}"]
    types = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    if not isinstance(value, types[schema["type"]]):
        return [f"{path}: {value!r} is no {schema['type']}"]
    found = []
    if isinstance(value, list):
        for item in value:
            found += violations(item, schema["items"], f"{path}[]")
    if isinstance(value, dict):
        fields, others = schema.get("properties", {}), schema.get("additionalProperties")
        found += [
            f"{path}: lacks {name}" for name in schema.get("required", []) if name not in value
        ]
        for name, item in value.items():
            known = fields.get(name, others)
            if known is None and fields:
                found.append(f"{path}.{name}: no such field")
            elif known is not None:
                found += violations(item, known, f"{path}.{name}")
    return found


@pytest.mark.parametrize("backend", ["python", "onnxruntime", "tensorrt"])
def test_the_manifest_follows_the_published_schema(backend: str) -> None:
    text = inference_service("rexnet_1.5", backend, "s3://bucket/models", "triton:1")
    service = yaml.safe_load(text)
    assert violations(service, SCHEMA) == []
    model = service["spec"]["predictor"]["model"]
    assert model["storageUri"] == "s3://bucket/models"
    assert model["image"] == "triton:1"
    assert ("nvidia.com/gpu" in model["resources"]["limits"]) == (backend == "tensorrt")
    assert ("onnxruntime" in text) == (backend == "python")
    # What is mounted is declared.
    declared = {volume["name"] for volume in service["spec"]["predictor"]["volumes"]}
    assert {mount["name"] for mount in model["volumeMounts"]} == declared


def test_the_check_finds_what_a_cluster_would_refuse() -> None:
    service = yaml.safe_load(inference_service("x", "python", "pvc://models", "image"))
    model = service["spec"]["predictor"]["model"]
    model["storageURI"] = model.pop("storageUri")
    model["resources"]["limits"]["memory"] = "plenty"
    del model["modelFormat"]["name"]
    found = "\n".join(violations(service, SCHEMA))
    for part in ("storageURI: no such field", "memory: plenty", "modelFormat: lacks name"):
        assert part in found


@pytest.mark.parametrize(
    "name", ["rexnet_1.5", "My_Model", "1.0", "x" * 80, "_-_a", "é", "on", "null"]
)
def test_names_are_names_in_kubernetes(name: str) -> None:
    service = yaml.safe_load(inference_service(name, "python", "pvc://models", "image"))
    # With "-predictor", as KServe makes a Service of it, at most 63 characters.
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,51}[a-z0-9])?", service["metadata"]["name"])


@pytest.mark.parametrize("image", ["123", "true", "1e3", "triton:"])
def test_what_yaml_could_take_for_something_else_stays_text(image: str) -> None:
    service = yaml.safe_load(inference_service("x", "python", f"pvc://{image}", image))
    model = service["spec"]["predictor"]["model"]
    assert (model["image"], model["storageUri"]) == (image, f"pvc://{image}")


@pytest.mark.parametrize(
    ("uri", "image", "part"),
    [
        ("models", "image", "storage-uri: got 'models'"),
        ("s3://a\nb: c", "image", "storage-uri"),
        ("s3://a #b", "image", "storage-uri"),
        ("pvc://models", "image: x", "image: got"),
        ("pvc://models", "", "image: got"),
    ],
)
def test_what_is_no_place_or_image_is_refused(uri: str, image: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        check_place(uri, image)
