"""Published and timm checkpoints: reading them safely, and knowing the network from its weights."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from rexdeploy.bundle.manifest import MAX_CLASSES
from rexdeploy.errors import UsageError, first_line
from rexdeploy.files import MAX_GRAPH_BYTES, open_plain
from rexdeploy.models.archives import check_archive, check_legacy
from rexdeploy.models.notes import Notes, read_notes
from rexdeploy.models.rexnet import (
    CONFIGS,
    MAX_WIDTH,
    MIN_WIDTH,
    Family,
    RexNet,
    RexNetConfig,
    check_width,
)

StateDict = dict[str, Tensor]

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # averaged weights first
_PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_NESTING = 8
_MAX_WEIGHTS_BYTES = MAX_GRAPH_BYTES  # in float32: what an ONNX graph of the network could hold
_COUNTER = "num_batches_tracked"  # unused in evaluation, and missing in some files


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is known to be a ReXNet."""

    family: Family
    width: float
    num_classes: int
    state_dict: StateDict  # published names, float32
    notes: Notes | None = None  # of a file that `finetune` wrote

    def build(self) -> RexNet:
        """The network with these weights, in evaluation mode."""
        model = RexNet(CONFIGS[self.family](self.width, self.num_classes))
        model.load_state_dict(self.state_dict)
        return model.eval()


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a `.pth`, `.pt` or `.safetensors` file; raises UsageError.

    Family, width and number of classes come from the weights' names and shapes.
    """
    checkpoint = known_checkpoint(read_state_dict(path), path)
    config = CONFIGS[checkpoint.family](checkpoint.width, checkpoint.num_classes)
    notes = _notes_of(path, config)
    return replace(checkpoint, width=notes.width, notes=notes) if notes else checkpoint


def known_checkpoint(state_dict: StateDict, path: Path) -> Checkpoint:
    """The classifier whose weights these are; `path` is what messages call them."""
    if "stem.conv.weight" in state_dict:
        state_dict = _from_timm(state_dict, path)
    family = _family_of(state_dict, path)
    num_classes = _classes_of(family, state_dict, path)
    width = nearest_width(family, state_dict, path)
    with torch.device("meta"):
        expected = RexNet(CONFIGS[family](width, num_classes)).state_dict()
    what = f"{family} of these channels and {num_classes} classes"
    return Checkpoint(family, width, num_classes, complete(state_dict, expected, what, path))


def read_state_dict(path: Path) -> StateDict:
    """A file's tensors by name, unwrapped and without prefixes; runs no code from the file.

    They are plain ones on the CPU. A `.pth` archive's are mapped, not read: what is not used of a
    training checkpoint takes no memory.
    """
    try:
        with open_plain(path) as file:
            return _strip_prefixes(_plain(_unwrap(_read(file, path), path), path))
    except FileNotFoundError:
        what = "no file there"
    except IsADirectoryError:
        what = "a folder"
    except OSError as error:
        what = error.strerror or str(error)
    raise UsageError(f"weights {path}: {what}; expected a .pth, .pt or .safetensors file")


def _notes_of(path: Path, config: RexNetConfig) -> Notes | None:
    """The file's notes, whose width must be one of the network that its weights are."""
    with open_plain(path) as file:
        if file.read(9)[8:] != b"{":
            return None
        notes = read_notes(file, f"weights {path}", config.num_classes)
    if notes is not None:
        try:
            noted = CONFIGS[config.family](check_width(notes.width), config.num_classes)
        except UsageError as error:
            raise UsageError(f"weights {path}: in its notes, {error}") from None
        if noted != config:
            raise UsageError(
                f"weights {path}: its notes say width {notes.width:g}, its weights are of another "
                f"{config.family}; give the file that finetune wrote"
            )
    return notes


def _read(file: BinaryIO, path: Path) -> object:
    head = file.read(9)
    file.seek(0)
    if not head:
        raise UsageError(f"weights {path}: the file is empty; copy it again")
    # By content, not by extension: after eight bytes of length, safetensors starts with '{'.
    if head[8:] == b"{":
        return _read_safetensors(file, path)
    if not head.startswith((b"PK", b"\x80")):  # a zip archive, or torch's older bare pickle
        raise UsageError(
            f"weights {path}: not a checkpoint; expected a .pth, .pt or .safetensors file"
        )
    return _read_pickle(file, path, is_archive=head.startswith(b"PK"))


def _read_safetensors(file: BinaryIO, path: Path) -> StateDict:
    try:
        return safetensors.torch.load_file(_name_of(file))
    except Exception as error:  # SafetensorError, and built-in types for types that torch lacks
        raise UsageError(
            f"weights {path}: a damaged safetensors file ({first_line(error)}); copy it again"
        ) from None


def _read_pickle(file: BinaryIO, path: Path, is_archive: bool) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript archives; refused below
            (check_archive if is_archive else check_legacy)(file, f"weights {path}")
            file.seek(0)
            # timm's train.py saves its arguments beside the weights; a Namespace runs no code.
            with torch.serialization.safe_globals([argparse.Namespace]):
                # Mapped, a storage cannot be longer than its file, whatever the pickle says.
                source = _name_of(file) if is_archive else file
                return torch.load(source, map_location="cpu", weights_only=True, mmap=is_archive)
    except UsageError:
        raise
    except pickle.UnpicklingError as error:
        match = re.search(r"(?:GLOBAL|class|call) (\S+\.\S+)", str(error))
        if match:
            raise UsageError(
                f"weights {path}: loading it would run code ({match.group(1)}), which is refused; "
                "save a plain state dict: torch.save(model.state_dict(), ...)"
            ) from None
        raise _not_a_checkpoint(path, error) from None
    except Exception as error:  # torch raises nearly every built-in type on damaged archives
        raise _not_a_checkpoint(path, error) from None


def _name_of(file: BinaryIO) -> str:
    """The open file's name for libraries that open it themselves: the same file, no extension."""
    return f"/proc/self/fd/{file.fileno()}"


def _not_a_checkpoint(path: Path, error: Exception) -> UsageError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Weights only load", "Please file"))]
    reason = (telling or lines or [type(error).__name__])[0].partition(". ")[0]
    return UsageError(
        f"weights {path}: not a checkpoint, or a truncated one ({reason}); "
        "expected a .pth, .pt or .safetensors file"
    )


def _unwrap(loaded: object, path: Path, depth: int = 0) -> dict[Any, Any]:
    if isinstance(loaded, dict):
        # The class's own methods: a pickle can hide them behind attributes of an OrderedDict.
        for key in _WRAPPERS:
            inner = dict.get(loaded, key)
            if isinstance(inner, dict) and depth < _MAX_NESTING:
                return _unwrap(inner, path, depth + 1)
        if loaded and all(isinstance(value, Tensor) for value in dict.values(loaded)):
            return loaded
    raise UsageError(
        f"weights {path}: got {type(loaded).__name__} without a state dict in it, expected one "
        f"bare or under {', '.join(_WRAPPERS)}"
    )


def _plain(state_dict: dict[Any, Any], path: Path) -> StateDict:
    """Tensors that hold values, without what a pickle can hang on them: attributes, a class."""
    plain = {}
    for key, tensor in dict.items(state_dict):
        name = str(key)
        if tensor.is_nested or tensor.device.type != "cpu":
            what = "nested" if tensor.is_nested else f"on the device '{tensor.device.type}'"
            raise UsageError(
                f"weights {path}: {name} is {what}, expected a plain tensor with values; save "
                "the state dict of a model that is on the CPU"
            )
        plain[name] = Tensor.detach(tensor)
    return plain


def _strip_prefixes(state_dict: Mapping[str, Tensor]) -> StateDict:
    stripped = dict(state_dict)
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in stripped)), None):
        stripped = {name.removeprefix(prefix): tensor for name, tensor in stripped.items()}
    return stripped


def _family_of(state_dict: StateDict, path: Path) -> Family:
    stem = state_dict.get("features.0.weight")
    if stem is not None and stem.ndim == 4 and stem.shape[1] == 3:
        if "output.4.weight" in state_dict:
            return "rexnet_lite"
        if "output.1.weight" in state_dict:
            return "rexnet"
    if stem is not None and "features.3.out.0.weight" in state_dict:
        raise UsageError(
            f"weights {path}: a ReXNet without its classifier; expected output.1 (V1), output.4 "
            "(lite) or head.fc (timm)"
        )
    example = ", ".join(sorted(state_dict)[:3])
    raise UsageError(
        f"weights {path}: not a ReXNet checkpoint; got {len(state_dict)} tensors such as "
        f"{example}, expected features.0.weight ... output.1.weight (published) or "
        "stem.conv.weight ... head.fc.weight (timm)"
    )


def _classes_of(family: Family, state_dict: StateDict, path: Path) -> int:
    last = "output.4.weight" if family == "rexnet_lite" else "output.1.weight"
    classifier = state_dict[last]
    num_classes = classifier.shape[0] if classifier.ndim == 4 else 0
    if not 1 <= num_classes <= MAX_CLASSES:
        raise UsageError(
            f"weights {path}: {last} has shape {list(classifier.shape)}, expected "
            f"[classes, channels, 1, 1] with 1 to {MAX_CLASSES} classes"
        )
    return num_classes


def nearest_width(family: Family, state_dict: StateDict, path: Path) -> float:
    """The simplest width whose network has the checkpoint's channels: 1.5 before 1.50001.

    Judged by the 1x1 head and every block's projection, so that a few missing or damaged tensors
    do not hide what the rest says.
    """
    seen = _channels(state_dict)
    best: tuple[int, float] | None = None
    for steps in (10, 20, 100, 1000):  # in steps of 0.1, of 0.05, of 0.01, of 0.001
        for step in range(round(MIN_WIDTH * steps), int(MAX_WIDTH * steps) + 1):
            width = step / steps
            expected = _config_channels(CONFIGS[family](width, 1))
            wrong = sum(expected.get(name) != channels for name, channels in seen.items())
            if not wrong:
                return width
            if best is None or wrong < best[0]:
                best = (wrong, width)
    if best is None or best[0] > len(seen) // 2:
        raise UsageError(
            f"weights {path}: the channels fit no {family}; got {list(seen.values())[:6]} ... for "
            "the stem and first blocks (rexnetr_* and custom depths or strides are other networks)"
        )
    return best[1]


def _channels(state_dict: StateDict) -> dict[str, int]:
    """Output channels of the stem, every block's projection and the head, by published position."""
    channels = {}
    for index in range(20):
        own = f"features.{index}.weight"
        projection = rf"features\.{index}\.out\.\d{{1,3}}\.weight"
        convolutions = [
            name for name, t in state_dict.items() if t.ndim == 4 and re.fullmatch(projection, name)
        ]
        if convolutions:
            last = max(convolutions, key=lambda name: int(name.split(".")[3]))
            channels[f"features.{index}"] = state_dict[last].shape[0]
        elif own in state_dict and state_dict[own].ndim == 4:
            channels[f"features.{index}"] = state_dict[own].shape[0]
    return channels


def _config_channels(config: RexNetConfig) -> dict[str, int]:
    blocks = {
        f"features.{index + 3}": block.out_channels for index, block in enumerate(config.blocks)
    }
    head = f"features.{len(config.blocks) + 3}"
    return {"features.0": config.stem_channels, **blocks, head: config.head_channels}


def complete(state_dict: StateDict, expected: StateDict, what: str, path: Path) -> StateDict:
    """The state dict in float32 with every entry that is expected; raises on any misfit.

    Only names, shapes and types of `expected` are read: its tensors may be on "meta".
    """
    missing = [name for name in expected if name not in state_dict and _COUNTER not in name]
    unknown = [name for name in state_dict if name not in expected]
    wrong = [n for n, t in expected.items() if n in state_dict and state_dict[n].shape != t.shape]
    if missing or unknown:
        raise UsageError(
            f"weights {path}: {len(missing)} tensors are missing and {len(unknown)} are unknown "
            f"(first: {(missing + unknown)[0]}), expected the {len(expected)} of a "
            f"{what}; is the file complete?"
        )
    if wrong:
        raise UsageError(
            f"weights {path}: {len(wrong)} tensors have the wrong shape (first: {wrong[0]}, got "
            f"{list(state_dict[wrong[0]].shape)}, expected {list(expected[wrong[0]].shape)})"
        )
    needed = sum(4 * tensor.numel() for tensor in expected.values())
    if needed > _MAX_WEIGHTS_BYTES:
        raise UsageError(
            f"weights {path}: a {what} takes {needed} bytes in float32, expected at most "
            f"{_MAX_WEIGHTS_BYTES}: an ONNX graph holds no more"
        )
    whole = {}
    for name, tensor in expected.items():
        if name.endswith(_COUNTER):
            whole[name] = torch.zeros((), dtype=tensor.dtype)
            continue
        found = state_dict[name]
        if found.dtype not in _FLOATS or found.layout != torch.strided:
            raise UsageError(
                f"weights {path}: {name} has type {found.dtype}, {found.layout}; expected dense "
                "float32 (or float16, bfloat16, float64): quantised weights are another network"
            )
        stored = found.untyped_storage().nbytes() // found.element_size()
        if stored < found.numel():  # the same values over and over
            raise UsageError(
                f"weights {path}: {name} has shape {list(found.shape)} and only {stored} values; "
                "save it whole: tensor.contiguous()"
            )
        if not found.isfinite().all():
            raise UsageError(f"weights {path}: {name} has NaN or infinite values")
        # A copy: the file is mapped, and may change from here on.
        whole[name] = found.to(tensor.dtype, copy=True).contiguous()
    return whole


def _from_timm(state_dict: StateDict, path: Path) -> StateDict:
    """Published names for timm's; its classifier `[classes, C]` gains two dimensions."""
    renamed: StateDict = {}
    for name, tensor in state_dict.items():
        new_name = _published_name(name, state_dict)
        if new_name is None:
            raise UsageError(
                f"weights {path}: unknown tensor {name} in what looks like a timm rexnet "
                "(rexnetr_* are other networks); expected rexnet_100 ... rexnet_300"
            )
        is_classifier = name == "head.fc.weight" and tensor.ndim == 2
        renamed[new_name] = tensor[:, :, None, None] if is_classifier else tensor
    return renamed


def _published_name(name: str, state_dict: StateDict) -> str | None:
    for pattern, template in (
        (r"stem\.conv\.(.+)", "features.0.{}"),
        (r"stem\.bn\.(.+)", "features.1.{}"),
        (r"head\.fc\.(.+)", "output.1.{}"),
    ):
        if match := re.fullmatch(pattern, name):
            return template.format(match.group(1))
    match = re.fullmatch(r"features\.(\d{1,3})\.(.+)", name)
    if not match:
        return None
    block, rest = int(match.group(1)), match.group(2)
    if match := re.fullmatch(r"(conv|bn)\.(.+)", rest):  # the 1x1 after the last block
        return f"features.{block + 3 + (match.group(1) == 'bn')}.{match.group(2)}"
    expands = f"features.{block}.conv_exp.conv.weight" in state_dict
    has_se = f"features.{block}.se.fc1.weight" in state_dict
    depthwise = 3 if expands else 0  # after expand, BN, SiLU
    project = depthwise + 3 + has_se  # after depthwise, BN, [SE,] ReLU6
    positions = {
        "conv_exp.conv": "0",
        "conv_exp.bn": "1",
        "conv_dw.conv": f"{depthwise}",
        "conv_dw.bn": f"{depthwise + 1}",
        "se.fc1": f"{depthwise + 2}.fc.0",
        "se.bn": f"{depthwise + 2}.fc.1",
        "se.fc2": f"{depthwise + 2}.fc.3",
        "conv_pwl.conv": f"{project}",
        "conv_pwl.bn": f"{project + 1}",
    }
    layer, _, leaf = rest.rpartition(".")
    return f"features.{block + 3}.out.{positions[layer]}.{leaf}" if layer in positions else None
