"""Training: the same bytes after a kill, two processes as one, and one line for what is bad."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import rexdeploy
from rexdeploy.models.checkpoints import load_checkpoint
from rexdeploy.models.notes import Notes, save_with_notes
from rexdeploy.models.rexnet import ReXNetV1
from rexdeploy.serving.front import free_port
from rexdeploy.steps.finetune import FinetuneResult
from tests.helpers import ROOT, assert_refused, run_cli, run_program
from tests.injection import failing

SMALL = {"width": 0.1, "image_size": 32, "epochs": 2, "batch": 8, "workers": 1}
OPTIONS = "--width 0.1 --image-size 32 --epochs 3 --batch 8 --workers 1".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of ten images: bright above, and bright below."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, half in (("above", slice(0, 20)), ("below", slice(20, 40))):
        (folder / name).mkdir()
        for number in range(10):
            pixels = rng.integers(0, 90, (40, 40, 3), dtype=np.uint8)
            pixels[half] += 120
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def _command(pictures: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "rexdeploy", "finetune", str(pictures), "--out", str(out),
            *OPTIONS, *more]  # fmt: skip


def _same_threads() -> dict[str, str]:
    """An environment in which another process adds up as many parts of a sum as this one."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def _train(pictures: Path, out: Path, **options: object) -> FinetuneResult:
    return rexdeploy.finetune(pictures, out=out, **{**SMALL, **options})  # type: ignore[arg-type]


def test_it_learns_and_export_takes_what_it_wrote(pictures: Path, tmp_path: Path) -> None:
    """Labels, width and image size come from the checkpoint; another size is a warning."""
    out = tmp_path / "mine.safetensors"
    more = [
        "--epochs",
        "10",
        "--batch",
        "4",
        "--lr",
        "0.01",
        "--plot",
        "curve.svg",
        "--json",
        "r.json",
    ]
    done = run_cli(
        "finetune", pictures, "--val", pictures, "--out", out, *OPTIONS, *more, cwd=tmp_path
    )
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["top1"] >= 0.9
    assert [epoch["number"] for epoch in found["epochs"]] == list(range(1, 11))
    assert f"epoch {found['best_epoch']}, top-1 {found['top1']:.2%}" in done.out
    assert "validation top-1" in (tmp_path / "curve.svg").read_text()
    assert sorted(os.listdir(tmp_path)) == ["curve.svg", "mine.safetensors", "r.json"]  # noqa: PTH208
    exported = rexdeploy.export(weights=out, out=tmp_path / "a", name="mine", simplify=False)
    model = exported.bundle.manifest.model
    assert (model.family, model.width, model.preprocess.height) == ("rexnet", 0.1, 32)
    assert (exported.bundle.path / "labels.txt").read_text() == "above\nbelow\n"
    # What validation has counted is what the bundle answers.
    files = sorted(pictures.rglob("*.png"))
    with rexdeploy.load(exported.bundle, "onnxruntime") as classifier:
        answers = [found[0].label for found in classifier.classify(files, top=1)]
    right = sum(label == file.parent.name for label, file in zip(answers, files, strict=True))
    assert right / len(files) == found["top1"]
    options = ("--image-size", "64", "--no-simplify", "--batch", "1")
    other = run_cli("export", "--weights", out, *options, cwd=tmp_path)
    assert other.code == 0
    assert "warning: the network was trained at 32 pixels and is exported for 64" in other.err


@pytest.mark.parametrize("recipe", ["small", "published"])
def test_killed_it_goes_on_to_the_same_bytes(recipe: str, pictures: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    done = run_cli("finetune", pictures, "--out", whole, *OPTIONS, "--recipe", recipe, cwd=tmp_path)
    assert done.code == 0, done.err
    process = subprocess.Popen(
        _command(pictures, broken, "--recipe", recipe),
        stderr=subprocess.PIPE, text=True, env=_same_threads(),
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch 2"):
            break
    process.kill()
    process.wait()
    process.stderr.close()
    assert (tmp_path / "broken.safetensors.training").exists()
    more = ("--recipe", recipe, "--workers", "2", "--json", "-")
    again = run_cli("finetune", pictures, "--out", broken, *OPTIONS, *more, cwd=tmp_path)
    assert again.code == 0, again.err
    found = json.loads(again.out)
    assert found["resumed"] == 1 < found["best_epoch"]  # else what was kept would be as it was
    assert broken.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.training")) + list(tmp_path.glob(".*"))


# Six steps of the published recipe in float64, in which rounding cannot hide a difference.
STEPS = """
import sys
from dataclasses import replace
import torch
from rexdeploy.models.rexnet import ReXNetV1
from rexdeploy.training.processes import group, place
from rexdeploy.training.trainer import RECIPES, Trainer
torch.manual_seed(0)
images, labels = torch.randn(8, 3, 32, 32).double(), torch.arange(8) % 3
model = ReXNetV1(width_mult=0.1, classes=3).double()
with group():
    rank, processes = place()
    own = slice(8 // processes * rank, 8 // processes * (rank + 1))
    trainer = Trainer(model, RECIPES["published"], 0.1, 2, 3, "cpu")
    torch.manual_seed(1)
    for _ in range(6):
        loss = trainer.step(images[own], labels[own]) / processes
        print(trainer.summed(loss).item(), file=sys.stdout if rank == 0 else sys.stderr)
    total = sum(value.double().sum() for value in trainer.result.state_dict().values())
    if rank == 0:
        print(total.item())
"""
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Batch norms, dropout, gradients and averages are the whole batch's."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(STEPS, {"__name__": "__main__"})
    alone = [float(line) for line in printed.getvalue().split()]
    assert len(alone) == 7
    assert alone[0] - alone[5] > 0.01  # it is training
    (tmp_path / "steps.py").write_text(STEPS)
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "steps.py"],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(ROOT)},
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    (out, said), (nothing, _) = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert nothing == ""
    np.testing.assert_allclose([float(line) for line in out.split()], alone, rtol=1e-9)


def test_torchrun_runs_the_command_and_one_of_two_tells(pictures: Path, tmp_path: Path) -> None:
    command = _command(pictures, tmp_path / "o.safetensors", "--epochs", "1", "--json", "-")
    alone = run_cli(*command[3:], cwd=tmp_path)
    assert alone.code == 0, alone.err
    done = run_program(command[0], *TWO, *command[1:], "--force")
    assert done.returncode == 0, done.stderr
    losses = []
    for out, said in ((alone.out, alone.err), (done.stdout, done.stderr)):
        assert said.count("epoch 1 of 1 ...") == 1
        (epoch,) = json.loads(out)["epochs"]
        losses.append([epoch["loss"], epoch["val_loss"], epoch["correct"]])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_nan_stops_and_keeps_the_last_good_checkpoint(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    with pytest.raises(rexdeploy.VerificationFailed, match="nothing was written: give a lower"):
        _train(pictures, out, lr=1e30)
    assert not list(tmp_path.iterdir())
    # Fine in the first epoch, and in the second a classifier that overflows.
    refused = run_cli("finetune", pictures, "--out", out, *OPTIONS, "--lr", "1e30", cwd=tmp_path)
    assert_refused(refused, "the loss is nan in epoch 1, step ", " of 2;", code=3)


def test_a_full_disk_keeps_the_last_good_checkpoint(pictures: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "a" / "o.safetensors", tmp_path / "b" / "o.safetensors"
    for folder in (whole.parent, out.parent):
        folder.mkdir()
    _train(pictures, whole)
    # The state after the first epoch, written behind the first checkpoint.
    with failing(out.parent, 2, 28, ["write"]), pytest.raises(rexdeploy.RexdeployError) as full:
        _train(pictures, out)
    assert "o.safetensors.training (No space left on device)" in str(full.value)
    assert "is the last good one, whole" in str(full.value)
    assert load_checkpoint(out).num_classes == 2
    assert os.listdir(out.parent) == ["o.safetensors"]  # noqa: PTH208 - hidden ones, too
    _train(pictures, out, force=True)
    assert out.read_bytes() == whole.read_bytes()


def test_another_training_is_not_gone_on_with(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    options = [*OPTIONS, "--epochs", "500"]  # it goes on until it is interrupted
    process = subprocess.Popen(
        _command(pictures, out, "--epochs", "500"), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch 2"):
            break
    other = run_cli("finetune", pictures, "--out", out, *options, cwd=tmp_path)
    assert_refused(other, "is being trained by another command", "another --out")
    process.send_signal(signal.SIGINT)
    assert "error: interrupted; the same command goes on" in process.stderr.read()
    assert process.wait() == 130
    other = run_cli("finetune", pictures, "--out", out, *options, "--batch", "4", cwd=tmp_path)
    assert_refused(other, "other options or data: batch 8 then, 4 now; lr 0.00025 then", "--force")
    more = tmp_path / "more"
    subprocess.run(["cp", "-r", pictures, more], check=True)
    (more / "above" / "0.png").unlink()
    other = run_cli("finetune", more, "--out", out, *options, cwd=tmp_path)
    assert_refused(other, "training images 20 then, 19 now")
    (tmp_path / "o.safetensors.training").write_bytes(b"PK damaged")
    other = run_cli("finetune", pictures, "--out", out, *options, cwd=tmp_path)
    assert_refused(other, "is no training's state", "--force")
    assert _train(pictures, out, force=True).resumed == 0
    other = run_cli("finetune", pictures, "--out", out, *options, cwd=tmp_path)
    assert_refused(other, "is there already: give another --out, or --force")


def test_given_weights_are_kept_but_for_another_classifier(pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "w.safetensors"
    model = ReXNetV1(width_mult=0.1, classes=7)
    safetensors.torch.save_file(model.state_dict(), weights)
    options = {"weights": weights, "width": None, "lr": 1e-12, "epochs": 1}
    _train(pictures, tmp_path / "a.safetensors", **options)
    trained = load_checkpoint(tmp_path / "a.safetensors")
    assert (trained.width, trained.num_classes) == (0.1, 2)
    stem = trained.state_dict["features.0.weight"]
    assert torch.allclose(stem, model.state_dict()["features.0.weight"], atol=1e-6)
    # For the classes that it was trained for the classifier stays, and not for as many others.
    options["weights"] = tmp_path / "a.safetensors"
    _train(pictures, tmp_path / "b.safetensors", **options)
    again = load_checkpoint(tmp_path / "b.safetensors").state_dict
    assert torch.allclose(
        again["output.1.weight"], trained.state_dict["output.1.weight"], atol=1e-6
    )
    renamed = tmp_path / "renamed"
    subprocess.run(["cp", "-r", pictures, renamed], check=True)
    (renamed / "above").rename(renamed / "on top")
    _train(renamed, tmp_path / "c.safetensors", seed=1, **options)
    other = load_checkpoint(tmp_path / "c.safetensors").state_dict
    assert not torch.allclose(other["output.1.weight"], again["output.1.weight"], atol=1e-2)
    refused = run_cli("finetune", pictures, "--weights", weights, "--lite", cwd=tmp_path)
    assert_refused(refused, "--lite contradicts")


def test_images_that_cannot_be_read_are_left_out_and_named(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    subprocess.run(["cp", "-r", pictures, folder], check=True)
    (folder / "above" / "broken.png").write_bytes(b"no image")
    done = run_cli("finetune", folder, "--out", "o.safetensors", *OPTIONS, "--epochs", "1",
                   cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    assert "left out: " in done.err
    assert "mixed/above/broken.png: not an image" in done.err
    assert "18 images to train on, 2 to validate by, 1 that cannot be read left out" in done.out
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    refused = run_cli("finetune", folder, *OPTIONS, cwd=tmp_path)
    assert_refused(refused, "none of its 21 images can be read")


def _one_class(folder: Path) -> None:
    (folder / "a").mkdir()


def _no_images(folder: Path) -> None:
    _one_class(folder)
    (folder / "b").mkdir()


def _no_folders(folder: Path) -> None:
    Image.new("RGB", (9, 9)).save(folder / "1.png")


def _steering(folder: Path) -> None:
    for name in ("a\x1b[2J", "b"):
        (folder / name).mkdir()
        Image.new("RGB", (9, 9)).save(folder / name / "1.png")


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda folder: folder.rmdir(), "no such folder"),
        (lambda folder: None, "no folders in it, expected one for each class"),
        (_no_folders, "no folders in it"),
        (_one_class, "got one class, 'a', expected two or more"),
        (_no_images, "no images in "),
        (_steering, "holds the control character U+001B"),
    ],
)
def test_a_folder_that_cannot_be_used(
    make: Callable[[Path], None], part: str, tmp_path: Path
) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    make(folder)
    assert_refused(run_cli("finetune", folder, cwd=tmp_path), part)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--recipe", "secret"], "expected published or small"),
        (["--epochs", "0"], "epochs: got 0"),
        (["--batch", "1"], "expected 2 or more images"),
        (["--batch", "64"], "18 images to train on are fewer than a batch of 64"),
        (["--lr", "nan"], "learning rate: got nan"),
        (["--seed", "-1"], "seed: got -1"),
        (["--workers", "0"], "workers: got 0"),
        (["--out", "x.pth"], "expected a name in .safetensors"),
        (["--out", "gone/x.safetensors"], "cannot write gone/x.safetensors"),
        (["--image-size", "8"], "image size: got 8"),
        (["--width", "nan"], "width multiplier: got nan"),
        (["--weights", "gone.pth"], "weights gone.pth: no file there"),
        (["--val", "other"], "1 of its 1 classes are not among those to train: got 'besides'"),
    ],
)
def test_options_that_cannot_be_used(
    options: list[str], part: str, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "other" / "besides").mkdir(parents=True)
    before = [] if "--out" in options else ["--out", "o.safetensors"]
    common = [] if "--width" in options or "--weights" in options else ["--width", "0.1"]
    size = [] if "--image-size" in options else ["--image-size", "32"]
    refused = run_cli("finetune", pictures, *before, *common, *size, *options, cwd=tmp_path)
    assert_refused(refused, part)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("note", "part"),
    [
        ("{", "its notes under 'rexdeploy' are not readable"),
        ('{"labels": ["a"], "width": 0.1, "image_size": 32}', "got 1 labels in its notes"),
        ('{"labels": ["a", "\\u001b[2J"], "width": 0.1, "image_size": 32}', "control character"),
        ('{"labels": ["a", "b\\nc"], "width": 0.1, "image_size": 32}', "line break"),
        ('{"labels": ["a", ""], "width": 0.1, "image_size": 32}', "blank"),
        ('{"labels": ["a", "b"], "width": 0.7, "image_size": 32}', "its notes say width 0.7"),
        ('{"labels": ["a", "b"], "width": 1e99, "image_size": 32}', "width multiplier"),
        ('{"labels": ["a", "b"], "width": 0.1, "image_size": 99999}', "image size: got 99999"),
    ],
)
def test_hostile_notes_are_one_line(note: str, part: str, tmp_path: Path) -> None:
    state = ReXNetV1(width_mult=0.1, classes=2).state_dict()
    (tmp_path / "w.safetensors").write_bytes(safetensors.torch.save(state, {"rexdeploy": note}))
    assert_refused(run_cli("export", "--weights", "w.safetensors", cwd=tmp_path), part)
    assert not (tmp_path / "artifacts" / "rexnet_0.1").exists()


def test_the_same_notes_are_the_same_bytes() -> None:
    state = ReXNetV1(width_mult=0.1, classes=2).state_dict()
    data = save_with_notes(state, Notes(("ä", "b"), 0.1, 32))
    assert data == save_with_notes(state, Notes(("ä", "b"), 0.1, 32))
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert list(header["__metadata__"]) == ["rexdeploy"]
