"""One adapter for TensorRT 10.13 and later, TensorRT 11 and TensorRT-RTX: parse, build, report.

The two flavours share an API, and all of it that is used here exists in every supported version
(a test checks that against the real bindings of 10.13, 10.16 and 11.4).
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from rexdeploy.bundle.manifest import BatchRange
from rexdeploy.bundle.precision import FLOATING, TYPES
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError

Flavor = Literal["tensorrt", "rtx"]

BUILD_REVISION = "3"
"""Of the builder's configuration: raise it with every change of what `build` asks for."""
FLAVORS: tuple[Flavor, ...] = ("tensorrt", "rtx")
TITLES: dict[Flavor, str] = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}
RTX_MAGIC = b"vtrt"
MIN_VERSION = (10, 13)  # of full TensorRT; the first release tested

_MODULES: dict[Flavor, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
# Observed in engines of TensorRT-RTX 1.7 (the format is not documented).
_RTX_TARGET_BITS = {"sm75": 1, "sm80": 2, "sm86": 4, "sm89": 8, "sm120": 16, "sm121": 32}
_RTX_HEADER_BYTES = 64
# trtexec.cpp of TensorRT 10: the tag, a format of 0, and the version at byte 24.
_FULL_MAGIC = b"ftrt"
_FULL_HEADER_BYTES = 28
# Square brackets nest one deep: tensors hold lists of numbers.
_TENSORS = r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]"
_LAYER = re.compile(
    rf"Name: (?P<name>.*?), LayerType: .*?Inputs: (?P<inputs>{_TENSORS}), "
    rf"(?:Constants: (?P<constants>{_TENSORS}), )?Outputs: (?P<outputs>{_TENSORS}), (?P<rest>.*)",
    re.DOTALL,
)


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
        that it reads; where it reads none, the widest that it writes.
        """
        if self.weights in TYPES:
            return self.weights
        for types in (self.inputs, self.outputs):
            widest = next((name for name in reversed(FLOATING) if name in types), None)
            if widest is not None:
                return widest
        return "/".join(sorted({*self.inputs, *self.outputs}))


@dataclass(frozen=True)
class EngineSettings:
    """Everything beside the ONNX graph that decides an engine."""

    flavor: Flavor
    batch: BatchRange
    targets: tuple[str, ...] = ()  # RTX only, such as "sm89"; empty: SM80 and newer
    workspace_mib: int | None = None  # None: TensorRT's own limit


@dataclass(frozen=True)
class BuiltEngine:
    """A serialised engine with its layers."""

    plan: bytes
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class PlanHeader:
    """What can be read off a plan without a GPU."""

    flavor: Flavor
    version: str | None  # None where the plan is of no format that we know
    targets: tuple[str, ...]  # RTX only


def load(flavor: Flavor) -> Any:
    """The flavour's Python module; raises BackendUnavailable if it is missing or too old."""
    title, module_name = TITLES[flavor], _MODULES[flavor]
    extra = "rtx" if flavor == "rtx" else "tensorrt"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        # A library that does not load is an ImportError of the same name: only the type tells.
        if isinstance(error, ModuleNotFoundError) and error.name == module_name:
            reason = f"{title} is not installed"
        else:
            reason = f"{title} cannot be loaded ({error})"
        raise BackendUnavailable(f"{reason}: pip install 'rexdeploy[{extra}]'") from None
    except (OSError, RuntimeError) as error:  # its libraries are missing: no wheel on PyPI
        raise BackendUnavailable(
            f"{title}'s libraries cannot be loaded ({error}): pip install 'rexdeploy[{extra}]'"
        ) from None
    version = tuple(int(part) for part in module.__version__.split(".")[:2])
    if flavor == "tensorrt" and version < MIN_VERSION:
        raise BackendUnavailable(
            f"got TensorRT {module.__version__}, expected "
            f"{'.'.join(map(str, MIN_VERSION))} or later: pip install 'rexdeploy[{extra}]'"
        )
    return module


@contextmanager
def captured_log(trt: Any) -> Iterator[Log]:
    """Yields the flavour's logger with an empty log; what TensorRT says meanwhile lands in it."""
    log = _loggers.get(trt.__name__)
    if log is None:
        log = _loggers[trt.__name__] = _make_logger(trt)
    log.messages.clear()
    yield log


class Log:
    """TensorRT's messages as (severity, text): 0 internal error, 1 error, ... 4 verbose."""

    def __init__(self, title: str) -> None:
        self.title = title  # of the flavour
        self.messages: list[tuple[int, str]] = []

    def first_error(self) -> str:
        """The first error, which names the cause; later ones are its echoes."""
        errors = [text for severity, text in self.messages if severity <= 1]
        return " ".join(errors[0].split()) if errors else "TensorRT gave no reason"


def start(factory: Any, log: Log) -> Any:
    """A Builder or Runtime; raises BackendUnavailable with TensorRT's reason if there is none."""
    try:
        return factory(log)
    except TypeError:  # what the bindings make of a null pointer, such as without a GPU
        raise BackendUnavailable(f"{log.title} cannot start here: {log.first_error()}") from None


def build(onnx_model: bytes, settings: EngineSettings) -> BuiltEngine:
    """Compiles an ONNX graph with one image input, in the graph's own types.

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
        if network.num_inputs != 1:
            raise UsageError(
                f"{title} cannot parse the ONNX graph: got {network.num_inputs} inputs, expected 1"
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


def is_plan(data: bytes) -> bool:
    """Whether the bytes begin as an engine of either flavour does."""
    return data[:4] in (RTX_MAGIC, _FULL_MAGIC)


def read_header(plan: bytes) -> PlanHeader:
    """Flavour, version and targets of a serialised engine, without a GPU.

    Whatever is not RTX's is taken for full TensorRT's, whose own trtexec (--getPlanVersionOnly)
    reads the version at the same place. Raises UsageError for a plan that is cut short.
    """
    version = ".".join(str(byte) for byte in plan[24:28])
    if plan[:4] != RTX_MAGIC:
        is_known = plan[:8] == _FULL_MAGIC + bytes(4)
        if is_known and len(plan) < _FULL_HEADER_BYTES:
            raise UsageError(
                f"a truncated TensorRT engine: got {len(plan)} bytes; copy or build it again"
            )
        return PlanHeader("tensorrt", version if is_known else None, ())
    if len(plan) < _RTX_HEADER_BYTES:
        raise UsageError(
            f"a truncated TensorRT-RTX engine: got {len(plan)} bytes, expected at "
            f"least {_RTX_HEADER_BYTES}; copy or build it again"
        )
    size = int.from_bytes(plan[16:24], "little")
    if len(plan) != size:
        raise UsageError(
            f"a truncated TensorRT-RTX engine: got {len(plan)} bytes, expected {size}; "
            "copy or build it again"
        )
    mask = int.from_bytes(plan[32:36], "little")
    targets = tuple(name for name, bit in _RTX_TARGET_BITS.items() if mask & bit)
    return PlanHeader("rtx", version, targets)


def target_names() -> tuple[str, ...]:
    """The compute capabilities that --target takes."""
    return tuple(_RTX_TARGET_BITS)


_loggers: dict[str, Any] = {}  # TensorRT keeps the first logger it sees for the whole process


def _make_logger(trt: Any) -> Any:
    class Logger(Log, trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            Log.__init__(self, "TensorRT-RTX" if trt.__name__ == "tensorrt_rtx" else "TensorRT")

        def log(self, severity: Any, text: str) -> None:
            self.messages.append((int(severity), text))

    return Logger()


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
    image = network.get_input(0)
    dimensions = tuple(image.shape)
    if dimensions[0] == -1:
        profile = builder.create_optimization_profile()
        batch = settings.batch
        shapes = [(size, *dimensions[1:]) for size in (batch.min, batch.opt, batch.max)]
        profile.set_shape(image.name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise RexdeployError(f"TensorRT refuses the batch range {batch}")
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
    names = {"FP16": "Half", "FP32": "Float", "BF16": "BFloat16", "INT8": "Int8"}
    words = text.upper().split()
    return next((name for key, name in names.items() if key in words), text.strip())
