"""Classifying: the right logits, from files, from many threads, and without torch."""

from __future__ import annotations

import io
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import rexdeploy
from rexdeploy import arrays, machine
from rexdeploy.arrays import softmax
from rexdeploy.backends import has_onnxruntime_cuda
from rexdeploy.backends.onnxrt import load_session
from rexdeploy.bundle.manifest import Artifact, BatchRange
from rexdeploy.bundle.store import Bundle, sha256
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError
from rexdeploy.images import decode, sets
from rexdeploy.inference.classifier import load
from rexdeploy.models.checkpoints import load_checkpoint
from tests.helpers import assert_refused, entry, run_cli, run_python


def test_predictions_are_the_networks_own(
    timm_original: Bundle, timm_checkpoint: Path, photos: Path
) -> None:
    paths = sets.find(photos)
    preprocess = timm_original.manifest.model.preprocess
    batch = decode.normalise(sets.load_batch(paths, preprocess), preprocess)
    with torch.inference_mode():
        expected = load_checkpoint(timm_checkpoint).build()(torch.from_numpy(batch)).numpy()
    with rexdeploy.load(timm_original.path) as classifier:
        results = classifier.classify(paths)
        np.testing.assert_allclose(classifier.logits(batch), expected, atol=2e-3)
    labels = rexdeploy.__path__[0] + "/data/imagenet1k.txt"
    names = Path(labels).read_text().splitlines()
    for row, best in zip(softmax(expected), results, strict=True):
        assert [item.index for item in best] == list(np.argsort(-row)[:5])
        assert [item.label for item in best] == [names[item.index] for item in best]
        assert [item.probability for item in best] == pytest.approx(sorted(row)[:-6:-1], rel=1e-2)


def test_every_backend_that_runs_gives_the_same_classes(
    small_v1_original: Bundle, photos: Path
) -> None:
    paths = sets.find(photos)
    answers = {}
    for backend in ("onnxruntime", "pytorch"):
        with load(small_v1_original, backend) as classifier:
            assert classifier.backend == backend
            answers[backend] = [[p.index for p in best] for best in classifier.classify(paths, 3)]
    assert answers["onnxruntime"] == answers["pytorch"]


def test_better_backends_are_passed_over_with_a_reason(small_v1_original: Bundle) -> None:
    with load(small_v1_original) as classifier:
        if classifier.backend != "onnxruntime":
            pytest.skip(f"this machine runs {classifier.backend}")
        assert len(classifier.passed_over) >= 1
        assert classifier.passed_over[0].startswith("fp16.rtx-sm89.engine on tensorrt-rtx: ")
    with pytest.raises(BackendUnavailable, match="nothing in the bundle can run here: fp16.rtx"):
        load(small_v1_original, "tensorrt-rtx")
    with pytest.raises(UsageError, match="backend: got 'cuda', expected one of auto"):
        load(small_v1_original, "cuda")
    with pytest.raises(
        BackendUnavailable, match="holds no file for backend tensorrt: 'rexdeploy build-trt' makes"
    ):
        load(small_v1_original, "tensorrt")


def test_a_cpu_onnxruntime_on_a_machine_with_a_gpu_is_named(
    small_v1_original: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if has_onnxruntime_cuda():
        pytest.skip("this onnxruntime can use a GPU")
    for exists in (False, True):
        device = tmp_path / "nvidiactl"
        if exists:
            device.touch()
        monkeypatch.setattr(machine, "_DEVICES", (device,))
        with load(small_v1_original) as classifier:
            assert any("CPU build" in line for line in classifier.passed_over) is exists


def test_many_threads_get_their_own_answers(small_v1_original: Bundle) -> None:
    pool = sets.synthetic(12, small_v1_original.manifest.model.preprocess, seed=5)
    with load(small_v1_original, "onnxruntime") as classifier:
        expected = classifier.logits(pool)

        def one(index: int) -> arrays.Float32:
            return classifier.logits(pool[index : index + 1])

        with ThreadPoolExecutor(8) as threads:
            for index, logits in enumerate(threads.map(one, [*range(12)] * 3)):
                np.testing.assert_allclose(logits[0], expected[index % 12], atol=1e-4)


def test_onnxruntime_starts_no_more_threads_than_the_process_has_cores(
    small_v1_original: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks how many the machine has: the threads of a container's few waited for each other."""
    data = small_v1_original.read(entry(small_v1_original, "fp32.onnx"))

    def threads(own: int, asked: int | None = None) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(own)}, raising=False)
        options = load_session(data, threads=asked).get_session_options()
        return int(options.intra_op_num_threads)

    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert threads(1) == 1
    assert threads(3) == 3
    assert threads(4) == 0  # onnxruntime's own choice, which binds each thread to a core
    assert threads(1, 2) == 2


def test_closing_waits_for_who_runs_and_refuses_who_comes(small_v1_original: Bundle) -> None:
    """However the threads meet: each gets its logits or the one error, and nothing crashes."""
    image = sets.synthetic(1, small_v1_original.manifest.model.preprocess)
    classifier = load(small_v1_original, "onnxruntime")
    expected, running = classifier.logits(image), threading.Barrier(5)

    def run_until_closed() -> str:
        running.wait()
        while True:
            try:
                np.testing.assert_allclose(classifier.logits(image), expected, atol=1e-4)
            except RexdeployError as error:
                return str(error)

    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(run_until_closed) for _ in range(4)]
        running.wait()
        time.sleep(0.1)
        classifier.close()
        closed = "this classifier was closed; load the bundle again"
        assert [answer.result() for answer in answers] == [closed] * 4


def test_a_fixed_batch_is_filled_and_cut(small_v1_original: Bundle, tmp_path: Path) -> None:
    """The same graph, as if it took exactly four images; the last batch is padded."""
    shutil.copytree(small_v1_original.path, tmp_path / "v1")
    bundle = Bundle.open(tmp_path / "v1")
    graph = entry(bundle, "fp32.onnx")
    fixed = bundle.update(replace(graph, batch=BatchRange(4, 4, 4)), files={})
    pool = sets.synthetic(6, bundle.manifest.model.preprocess, seed=6)
    with load(small_v1_original, "onnxruntime") as free, load(fixed, "onnxruntime") as filled:
        np.testing.assert_allclose(filled.logits(pool), free.logits(pool), atol=1e-4)


def test_pillow_images_are_taken_in_any_mode_and_turned_upright_like_files(
    small_v1_original: Bundle, photos: Path, tmp_path: Path
) -> None:
    path, turned, exif = sets.find(photos)[0], tmp_path / "turned.png", Image.Exif()
    exif[0x0112] = 6
    with load(small_v1_original) as classifier, Image.open(path) as image:
        image.save(turned, exif=exif)
        for file, same in ((path, image.convert("RGBA")), (turned, Image.open(turned))):
            first, second = classifier.classify([file, same])
            assert [item.index for item in first] == [item.index for item in second]
        assert classifier.classify([image.convert("L")])[0][0].label.startswith("class ")


def test_pillow_images_that_are_broken_are_refused_like_files(
    small_v1_original: Bundle, photos: Path
) -> None:
    photo = sets.find(photos)[0].read_bytes()
    lazy = Image.open(io.BytesIO(photo[: len(photo) // 2]))  # its pixels are not read yet
    with load(small_v1_original) as classifier:
        for image, reason in (
            (lazy, "cannot be decoded as an image"),
            (Image.new("RGB", (0, 0)), "an image of 0 x 0 pixels"),
            (Image.new("F", (9, 9)), "no known range"),
        ):
            with pytest.raises(UsageError, match=f"^image 1: .*{reason}"):
                classifier.classify([Image.new("RGB", (9, 9)), image])


def test_what_is_no_list_of_images_or_no_batch_is_refused(
    small_v1_original: Bundle, photos: Path
) -> None:
    def zeros(*shape: int, dtype: type = np.float32) -> Any:
        return np.zeros(shape, dtype)

    one, photo = "got one image .* expected a list", sets.find(photos)[0]
    with load(small_v1_original) as classifier:
        classify, logits = classifier.classify, classifier.logits
        cases: tuple[tuple[Any, Any, str], ...] = (
            (classifier.prepare, "cat.jpg", one),
            (classifier.prepare, Path("cat.jpg"), one),
            (classifier.prepare, Image.new("RGB", (9, 9)), one),
            (classify, [], "got 0 images and top 5"),
            (partial(classify, top=-1), [photo], "got 1 images and top -1"),
            (logits, zeros(1, 3, 64, 65), "images: got float32 of shape"),
            (logits, zeros(3, 64, 64), "images: got float32 of shape"),
            (logits, zeros(0, 3, 64, 64), "images: got float32 of shape"),
            (logits, zeros(1, 64, 64, 3), "images: got float32 of shape"),
            (logits, zeros(1, 3, 64, 64, dtype=np.float64), "got float64 of shape"),
        )
        for call, given, part in cases:
            with pytest.raises(UsageError, match=part):
                call(given)
    with pytest.raises(RexdeployError, match="was closed"):
        logits(zeros(1, 3, 64, 64))
    classifier.close()


def test_labels_of_another_number_of_classes_are_refused(small_v1: Bundle) -> None:
    data = b"one\ntwo\n"
    bundle = small_v1.update(
        Artifact("labels", "labels.txt", sha256(data)), files={"labels.txt": data}
    )
    with pytest.raises(UsageError, match="got 2 labels, expected 37"):
        load(bundle)


def test_serving_needs_no_torch(small_v1_original: Bundle, photos: Path) -> None:
    """Nor onnx, nor anything else that only exporting needs."""
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxsim', 'safetensors', 'timm', 'typer', 'rich'):\n"
        "    sys.modules[name] = None\n"
        "import rexdeploy\n"
        "with rexdeploy.load(sys.argv[1]) as classifier:\n"
        "    print(classifier.backend, classifier.classify([sys.argv[2]])[0][0].index)\n"
    )
    answer = run_python(code, small_v1_original.path, sets.find(photos)[0])
    with load(small_v1_original, "onnxruntime") as classifier:
        best = classifier.classify([sets.find(photos)[0]])[0][0].index
    assert answer.stdout == f"onnxruntime {best}\n", answer.stderr


def test_predict_prints_labels_and_probabilities(
    small_v1: Bundle, photos: Path, tmp_path: Path
) -> None:
    paths = sets.find(photos)
    result = run_cli("predict", *paths, "--top", "2", cwd=tmp_path)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].startswith("rexnet 0.3 on ")
    assert lines[1] == str(paths[0])
    assert len(lines) == 1 + 2 * 3
    assert "passed over: fp16.rtx-sm89.engine" in result.err or "tensorrt" in lines[0]


def test_predict_refuses_what_is_no_image(small_v1: Bundle, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    good = sets.find(photos)[0]
    result = run_cli("predict", good, "notes.txt", "--quiet", cwd=tmp_path)
    assert_refused(result, "notes.txt: not an image")
    assert result.out == ""
    assert_refused(run_cli("predict", "gone.jpg", cwd=tmp_path), "gone.jpg: no such file")
