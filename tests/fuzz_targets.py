"""What reads files of strangers, each as a function of bytes that may only refuse them.

`python -m tests.fuzz_targets TARGET SECONDS FOLDER` runs one: by random damage, or by atheris where
scripts/fuzz_atheris.py has started it. Inputs that fall are written to the folder. scripts/fuzz.sh
runs all.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import random
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import safetensors.torch
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from PIL import Image

from rexdeploy.backends import tensorrt_api
from rexdeploy.bundle import labels, manifest
from rexdeploy.errors import RexdeployError
from rexdeploy.graphs import cast, products, read, wrapper
from rexdeploy.images import decode
from rexdeploy.models import checkpoints
from tests import hostile_images as hostile
from tests.cpp_probe import probe
from tests.mutations import mutated, mutated_image, mutated_json, mutated_message, mutated_zip
from tests.test_one_meaning import MANIFEST, OWN_GRAPH, differences

SLOW = 30.0  # seconds; what one input may take at most


@dataclass(frozen=True)
class Target:
    """One reader, and what it is fed."""

    read: Callable[[bytes], object]  # raises RexdeployError, and nothing else
    seeds: Callable[[], Sequence[bytes]]  # good files, small ones
    mutate: Callable[[bytes, random.Random], bytes] = mutated


def run(target: Target, data: bytes) -> str:
    """Feeds one input; gives why it was refused, or nothing. What else it raises is a defect."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, about damaged files
        try:
            target.read(data)
        except RexdeployError as error:
            refusal = str(error)
        else:
            return ""
    if not refusal or len(refusal.splitlines()) != 1:
        raise AssertionError(f"not one line: {refusal!r}")
    return refusal


def damaged(target: Target, rng: random.Random) -> bytes:
    """A damaged copy of one of the target's files."""
    return target.mutate(rng.choice(_seeds(target)), rng)


@functools.cache
def _seeds(target: Target) -> Sequence[bytes]:
    return target.seeds()


# The readers


def _read_graph(data: bytes) -> None:
    """As `inspect` and the building of an engine read a graph of somebody else's."""
    model = read.parse(data, "x.onnx")
    read.describe(model)
    products.products(model)
    products.precision_of(model)
    wrapper.forms(model)


def _read_plan(data: bytes) -> None:
    tensorrt_api.is_plan(data)
    tensorrt_api.read_header(data)


def _as_file(read: Callable[[Path], object], data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        read(path)


def _read_labels(data: bytes) -> None:
    _as_file(lambda path: labels.labels_for(path, 3), data)


def _read_weights(data: bytes) -> None:
    _as_file(checkpoints.read_state_dict, data)


def _read_image(data: bytes) -> None:
    with decode.opened(data, "image") as image:
        decode.crop(decode.to_rgb(image), manifest.Preprocess(32, 32))


# Good files of each kind


def _manifests() -> list[bytes]:
    return [manifest.to_json(MANIFEST), manifest.to_json(OWN_GRAPH)]


def _graphs() -> list[bytes]:
    """A classifier of two layers; in 16 bits; with a branch; and one that takes bytes."""
    weights = np.ones((4, 3, 3, 3), np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["logits"], "flat"),
    ]
    plain = _graph(nodes, {"w": weights})
    half = cast.to_precision(onnx.load_from_string(plain), "fp16").SerializeToString()
    then = helper.make_graph(
        [helper.make_node("Relu", ["c"], ["r"])],
        "then",
        [],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
    )
    branch = helper.make_node("If", ["yes"], ["b"], "if", then_branch=then, else_branch=then)
    pool = helper.make_node("GlobalAveragePool", ["b"], ["p"], "pool")
    branched = _graph([nodes[0], branch, pool, nodes[2]], {"w": weights, "yes": np.array(True)})
    spec = manifest.ModelSpec(
        "onnx",
        None,
        4,
        "input",
        "logits",
        manifest.Preprocess(32, 32),
        MANIFEST.model.weights,
        "uint8",
        "probabilities",
    )
    wrapped = wrapper.wrap(onnx.load_from_string(plain), spec).SerializeToString()
    return [plain, half, branched, wrapped]


def _graph(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return bytes(model.SerializeToString())


def _mutated_graph(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutated(data, rng)
    model = ModelProto.FromString(data)
    mutated_message(model, rng)
    return bytes(model.SerializeToString())


def _plans() -> list[bytes]:
    rtx = bytearray(200)
    rtx[:4] = tensorrt_api.RTX_MAGIC
    rtx[16:24] = struct.pack("<Q", len(rtx))
    rtx[24:28], rtx[32:36] = bytes([1, 7, 1, 0]), struct.pack("<L", 127)
    return [bytes(rtx), tensorrt_api._FULL_MAGIC + bytes(4) + bytes(16) + bytes([10, 13, 0, 1] * 9)]


def _labels() -> list[bytes]:
    return [b"cat\ndog\nfish\n", "\ufeffKüche\r\nHund 犬\r\nx".encode(), b"a\n\nb\0\x1b[2J\n"]


def _weights() -> list[bytes]:
    state = {"features.0.weight": torch.ones(4, 3, 3, 3), "output.1.weight": torch.ones(2, 4, 1, 1)}
    files = [safetensors.torch.save(state)]
    for loaded in (state, {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}):
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(loaded, file, _use_new_zipfile_serialization=zipped)
            files.append(file.getvalue())
    return files


def _images() -> list[bytes]:
    noise, grey = hostile.noise(24, 17), hostile.noise(24, 17).convert("L")
    jpeg = hostile.encoded(hostile.gradients(40, 30), "JPEG", progressive=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [
        jpeg,
        hostile.with_scans(jpeg, 3),
        hostile.planes_apart(noise),
        hostile.bare_jpeg(9, 9, 2),
    ]
    files += [
        hostile.png(9, 7, *hostile.profiles(1), *hostile.packed_texts(1)),
        hostile.grey_tiff(64, 64, (322, 4, 1, 64), (323, 4, 1, 64)),
        hostile.jpeg_tiff(hostile.encoded(grey, "JPEG"), 24, 17),
        hostile.packed_bmp(20, 20),
        hostile.gif_of_blocks(9),
    ]
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        files.append(hostile.encoded(noise, kind, exif=exif))
    files.append(hostile.encoded(noise.quantize(9), "PNG", transparency=bytes(9)))
    for kind in ("WEBP", "GIF", "MPO", "PNG"):
        files.append(hostile.encoded(noise, kind, save_all=True, append_images=[noise.rotate(9)]))
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits", "lzma", "zstd"):
        files.append(hostile.encoded(noise, "TIFF", compression=compression))
    files += [
        hostile.encoded(noise.convert("1"), "TIFF", compression=c) for c in ("group3", "group4")
    ]
    return files


TARGETS = {
    "manifest": Target(lambda data: manifest.decode(data, "x"), _manifests, mutated_json),
    "graph": Target(_read_graph, _graphs, _mutated_graph),
    "engine": Target(_read_plan, _plans),
    "labels": Target(_read_labels, _labels),
    "weights": Target(_read_weights, _weights, mutated_zip),
    "image": Target(_read_image, _images, mutated_image),
}


# C++: many files for one process, under the sanitizers


def run_cpp(target: str, count: int, rng: random.Random, folder: Path) -> int:
    """Feeds `count` damaged files to the sanitized probe; gives how many it refused.

    A crash, a report of the sanitizers, or a manifest that Python reads to something else raises
    AssertionError, and the files stay in the folder.
    """
    kind = TARGETS["manifest" if target == "cpp-manifest" else "image"]
    files = [folder / f"{index}" for index in range(count)]
    documents = [damaged(kind, rng) for _ in files]
    if target == "cpp-manifest":
        found, both = differences(documents, folder, "sanitized")
        assert not found, "\n".join(found)
        return count - both
    for file, data in zip(files, documents, strict=True):
        file.write_bytes(data)
    lines = probe("decode", [(folder / "out", file) for file in files], "sanitized")
    return sum(line.startswith("error: ") for line in lines)


# For hours


def main() -> None:
    """Runs one target for so many seconds; the exit code says whether something fell."""
    name, seconds, folder = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    if name not in TARGETS:
        sys.exit(_fuzz_cpp(name, seconds, folder))
    if "atheris" in sys.modules:
        _fuzz_by_atheris(name, seconds, folder)
    sys.exit(_fuzz_by_damage(name, seconds, folder))


def _fuzz_by_damage(name: str, seconds: float, folder: Path) -> int:
    seed = time.time_ns()
    rng, target = random.Random(seed), TARGETS[name]
    count, found, refused = 0, set(), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = damaged(target, rng)
        started = time.monotonic()
        count += 1
        try:
            refused += bool(run(target, data))
            assert time.monotonic() - started < SLOW, "too slow"
        except BaseException as error:  # also MemoryError, and whatever a library makes up
            if isinstance(error, KeyboardInterrupt):
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            if (kind := (type(error), where.filename, where.lineno)) not in found:
                found.add(kind)
                file = folder / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
                file.write_bytes(data)
                print(f"{name}: {file}: {error!r} at {where.filename}:{where.lineno}", flush=True)
    print(f"{name}: {count} inputs, {refused} refused, {len(found)} kinds of defects")
    return int(bool(found))


def _fuzz_by_atheris(name: str, seconds: float, folder: Path) -> None:
    """Does not return: libFuzzer leaves the process itself."""
    atheris = importlib.import_module("atheris")
    corpus = Path(tempfile.mkdtemp(prefix="corpus-"))
    target = TARGETS[name]
    for index, data in enumerate(_seeds(target)):
        (corpus / str(index)).write_bytes(data)

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        try:
            if rng.random() < 0.5:
                return target.mutate(data, rng)[:largest]
        except Exception:  # what is damaged already may be no JSON, archive or graph any more
            pass
        return bytes(atheris.Mutate(data, largest))

    limits = [f"-max_total_time={int(seconds)}", f"-timeout={int(SLOW)}", "-rss_limit_mb=6000"]
    limits += [f"-artifact_prefix={folder}/{name}-", "-max_len=100000", "-print_final_stats=1"]
    atheris.Setup(
        [sys.argv[0], *limits, str(corpus)], lambda data: run(target, data), custom_mutator=mutate
    )
    atheris.Fuzz()


def _fuzz_cpp(name: str, seconds: float, folder: Path) -> int:
    rng = random.Random(time.time_ns())
    count = refused = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        batch = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
        try:
            refused += run_cpp(name, 500, rng, batch)
        except AssertionError as error:
            print(f"{name}: {batch}: {error}", flush=True)
            return 1
        count += 500
        for file in batch.iterdir():
            file.unlink()
        batch.rmdir()
    print(f"{name}: {count} inputs, {refused} refused, 0 defects")
    return 0


if __name__ == "__main__":
    main()
