"""Checkpoints: every format is read, every network but ReXNet is refused, no code is run."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rexdeploy.errors import UsageError
from rexdeploy.models.checkpoints import load_checkpoint
from rexdeploy.models.rexnet import CONFIGS, Family, RexNet, ReXNetV1, ReXNetV1_lite


def _empty_state(family: Family, width: float, classes: int = 5) -> dict[str, torch.Tensor]:
    """A state dict of the right shapes that takes as much space as its largest tensor."""
    with torch.device("meta"):
        state = RexNet(CONFIGS[family](width, classes)).state_dict()
    shared = torch.zeros(max(tensor.numel() for tensor in state.values()))
    return {name: shared[: tensor.numel()].view(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 7, "arch": "rexnet"},
        lambda state: {"model": state},
        lambda state: {"model_ema": state, "optimizer": {"lr": 0.1}},
        lambda state: {"state_dict_ema": state, "state_dict": {"wrong": torch.zeros(1)}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
        lambda state: {"state_dict": {f"_orig_mod.module.{k}": v for k, v in state.items()}},
        lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}},
    ],
)
def test_a_state_dict_is_found_where_training_scripts_put_it(
    wrap: Callable[[dict[str, torch.Tensor]], Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = ReXNetV1(classes=6)
    path = tmp_path / "checkpoint.pth"
    torch.save(wrap(dict(model.state_dict())), path)
    checkpoint = load_checkpoint(path)
    assert (checkpoint.family, checkpoint.width, checkpoint.num_classes) == ("rexnet", 1.0, 6)
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.state_dict[name], tensor), name


def test_a_file_is_known_by_its_content_not_its_extension(tmp_path: Path) -> None:
    state = dict(ReXNetV1_lite(classes=3).state_dict())
    safetensors.torch.save_file(state, tmp_path / "lite.pth")
    torch.save(state, tmp_path / "lite.safetensors")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("lite.pth", "lite.safetensors", "old.pt"):
        assert load_checkpoint(tmp_path / name).family == "rexnet_lite"


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in ReXNetV1(classes=3).state_dict().items()}
    torch.save(state, tmp_path / "half.pth")
    model = load_checkpoint(tmp_path / "half.pth").build()
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_the_batch_counters_may_be_missing(tmp_path: Path) -> None:
    state = {k: v for k, v in ReXNetV1().state_dict().items() if "num_batches" not in k}
    safetensors.torch.save_file(state, tmp_path / "lean.safetensors")
    assert load_checkpoint(tmp_path / "lean.safetensors").width == 1.0


@given(
    width=st.integers(10, 320).map(lambda hundredths: hundredths / 100),
    family=st.sampled_from(sorted(CONFIGS)),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_width_is_inferred(width: float, family: Family, tmp_path: Path) -> None:
    """Up to widths that give the same network: lite rounds its channels to multiples of 8."""
    torch.save(_empty_state(family, width), tmp_path / "any.pth")
    checkpoint = load_checkpoint(tmp_path / "any.pth")
    assert checkpoint.family == family
    assert CONFIGS[family](checkpoint.width, 5) == CONFIGS[family](width, 5)


def test_an_odd_width_is_inferred_to_three_digits(tmp_path: Path) -> None:
    torch.save(_empty_state("rexnet", 1.234), tmp_path / "odd.pth")
    assert load_checkpoint(tmp_path / "odd.pth").width == 1.234


@pytest.mark.parametrize("name", ["rexnet_100", "rexnet_200"])
def test_timm_files_load_in_any_order_of_keys(name: str, tmp_path: Path) -> None:
    state = timm.create_model(name, num_classes=9).state_dict()
    torch.save(dict(sorted(state.items(), reverse=True)), tmp_path / "timm.pth")
    checkpoint = load_checkpoint(tmp_path / "timm.pth")
    assert (checkpoint.width, checkpoint.num_classes) == (float(name[7:]) / 100, 9)


class _RunsCode:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize(
    "dump", [torch.save, lambda item, path: path.write_bytes(pickle.dumps(item))]
)
def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(
    dump: Callable[[object, Path], object], tmp_path: Path
) -> None:
    path, canary = tmp_path / "evil.pth", tmp_path / "canary"
    dump({"state_dict": _RunsCode(canary)}, path)
    with pytest.raises(UsageError):
        load_checkpoint(path)
    assert not canary.exists()


def test_a_pickled_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(ReXNetV1(classes=2), tmp_path / "module.pth")
    with pytest.raises(
        UsageError, match=r"would run code .*ReXNetV1.*torch.save\(model.state_dict"
    ):
        load_checkpoint(tmp_path / "module.pth")


def _truncate(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files_are_refused(keep: float, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"cut{suffix}"
    state = dict(ReXNetV1_lite(classes=2).state_dict())
    if suffix == ".pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    _truncate(path, keep)
    with pytest.raises(UsageError, match=r"empty|truncated|damaged|not a checkpoint"):
        load_checkpoint(path)


@given(
    data=st.binary(max_size=200),
    head=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x10" + b"\0" * 7 + b"{"]),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_arbitrary_bytes_are_refused_in_one_line(data: bytes, head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "noise.pth"
    path.write_bytes(head + data)
    with pytest.raises(UsageError) as refusal:
        load_checkpoint(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"fc.weight": torch.zeros(2, 2)},
            "not a ReXNet checkpoint; got 1 tensors such as fc.weight",
        ),
        ([1, 2, 3], "got list without a state dict"),
        ({"state_dict": {}}, "got dict without a state dict"),
        (torch.zeros(3), "got Tensor without a state dict"),
    ],
)
def test_other_contents_are_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UsageError, match=message):
        load_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["rexnetr_100", "resnet18", "mobilenetv2_100", "efficientnet_b0"])
def test_other_networks_are_refused(name: str, tmp_path: Path) -> None:
    torch.save(timm.create_model(name).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"not a ReXNet|fit no rexnet|unknown tensor"):
        load_checkpoint(tmp_path / "other.pth")


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "damaged.pth"
    state = _empty_state("rexnet", 1.5)
    torch.save({k: v for k, v in state.items() if k != "features.7.out.3.weight"}, path)
    with pytest.raises(UsageError, match=r"1 tensors are missing .*features.7.out.3.weight"):
        load_checkpoint(path)
    torch.save(state | {"features.7.extra.weight": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match=r"1 are unknown \(first: features.7.extra.weight"):
        load_checkpoint(path)
    torch.save(state | {"features.7.out.0.weight": torch.zeros(3, 3, 1, 1)}, path)
    with pytest.raises(UsageError, match=r"features.7.out.0.weight, got \[3, 3, 1, 1\], expected"):
        load_checkpoint(path)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_no_file_is_said_to_be_none(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "weights.pth")
    with pytest.raises(UsageError, match=r"expected a \.pth, \.pt or \.safetensors file"):
        load_checkpoint(tmp_path / "weights.pth")


def test_a_timm_training_checkpoint_loads_with_its_arguments(tmp_path: Path) -> None:
    state = timm.create_model("rexnet_100", num_classes=4).state_dict()
    content = {"state_dict": state, "args": argparse.Namespace(lr=0.1, model="rexnet_100")}
    torch.save(content, tmp_path / "model_best.pth.tar")
    assert load_checkpoint(tmp_path / "model_best.pth.tar").num_classes == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.to(torch.int8), "has type torch.int8.*quantised weights are another"),
        (lambda value: value.to(torch.complex64), "has type torch.complex64"),
        (lambda value: value.to_sparse(), "torch.sparse_coo"),
        (lambda value: value * float("nan"), "has NaN or infinite values"),
        (lambda value: value / 0, "has NaN or infinite values"),
    ],
)
def test_weights_that_are_no_plain_numbers_are_refused(
    change: Callable[[torch.Tensor], torch.Tensor], message: str, tmp_path: Path
) -> None:
    state = dict(ReXNetV1(classes=3).state_dict())
    state["features.5.out.0.weight"] = change(state["features.5.out.0.weight"])
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(UsageError, match=message):
        load_checkpoint(tmp_path / "odd.pth")


def test_a_missing_or_misshapen_classifier_is_named(tmp_path: Path) -> None:
    path = tmp_path / "headless.pth"
    state = dict(ReXNetV1(classes=3).state_dict())
    torch.save({k: v for k, v in state.items() if not k.startswith("output")}, path)
    with pytest.raises(UsageError, match="a ReXNet without its classifier"):
        load_checkpoint(path)
    for shape in ((), (0, 1280, 1, 1), (3, 1280)):
        torch.save(state | {"output.1.weight": torch.zeros(shape)}, path)
        with pytest.raises(UsageError, match=r"output.1.weight has shape .*expected \[classes"):
            load_checkpoint(path)


def test_a_dictionary_that_holds_itself_is_refused(tmp_path: Path) -> None:
    endless: dict[str, Any] = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "endless.pth")
    with pytest.raises(UsageError, match="without a state dict"):
        load_checkpoint(tmp_path / "endless.pth")


def test_twentieths_are_preferred_to_hundredths(tmp_path: Path) -> None:
    """Lite 0.71 to 0.75 are one network; a person means 0.75."""
    torch.save(_empty_state("rexnet_lite", 0.75), tmp_path / "lite.pth")
    assert load_checkpoint(tmp_path / "lite.pth").width == 0.75
