"""The ONNX graph of a network: exported, simplified, checked, and labelled with what it is."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import onnx
import torch
from onnx import ModelProto
from torch import Tensor, nn

from rexdeploy.bundle.manifest import ModelSpec
from rexdeploy.errors import BackendUnavailable, RexdeployError, VerificationFailed

MIN_OPSET = 18  # torch 2.15's exporter writes 18 when asked for less


def export_graph(model: nn.Module, spec: ModelSpec, batch: int | None, opset: int) -> ModelProto:
    """The network as torch exports it; `batch` None leaves the batch size open."""
    # A sample batch of 2: torch.export specialises on a batch of 1.
    sample = torch.zeros(batch or 2, 3, spec.preprocess.height, spec.preprocess.width)
    dynamic = None if batch else ({0: torch.export.Dim("batch")},)
    return export_module(model, (sample,), dynamic, [spec.input_name], [spec.output_name], opset)


def export_module(
    model: nn.Module,
    samples: tuple[Tensor, ...],
    dynamic: tuple[dict[int, Any], ...] | None,
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int,
) -> ModelProto:
    """Any module's graph; `dynamic` names the open sizes of each input, None fixes all."""
    with _quiet_exporter(), _out_of_place(model):
        program = torch.onnx.export(
            model,
            samples,
            dynamo=True,
            dynamic_shapes=dynamic,
            input_names=inputs,
            output_names=outputs,
            opset_version=opset,
            verbose=False,
        )
    if program is None:
        raise RexdeployError("torch.onnx.export gave no program; please report this")
    exported: ModelProto = program.model_proto
    _strip(exported)
    return exported


@contextlib.contextmanager
def _out_of_place(model: nn.Module) -> Iterator[None]:
    """Lets activations give new tensors: the same nodes, but for the numbers in their names.

    torch takes those that work in place apart in Python, with an open size for the batch: a third
    of the export's time, half of lite's.
    """
    in_place: list[Any] = [
        module for module in model.modules() if getattr(module, "inplace", False)
    ]
    try:
        for module in in_place:
            module.inplace = False
        yield
    finally:
        for module in in_place:
            module.inplace = True


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keeps the exporter's deprecation warnings and its rewrite log off the terminal."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def simplify(model: ModelProto) -> ModelProto:
    """The graph as onnxsim leaves it; compare logits, since simplifiers can be silently wrong."""
    try:
        import onnxsim
    except ImportError:
        raise BackendUnavailable(
            "simplifying needs onnxsim: pip install 'rexdeploy[cpu]', or give --no-simplify"
        ) from None
    # onnxsim's own check draws random input; ours, on images, follows.
    simplified: ModelProto = onnxsim.simplify(model, check_n=0)[0]
    _strip(simplified)
    return simplified


def _strip(model: ModelProto) -> None:
    """Removes what exporters note down: stack traces with this machine's paths, tools' settings."""
    del model.metadata_props[:]
    model.doc_string = model.graph.doc_string = ""
    del model.graph.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        del value.metadata_props[:]


def check_graph(model: ModelProto, spec: ModelSpec, batch: int | None, opset: int) -> None:
    """Raises VerificationFailed unless the graph is valid, with the spec's input and output."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        raise VerificationFailed(f"the ONNX graph is invalid: {reason}") from None
    kind = onnx.TensorProto.UINT8 if spec.input == "uint8" else onnx.TensorProto.FLOAT
    expected = [
        (spec.input_name, kind, [batch or "batch", *spec.input_shape]),
        (spec.output_name, onnx.TensorProto.FLOAT, [batch or "batch", spec.num_classes]),
    ]
    got = []
    for value in [*model.graph.input, *model.graph.output]:
        tensor = value.type.tensor_type
        shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
        got.append((value.name, tensor.elem_type, shape))
    found = {entry.domain: entry.version for entry in model.opset_import}.get("")
    if got != expected or found != opset:
        raise VerificationFailed(
            f"the ONNX graph has {got} at opset {found}, expected {expected} at {opset}"
        )


def add_metadata(model: ModelProto, spec: ModelSpec, align: str) -> ModelProto:
    """Writes into the model what it is and how its images are prepared; returns it."""
    onnx.helper.set_model_props(
        model,
        {
            "rexdeploy.name": spec.title,
            "rexdeploy.family": spec.family,
            "rexdeploy.width": f"{spec.width:g}",
            "rexdeploy.num_classes": str(spec.num_classes),
            "rexdeploy.align": align,  # the multiple its channels are padded to, or "off"
            "rexdeploy.input": spec.input,
            "rexdeploy.output": spec.output,
            "rexdeploy.preprocess": json.dumps(asdict(spec.preprocess)),
            "rexdeploy.weights": spec.weights.source,
            "rexdeploy.weights_sha256": spec.weights.sha256,
        },
    )
    return model
