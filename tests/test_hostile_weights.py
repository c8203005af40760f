"""Checkpoints that are damaged, or made to harm: refused in one line, within a stated memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rexdeploy.errors import UsageError
from rexdeploy.models.archives import MAX_OPERATIONS
from rexdeploy.models.checkpoints import load_checkpoint
from rexdeploy.models.rexnet import CONFIGS, RexNet
from tests.helpers import run_measured

State = dict[str, Tensor]
CLASSIFIER = "output.4.weight"


@pytest.fixture(scope="module")
def state() -> State:
    """The smallest lite network's weights, two classes."""
    torch.manual_seed(0)
    return dict(RexNet(CONFIGS["rexnet_lite"](0.1, 2)).state_dict())


@pytest.fixture(scope="module")
def archive(state: State, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("archive") / "sound.pth"
    torch.save(state, path)
    return path.read_bytes()


def _rewritten(archive: bytes, change: Callable[[str, bytes], bytes], **how: int) -> bytes:
    """The archive with every entry changed, and right checksums."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(target, "w", **how) as new:  # type: ignore[call-overload]
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return target.getvalue()


def _with_pickle(archive: bytes, data: bytes) -> bytes:
    return _rewritten(archive, lambda name, old: data if name.endswith("data.pkl") else old)


def _refusal(path: Path, data: bytes) -> str:
    """What is said of a file; the test fails where it loads, or says more than a line."""
    path.write_bytes(data)
    with pytest.raises(UsageError) as refusal:
        load_checkpoint(path)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# Damage


def test_no_flipped_bit_of_a_checkpoint_changes_a_weight(
    state: State, archive: bytes, tmp_path: Path
) -> None:
    """Half of such files were loaded without a word before the checksums were compared."""
    path, chosen = tmp_path / "flipped.pth", random.Random(0)
    refused = 0
    for _ in range(60):
        data = bytearray(archive)
        data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        path.write_bytes(data)
        try:
            loaded = load_checkpoint(path).state_dict
        except UsageError:
            refused += 1
        else:  # in the padding before an entry, or a date: nothing that is read
            assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert refused >= 40


def test_a_flipped_bit_of_a_weight_is_named_as_damage(
    state: State, archive: bytes, tmp_path: Path
) -> None:
    data = bytearray(archive)
    found = data.index(state["features.0.weight"].numpy().tobytes())
    data[found + 1] ^= 1
    said = _refusal(tmp_path / "flipped.pth", bytes(data))
    assert "it is damaged: sound/data/0 has not the checksum that it was saved with" in said


def test_a_checkpoint_without_checksums_still_loads(state: State, tmp_path: Path) -> None:
    """`torch.serialization.set_crc32_options(False)` writes zeros in their place."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "fast.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_checkpoint(tmp_path / "fast.pth").num_classes == 2


def test_an_archive_that_another_program_stored_again_loads(archive: bytes, tmp_path: Path) -> None:
    path = tmp_path / "again.pth"
    path.write_bytes(_rewritten(archive, lambda name, data: data))
    assert load_checkpoint(path).num_classes == 2


def test_what_was_loaded_stays_when_the_file_changes(
    state: State, archive: bytes, tmp_path: Path
) -> None:
    """The file is mapped while it is read."""
    path = tmp_path / "gone.pth"
    path.write_bytes(archive)
    loaded = load_checkpoint(path)
    os.truncate(path, 0)
    assert all(torch.equal(loaded.state_dict[name], state[name]) for name in state)


# More memory than the file has


def test_a_compressed_archive_is_refused_by_its_directory(archive: bytes, tmp_path: Path) -> None:
    deflated = _rewritten(archive, lambda name, data: data, compression=zipfile.ZIP_DEFLATED)
    said = _refusal(tmp_path / "deflated.pth", deflated)
    assert "is compressed" in said
    assert "save it again" in said


def _directory_bomb(size: int) -> bytes:
    """A deflated entry of `size` zeros, some thousandth of that in the file."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"a": 1}, 2))
        archive.writestr("x/byteorder", b"little")
        with archive.open("x/data/0", "w", force_zip64=True) as entry:
            for _ in range(size >> 20):
                entry.write(bytes(1 << 20))
    return target.getvalue()


def test_a_second_directory_hides_nothing(archive: bytes, tmp_path: Path) -> None:
    """Zipfile would see the sound archive, and torch the one whose directory it is told of."""
    bomb = _directory_bomb(4 << 20)
    behind = bomb + archive  # zipfile takes offsets from where the archive must begin
    assert zipfile.ZipFile(io.BytesIO(behind)).testzip() is None
    for data in (behind, archive + b"\0", bomb + archive + bomb[-22:]):
        said = _refusal(tmp_path / "two.pth", data)
        assert "not a checkpoint, or a truncated one" in said


def test_entries_that_share_their_bytes_are_refused(archive: bytes, tmp_path: Path) -> None:
    """A directory may name the same bytes as often as it likes."""
    with zipfile.ZipFile(io.BytesIO(archive)) as old:
        start = old.start_dir
    end = archive.rindex(b"PK\6\6")
    directory = archive[start:end] * 3
    record = list(struct.unpack("<4sQ2H2L4Q", archive[end : end + 56]))
    record[6] = record[7] = 3 * record[7]
    record[8] = len(directory)
    moved = struct.pack("<4sLQL", b"PK\6\7", 0, start + len(directory), 1)
    data = archive[:start] + directory + struct.pack("<4sQ2H2L4Q", *record) + moved + archive[-22:]
    assert "its entries state" in _refusal(tmp_path / "shared.pth", data)


class _Calls:
    """A pickle that calls a harmless function with what it is given."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def _doubled(times: int) -> bytes:
    """A pickle of one byte, written in hexadecimal so many times over."""
    start = b"\x80\x02c_codecs\nencode\nq\0h\0X\1\0\0\0aX\6\0\0\0latin1\x86R"
    again = b"q\1h\0h\1X\3\0\0\0hex\x86R"
    return start + times * again + b"."


BOMBS: dict[str, Callable[[bytes], bytes]] = {
    "deflated": lambda archive: _directory_bomb(1 << 29),
    "bytearray": lambda archive: _with_pickle(archive, pickle.dumps(_Calls(bytearray, 1 << 29), 2)),
    "hexadecimal": lambda archive: _with_pickle(archive, _doubled(29)),
    "older format": lambda archive: pickle.dumps(_Calls(bytearray, 1 << 29), 2),
    "objects": lambda archive: _with_pickle(
        archive, b"\x80\x02" + b"]" * (MAX_OPERATIONS + 1) + b"."
    ),
}


def test_memory_bombs_are_refused_before_they_take_memory(archive: bytes, tmp_path: Path) -> None:
    commands: list[list[str | Path]] = []
    for name, make in BOMBS.items():
        path = tmp_path / f"{name}.pth"
        path.write_bytes(make(archive))
        assert path.stat().st_size < 16 << 20
        commands.append(["export", "--weights", path, "--out", tmp_path / "artifacts"])
    for name, measured in zip(BOMBS, run_measured(*commands), strict=True):
        assert (measured.code, len(measured.lines)) == (2, 1), (name, measured)
        assert measured.grown_mib < 300, (name, measured)


# What a state dict can claim


def _classifier(shape: tuple[int, ...], state: State) -> State:
    """The state dict with a classifier of one value, over and over."""
    return state | {
        CLASSIFIER: torch.zeros(()).expand(shape),
        CLASSIFIER.replace("weight", "bias"): torch.zeros(shape[0]),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: _classifier((50_000, 1024, 1, 1), state),
            "output.4.weight has shape [50000, 1024, 1, 1] and only 1 values",
        ),
        (lambda state: _classifier((1_000_001, 1024, 1, 1), state), "with 1 to 1000000 classes"),
        (
            lambda state: _classifier((900_000, 1024, 1, 1), state),
            "bytes in float32, expected at most 2147483647: an ONNX graph holds no more",
        ),
        (
            lambda state: {name: tensor.to("meta") for name, tensor in state.items()},
            "features.0.weight is on the device 'meta', expected a plain tensor with values",
        ),
        (
            lambda state: (
                state
                | {
                    "features.0.weight": torch.nested.nested_tensor(
                        [torch.zeros(2), torch.zeros(3)]
                    )
                }
            ),
            "features.0.weight is nested",
        ),
        (
            lambda state: state | {f"features.3.out.{'1' * 5000}.weight": torch.zeros(3, 3, 1, 1)},
            "1 are unknown",
        ),
        (
            lambda state: {
                "stem.conv.weight": torch.zeros(1),
                f"features.{'7' * 5000}.conv.weight": torch.zeros(1),
            },
            "unknown tensor features.777",
        ),
    ],
    ids=["stride 0", "classes", "too large", "meta", "nested", "digits", "timm digits"],
)
def test_a_claim_without_values_behind_it_is_refused(
    change: Callable[[State], State], message: str, state: State, tmp_path: Path
) -> None:
    torch.save(change(state), tmp_path / "claims.pth")
    assert message in _refusal(tmp_path / "claims.pth", (tmp_path / "claims.pth").read_bytes())


def test_attributes_of_a_pickle_stand_in_for_no_method(state: State, tmp_path: Path) -> None:
    """A tensor's `isfinite` and a dictionary's `values`, which would be called."""
    broken = torch.full_like(state["features.0.weight"], float("nan"))
    broken.isfinite = 5  # type: ignore[assignment, method-assign]
    wrapped = OrderedDict(state | {"features.0.weight": broken})
    wrapped.__dict__.update(values=5, get=5)
    torch.save(wrapped, tmp_path / "hung.pth")
    said = _refusal(tmp_path / "hung.pth", (tmp_path / "hung.pth").read_bytes())
    assert "features.0.weight has NaN or infinite values" in said


@pytest.mark.parametrize("kind", ["F8_E8M0", "F4", "F6_E2M3", "C64", "BOOL", "U64", "NONE"])
def test_no_type_of_a_safetensors_file_is_a_traceback(kind: str, tmp_path: Path) -> None:
    header = json.dumps(
        {"features.0.weight": {"dtype": kind, "shape": [8], "data_offsets": [0, 8]}}
    ).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(8)
    assert "odd.safetensors" in _refusal(tmp_path / "odd.safetensors", data)


def test_weights_that_share_a_storage_load(tmp_path: Path) -> None:
    """As the copies of a training checkpoint do: they are no more than the file holds."""
    model = RexNet(CONFIGS["rexnet_lite"](0.1, 2))
    shared = torch.zeros(max(tensor.numel() for tensor in model.state_dict().values()))
    views = {
        name: shared[: tensor.numel()].view(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    torch.save({"state_dict": views, "optimizer": {"step": torch.ones(3)}}, tmp_path / "tied.pth")
    assert load_checkpoint(tmp_path / "tied.pth").num_classes == 2
