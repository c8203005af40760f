"""INT8 graphs, made from float32 ones: ranges, Q/DQ pairs by ONNX Runtime, and what mends them.

Targets differ. ONNX Runtime on x86 is fast with unsigned activations and a quantised bias; TensorRT
takes signed, symmetric activations and no quantised bias, and requantises by itself.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.utils import Extractor

from rexdeploy.arrays import Float32
from rexdeploy.errors import RexdeployError, first_line
from rexdeploy.graphs.products import ARITHMETIC_OPS
from rexdeploy.graphs.read import node_name

if TYPE_CHECKING:
    from onnxruntime.quantization.calibrate import TensorsData

Target = Literal["cpu", "trt"]
TARGETS: tuple[Target, ...] = get_args(Target)
Method = Literal["minmax", "entropy", "percentile"]
METHODS: tuple[Method, ...] = get_args(Method)
"""How a tensor's range is taken: all of it, what loses the least information, 99.99 % of it."""
REVISION = "1"
"""Of what this file makes: raise it with every change."""
_METHOD_NAMES = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
_TRT_OPS = ("Conv", "Gemm", "MatMul", "Add")  # inputs of products, and of the shortcuts' sums
BATCH = 32
_HISTOGRAM_BATCH = 8  # every inner tensor of so many images is in memory at once

Run = Callable[[ModelProto, Float32], dict[str, Float32]]
"""Runs a graph over images `[N, 3, H, W]`: all its outputs by name, float32."""


def calibrate(model: ModelProto, images: Float32, method: Method) -> TensorsData:
    """The range of every inner tensor of a float32 graph over images `[N, 3, H, W]`.

    Raises RexdeployError where ONNX Runtime cannot run the graph so.
    """
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    name = model.graph.input[0].name
    size = BATCH if method == "minmax" else _HISTOGRAM_BATCH
    with tempfile.TemporaryDirectory() as folder, _quiet("its tensors cannot be calibrated"):
        path = Path(folder)
        onnx.save(model, path / "graph.onnx")
        calibrator = create_calibrator(
            path / "graph.onnx",
            None,
            augmented_model_path=str(path / "with_outputs.onnx"),
            calibrate_method=CalibrationMethod[_METHOD_NAMES[method]],
            extra_options={"percentile": 99.99} if method == "percentile" else {},
        )
        for batch in batches(model, images, size):
            calibrator.collect_data(_once({name: batch}))
        return calibrator.compute_data()


def quantized(
    model: ModelProto,
    ranges: TensorsData,
    target: Target,
    keep: Collection[str] = (),
    reduce_range: bool = False,
) -> ModelProto:
    """A copy of a float32 graph in int8, in Q/DQ pairs, its input and output still float32.

    Weights are int8 by output channel, activations uint8 ("cpu") or int8 about zero ("trt"). The
    nodes named in `keep` (see `node_name`) stay float32. `reduce_range`: weights of 7 bits, for
    processors that saturate (no VNNI). Raises RexdeployError where ONNX Runtime's quantiser fails.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    copy = ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        node.name = node_name(node)  # the quantiser knows nodes by their names
    is_cpu = target == "cpu"
    options = {"DedicatedQDQPair": False, "QuantizeBias": is_cpu, "WeightSymmetric": True}
    if not is_cpu:
        options |= {"ActivationSymmetric": True}
        options |= {"OpTypesToExcludeOutputQuantization": list(_TRT_OPS)}  # type: ignore[dict-item]
    with _quiet("the graph cannot be quantised"):
        quantizer = QDQQuantizer(
            copy,
            True,
            reduce_range,
            QuantType.QInt8,
            QuantType.QUInt8 if is_cpu else QuantType.QInt8,
            ranges,
            [],
            [node.name for node in copy.graph.node if node.name in keep],
            sorted(_quantizable(copy) if is_cpu else set(_TRT_OPS)),
            options,
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        made: ModelProto = quantizer.model.model
    made.producer_name, made.producer_version = model.producer_name, model.producer_version
    del made.metadata_props[:], made.graph.value_info[:]
    made.metadata_props.extend(model.metadata_props)
    with _quiet("the INT8 graph is not valid"):
        onnx.checker.check_model(made, full_check=True)
    return made


def float_operators(model: ModelProto) -> list[str]:
    """The graph's operators that stay float32, since they cannot be quantised; by name."""
    return sorted({node.op_type for node in model.graph.node} - _quantizable(model))


def _quantizable(model: ModelProto) -> set[str]:
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return {node.op_type for node in model.graph.node} & (
        set(QDQRegistry) | set(QLinearOpsRegistry)
    )


def equalized(model: ModelProto, images: Float32, run: Run) -> ModelProto:
    """The same network with channels that are added or projected made alike in size.

    Cross-layer equalisation (Nagel et al., ICCV 2019) where it holds for ReXNets: of the tensors
    that only convolutions, sums and concatenations touch, each channel is divided by a number and
    multiplied by it again in the convolutions that read it. Numbers are powers of two: no logit of
    the float32 graph changes by a bit. A channel's number balances its largest value over `images`
    with its largest weight in the readers.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    channels = _Channels(copy)
    if not channels.free:
        return copy
    sizes = run(_with_outputs(copy, channels.tensors), images)
    peaks = {name: np.abs(sizes[name]).max(axis=(0, 2, 3)) for name in channels.tensors}
    channels.scale(peaks)
    return copy


class _Channels:
    """Which channels of which tensors have to be scaled alike, and who makes and reads them."""

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._shared = Counter(name for node in graph.node for name in node.input)
        self._parents: list[int] = []
        self._ids: dict[str, list[int]] = {}  # of a tensor's channels
        self._makers: list[NodeProto] = []
        readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        for node in graph.node:
            self._follow(node)
        given = {value.name for value in graph.output}
        self._readers = {
            name: [node for node in readers.get(name, []) if node.op_type == "Conv"]
            for name in self._ids
        }
        fixed = set()
        for name, ids in self._ids.items():
            fits = all(self._takes(node, name) for node in readers.get(name, []))
            if name in given or not fits:
                fixed |= {self._root(number) for number in ids}
        self.free = {self._root(number) for number in range(len(self._parents))} - fixed
        self.tensors = [
            name
            for name, ids in self._ids.items()
            if any(self._root(number) in self.free for number in ids)
        ]

    def scale(self, peaks: Mapping[str, Float32]) -> None:
        """Divides channels by what their largest values ask for, and multiplies their readers."""
        values = np.zeros(len(self._parents))
        columns = np.zeros(len(self._parents))
        for name in self.tensors:
            roots = [self._root(number) for number in self._ids[name]]
            np.maximum.at(values, roots, peaks[name])
            for reader in self._readers[name]:
                weight = np.abs(self._array(reader.input[1]))
                # Every row has a scale of its own, so that a column counts beside its row.
                weight = weight / np.maximum(weight.max(axis=(1, 2, 3), keepdims=True), 1e-30)
                per_column = weight.max(axis=(0, 2, 3) if _group(reader) == 1 else (1, 2, 3))
                np.maximum.at(columns, roots, per_column)
        is_used = (values > 0) & (columns > 0)
        ratio = np.divide(values, columns, out=np.ones_like(values), where=is_used)
        power = np.round(np.log2(ratio) / 2)
        power -= np.round(np.median(power[is_used])) if is_used.any() else 0
        power[~is_used] = 0
        for number in range(len(power)):
            power[number] = power[self._root(number)] if self._root(number) in self.free else 0
        factors = np.exp2(power).astype(np.float32)
        for node in self._makers:
            rows = factors[self._ids[node.output[0]]]
            self._put(node, 1, self._array(node.input[1]) / rows[:, None, None, None])
            if len(node.input) > 2:
                self._put(node, 2, self._array(node.input[2]) / rows)
        for name in self.tensors:
            own = factors[self._ids[name]]
            for reader in self._readers[name]:
                shape = (1, -1, 1, 1) if _group(reader) == 1 else (-1, 1, 1, 1)
                self._put(reader, 1, self._array(reader.input[1]) * own.reshape(shape))

    def _follow(self, node: NodeProto) -> None:
        known = [self._ids.get(name) for name in node.input]
        is_own = all(self._shared[name] == 1 for name in node.input[1:])
        if node.op_type == "Conv" and node.input[1] in self._weights and is_own:
            count = self._weights[node.input[1]].dims[0]
            self._ids[node.output[0]] = list(range(len(self._parents), len(self._parents) + count))
            self._parents += self._ids[node.output[0]]
            self._makers.append(node)
        elif node.op_type == "Add" and len(known) == 2 and known[0] and known[1]:
            if len(known[0]) == len(known[1]):
                for first, second in zip(*known, strict=True):
                    self._parents[self._root(first)] = self._root(second)
                self._ids[node.output[0]] = known[0]
        elif node.op_type == "Concat" and all(known) and _axis(node) == 1:
            self._ids[node.output[0]] = [number for ids in known for number in ids or ()]

    def _takes(self, node: NodeProto, name: str) -> bool:
        """Whether a reader of a tensor can take its channels scaled."""
        if node.op_type == "Conv":
            weight = self._weights.get(node.input[1])
            in_weights = list(node.input).count(name) == 1 and node.input[0] == name
            if not in_weights or weight is None or self._shared[node.input[1]] > 1:
                return False
            count = len(self._ids[name])
            return _group(node) == 1 or _group(node) == count == weight.dims[0]
        return node.op_type in ("Add", "Concat") and node.output[0] in self._ids

    def _root(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = number = self._parents[self._parents[number]]
        return number

    def _array(self, name: str) -> Float32:
        value: Float32 = numpy_helper.to_array(self._weights[name])
        return value

    def _put(self, node: NodeProto, index: int, value: Float32) -> None:
        name = node.input[index]
        self._weights[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))


def corrected(quantised: ModelProto, model: ModelProto, images: Float32, run: Run) -> ModelProto:
    """A quantised graph with the biases of its convolutions moved, in the graph's order.

    Rounding moves the mean of what each puts out; the next is measured with that undone (bias
    correction, Nagel et al., ICCV 2019). `model` is the float32 graph, `images` `[N, 3, H, W]`.
    """
    copy = ModelProto()
    copy.CopyFrom(quantised)
    there = {node_name(node): node.output[0] for node in model.graph.node}
    layers = [
        node
        for node in copy.graph.node
        if node.op_type == "Conv" and node.name in there and len(node.input) > 2
    ]
    if not layers:
        return copy
    names = [there[node.name] for node in layers]
    exact = run(_with_outputs(model, names), images)
    wanted = {name: exact[name].mean(axis=(0, 2, 3)) for name in names}
    del exact
    biases = _Biases(copy)
    for node in layers:
        part = _up_to(copy, node.output[0])
        found = run(part, images)[node.output[0]].mean(axis=(0, 2, 3))
        biases.add(node.input[2], wanted[there[node.name]] - found)
    return copy


class _Biases:
    """The biases of a quantised graph: int32 behind a DequantizeLinear, or float32."""

    def __init__(self, model: ModelProto) -> None:
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._makers = {name: node for node in model.graph.node for name in node.output}

    def add(self, name: str, value: Float32) -> None:
        maker = self._makers.get(name)
        if maker is not None and maker.op_type == "DequantizeLinear":
            name = maker.input[0]
            scale = numpy_helper.to_array(self._weights[maker.input[1]]).astype(np.float64)
            bounds = np.iinfo(np.int32)
            steps = np.rint(value / np.where(scale > 0, scale, np.inf))
            moved = np.clip(self._array(name) + steps, bounds.min, bounds.max).astype(np.int32)
        elif name in self._weights:
            moved = (self._array(name) + value).astype(np.float32)
        else:
            return
        self._weights[name].CopyFrom(numpy_helper.from_array(moved, name))

    def _array(self, name: str) -> Any:
        return numpy_helper.to_array(self._weights[name])


def _up_to(model: ModelProto, tensor: str) -> ModelProto:
    """The part of a graph that makes one tensor, which it puts out."""
    inferred = onnx.shape_inference.infer_shapes(_with_outputs(model, [tensor]))
    return Extractor(inferred).extract_model([inferred.graph.input[0].name], [tensor])


def _with_outputs(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """A copy that puts out these tensors of four dimensions, and nothing else."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in names
    )
    return copy


def quantized_products(optimized: ModelProto) -> tuple[int, int]:
    """How many products of a graph, as ONNX Runtime has fused it, are int8, and how many are not.

    What it runs says more than the file: where it finds no int8 kernel it dequantises and runs
    float32, without a word.
    """
    kinds = [node.op_type for node in optimized.graph.node]
    whole = sum(kind in ("QLinearConv", "QGemm", "QLinearMatMul") for kind in kinds)
    others = sum(kind in ARITHMETIC_OPS or kind == "FusedConv" for kind in kinds)
    return whole, others


def batches(model: ModelProto, images: Float32, size: int) -> list[Float32]:
    """Images `[N, 3, H, W]` in batches of that size, or as large as the graph takes them.

    What a graph of one batch size leaves over is left out, and too few images come again: ranges
    and means change little by either.
    """
    fixed = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    size = fixed or size
    if len(images) < fixed:
        images = images[np.arange(fixed) % len(images)]
    end = len(images) - size + 1 if fixed else len(images)
    return [images[start : start + size] for start in range(0, end, size)]


def _group(node: NodeProto) -> int:
    return next((item.i for item in node.attribute if item.name == "group"), 1)


def _axis(node: NodeProto) -> int | None:
    return next((item.i for item in node.attribute if item.name == "axis"), None)


def _once(feeds: dict[str, Float32]) -> Any:
    """What ONNX Runtime's calibrators read: one batch."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left: Iterator[dict[str, Float32]] = iter([feeds])

        def get_next(self) -> dict[str, Float32] | None:
            return next(self._left, None)

    return Reader()


@contextlib.contextmanager
def _quiet(what: str) -> Iterator[None]:
    """Without the lines that ONNX Runtime's quantiser prints; its errors in a line."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except Exception as error:  # whatever it raises, of any class
        raise RexdeployError(f"{what} ({first_line(error)})") from None
    finally:
        logging.disable(before)
