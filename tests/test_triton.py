"""Model repositories: their configurations by Triton's own schema, versions, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from rexdeploy import load
from rexdeploy.bundle.manifest import Artifact, BatchRange
from rexdeploy.bundle.precision import TYPE_NAMES, Precision, PrecisionProof
from rexdeploy.bundle.store import Bundle, sha256
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.images import decode, sets
from rexdeploy.serving.deploy import deploy
from rexdeploy.triton_backend import decoded, run_each
from tests.helpers import assert_refused, edit_weights, run_cli
from tests.hostile_images import encoded, png
from tests.test_repository import tree

LABELS = "\n".join(f"kind {index}" for index in range(37)).encode()


def with_labels(bundle: Bundle, labels: bytes = LABELS) -> Bundle:
    artifact = Artifact("labels", "labels.txt", sha256(labels))
    return bundle.update(artifact, files={"labels.txt": labels})


def with_changed_weights(bundle: Bundle) -> Bundle:
    """The same bundle with another network in its graph, and no engine."""
    graph = bundle.manifest.find("onnx")
    assert graph is not None
    model = onnx.load_from_string(bundle.read(graph))
    names = [tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 4]
    data = edit_weights(model, names[:3], lambda old: old * np.float32(1.1)).SerializeToString()
    return bundle.update(replace(graph, sha256=sha256(data)), files={graph.file: data})


def config(folder: Path) -> Any:
    """A config.pbtxt by the schema that Triton publishes."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")
    return text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())


def with_engine(bundle: Bundle, precision: Precision, data: bytes) -> Bundle:
    """The bundle with one more engine, said to be full TensorRT's."""
    engine = bundle.manifest.find("engine")
    assert engine is not None
    named = replace(
        engine,
        file=f"{precision}.tensorrt.engine",
        sha256=sha256(data),
        precision=precision,
        proof=PrecisionProof(TYPE_NAMES[precision], {TYPE_NAMES[precision]: 1}),
        built_with={**engine.built_with, "flavor": "tensorrt"},
    )
    return bundle.update(named, files={named.file: data})


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime", "python"])
@pytest.mark.parametrize("form", ["small_v1", "small_pixels"])
def test_configurations_are_those_of_the_engine_and_the_graph(
    form: str, backend: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    plain: Bundle = request.getfixturevalue(form)
    engine = plain.manifest.find("engine")
    assert engine is not None
    bundle = with_engine(with_labels(plain), "fp16", plain.read(engine))
    deployment = deploy(bundle, tmp_path / "models", backend)
    network = config(tmp_path / "models" / deployment.name)
    graph = bundle.manifest.find("onnx")
    assert graph is not None
    value = onnx.load_from_string(bundle.read(graph)).graph

    assert (network.name, network.backend) == (deployment.name, backend)
    profile = engine.batch or BatchRange(0, 0, 0)
    most, best = (64, 8) if backend == "onnxruntime" else (profile.max, profile.opt)
    assert network.max_batch_size == most
    assert list(network.dynamic_batching.preferred_batch_size) == [best, most]
    assert network.dynamic_batching.max_queue_delay_microseconds == 0
    for tensor, known in ((network.input[0], value.input[0]), (network.output[0], value.output[0])):
        assert tensor.name == known.name
        assert list(tensor.dims) == [dim.dim_value for dim in known.type.tensor_type.shape.dim][1:]
        types = {onnx.TensorProto.FLOAT: 11, onnx.TensorProto.UINT8: 2}  # TYPE_FP32, TYPE_UINT8
        assert tensor.data_type == types[known.type.tensor_type.elem_type]
    assert network.output[0].label_filename == "labels.txt"
    assert (tmp_path / "models" / deployment.name / "labels.txt").read_bytes() == LABELS
    assert network.version_policy.latest.num_versions == 1
    kinds = {"tensorrt": 1, "onnxruntime": 0, "python": 2}  # KIND_GPU, KIND_AUTO, KIND_CPU
    assert [(group.kind, group.count) for group in network.instance_group] == [(kinds[backend], 1)]
    assert [warm.batch_size for warm in network.model_warmup] == [1, best]
    for warm in network.model_warmup:
        assert list(warm.inputs[network.input[0].name].dims) == list(network.input[0].dims)

    file = {"tensorrt": "model.plan", "onnxruntime": "model.onnx", "python": graph.file}[backend]
    original = engine if backend == "tensorrt" else graph
    written = tmp_path / "models" / deployment.name / "1" / file
    assert sha256(written.read_bytes()) == original.sha256

    preprocess = config(tmp_path / "models" / f"{deployment.name}_preprocess")
    ensemble = config(tmp_path / "models" / deployment.image_name)
    first, second = ensemble.ensemble_scheduling.step
    assert (first.model_name, second.model_name) == (preprocess.name, network.name)
    assert preprocess.output[0].dims == network.input[0].dims
    assert preprocess.output[0].data_type == network.input[0].data_type
    assert first.output_map[preprocess.output[0].name] == second.input_map[network.input[0].name]
    assert second.output_map[network.output[0].name] == ensemble.output[0].name
    assert {preprocess.max_batch_size, ensemble.max_batch_size} == {most}


def test_a_version_of_the_python_backend_is_a_bundle_with_the_same_logits(
    small_v1: Bundle, photos: Path, tmp_path: Path
) -> None:
    deploy(small_v1, tmp_path / "models", "python")
    folder = tmp_path / "models" / "small_v1" / "1"
    with load(folder, "onnxruntime") as served, load(small_v1, "onnxruntime") as original:
        batch = original.prepare(sets.find(photos))
        np.testing.assert_array_equal(served.run(batch), original.run(batch))
    (folder / "fp32.onnx").write_bytes(b"damaged")
    with pytest.raises(UsageError, match="is not the file the manifest describes"):
        load(folder, "onnxruntime")


def test_versions_are_added_beside_what_is_there(small_v1: Bundle, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    assert deploy(small_v1, repository, "onnxruntime").added
    before = tree(repository)
    again = deploy(small_v1, repository, "onnxruntime")
    assert (again.version, again.added) == (1, False)
    assert tree(repository) == before

    changed = deploy(with_changed_weights(small_v1), repository, "onnxruntime")
    assert (changed.version, changed.added) == (2, True)
    after = tree(repository)
    assert after.keys() - before.keys() == {"small_v1/2", "small_v1/2/model.onnx"}
    assert {name: after[name] for name in before} == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_two_at_once_leave_one_of_them(
    small_v1: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other finds that the version it was to write is there meanwhile, and says so."""
    repository, rename = tmp_path / "models", Path.rename
    deploy(small_v1, repository, "onnxruntime")

    def late(self: Path, target: Path) -> Path:
        target.mkdir()
        (target / "model.onnx").write_bytes(b"the other's")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(RexdeployError, match="changed by another command meanwhile"):
        deploy(with_changed_weights(small_v1), repository, "onnxruntime")
    assert (repository / "small_v1" / "2" / "model.onnx").read_bytes() == b"the other's"
    assert not list(tmp_path.glob(".models.*"))


@pytest.mark.parametrize("model", ["small_v1", "small_v1_preprocess", "small_v1_image"])
def test_somebody_elses_model_is_refused_and_untouched(
    model: str, small_v1: Bundle, tmp_path: Path
) -> None:
    theirs = tmp_path / "models" / model
    (theirs / "1").mkdir(parents=True)
    (theirs / "config.pbtxt").write_text('name: "small_v1"\nbackend: "pytorch"\n')
    (theirs / "1" / "model.pt").write_bytes(b"weights")
    before = tree(tmp_path / "models")
    result = run_cli("triton", small_v1.path, "--repository", "models", cwd=tmp_path)
    assert_refused(result, f"models/{model} is no", "that rexdeploy has written", "--name")
    assert tree(tmp_path / "models") == before


@pytest.mark.parametrize("role", ["image", "preprocess"])
def test_a_network_does_not_take_the_place_of_another_ones_parts(
    role: str, small_v1: Bundle, tmp_path: Path
) -> None:
    """Also where the two have the same signature."""
    repository = tmp_path / "models"
    deploy(small_v1, repository, "python")
    before = tree(repository)
    with pytest.raises(
        UsageError, match=f"small_v1_{role} is no network that rexdeploy has written"
    ):
        deploy(small_v1, repository, "python", f"small_v1_{role}")
    assert tree(repository) == before


def test_another_signature_under_one_name_is_refused(
    small_v1: Bundle, small_pixels: Bundle, tmp_path: Path
) -> None:
    repository = tmp_path / "models"
    deploy(small_v1, repository, "python")
    before = tree(repository)
    with pytest.raises(UsageError, match="another input, input_name, output, output_name, and"):
        deploy(small_pixels, repository, "python", "small_v1")
    with pytest.raises(UsageError, match="another backend, and .*take --backend python, or"):
        deploy(small_v1, repository, "onnxruntime")
    with pytest.raises(UsageError, match="another labels, and"):
        deploy(with_labels(small_v1), repository, "python")
    assert tree(repository) == before
    assert deploy(small_pixels, repository, "python").version == 1  # by its own name


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--backend", "tensorrt"], ["only TensorRT-RTX engines", "--flavor tensorrt"]),
        (["--backend", "pytorch"], ["backend: got 'pytorch', expected one of auto, tensorrt"]),
        (["--name", "../x"], ["name: got '../x'"]),
        (["--repository", "file"], ["file is a file, expected a folder of models"]),
        (["--repository", "artifacts/small_v1"], ["artifacts/small_v1 is a bundle"]),
        (["--repository", "file/models"], ["cannot write the model repository file/models"]),
        (["--kserve", "nowhere/x.yaml"], ["cannot write nowhere/x.yaml"]),
        (["--storage-uri", "x"], ["storage-uri: got 'x'"]),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str], parts: list[str], small_v1: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(run_cli("triton", "small_v1", *arguments, cwd=tmp_path), *parts)
    assert not (tmp_path / "artifacts" / "triton").exists()


@pytest.mark.parametrize("size", [1, 4])
def test_a_fixed_batch_is_for_the_python_backend(
    size: int, small_v1: Bundle, tmp_path: Path
) -> None:
    """Of 1 too: Triton's ONNX Runtime wants a dimension of -1 wherever it may batch."""
    graph = small_v1.manifest.find("onnx")
    assert graph is not None
    batch = BatchRange(size, size, size)
    fixed = small_v1.update(replace(graph, batch=batch), files={graph.file: small_v1.read(graph)})
    with pytest.raises(UsageError, match=f"takes batches of {size} to {size}, .*--backend python"):
        deploy(fixed, tmp_path / "models")
    assert deploy(fixed, tmp_path / "models", "python").batch.max == 8


def test_of_several_engines_the_fastest_is_served(small_v1: Bundle, tmp_path: Path) -> None:
    bundle = with_engine(with_engine(small_v1, "fp32", b"slow"), "fp16", b"fast")
    assert deploy(bundle, tmp_path / "models").backend == "tensorrt"
    assert (tmp_path / "models" / "small_v1" / "1" / "model.plan").read_bytes() == b"fast"


def test_the_command_says_what_it_wrote(small_v1: Bundle, tmp_path: Path) -> None:
    result = run_cli("triton", "small_v1", "--kserve", "service.yaml", cwd=tmp_path)
    assert result.code == 0
    assert "artifacts/triton: version 1\n  small_v1: onnxruntime backend" in result.out
    answer = json.loads(run_cli("triton", "small_v1", "--json", "-", cwd=tmp_path).out)
    assert (answer["version"], answer["added"], answer["batch"]["max"]) == (1, False, 64)
    assert "kind: InferenceService" in (tmp_path / "service.yaml").read_text()
    assert "unchanged, version 1" in run_cli("triton", "small_v1", cwd=tmp_path).out


GOOD: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg": lambda image: encoded(image, "JPEG"),
    "cmyk": lambda image: encoded(image.convert("CMYK"), "JPEG"),
    "16-bit": lambda image: encoded(image.convert("L").convert("I;16"), "PNG"),
    "palette": lambda image: encoded(image.quantize(16), "PNG", transparency=3),
    "alpha": lambda image: encoded(image.convert("RGBA"), "PNG"),
    "animated": lambda image: encoded(
        image, "GIF", save_all=True, append_images=[Image.new("RGB", image.size)]
    ),
}


@pytest.mark.parametrize("kind", GOOD)
def test_the_server_decodes_what_the_library_decodes(
    kind: str, small_v1_original: Bundle, photos: Path, tmp_path: Path
) -> None:
    """Also with the zeros that fill up the shorter files of a batch."""
    spec = small_v1_original.manifest.model
    with Image.open(sets.find(photos)[0]) as photo:
        data = GOOD[kind](photo)
    (tmp_path / "photo").write_bytes(data)
    expected = decode.crop(decode.load(tmp_path / "photo"), spec.preprocess)
    for end in (b"", bytes(1000)):
        np.testing.assert_array_equal(decoded(data + end, 0, spec), expected)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "not an image"),
        (bytes(100), "not an image"),
        (b"\xff\xd8\xff\xe0 and so on", "cannot be decoded|not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (png(30_000, 30_000, rows=bytes(100)), "too large to decode safely"),
        (png(9000, 9000, rows=bytes(100)), "cannot be decoded"),
    ],
    ids=["empty", "zeros", "cut", "a program", "bomb", "large and cut"],
)
def test_what_cannot_be_decoded_names_the_image(
    data: bytes, part: str, small_v1_original: Bundle
) -> None:
    with pytest.raises(UsageError, match=f"image 7.*({part})"):
        decoded(data, 7, small_v1_original.manifest.model)


def test_one_request_that_fails_does_not_fail_its_neighbours(small_v1_original: Bundle) -> None:
    spec = small_v1_original.manifest.model
    good = sets.synthetic(3, spec.preprocess)
    bad = np.full_like(good[:1], np.nan)
    with load(small_v1_original, "onnxruntime") as classifier:
        first, second, third = run_each(classifier.run, [good[:1], bad, good[1:]])
        alone = classifier.run(good)
    assert isinstance(second, UsageError)  # of that client, not of the network
    assert "images: got NaN" in str(second)
    np.testing.assert_allclose(np.concatenate([first, third]), alone, rtol=1e-3, atol=1e-3)


def test_a_missing_part_of_a_model_is_written_again(small_v1: Bundle, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    deploy(small_v1, repository, "python")
    before = tree(repository)
    shutil.rmtree(repository / "small_v1_image")
    (repository / "small_v1" / "config.pbtxt").write_text(
        (repository / "small_v1" / "config.pbtxt").read_text().replace("max_batch_size: 8", "")
    )
    deploy(small_v1, repository, "python")
    assert tree(repository) == before


def test_a_file_of_too_many_bytes_is_not_decoded(
    monkeypatch: pytest.MonkeyPatch, small_v1_original: Bundle
) -> None:
    """For servers without this front."""
    monkeypatch.setattr("rexdeploy.triton_backend._MOST_BYTES", 10)
    spec = small_v1_original.manifest.model
    with pytest.raises(UsageError, match="image 3: got 11 bytes, expected at most 10"):
        decoded(b"x" * 11, 3, spec)
    with pytest.raises(UsageError, match="image 3: not an image"):
        decoded(b"x" * 10, 3, spec)
