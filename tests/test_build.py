"""Building: FP16 that is proven, answers from the bundle, and somebody's own graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from rexdeploy.bundle.manifest import BatchRange
from rexdeploy.bundle.precision import PrecisionProof
from rexdeploy.bundle.store import Bundle, sha256
from rexdeploy.errors import BackendUnavailable, UsageError, VerificationFailed
from rexdeploy.graphs.engine_graph import Source
from rexdeploy.inference.classifier import load
from rexdeploy.steps.build_trt import build_trt, float32_nodes
from rexdeploy.steps.import_onnx import import_onnx
from rexdeploy.steps.inspect import inspect
from rexdeploy.steps.verify import verify
from rexdeploy.timing.networks import BundleNetwork
from tests.helpers import (
    copied,
    edit_weights,
    entry,
    folder_state,
    graph,
    nodes_of,
    reacting,
    saved,
    with_file,
    with_notes,
)

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

PLAIN = "fp32.tensorrt.onnx"
ENGINE = "fp16.rtx-sm89.engine"
OPTIONS: dict[str, Any] = {
    "fp16": True,
    "flavor": "rtx",
    "batch": BatchRange(1, 2, 8),
    "target": ("sm89",),
}


def test_the_chain_of_hashes_leads_from_the_engine_to_the_weights(
    small_v1_original: Bundle,
) -> None:
    engine = entry(small_v1_original, "fp16.rtx-sm89.engine")
    by_hash = {artifact.sha256: artifact for artifact in small_v1_original.manifest.artifacts}
    chain = [engine]
    while (parent := chain[-1].parent_sha256) is not None:
        chain.append(by_hash[parent])
    assert [artifact.file for artifact in chain[1:]] == [
        "fp16.onnx", "fp32.tensorrt.onnx", "fp32.onnx", "weights.safetensors",
    ]  # fmt: skip
    for artifact in small_v1_original.manifest.artifacts:
        assert sha256(small_v1_original.read(artifact)) == artifact.sha256
    assert engine.file == "fp16.rtx-sm89.engine"
    assert engine.proof is not None
    assert (engine.proof.wanted, engine.proof.layers["Float"]) == ("Half", 1)  # reads the image
    assert engine.batch == BatchRange(1, 2, 8)


def test_an_unchanged_build_is_answered_from_the_bundle(small_v1: Bundle) -> None:
    before = folder_state(small_v1.path)
    again = build_trt(small_v1, **OPTIONS)
    assert again.reused
    assert folder_state(small_v1.path) == before
    forced = build_trt(small_v1, **OPTIONS | {"force": True})
    assert not forced.reused
    assert forced.bundle.manifest.updated_at > small_v1.manifest.updated_at


@pytest.mark.parametrize(
    "other",
    [
        OPTIONS | {"fp16": False},
        OPTIONS | {"batch": BatchRange(1, 4, 8)},
        OPTIONS | {"target": ("sm86",)},
        OPTIONS | {"target": ()},
        OPTIONS | {"workspace": 256},
    ],
    ids=["precision", "profile", "target", "any target", "workspace"],
)
def test_every_part_of_the_key_makes_another_engine(
    small_v1: Bundle, other: dict[str, Any]
) -> None:
    assert not build_trt(small_v1, **other).reused


def test_other_weights_are_never_answered_with_the_old_engine(small_v1: Bundle) -> None:
    """The cache without a weights' hash: onnxruntime issue 6455."""
    model = graph(small_v1)
    name = nodes_of(model, "Conv")[5].input[1]
    data = edit_weights(model, [name], lambda values: values * 1.5).SerializeToString()
    changed = with_file(small_v1, "fp32.onnx", data)
    assert changed.manifest.find("engine") is None
    assert not list(changed.path.glob("*.engine"))
    result = build_trt(changed, **OPTIONS)
    assert not result.reused
    assert result.engine.sha256 != entry(small_v1, ENGINE).sha256


def test_an_fp16_build_that_is_really_fp32_fails_and_writes_nothing(small_v1: Bundle) -> None:
    """The float16 graph of the bundle is swapped for the float32 one, hash and all."""
    model = graph(small_v1, PLAIN)
    model.doc_string = "another file than its parent"
    parent = entry(small_v1, PLAIN).sha256
    bundle = with_file(small_v1, "fp16.onnx", model.SerializeToString(), parent_sha256=parent)
    before = folder_state(bundle.path)
    with pytest.raises(VerificationFailed, match=r"not FP16: 0 of \d+ layers in Half \(0%\)") as no:
        build_trt(bundle, **OPTIONS)
    assert no.value.exit_code == 3
    assert folder_state(bundle.path) == before


def test_a_float32_build_has_no_half_layer(small_v1: Bundle) -> None:
    engine = build_trt(small_v1, **OPTIONS | {"fp16": False}).engine
    assert engine.proof is not None
    assert (engine.precision, set(engine.proof.layers)) == ("fp32", {"Float"})
    assert engine.file == "fp32.rtx-sm89.engine"


def _noted(bundle: Bundle, file: str, **notes: str) -> Bundle:
    """The bundle with other notes on one of its files, whose bytes stay."""
    return with_notes(bundle, file, built_with=entry(bundle, file).built_with | notes)


def test_engines_are_built_from_the_form_with_plain_shortcuts(small_v1: Bundle) -> None:
    """At most 120 layers in either precision, and the exported graph is still first."""
    root, half = (entry(small_v1, file) for file in ("fp32.onnx", "fp16.onnx"))
    result = build_trt(small_v1, **OPTIONS | {"fp16": False})
    bundle = result.bundle
    files = {item.sha256: item for item in bundle.manifest.artifacts}
    plain = files[result.engine.parent_sha256 or ""]
    assert (plain.file, plain.kind, plain.precision) == ("fp32.tensorrt.onnx", "onnx", "fp32")
    assert bundle.manifest.find("onnx") == bundle.manifest.find("onnx", "fp32") == root
    for engine in (result.engine, entry(bundle, ENGINE)):
        assert engine.proof is not None
        assert sum(engine.proof.layers.values()) <= 120
        parent = files[engine.parent_sha256 or ""]
        assert nodes_of(graph(bundle, parent.file), "Concat") == []
    assert plain.parent_sha256 == root.sha256
    assert plain.built_with["shortcuts"] == "plain adds"
    assert files[half.sha256].parent_sha256 == plain.sha256
    assert build_trt(bundle, **OPTIONS | {"fp16": False}).reused
    assert build_trt(bundle, **OPTIONS).reused


def test_verification_judges_both_engines_graphs(small_v1: Bundle) -> None:
    bundle = build_trt(small_v1, **OPTIONS | {"fp16": False}).bundle
    sound = verify(bundle, samples=4)
    assert sound.passed, sound.failures
    errors = {(edge.reference, edge.candidate.split()[0]): edge.error for edge in sound.edges}
    assert errors["fp32.onnx", "fp32.tensorrt.onnx"] < 1e-4
    assert ("fp32.tensorrt.onnx", "fp16.onnx") in errors
    parents = {edge.candidate.split()[0]: edge.reference for edge in sound.edges}
    parents |= {skip.candidate.split()[0]: skip.reference for skip in sound.skipped}
    assert parents["fp32.rtx-sm89.engine"] == "fp32.tensorrt.onnx"
    assert parents["fp16.rtx-sm89.engine"] == "fp16.onnx"

    model = graph(bundle, PLAIN)
    weight = nodes_of(model, "Conv")[5].input[1]
    data = edit_weights(model, [weight], lambda values: values * 1.05).SerializeToString()
    (failure,) = verify(with_file(bundle, PLAIN, data), samples=4).failures
    assert failure.startswith("broken edge fp32.onnx -> fp32.tensorrt.onnx (onnxruntime): error ")


def test_a_graph_that_was_not_aligned_is_built_as_it_is(small_v1: Bundle) -> None:
    bundle = _noted(small_v1, "fp32.onnx", align="off")
    root = entry(bundle, "fp32.onnx")
    result = build_trt(bundle, **OPTIONS | {"fp16": False})
    assert result.engine.parent_sha256 == root.sha256
    half = build_trt(result.bundle, **OPTIONS)
    assert not half.reused  # the float16 graph has other shortcuts
    assert entry(half.bundle, "fp16.onnx").parent_sha256 == root.sha256
    assert nodes_of(graph(half.bundle, "fp16.onnx"), "Concat")
    # What a bundle of an older version looks like: its float16 graph is made again.
    again = build_trt(_noted(half.bundle, "fp32.onnx", align="16"), **OPTIONS)
    assert not again.reused
    assert not nodes_of(graph(again.bundle, "fp16.onnx"), "Concat")


@pytest.fixture(scope="module")
def bf16_original(small_v1_original: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The V1 bundle with a bfloat16 graph and engine, too."""
    bundle = copied(small_v1_original, tmp_path_factory.mktemp("bf16") / "v1")
    return build_trt(bundle, **OPTIONS | {"fp16": False, "bf16": True}).bundle


def test_a_bfloat16_build_is_proven_and_its_graph_is_verified_by_emulation(
    bf16_original: Bundle,
) -> None:
    engine = entry(bf16_original, "bf16.rtx-sm89.engine")
    assert engine.file == "bf16.rtx-sm89.engine"
    assert engine.proof is not None
    assert engine.proof.wanted == "BFloat16"
    assert engine.proof.holds
    assert engine.proof.macs.keys() == {"BFloat16"}
    result = verify(bf16_original, samples=6)
    assert result.passed, result.failures
    label = "bf16.onnx (onnxruntime, bfloat16 emulated)"
    edge, twin = (edge for edge in result.edges if edge.candidate == label)
    assert (edge.reference, twin.reference) == (PLAIN, f"{PLAIN}, rounded")
    assert 0.1 < edge.error < edge.limits.error  # it did round, by 3 bits more than float16
    assert twin.error < 1e-4  # and exactly so
    assert build_trt(bf16_original, **OPTIONS | {"fp16": False, "bf16": True}).reused


def test_swapped_channels_in_the_bfloat16_graph_break_its_edge(
    bf16_original: Bundle, tmp_path: Path
) -> None:
    model = graph(bf16_original, "bf16.onnx")
    (stem,) = (t for t in model.graph.initializer if t.name == nodes_of(model, "Conv")[0].input[1])
    values = np.frombuffer(stem.raw_data, "<u2").reshape(stem.dims)
    stem.raw_data = values[:, ::-1].tobytes()
    path = saved(model, tmp_path / "swapped.onnx")
    result = verify(bf16_original, samples=6, candidate=path)
    assert "swapped.onnx (onnxruntime, bfloat16 emulated): error" in result.failures[0]


def test_both_precisions_or_a_graph_in_another_are_refused(small_v1: Bundle) -> None:
    with pytest.raises(UsageError, match="got --fp16 and --bf16, expected one of them"):
        build_trt(small_v1, **OPTIONS | {"bf16": True})
    half = entry(small_v1, "fp16.onnx")
    weights = entry(small_v1, "weights.safetensors")
    lone = replace(half, file="fp32.onnx", parent_sha256=weights.sha256)
    bundle = small_v1.update(lone, files={lone.file: small_v1.read(half)})
    with pytest.raises(UsageError, match="fp32.onnx is a graph in fp16; --bf16 needs one in"):
        build_trt(bundle, **OPTIONS | {"fp16": False, "bf16": True})


def test_a_damaged_graph_is_refused(small_v1: Bundle) -> None:
    path = small_v1.path / "fp32.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match="fp32.onnx is not the file the manifest describes"):
        build_trt(small_v1, **OPTIONS | {"fp16": False})


def test_a_damaged_engine_is_not_an_answer(small_v1: Bundle) -> None:
    engine = entry(small_v1, ENGINE)
    (small_v1.path / engine.file).write_bytes(b"vtrt" + b"\0" * 100)
    assert not build_trt(small_v1, **OPTIONS).reused
    assert build_trt(Bundle.open(small_v1.path), **OPTIONS).reused
    half = small_v1.path / "fp16.onnx"
    half.write_bytes(half.read_bytes()[:-1])  # made again from the float32 graph
    assert build_trt(Bundle.open(small_v1.path), **OPTIONS).reused is True
    assert verify(Bundle.open(small_v1.path), samples=2).passed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (OPTIONS | {"target": ("sm90",)}, "target: got 'sm90', expected sm75, sm80"),
        (OPTIONS | {"flavor": "tensorrt"}, "--target is for --flavor rtx"),
        (OPTIONS | {"flavor": "trt"}, "flavor: got 'trt', expected auto, tensorrt, rtx"),
        (OPTIONS | {"workspace": 1 << 44}, "workspace: got 17592186044416, expected 1 to"),
    ],
)
def test_unusable_options_are_refused(
    small_v1_original: Bundle, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build_trt(small_v1_original, **options)


class _Own(torch.nn.Module):
    """Somebody's own classifier: other names, other layers, a fixed input size."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3, 2, bias=False),
            torch.nn.BatchNorm2d(16),
            torch.nn.SiLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(16, 7),
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.body(pixels)
        return logits


@pytest.fixture(scope="module")
def own_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("own") / "mine.onnx"
    program = torch.onnx.export(
        reacting(_Own(), size=64),
        (torch.zeros(2, 3, 64, 64),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("n")},),
        input_names=["pixels"],
        output_names=["scores"],
        verbose=False,
    )
    assert program is not None
    program.save(path, external_data=False)
    return path


def _imported(path: Path, out: Path, options: dict[str, Any]) -> Source:
    return import_onnx(path, out=out, batch=options["batch"], force=options.get("force", False))


def test_somebodys_own_graph_gets_a_bundle_an_engine_and_a_verification(
    own_graph: Path, tmp_path: Path
) -> None:
    source = _imported(own_graph, tmp_path, OPTIONS)
    assert list(tmp_path.iterdir()) == []  # nothing is written before the engine is proven
    bundle = source.bundle
    assert (bundle.manifest.model.family, bundle.manifest.model.num_classes) == ("onnx", 7)
    assert bundle.path == tmp_path / "mine"
    result = build_trt(source, **OPTIONS)
    assert result.engine.proof is not None
    assert result.engine.proof.layers["Half"] == 3  # one more reads the float32 image
    verification = verify(result.bundle, samples=6)
    assert verification.passed
    assert [edge.reference for edge in verification.edges] == ["model.onnx", "model.onnx, rounded"]
    # Imported again unchanged, the engine is still there.
    assert build_trt(_imported(own_graph, tmp_path, OPTIONS), **OPTIONS).reused
    again = verify(Bundle.open(bundle.path), samples=6)
    assert [edge.reference for edge in again.edges] == ["model.onnx", "model.onnx, rounded"]


def test_an_imported_graph_does_not_take_the_place_of_another_model(
    own_graph: Path, small_v1: Bundle
) -> None:
    taken = own_graph.with_name("small_v1.onnx")
    taken.write_bytes(own_graph.read_bytes())
    before = folder_state(small_v1.path)
    with pytest.raises(UsageError, match=r"holds another model \(rexnet 0.3\)"):
        _imported(taken, small_v1.path.parent, OPTIONS)
    assert folder_state(small_v1.path) == before


def test_a_failing_import_leaves_an_existing_bundle_as_it_was(
    own_graph: Path, tmp_path: Path
) -> None:
    bundle = build_trt(_imported(own_graph, tmp_path, OPTIONS), **OPTIONS).bundle
    before = folder_state(bundle.path)
    (tmp_path / "elsewhere").mkdir()
    model = onnx.load(own_graph)
    model.graph.name = "another"
    other = saved(model, tmp_path / "elsewhere" / "mine.onnx")
    wrong = OPTIONS | {"flavor": "nonsense", "force": True}
    with pytest.raises(UsageError, match="holds another model .*mine.onnx.*--force"):
        _imported(other, tmp_path, OPTIONS)
    with pytest.raises(UsageError, match="flavor: got 'nonsense'"):
        build_trt(_imported(other, tmp_path, wrong), **wrong)
    assert folder_state(bundle.path) == before
    forced = OPTIONS | {"force": True}
    assert build_trt(_imported(other, tmp_path, forced), **forced).bundle.path == bundle.path


def test_a_graph_that_ends_in_softmax_is_refused(own_graph: Path, tmp_path: Path) -> None:
    model = onnx.load(own_graph)
    output = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["logits" if name == output else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Softmax", ["logits"], [output]))
    path = saved(model, tmp_path / "soft.onnx")
    with pytest.raises(UsageError, match="ends in Softmax; expected logits"):
        _imported(path, tmp_path / "out", OPTIONS)


def test_weights_beside_the_graph_are_taken_in(own_graph: Path, tmp_path: Path) -> None:
    onnx.save(
        onnx.load(own_graph),
        tmp_path / "split.onnx",
        save_as_external_data=True,
        location="split.data",
        size_threshold=0,
    )
    bundle = build_trt(
        _imported(tmp_path / "split.onnx", tmp_path / "out", OPTIONS), **OPTIONS
    ).bundle
    (tmp_path / "split.data").unlink()
    assert verify(bundle, samples=4).passed


def test_files_that_are_no_classifier_are_refused(own_graph: Path, tmp_path: Path) -> None:
    model = onnx.load(own_graph)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4
    four_channels = saved(model, tmp_path / "four.onnx")
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(np.random.default_rng(0).bytes(1000))
    truncated = tmp_path / "cut.onnx"
    truncated.write_bytes(own_graph.read_bytes()[:-100])
    empty = tmp_path / "empty.onnx"
    empty.write_bytes(b"")
    for path in (four_channels, garbage, truncated, empty, tmp_path / "missing.onnx"):
        with pytest.raises(UsageError, match=path.name):
            _imported(path, tmp_path / "out", OPTIONS)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("made_by", ["0", None])
def test_a_graph_of_another_revision_is_made_again(small_v1: Bundle, made_by: str | None) -> None:
    half = entry(small_v1, "fp16.onnx")
    model = graph(small_v1, "fp16.onnx")
    del model.metadata_props[:]
    model.doc_string = "of an older converter"
    notes = {key: value for key, value in half.built_with.items() if key != "revision"}
    notes |= {"revision": made_by} if made_by else {}
    old = with_file(small_v1, half.file, model.SerializeToString(), built_with=notes)
    said: list[str] = []
    result = build_trt(old, **OPTIONS, report=said.append)
    again = entry(result.bundle, "fp16.onnx")
    assert (again.sha256, again.built_with["revision"]) == (half.sha256, "1")
    assert any("making fp16.onnx again, since " in line for line in said), said
    assert build_trt(result.bundle, **OPTIONS).reused


def test_force_makes_the_graphs_again_and_says_what_tuning_is_lost(small_v1: Bundle) -> None:
    half = entry(small_v1, "fp16.onnx")
    model = graph(small_v1, "fp16.onnx")
    model.doc_string = "mixed"
    notes = half.built_with | {"float32": "block 10"}
    data = model.SerializeToString()
    bundle = with_file(small_v1, half.file, data, built_with=notes, precision=None)
    said: list[str] = []
    kept = build_trt(bundle, **OPTIONS, report=said.append).engine
    assert kept.parent_sha256 == sha256(data)
    assert not any("tune-precision" in line for line in said)
    forced = build_trt(Bundle.open(bundle.path), **OPTIONS | {"force": True}, report=said.append)
    assert entry(forced.bundle, "fp16.onnx").sha256 == half.sha256
    lost = [line for line in said if "tune-precision" in line]
    assert len(lost) == 1
    assert "fp16.onnx was tune-precision's, with block 10 in float32" in lost[0]


@pytest.mark.parametrize("notes", [{"revision": "1"}, {"proof": "1"}])
def test_an_engine_of_another_revision_is_no_answer(
    small_v1: Bundle, notes: dict[str, str]
) -> None:
    assert build_trt(small_v1, **OPTIONS).reused
    assert not build_trt(_noted(small_v1, ENGINE, **notes), **OPTIONS).reused


def test_an_engine_whose_proof_is_of_another_type_is_nowhere_taken(small_v1: Bundle) -> None:
    """A manifest that claims fp16, of an engine that was proven to be float32."""
    engine = entry(small_v1, ENGINE)
    bundle = with_notes(small_v1, ENGINE, proof=PrecisionProof("Float", {"Float": 100}))
    fault = "claims fp16, and its proof is of Float"
    with pytest.raises(VerificationFailed, match=fault):
        inspect(bundle.path / engine.file)
    assert any(fault in line for line in verify(bundle, samples=2).failures)
    with load(bundle) as classifier:
        assert any(fault in line for line in classifier.passed_over)
    with pytest.raises(BackendUnavailable, match=fault):
        BundleNetwork(bundle).file("tensorrt-rtx", fp16=False)
    assert not build_trt(bundle, **OPTIONS).reused


@pytest.mark.parametrize("kind", ["Sigmoid", "Mul", "GlobalAveragePool", "AveragePool"])
def test_the_nodes_that_may_be_float32_are_ends_and_bfloat16_pools(
    small_pixels_original: Bundle, kind: str
) -> None:
    model = graph(small_pixels_original, "fp16.onnx")
    inner = {node.name for node in nodes_of(model, kind) if not node.name.startswith("interface/")}
    assert not inner & float32_nodes(model, "fp16")
    assert inner & float32_nodes(model, "bf16") == (inner if "Pool" in kind else set())
    assert {"interface/float", "interface/scaled"} <= float32_nodes(model, "fp16")
    casts = {node.name for node in nodes_of(model, "Cast")}
    assert len(casts) == 3  # of the pixels, and of the core's two ends
    assert casts <= float32_nodes(model, "fp16")
