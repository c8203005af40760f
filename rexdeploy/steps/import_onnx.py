"""Somebody else's ONNX graph as a bundle."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import ModelProto

from rexdeploy.bundle.manifest import (
    FORMAT,
    MANIFEST,
    MAX_BATCH,
    MAX_CLASSES,
    MAX_IMAGE_SIZE,
    Artifact,
    BatchRange,
    Manifest,
    ModelSpec,
    Preprocess,
    WeightsOrigin,
)
from rexdeploy.bundle.store import DEFAULT_ROOT, Bundle, check_writable, sha256
from rexdeploy.errors import UsageError, first_line
from rexdeploy.graphs.bounds import check_memory
from rexdeploy.graphs.engine_graph import Source
from rexdeploy.graphs.products import precision_of
from rexdeploy.graphs.read import graph_inputs, parse, read_with_external_data, type_name
from rexdeploy.steps.build_trt import batch_range
from rexdeploy.text import printable

_OUTPUT_TYPES = frozenset(
    getattr(onnx.TensorProto, name) for name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")
)


def import_onnx(
    path: Path | str,
    *,
    out: Path | str = DEFAULT_ROOT,
    batch: BatchRange | str | None = None,
    force: bool = False,
    command: str = "rexdeploy build-trt",
) -> Source:
    """Somebody's own ONNX classifier, for `build_trt`; writes nothing.

    `build_trt` makes a bundle of it in the folder `out`, whose reference is the graph. Its
    preprocessing is taken to be ImageNet's at the graph's image size. `batch` are the sizes that an
    engine is to accept, `force` replaces another such bundle of its name, and `command` is what the
    manifest says that made it. Raises UsageError unless the graph has one float32 image input
    `[N, 3, H, W]` and one output of logits `[N, classes]`, or where another model has its name.

    Example: `rexdeploy.build_trt(rexdeploy.import_onnx("model.onnx"), fp16=True)`
    """
    path, root = Path(path), Path(out)
    check_writable(root)
    if path.stem.startswith("."):
        raise UsageError(f"ONNX graph {path}: give the file a name, which its bundle will have")
    try:
        data = read_with_external_data(path)
    except OSError as error:
        raise UsageError(f"ONNX graph {path} cannot be read ({error.strerror})") from None
    model = parse(data, f"ONNX graph {path}")
    try:
        model = onnx.shape_inference.infer_shapes(model)
    except onnx.shape_inference.InferenceError as error:
        raise UsageError(
            f"ONNX graph {path}: its types and shapes contradict each other ({first_line(error)})"
        ) from None
    shapes = _check_classifier(model, path)
    rows = shapes[0][0] or batch_range(batch, None).opt
    check_memory(model, rows, shapes[0][1:], f"ONNX graph {path}")
    artifact = Artifact(
        "onnx",
        "model.onnx",
        sha256(data),
        precision=precision_of(model),
        batch=BatchRange(shapes[0][0], shapes[0][0], shapes[0][0]) if shapes[0][0] else None,
        command=command,
    )
    if artifact.precision == "bf16":
        raise UsageError(
            f"{path} is in bfloat16, which nothing here can run as a reference; give the float32 "
            "graph, with --bf16"
        )
    folder = root / path.stem
    if (folder / MANIFEST).exists():
        existing = Bundle.open(folder)
        if existing.manifest.find("onnx", sha256=artifact.sha256):
            return Source(existing)
        if existing.manifest.model.family != "onnx" or not force:
            raise UsageError(
                f"{folder} holds another model ({existing.manifest.model.title}); rename the ONNX "
                "file, choose another folder with --out, or (for ONNX bundles) replace it with "
                "--force"
            )
    spec = ModelSpec(
        family="onnx",
        width=None,
        num_classes=shapes[1][1],
        input_name=graph_inputs(model)[0].name,
        output_name=model.graph.output[0].name,
        preprocess=Preprocess(height=shapes[0][2], width=shapes[0][3]),
        weights=WeightsOrigin(printable(path.name), artifact.sha256, trained=True),
    )
    manifest = Manifest(FORMAT, printable(path.stem), spec, (artifact,))
    return Source(Bundle(folder, manifest), {artifact.file: data}, is_new=True)


def _check_classifier(model: ModelProto, path: Path) -> list[list[int]]:
    """Shapes of the input and the output (0 is dynamic); raises UsageError if they do not fit."""
    inputs = graph_inputs(model)
    values = [*inputs, *model.graph.output]
    shapes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values]
    types = [value.type.tensor_type.elem_type for value in values]
    if len(shapes) == 2 and [len(shape) for shape in shapes] == [4, 2]:
        for what, size, most in (
            ("a fixed batch", shapes[0][0], MAX_BATCH),
            ("images with a side", shapes[0][2], MAX_IMAGE_SIZE),
            ("images with a side", shapes[0][3], MAX_IMAGE_SIZE),
            ("a number of classes", shapes[1][1], MAX_CLASSES),
        ):
            if not 0 <= size <= most:
                raise UsageError(
                    f"{path} has {what} of {size}, expected 1 to {most}; export it with another"
                )
    if (
        len(inputs) != 1
        or [len(shape) for shape in shapes] != [4, 2]
        or types[0] != onnx.TensorProto.FLOAT
        or types[1] not in _OUTPUT_TYPES
        or shapes[0][1] != 3
        or not all(shapes[0][2:] + shapes[1][1:])
    ):
        names = [type_name(kind).lower() for kind in types]
        got = ", ".join(f"{kind} {shape}" for kind, shape in zip(names, shapes, strict=True))
        raise UsageError(
            f"{path} has inputs and outputs {got} (0 is dynamic), expected one float input "
            "[N, 3, height, width] and one floating output [N, classes]"
        )
    last = next((n for n in model.graph.node if model.graph.output[0].name in n.output), None)
    if last is not None and last.op_type in ("Softmax", "LogSoftmax"):
        raise UsageError(f"{path} ends in {last.op_type}; expected logits: export it without")
    return shapes
