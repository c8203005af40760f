"""Defects to plant in a bundle's graphs, which verification and localisation must find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import safetensors
import safetensors.torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from rexdeploy.bundle.store import Bundle
from rexdeploy.graphs.cast import to_precision
from tests.helpers import edit_weights, graph, nodes_of, with_file

Defect = Callable[[ModelProto], ModelProto]


def plant(bundle: Bundle, file: str, defect: Defect) -> Bundle:
    """The bundle with a defect in one graph; the manifest agrees, only the logits can tell."""
    model = defect(graph(bundle, file))
    onnx.checker.check_model(model, full_check=True)
    return with_file(bundle, file, model.SerializeToString())


def copy(model: ModelProto) -> ModelProto:
    made = ModelProto()
    made.CopyFrom(model)
    return made


def classes(model: ModelProto) -> int:
    return int(model.graph.output[0].type.tensor_type.shape.dim[1].dim_value)


def with_nodes(model: ModelProto, nodes: Sequence[NodeProto]) -> ModelProto:
    """The model with exactly these nodes, some of which may be its own."""
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(kept)
    return model


def add_constants(model: ModelProto, **values: object) -> ModelProto:
    for name, value in values.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    return model


def before_output(model: ModelProto, *nodes: NodeProto, **constants: object) -> ModelProto:
    """A copy with nodes from "inner" (what was the output) to "output", the output's name."""
    model = copy(model)
    outer = model.graph.output[0].name
    rename(model, {outer: "inner"})
    model.graph.node.extend(nodes)
    rename(model, {"output": outer})
    return add_constants(model, **constants)


def rename(model: ModelProto, names: dict[str, str]) -> None:
    """Other names for tensors, in all nodes."""
    for node in model.graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(name, name) for name in tensors]


def cast(source: str, target: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], to=to)


# Weights


def weight_off_by_one_percent(model: ModelProto) -> ModelProto:
    return edit_weights(model, [nodes_of(model, "Conv")[2].input[1]], lambda values: values * 1.01)


def swapped_channels(model: ModelProto) -> ModelProto:
    """BGR for RGB: the stem's input channels in reverse."""
    stem = nodes_of(model, "Conv")[0].input[1]
    return edit_weights(model, [stem], lambda values: values[:, ::-1])


def one_channel_off_by_one_percent(model: ModelProto) -> ModelProto:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[3] *= 1.01
        return values

    return edit_weights(model, [nodes_of(model, "Conv")[8].input[1]], change)


def _in_the_head(change: Callable[[np.ndarray], np.ndarray]) -> Defect:
    return lambda model: edit_weights(model, list(nodes_of(model, "Conv")[-1].input[1:]), change)


def two_classes_swapped(model: ModelProto) -> ModelProto:
    def swap(values: np.ndarray) -> np.ndarray:
        order = np.arange(len(values))
        order[[2, 5]] = 5, 2
        return values[order]

    return _in_the_head(swap)(model)


def a_third_of_the_classes_rotated(model: ModelProto) -> ModelProto:
    def rotate(values: np.ndarray) -> np.ndarray:
        third = len(values) // 3
        return np.concatenate([np.roll(values[:third], 1, axis=0), values[third:]])

    return _in_the_head(rotate)(model)


def up_by_half_a_signal(model: ModelProto) -> ModelProto:
    bias = nodes_of(model, "Conv")[-1].input[2]
    return edit_weights(model, [bias], lambda values: values + 0.15)  # signal 0.3 to 0.5


def overflowing_head(model: ModelProto) -> ModelProto:
    """An FP16 overflow: the head's weights as large as half allows."""
    name = nodes_of(model, "Conv")[-1].input[1]
    return edit_weights(model, [name], lambda values: np.full_like(values, 60000))


# Structure


def dropped_se(model: ModelProto) -> ModelProto:
    """The first squeeze-excitation's product passes its features through."""
    model = copy(model)
    sigmoids = {
        node.output[0]
        for node in nodes_of(model, "Sigmoid")
        if "Conv" in {p.op_type for p in model.graph.node if set(p.output) & set(node.input)}
    }
    for node in nodes_of(model, "Mul"):
        gates = [name for name in node.input if name in sigmoids]
        others = [name for name in node.input if name not in sigmoids]
        # The product of a SiLU has its sigmoid's own input as the other factor.
        if gates and not any(
            set(p.input) & set(others) and p.output[0] == gates[0] for p in model.graph.node
        ):
            node.op_type = "Identity"
            node.input[:] = others
            return model
    raise AssertionError("no squeeze-excitation found")


def shifted_rows(model: ModelProto) -> ModelProto:
    """Every image gets its neighbour's logits; at batch 1 nothing can be seen."""
    return before_output(
        model,
        helper.make_node("Slice", ["inner", "one", "end", "zero"], ["tail"]),
        helper.make_node("Slice", ["inner", "zero", "one", "zero"], ["head"]),
        helper.make_node("Concat", ["tail", "head"], ["output"], axis=0),
        zero=[0], one=[1], end=[2**31 - 1],
    )  # fmt: skip


def constant_output(model: ModelProto) -> ModelProto:
    """What it would say of any image: its logits times zero, plus a bias."""
    always = np.random.default_rng(0).standard_normal(classes(model)).astype(np.float32)
    return before_output(
        model,
        helper.make_node("Mul", ["inner", "nothing"], ["zeros"]),
        helper.make_node("Add", ["zeros", "always"], ["output"]),
        nothing=np.float32(0), always=always,
    )  # fmt: skip


def forgotten_normalisation(model: ModelProto) -> ModelProto:
    """The graph is fed what a client sends who leaves out mean and std: pixels in [0, 1]."""
    model = copy(model)
    source = model.graph.input[0].name
    rename(model, {source: "pixels"})
    undo = [
        helper.make_node("Mul", [source, "own_std"], ["own_scaled"]),
        helper.make_node("Add", ["own_scaled", "own_mean"], ["pixels"]),
    ]
    return add_constants(
        with_nodes(model, [*undo, *model.graph.node]),
        own_std=np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 3, 1, 1),
        own_mean=np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 3, 1, 1),
    )


def fixed_reshape(model: ModelProto, rows: int) -> ModelProto:
    """A batch size left in the graph: works at that size, fails or lies at others."""
    node = helper.make_node("Reshape", ["inner", "fixed"], ["output"], name="fixed")
    edited = before_output(model, node, fixed=[rows, classes(model) if rows > 0 else -1])
    del edited.graph.value_info[:]
    return edited


def _gathered(model: ModelProto, *nodes: NodeProto, **constants: object) -> ModelProto:
    """Nodes from "row", the numbers of a batch's rows, to "source", those that it answers with."""
    return before_output(
        model,
        helper.make_node("Shape", ["inner"], ["rows"], end=1),
        helper.make_node("Squeeze", ["rows"], ["row_count"]),
        helper.make_node("Range", ["first", "row_count", "step"], ["row"]),
        *nodes,
        helper.make_node("Gather", ["inner", "source"], ["output"], axis=0),
        first=0, step=1, **constants,
    )  # fmt: skip


def copied_rows(model: ModelProto, computed: int) -> ModelProto:
    """Batches of more than `computed` images get the first ones' answers over and over."""
    node = helper.make_node("Mod", ["row", "computed"], ["source"])
    return _gathered(model, node, computed=computed)


def exchanged_rows(model: ModelProto) -> ModelProto:
    """Of a batch of 64, images 17 and 49 get each other's answer; no other batch shows it."""
    return _gathered(
        model,
        helper.make_node("Sub", ["row_count", "step"], ["row_count_less"]),
        helper.make_node("Equal", ["row", "a"], ["is_a"]),
        helper.make_node("Equal", ["row", "b"], ["is_b"]),
        helper.make_node("Where", ["is_a", "b", "row"], ["half_way"]),
        helper.make_node("Where", ["is_b", "a", "half_way"], ["exchanged"]),
        helper.make_node("Min", ["exchanged", "row_count_less"], ["source"]),
        a=17, b=49,
    )  # fmt: skip


def halved(model: ModelProto) -> ModelProto:
    node = helper.make_node("Mul", ["inner", "half"], ["output"])
    return before_output(model, node, half=np.float32(0.5))


def only_exponents(model: ModelProto) -> ModelProto:
    model = copy(model)
    (softmax,) = nodes_of(model, "Softmax")
    softmax.op_type = "Exp"
    del softmax.attribute[:]
    return model


def renamed(model: ModelProto) -> ModelProto:
    """Names of its own for all tensors inside."""
    model = copy(model)
    outer = model.graph.output[0].name
    inner = [name for node in model.graph.node for name in node.output if name != outer]
    rename(model, {name: f"other_{index}" for index, name in enumerate(inner)})
    del model.graph.value_info[:]
    return model


# Types


def stem_in_float32(model: ModelProto) -> ModelProto:
    model = copy(model)
    stem = nodes_of(model, "Conv")[0]
    at = list(model.graph.node).index(stem)
    casts = [cast(name, f"{name}_full", TensorProto.FLOAT) for name in stem.input]
    back = cast("stem_full", stem.output[0], TensorProto.FLOAT16)
    stem.input[:] = [f"{name}_full" for name in stem.input]
    stem.output[:] = ["stem_full"]
    nodes = list(model.graph.node)
    return with_nodes(model, [*nodes[:at], *casts, stem, back, *nodes[at + 1 :]])


def rounded_inside(model: ModelProto, kind: int) -> ModelProto:
    """What every convolution but the first gives goes through a 16-bit type and back."""
    model = copy(model)
    outer, first = model.graph.output[0].name, nodes_of(model, "Conv")[0]
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        name = node.output[0]
        if node.op_type == "Conv" and name != outer and node != first:
            node.output[0] = f"{name}_exact"
            nodes += [
                cast(f"{name}_exact", f"{name}_narrow", kind),
                cast(f"{name}_narrow", name, TensorProto.FLOAT),
            ]
    return with_nodes(model, nodes)


def bfloat16_before_output(model: ModelProto) -> ModelProto:
    return before_output(
        model,
        cast("inner", "narrow", TensorProto.BFLOAT16),
        cast("narrow", "output", TensorProto.FLOAT),
    )


def double_output(model: ModelProto) -> ModelProto:
    model = before_output(model, cast("inner", "output", TensorProto.DOUBLE))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    return model


def double_product(model: ModelProto) -> ModelProto:
    """A matrix product in float64 at its end, with the identity."""
    return before_output(
        model,
        cast("inner", "double", TensorProto.DOUBLE),
        helper.make_node("MatMul", ["double", "same"], ["product"]),
        cast("product", "output", TensorProto.FLOAT),
        same=np.eye(classes(model)),
    )


def half_convolution_of_zeros(model: ModelProto) -> ModelProto:
    return before_output(
        model,
        cast(model.graph.input[0].name, "half", TensorProto.FLOAT16),
        helper.make_node("Conv", ["half", "zeros"], ["nothing"], name="zeros"),
        helper.make_node("GlobalAveragePool", ["nothing"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        cast("flat", "wide", TensorProto.FLOAT),
        helper.make_node("Add", ["inner", "wide"], ["output"]),
        zeros=np.zeros((classes(model), 3, 1, 1), np.float16),
    )


def rounded_gates(model: ModelProto) -> ModelProto:
    """In float16 but for gates and products, with what each sigmoid gives rounded once more."""
    kept = [node.name for node in model.graph.node if node.op_type in ("Sigmoid", "Mul")]
    half = to_precision(model, "fp16", kept)
    nodes: list[NodeProto] = []
    again: dict[str, str] = {}
    for node in half.graph.node:
        node.input[:] = [again.get(name, name) for name in node.input]
        nodes.append(node)
        if node.op_type == "Sigmoid":
            name = node.output[0]
            again[name] = f"{name}_again"
            nodes += [
                cast(name, f"{name}_half", TensorProto.FLOAT16),
                cast(f"{name}_half", f"{name}_again", TensorProto.FLOAT),
            ]
    return with_nodes(half, nodes)


def unbalanced(source: Path, target: Path, factor: float = 128.0) -> Path:
    """The network with some channels `factor` times as large, and divided out where they are read.

    Behind the first block, and behind others whose shortcut does not reach those channels, a
    strided block reads them and nothing else. No logit changes but by rounding.
    """
    with safetensors.safe_open(str(source), "pt") as file:
        notes = file.metadata()
    state = {
        name: value.float() if value.is_floating_point() else value
        for name, value in safetensors.torch.load_file(source).items()
    }
    blocks = sorted({int(name.split(".")[1]) for name in state if ".out." in name})

    def own(block: int, dimensions: int) -> list[str]:
        """A block's weights of so many dimensions that are not squeeze and excitation's."""
        prefix = f"features.{block}.out."
        found = [name for name in state if name.startswith(prefix) and name.count(".") == 4]
        kept = [name for name in found if name.endswith("weight")]
        kept = [name for name in kept if state[name].ndim == dimensions]
        return sorted(kept, key=lambda name: int(name.split(".")[3]))

    for place in (0, 2, 4, 10):
        block, following = blocks[place], blocks[place + 1]
        width = len(state[own(block, 4)[-1]])
        reached = state[own(block, 4)[0]].shape[1] if place else 0
        channels = list(range(reached, width))[:8]
        norm = own(block, 1)[-1].removesuffix(".weight")
        for name in (f"{norm}.weight", f"{norm}.bias"):
            state[name][channels] *= factor
        state[own(following, 4)[0]][:, channels] /= factor
    safetensors.torch.save_file(state, target, notes)
    return target
