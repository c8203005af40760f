"""Builds TensorRT engines, and reads what their builder reports of their layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rexdeploy.backends.tensorrt_api import (
    TITLES,
    Flavor,
    Log,
    captured_log,
    load,
    start,
    target_names,
)
from rexdeploy.bundle.manifest import BatchRange
from rexdeploy.bundle.precision import FLOATING, PRECISIONS, TYPES
from rexdeploy.errors import RexdeployError, UsageError

BUILD_REVISION = "3"
"""Of the builder's configuration: raise it with every change of what `build` asks for."""
# Square brackets nest one deep: tensors hold lists of numbers.
_TENSORS = r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]"
_LAYER = re.compile(
    rf"Name: (?P<name>.*?), LayerType: .*?Inputs: (?P<inputs>{_TENSORS}), "
    rf"(?:Constants: (?P<constants>{_TENSORS}), )?Outputs: (?P<outputs>{_TENSORS}), (?P<rest>.*)",
    re.DOTALL,
)


_EIGHT_BIT_FLOATS = ("FP8", "FLOAT8")  # types that no proof counts: not to be taken for Float


@dataclass(frozen=True)
class Layer:
    """One layer of a built engine, and the types it works on ("Half", "Float", ...)."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: str | None  # type of its largest constant
    onnx_nodes: tuple[str, ...]  # names of the graph's nodes that it carries out
    weights_count: int = 0  # values of its largest constant

    @property
    def precision(self) -> str:
        """The type it computes in.

        A convolution's weights tell: casts are fused into it, so that one in Float may well read
        Float and write Half. Without weights (they may be computed, too), the widest floating type
        that it reads; where it reads none, the widest that it writes. Int8 weights tell only where
        it reads Int8 as well: for SM75, TensorRT-RTX 1.7 keeps them and computes in Half.
        """
        weights = self.weights or ""
        is_widened = weights == "Int8" and "Int8" not in self.inputs
        if not is_widened and (weights in TYPES or weights.upper().startswith(_EIGHT_BIT_FLOATS)):
            return weights
        for types in (self.inputs, self.outputs):
            widest = next((name for name in reversed(FLOATING) if name in types), None)
            if widest is not None:
                return widest
        return "/".join(sorted({*self.inputs, *self.outputs}))


Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""The least, the usual and the largest shape of an input."""


@dataclass(frozen=True)
class EngineSettings:
    """Everything beside the ONNX graph that decides an engine."""

    flavor: Flavor
    batch: BatchRange
    targets: tuple[str, ...] = ()  # RTX only, such as "sm89"; empty: SM80 and newer
    workspace_mib: int | None = None  # None: TensorRT's own limit
    shapes: Mapping[str, Shapes] | None = None  # of every input; None: one, open in its batch


@dataclass(frozen=True)
class BuiltEngine:
    """A serialised engine with its layers."""

    plan: bytes
    layers: tuple[Layer, ...]


def build(onnx_model: bytes, settings: EngineSettings) -> BuiltEngine:
    """Compiles an ONNX graph, of one image input or those in `settings.shapes`, in its own types.

    Always strongly typed, with TF32 off. Raises RexdeployError with every parser error, or the
    builder's first one.
    """
    trt = load(settings.flavor)
    title = TITLES[settings.flavor]
    with captured_log(trt) as log:
        builder = start(trt.Builder, log)
        # From TensorRT 11 on every network is strongly typed, flag or not; 10.x must be asked.
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse(onnx_model):
            errors = [_describe(parser.get_error(index)) for index in range(parser.num_errors)]
            reasons = "; ".join(errors) or log.first_error()
            raise RexdeployError(f"{title} cannot parse the ONNX graph: {reasons}")
        expected = len(settings.shapes or "1")
        if network.num_inputs != expected:
            raise UsageError(
                f"{title} cannot parse the ONNX graph: got {network.num_inputs} inputs, expected "
                f"{expected}"
            )
        config = _configure(trt, builder, network, settings)
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise RexdeployError(f"{title} cannot build the engine: {log.first_error()}")
        plan = bytes(serialized)
        report = _layer_report(trt, plan, log)
    layers = parse_layers(report)
    if not layers:
        raise RexdeployError(
            f"{title} {trt.__version__} built an engine but reported no layers, so its precision "
            "cannot be proven; please report this with the version"
        )
    return BuiltEngine(plan, layers)


def parse_layers(report: str) -> tuple[Layer, ...]:
    """Reads TensorRT's one-line-per-layer report (its inspector's, or RTX's build log's)."""
    layers = []
    for line in report.split("\n"):  # not splitlines: \x1e stands between ONNX names
        match = _LAYER.match(line)
        if match:
            count, kind = _weights(match["constants"] or "", match["rest"])
            layers.append(
                Layer(
                    name=match["name"],
                    inputs=_data_types(match["inputs"]),
                    outputs=_data_types(match["outputs"]),
                    weights=kind if count != 1 else None,
                    onnx_nodes=tuple(re.findall(r"ONNX Layer: ([^\]\x1e]+)", match["rest"])),
                    weights_count=count,
                )
            )
    return tuple(layers)


def _describe(error: Any) -> str:
    """A parser error in one line, with the node it is about."""
    text = " ".join(error.desc().split())
    node = f"{error.node_operator()} {error.node_name()}".strip()
    return f"{text} (node {node})" if node else text


def _configure(trt: Any, builder: Any, network: Any, settings: EngineSettings) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings.flavor == "rtx":
        # Only what allocates nothing while it runs can be captured as a CUDA graph (since 1.2).
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
    if settings.targets:
        config.num_compute_capabilities = len(settings.targets)
        for index, target in enumerate(settings.targets):
            capability = getattr(trt.ComputeCapability, target.upper(), None)
            if capability is None:
                raise UsageError(
                    f"target {target} is unknown to TensorRT-RTX {trt.__version__}; "
                    f"expected one of {', '.join(target_names())}"
                )
            config.set_compute_capability(capability, index)
    image, batch = network.get_input(0), settings.batch
    rest, sizes = tuple(image.shape)[1:], (batch.min, batch.opt, batch.max)
    shapes: Mapping[str, Any] = settings.shapes or {
        image.name: tuple((size, *rest) for size in sizes)
    }
    if settings.shapes or image.shape[0] == -1:
        profile = builder.create_optimization_profile()
        for name, three in shapes.items():
            profile.set_shape(name, *three)
        if config.add_optimization_profile(profile) < 0:
            what = "these shapes" if settings.shapes else f"the batch range {batch}"
            raise RexdeployError(f"TensorRT refuses {what}")
    return config


def _layer_report(trt: Any, plan: bytes, log: Log) -> str:
    """The engine's layers, one a line; without a GPU, from the RTX build log's own report."""
    for _, text in log.messages:
        if text.startswith("Layers:"):
            return text
    runtime = start(trt.Runtime, log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise RexdeployError(f"the engine just built cannot be loaded: {log.first_error()}")
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.ONELINE))


def _data_types(tensors: str) -> tuple[str, ...]:
    """The types in a list of tensors, by RTX's names."""
    return tuple(_type_name(text) for text in re.findall(r"Datatype: ([^,}]+)", tensors))


def _weights(constants: str, rest: str) -> tuple[int, str | None]:
    """How many values the layer's largest constant has (0: not told), and their type, if any.

    RTX lists constants like tensors; full TensorRT writes `Weights: {Type: Half, Count: 864}`.
    """
    stated = re.search(r"Weights: \{ ?Type: (\w+)(?:, Count: (\d+))?", rest)
    if stated:
        return int(stated[2] or 0), _type_name(stated[1])
    sized = [
        (math.prod(int(number) for number in dimensions.split(",")), _type_name(kind))
        for dimensions, kind in re.findall(
            r"Dimensions: \[([\d,]+)\].*?Datatype: ([^,}]+)", constants
        )
    ]
    return max(sized, default=(0, None))


def _type_name(text: str) -> str:
    """RTX says "Half"; full TensorRT says "Channel major FP16 format where ..."."""
    names = {kind.tensorrt: kind.rtx for kind in PRECISIONS.values()}
    words = text.upper().split()
    return next((name for key, name in names.items() if key in words), text.strip())
