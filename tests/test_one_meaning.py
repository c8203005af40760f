"""One file, one meaning: Python and C++ read a manifest to the same values, or both refuse it."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from rexdeploy.bundle.manifest import (
    Artifact,
    BatchRange,
    Manifest,
    ModelSpec,
    Preprocess,
    WeightsOrigin,
    decode,
    to_json,
)
from rexdeploy.bundle.precision import PrecisionProof
from rexdeploy.errors import UsageError
from tests.cpp_probe import probe
from tests.mutations import ODD_JSON, mutated_json

pytestmark = pytest.mark.slow

MANIFEST = Manifest(
    1,
    "m",
    ModelSpec(
        "rexnet", 1.5, 10, "input", "logits", Preprocess(), WeightsOrigin("a.pth", "0" * 64, True)
    ),
    (
        Artifact("weights", "weights.safetensors", "a" * 64),
        Artifact("onnx", "fp32.onnx", "b" * 64, "a" * 64, "fp32", command="rexdeploy export"),
        Artifact(
            "engine",
            "x.engine",
            "c" * 64,
            "b" * 64,
            "fp16",
            BatchRange(1, 2, 3),
            {"flavor": "rtx"},
            proof=PrecisionProof("Half", {"Half": 3}, {"Half": 9}, ("a",), ("b",)),
        ),
    ),
    "2026-11-25T00:00:00.000000Z",
)
OWN_GRAPH = replace(MANIFEST, model=replace(MANIFEST.model, family="onnx", width=None))


def _spelled(manifest: Manifest) -> str:
    """What cpp/tests/probe.cpp prints of it."""
    model, spec = manifest.model, manifest.model.preprocess
    words: list[object] = [_hex(model.title.encode()), model.num_classes, spec.height, spec.width]
    words += [_hex(struct.pack("<d", spec.crop_pct)), int(spec.interpolation == "bicubic")]
    words += [_hex(struct.pack("<3f", *spec.mean)), _hex(struct.pack("<3f", *spec.std))]
    words += [int(model.input == "uint8"), int(model.output == "probabilities")]
    for item in manifest.artifacts:
        texts = (item.parent_sha256 or "", item.precision or "")
        later = (item.built_with.get("flavor", ""), item.command)
        words += ["|", item.kind, item.file, item.sha256]
        words += [_hex(text.encode()) for text in texts]
        words += [item.batch or "0:0:0", *(_hex(text.encode()) for text in later)]
    return " ".join(map(str, words))


def _hex(data: bytes) -> str:
    return "x" + data.hex()


def differences(
    documents: Sequence[bytes], folder: Path, build: Literal["release", "sanitized"] = "release"
) -> tuple[list[str], int]:
    """Where the two readers differ, a line each; and how many documents both read."""
    files = [folder / f"{index}.json" for index in range(len(documents))]
    for file, data in zip(files, documents, strict=True):
        file.write_bytes(data)
    found, both = [], 0
    lines = probe("manifest", [(file,) for file in files], build)
    for data, line in zip(documents, lines, strict=True):
        try:
            expected = _spelled(decode(data, "here"))
        except UsageError as error:
            expected = f"error: {error}"
        if expected.startswith("error: ") != line.startswith("error: ") or (
            expected != line and not line.startswith("error: ")
        ):
            found.append(f"{data!r}:\n  Python: {expected}\n  C++: {line}")
        both += expected == line
    return found, both


@pytest.mark.parametrize("odd", ["values", "doubled", "random"])
def test_every_mutated_manifest_means_the_same(odd: str, tmp_path: Path) -> None:
    base = to_json(MANIFEST)
    documents = [base, to_json(OWN_GRAPH)]
    if odd == "values":  # in the place of every field, and in a field that nobody knows
        for path in _paths(json.loads(base)):
            documents += [_with(base, path, value) for value in ODD_JSON]
    elif odd == "doubled":
        documents += [
            base.replace(name, name + b' "0", ' + name)
            for name in (b'"name":', b'"file":', b'"flavor":', b'"input":', b'"min":', b'"Half":')
        ]
        documents += [base + b"\0", base + b"\0{", b"\xef\xbb\xbf" + base, base[:-2]]
        documents += [base.decode().encode(kind) for kind in ("utf-16", "utf-16-le", "utf-32")]
    else:
        rng = random.Random(0)
        documents += [mutated_json(rng.choice(documents[:2]), rng) for _ in range(2000)]
    found, both = differences(documents, tmp_path)
    assert not found, "\n".join(found[:5])
    assert both >= (100 if odd != "doubled" else 2)  # and what both refuse is not all


def _paths(document: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in the document, of each list the last item's, and a new one in the first."""
    paths: list[tuple[str | int, ...]] = [(*path, "unknown")] if not path else [path]
    if isinstance(document, dict):
        for name in document:
            paths += _paths(document[name], (*path, name))
    elif isinstance(document, list):
        paths += _paths(document[-1], (*path, len(document) - 1))
    return paths


def _with(base: bytes, path: Sequence[str | int], value: str) -> bytes:
    document = place = json.loads(base)
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = "@"
    return json.dumps(document).replace('"@"', value).encode()


def test_circles_are_refused_by_both(tmp_path: Path) -> None:
    """Made from itself, or from each other. Two files of the same bytes are no circle."""
    weights, graph, engine = MANIFEST.artifacts
    document = to_json(MANIFEST).decode()
    own = document.replace(f'"parent_sha256": "{"a" * 64}"', f'"parent_sha256": "{"b" * 64}"')
    ring = document.replace(f'"parent_sha256": "{"a" * 64}"', f'"parent_sha256": "{"c" * 64}"')
    assert own != document != ring
    twins = replace(MANIFEST, artifacts=(weights, graph, engine, replace(graph, file="b.onnx")))
    found, both = differences([own.encode(), ring.encode(), to_json(twins)], tmp_path)
    assert not found, "\n".join(found)
    assert both == 1
