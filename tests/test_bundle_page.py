"""docs/bundle.md says of the format what the types that read it say."""

from __future__ import annotations

import dataclasses
import json
import re
import typing

import pytest

from rexdeploy.bundle import manifest, strict_json
from rexdeploy.bundle.precision import TYPE_NAMES, TYPES, PrecisionProof
from rexdeploy.files import MAX_TEXT_BYTES
from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "bundle.md").read_text()
TYPES_OF_A_MANIFEST = (
    manifest.Manifest,
    manifest.ModelSpec,
    manifest.Preprocess,
    manifest.WeightsOrigin,
    manifest.Artifact,
    manifest.BatchRange,
    PrecisionProof,
)


def _section(heading: str) -> str:
    text = PAGE.partition(f"\n{heading}\n")[2]
    assert text, heading
    return re.split(r"^#", text, maxsplit=1, flags=re.MULTILINE)[0]


def _default(field: dataclasses.Field[typing.Any]) -> str:
    """As the table's column says it: JSON, or the word "required"."""
    if field.default_factory is not dataclasses.MISSING:
        return json.dumps(field.default_factory())
    if field.default is dataclasses.MISSING:
        return "required"
    return json.dumps(field.default)


def _choices(hint: object) -> list[str]:
    """The values of a Literal, also within an optional one."""
    if typing.get_origin(hint) is typing.Literal:
        return [str(value) for value in typing.get_args(hint)]
    return [value for part in typing.get_args(hint) for value in _choices(part)]


@pytest.mark.parametrize("kind", TYPES_OF_A_MANIFEST)
def test_every_field_is_in_its_table_with_its_default_and_its_values(kind: type) -> None:
    section = _section(f"### `{kind.__name__}`")
    rows = [re.split(r" *\| *", line.strip("| ")) for line in section.splitlines() if "|" in line]
    rows = rows[2:]  # below the header and the rule
    fields = dataclasses.fields(kind)
    assert [row[0] for row in rows] == [f"`{field.name}`" for field in fields]
    hints = typing.get_type_hints(kind)
    for field, (_, said, default, meaning) in zip(fields, rows, strict=True):
        assert default.strip("`") == _default(field), field.name
        assert [value for value in _choices(hints[field.name]) if f"`{value}`" not in meaning] == []
        assert ("null" in said) == (type(None) in typing.get_args(hints[field.name])), field.name


def test_every_type_of_a_manifest_has_a_table() -> None:
    named = {kind.__name__ for kind in TYPES_OF_A_MANIFEST}
    used = {
        part.__name__
        for kind in TYPES_OF_A_MANIFEST
        for hint in typing.get_type_hints(kind).values()
        for part in (hint, *typing.get_args(hint))
        if dataclasses.is_dataclass(part) and isinstance(part, type)
    }
    assert used <= named
    assert set(re.findall(r"^### `(\w+)`$", PAGE, re.MULTILINE)) == named


def test_the_limits_are_those_of_the_reader() -> None:
    assert f"1 to {manifest.MAX_CLASSES:,}" in _section("### `ModelSpec`")
    assert _section("### `Preprocess`").count(f"1 to {manifest.MAX_IMAGE_SIZE}") == 2
    assert f"<= {manifest.MAX_BATCH}." in _section("### `BatchRange`")
    rules = " ".join(_section("## `manifest.json`").split())
    assert f"at most {MAX_TEXT_BYTES >> 20} MiB" in rules
    assert f"at most {strict_json.MAX_DEPTH} deep" in rules
    assert f"beyond 2^{strict_json.MAX_NUMBER.bit_length() - 1}," in rules
    versions = _section("## Versions of the format")
    assert f"`format` is {manifest.FORMAT}; it is {manifest.DETECTOR_FORMAT} if" in versions
    proof = " ".join(_section("### `PrecisionProof`").split())
    assert [name for name in TYPES if f"`{name}`" not in proof] == []
    assert [pair for pair in TYPE_NAMES.items() if "`{}` is `{}`".format(*pair) not in proof] == []


def test_the_example_is_a_manifest() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    read = manifest.decode(example.encode(), "the example")
    assert json.loads(manifest.to_json(read)) == json.loads(example)
    chain = [read.find("engine")]
    while chain[-1] and chain[-1].parent_sha256:
        chain.append(next(a for a in read.artifacts if a.sha256 == chain[-1].parent_sha256))
    names = [artifact.file for artifact in reversed(chain) if artifact]
    assert " -> ".join(names) in _section("## The chain of hashes")
