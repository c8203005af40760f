"""Bundles that are expensive to make: each is exported once for the whole run, and copied."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from rexdeploy.bundle.store import Bundle
from rexdeploy.models.rexnet import ReXNetV1, ReXNetV1_lite
from rexdeploy.steps.build_trt import build_trt
from rexdeploy.steps.export import export
from tests.helpers import reacting, run_cli


def pytest_configure() -> None:
    """Gives each of several test processes a core of its own, and their libraries one thread.

    Threads of two processes that wait for each other by spinning took more time than one process.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    torch.set_num_threads(1 if worker else 2)


LONGEST = (
    *("test_readme", "test_quantize", "test_verify_defects", "test_finetune", "test_verify"),
    "test_serve",
    *("test_cli", "test_export", "test_serve_faults", "test_build", "test_localize", "test_tune"),
    *("test_bench", "test_injection", "test_cpp", "test_cpp_package", "test_triton_serve"),
    *("test_rexnet", "test_tune_serving", "test_interface", "test_image_sets", "test_engines"),
    *("test_peers", "test_triton"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first: begun last, one process would wait for the other."""
    places = {f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def session_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all test processes of this run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "session"
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def _once(path: Path) -> Iterator[bool]:
    """Whether `path` is still to be made in the block: by the first process that comes."""
    done = path.with_name(f"{path.name}.done")
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not done.exists()
        done.touch()


@pytest.fixture(scope="session")
def photos(session_dir: Path) -> Path:
    """A folder with two real photographs."""
    folder = session_dir / "photos"
    with _once(folder) as missing:
        if missing:
            folder.mkdir()
            samples = load_sample_images()
            for name, pixels in zip(samples.filenames, samples.images, strict=True):
                Image.fromarray(pixels).save(folder / Path(name).with_suffix(".png").name)
    return folder


@pytest.fixture(scope="session")
def v1_checkpoint(session_dir: Path) -> Path:
    """A published-format V1 1.0 checkpoint with 37 classes, as DataParallel would save it."""
    path = session_dir / "rexnetv1_1.0.pth"
    with _once(path) as missing:
        if missing:
            torch.manual_seed(1)
            model = reacting(ReXNetV1(width_mult=1.0, classes=37))
            state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
            torch.save({"epoch": 3, "state_dict": state}, path)
    return path


@pytest.fixture(scope="session")
def timm_checkpoint(session_dir: Path) -> Path:
    """A timm rexnet_130 checkpoint with 1000 classes."""
    path = session_dir / "model.safetensors"
    with _once(path) as missing:
        if missing:
            torch.manual_seed(2)
            model = reacting(timm.create_model("rexnet_130"), 96)
            safetensors.torch.save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def lite_checkpoint(session_dir: Path) -> Path:
    """A published-format lite 1.0 checkpoint with 10 classes."""
    path = session_dir / "rexnet_lite_1.0.pth"
    with _once(path) as missing:
        if missing:
            torch.manual_seed(3)
            model = reacting(ReXNetV1_lite(multiplier=1.0, classes=10))
            torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def narrow_checkpoint(session_dir: Path) -> Path:
    """A published-format V1 0.3 checkpoint with 37 classes: all that V1 1.0 has, but cheap."""
    path = session_dir / "rexnetv1_0.3.pth"
    with _once(path) as missing:
        if missing:
            torch.manual_seed(1)
            model = reacting(ReXNetV1(width_mult=0.3, classes=37), 64)
            torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def narrow_lite_checkpoint(session_dir: Path) -> Path:
    """A published-format lite 0.3 checkpoint with 10 classes."""
    path = session_dir / "rexnet_lite_0.3.pth"
    with _once(path) as missing:
        if missing:
            torch.manual_seed(3)
            model = reacting(ReXNetV1_lite(multiplier=0.3, classes=10), 64)
            torch.save(model.state_dict(), path)
    return path


def _bundle(
    checkpoint: Path, name: str, takes: str = "float32", gives: str = "logits", size: int = 224
) -> Bundle:
    """A bundle with an ONNX graph, its float16 form and an RTX engine."""
    out = checkpoint.parent / "artifacts"
    out.mkdir(exist_ok=True)
    with _once(out / name) as missing:
        if missing:
            exported = export(
                weights=checkpoint, name=name, out=out, image_size=size, input=takes, output=gives
            )
            build_trt(exported.bundle, fp16=True, flavor="rtx", batch="1:2:8", target=["sm89"])
    return Bundle.open(out / name)


@pytest.fixture(scope="session")
def v1_original(v1_checkpoint: Path) -> Bundle:
    """Shared: copy it (`v1_bundle`) before changing it."""
    return _bundle(v1_checkpoint, "v1")


@pytest.fixture(scope="session")
def timm_original(timm_checkpoint: Path) -> Bundle:
    return _bundle(timm_checkpoint, "timm", size=96)


@pytest.fixture(scope="session")
def lite_original(lite_checkpoint: Path) -> Bundle:
    return _bundle(lite_checkpoint, "lite")


@pytest.fixture(scope="session")
def small_v1_original(narrow_checkpoint: Path) -> Bundle:
    """The V1 bundle's network at 64 pixels: the same graphs, a twelfth of the arithmetic."""
    return _bundle(narrow_checkpoint, "small_v1", size=64)


@pytest.fixture(scope="session")
def small_lite_original(narrow_lite_checkpoint: Path) -> Bundle:
    return _bundle(narrow_lite_checkpoint, "small_lite", size=64)


@pytest.fixture(scope="session")
def small_pixels_original(narrow_checkpoint: Path) -> Bundle:
    return _bundle(narrow_checkpoint, "small_pixels", "uint8", "probabilities", size=64)


def _copy(original: Bundle, folder: Path) -> Bundle:
    target = folder / "artifacts" / original.path.name
    shutil.copytree(original.path, target)
    return Bundle.open(target)


@pytest.fixture(scope="session")
def detector_original(session_dir: Path) -> Bundle:
    """A seeded Mask R-CNN over a narrow ReXNet; short sides of 96 pixels, 20 classes."""
    out = session_dir / "detectors"
    out.mkdir(exist_ok=True)
    with _once(out / "segment") as missing:
        if missing:
            done = run_cli(
                "export", "--task", "segment", "--width", "0.3", "--num-classes", "21",
                "--image-size", "96", "--name", "segment", "--out", out, cwd=out,
            )  # fmt: skip
            assert done.code == 0, done.err
            assert "the heads are untrained (seeded)" in done.out
    return Bundle.open(out / "segment")


@pytest.fixture
def v1_bundle(v1_original: Bundle, tmp_path: Path) -> Bundle:
    """A copy of the V1 bundle, at artifacts/v1 in the test's own folder."""
    return _copy(v1_original, tmp_path)


@pytest.fixture
def small_v1(small_v1_original: Bundle, tmp_path: Path) -> Bundle:
    return _copy(small_v1_original, tmp_path)


@pytest.fixture
def small_lite(small_lite_original: Bundle, tmp_path: Path) -> Bundle:
    return _copy(small_lite_original, tmp_path)


@pytest.fixture
def small_pixels(small_pixels_original: Bundle, tmp_path: Path) -> Bundle:
    return _copy(small_pixels_original, tmp_path)
