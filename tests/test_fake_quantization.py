"""Learning with INT8's rounding: it is the graph's, it helps, and it goes on where it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import ModelProto, numpy_helper

import rexdeploy
from rexdeploy.backends import open_backend
from rexdeploy.backends.pytorch import reference
from rexdeploy.bundle.labels import read_labels
from rexdeploy.bundle.store import Bundle, commit
from rexdeploy.graphs import quantize as ops
from rexdeploy.graphs.read import parse
from rexdeploy.images.decode import normalise
from rexdeploy.images.labelled import find_labelled
from rexdeploy.images.sets import find, load_batch
from rexdeploy.models.rexnet import RexNet
from rexdeploy.steps.export import export
from rexdeploy.steps.import_onnx import import_onnx
from rexdeploy.training.fake_quantization import FakeQuantized
from tests.drawn_images import write_drawn_images
from tests.helpers import assert_refused, run_cli
from tests.planted import unbalanced
from tests.test_quantize import DATA

BATCH = 16


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dials")
    write_drawn_images(folder / "train", 1, 144)
    write_drawn_images(folder / "val", 2, 240)
    return folder


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A network that plain INT8 breaks."""
    folder = tmp_path_factory.mktemp("hard")
    weights = unbalanced(DATA / "drawn_lite.safetensors", folder / "hard.safetensors")
    return export(weights=weights, image_size=32, name="hard", out=folder).bundle


def pixels(bundle: Bundle, files: list[Path]) -> np.ndarray:
    spec = bundle.manifest.model.preprocess
    return normalise(load_batch(files, spec), spec)


def plain_int8(bundle: Bundle, images: Path) -> tuple[ModelProto, ModelProto]:
    """The bundle's float32 graph and a plain INT8 one, with the ranges of all of train/."""
    root = bundle.manifest.graph
    assert root is not None
    model = parse(bundle.read(root), root.file)
    ranges = ops.calibrate(model, pixels(bundle, find(images / "train")), "minmax")
    return model, ops.quantized(model, ranges, "cpu")


def answers(bundle: Bundle, model: ModelProto, files: list[Path]) -> np.ndarray:
    backend = open_backend("onnxruntime", model.SerializeToString(), bundle.manifest.model.core)
    return backend.run(pixels(bundle, files))


def right(bundle: Bundle, model: ModelProto, images: Path) -> int:
    """How many of val/ a graph answers right."""
    labelled = find_labelled(images / "val", read_labels(bundle))
    found = answers(bundle, model, [images / "val" / file for file in labelled.files])
    return int((found.argmax(1) == labelled.classes).sum())


@pytest.mark.parametrize("name", ["small_lite_original", "small_v1_original"])
def test_it_rounds_where_the_graph_does(
    name: str, request: pytest.FixtureRequest, images: Path
) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    spec, weights = bundle.manifest.model, bundle.manifest.find("weights")
    assert weights is not None
    network = reference(bundle.read(weights), spec)
    assert isinstance(network, RexNet)
    model, quantised = plain_int8(bundle, images)
    known = {item.name: numpy_helper.to_array(item) for item in quantised.graph.initializer}
    scales = {
        float(known[node.input[1]])
        for node in quantised.graph.node
        if node.op_type == "QuantizeLinear"
    }
    val = find(images / "val")
    exact, given = (answers(bundle, graph, val) for graph in (model, quantised))
    wanted = float(np.sqrt(((given - exact) ** 2).mean()))
    errors = {}
    for bits in (8, 4):
        fake = FakeQuantized(network, bits).eval()
        fake.take_ranges([torch.from_numpy(pixels(bundle, find(images / "train")))])
        own = [(high - low) / 255 for low, high in fake.ranges.values()]
        for first, second in ((own, list(scales)), (list(scales), own)):
            near = np.abs(np.subtract.outer(first, second)).min(1) / np.asarray(first)
            assert near.max() < 1e-4
        with torch.inference_mode():
            found = fake(torch.from_numpy(pixels(bundle, val))).numpy()
        errors[bits] = float(np.sqrt(((found - exact) ** 2).mean()))
    assert 0.8 < errors[8] / wanted < 1.25
    assert errors[4] > 1.5 * errors[8]


def test_it_learns_to_be_rounded(hard: Bundle, images: Path, tmp_path: Path) -> None:
    model, quantised = plain_int8(hard, images)
    before, exact = right(hard, quantised, images), right(hard, model, images)
    assert exact - before > 0.1 * 240
    out = tmp_path / "learned.safetensors"
    asked = ("finetune", images / "train", "--qat", hard.path, "--val", images / "val")
    done = run_cli(
        *asked, "--epochs", "3", "--batch", str(BATCH), "--lr", "1e-4", "--workers", "1",
        "--out", out, cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    learned = export(weights=out, name="learned", out=tmp_path).bundle
    assert learned.manifest.model.preprocess.height == 32  # noted in the checkpoint
    _, again = plain_int8(learned, images)
    assert right(learned, again, images) - before > 0.05 * 240


def test_interrupted_it_goes_on_to_the_same_bytes(
    hard: Bundle, images: Path, tmp_path: Path
) -> None:
    def train(name: str, stop_at: str = "") -> bytes:
        def report(text: str) -> None:
            if stop_at and text.startswith(stop_at):
                raise KeyboardInterrupt

        out = tmp_path / f"{name}.safetensors"
        rexdeploy.finetune(
            images / "train", qat=hard, epochs=2, batch=BATCH, workers=1, out=out, report=report
        )
        return out.read_bytes()

    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("broken", "epoch 2")
    with pytest.raises(rexdeploy.UsageError, match="INT8's weights [78] bits then, not given now;"):
        rexdeploy.finetune(
            images / "train", weights=hard.path / "weights.safetensors", epochs=2, batch=BATCH,
            lr=5e-5, image_size=32, out=tmp_path / "broken.safetensors",
        )  # fmt: skip
    assert train("broken") == whole


@pytest.mark.parametrize("option", [("--lite",), ("--width", "1"), ("--image-size", "32")])
def test_a_bundles_network_is_all_that_it_takes(
    option: tuple[str, ...], hard: Bundle, images: Path, tmp_path: Path
) -> None:
    refused = run_cli("finetune", images / "train", "--qat", hard.path, *option, cwd=tmp_path)
    assert_refused(refused, "qat takes a bundle's own network: leave weights, lite, width and")


def test_other_images_and_other_graphs_are_refused(
    hard: Bundle, images: Path, tmp_path: Path
) -> None:
    write_drawn_images(tmp_path / "few", 1, 40)
    next((tmp_path / "few").iterdir()).rename(tmp_path / "gone")
    refused = run_cli("finetune", tmp_path / "few", "--qat", hard.path, cwd=tmp_path)
    assert_refused(refused, "the images show")
    root = hard.manifest.graph
    assert root is not None
    own = import_onnx(hard.path / root.file, out=tmp_path)
    foreign = commit(own.bundle.path, lambda _: own.bundle.manifest, own.new_files)
    refused = run_cli("finetune", images / "train", "--qat", foreign.path, cwd=tmp_path)
    assert_refused(refused, "holds somebody's own ONNX graph, which cannot be trained")
