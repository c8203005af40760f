"""ONNX graphs that are legal and absurd, or made to harm: one line, and a stated memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import ModelProto, NodeProto, SparseTensorProto, TensorProto, ValueInfoProto, helper
from onnx import numpy_helper as numpy_helper

from rexdeploy.backends.onnxrt import GraphSession
from rexdeploy.bundle.store import Bundle, commit
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.graphs.bounds import MAX_RUN_BYTES, peak_bytes
from rexdeploy.machine import bounded
from rexdeploy.steps.import_onnx import import_onnx
from rexdeploy.steps.inspect import inspect
from rexdeploy.steps.verify import verify
from tests.helpers import assert_refused, graph, run_cli, run_measured

Shape = Sequence[int | str] | None
Command = list[str | Path]
_node = helper.make_node


def _value(name: str, shape: Shape, kind: int = TensorProto.FLOAT) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _numbers(name: str, values: list[int]) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def _model(
    nodes: list[NodeProto],
    weights: Sequence[TensorProto] = (),
    image: ValueInfoProto | None = None,
    output: ValueInfoProto | None = None,
) -> ModelProto:
    """A graph from `x` to `y`: of any number of images of 64 x 64, if nothing else is said."""
    graph = helper.make_graph(
        nodes,
        "g",
        [image or _value("x", ["n", 3, 64, 64])],
        [output or _value("y", ["n", 3])],
        list(weights),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _classifier(
    image: ValueInfoProto | None = None, output: ValueInfoProto | None = None
) -> ModelProto:
    """A convolution to ten classes."""
    weight = numpy_helper.from_array(np.ones((10, 3, 3, 3), np.float32), "w")
    nodes = [_node("Conv", ["x", "w"], ["c"]), *_pooled("c")]
    return _model(nodes, [weight], image, output or _value("y", ["n", 10]))


def _pooled(name: str, output: str = "y") -> list[NodeProto]:
    return [
        _node("GlobalAveragePool", [name], [f"{name}/pooled"]),
        _node("Flatten", [f"{name}/pooled"], [output]),
    ]


def _plus_mean_of(name: str) -> list[NodeProto]:
    return [
        _node("ReduceMean", [name], ["mean"], keepdims=0),
        *_pooled("x", "flat"),
        _node("Add", ["flat", "mean"], ["y"]),
    ]


def _of_classes(count: int) -> ModelProto:
    """Three means, each given `count` / 3 times."""
    return _model(
        [
            _node("GlobalAveragePool", ["x"], ["p"]),
            _node("Reshape", ["p", "column"], ["q"]),
            _node("Expand", ["q", "wide"], ["s"]),
            _node("Reshape", ["s", "classes"], ["y"]),
        ],
        [
            _numbers("column", [-1, 3, 1]),
            _numbers("wide", [1, 3, count // 3]),
            _numbers("classes", [-1, count]),
        ],
        output=_value("y", ["n", count]),
    )


def _sparse(size: int) -> ModelProto:
    model = _model(_plus_mean_of("sv"))
    sparse = SparseTensorProto(dims=[size])
    sparse.values.CopyFrom(helper.make_tensor("sv", TensorProto.FLOAT, [1], [1.0]))
    sparse.indices.CopyFrom(helper.make_tensor("si", TensorProto.INT64, [1], [0]))
    model.graph.sparse_initializer.append(sparse)
    return model


def _of_functions(levels: int, own: bool = False) -> ModelProto:
    """A function that calls another twice, and so on; `own`: one that calls itself."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("d", 1)]
    functions = []
    for level in range(levels):
        is_last = level == levels - 1 and not own
        inner, domain = ("Relu", "") if is_last else (f"F{(level + 1) % levels}", "d")
        body = [_node(inner, [a], [b], domain=domain) for a, b in ("ab", "bc")]
        functions.append(helper.make_function("d", f"F{level}", ["a"], ["c"], body, opsets))
    model = _model([_node("F0", ["x"], ["z"], domain="d"), *_pooled("z")])
    model.functions.extend(functions)
    model.opset_import.append(helper.make_opsetid("d", 1))
    return model


def _beside(location: str) -> ModelProto:
    """A graph whose weights are in another file."""
    model = _classifier()
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with one convolution in it."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.onnx").write_bytes(_classifier().SerializeToString())
    source = import_onnx(folder / "tiny.onnx", out=folder)
    manifest = source.bundle.manifest
    return commit(source.bundle.path, lambda _: manifest, source.new_files)


def _commands(path: Path, bundle: Bundle, out: Path) -> list[Command]:
    """Every command that reads a graph from elsewhere."""
    return [
        ["inspect", path],
        ["verify", bundle.path, "--samples", "2", "--candidate", path],
        ["build-trt", "--onnx", path, "--flavor", "rtx", "--out", out],
    ]


GIB = (1 << 30) // 4  # values
BOMBS: dict[str, Callable[[], ModelProto]] = {
    "constant": lambda: _model(
        [_node("ConstantOfShape", ["shape"], ["c"]), *_plus_mean_of("c")],
        [_numbers("shape", [13 * GIB])],
    ),
    "many constants": lambda: _model(
        [
            *(
                node
                for index in range(10)
                for node in (
                    _node("ConstantOfShape", ["shape"], [f"c{index}"]),
                    _node("ReduceMean", [f"c{index}"], [f"m{index}"], keepdims=1),
                )
            ),
            _node("Sum", [f"m{index}" for index in range(10)], ["c"]),
            *_plus_mean_of("c"),
        ],
        [_numbers("shape", [3 * GIB // 2])],
    ),
    "tile": lambda: _model(
        [_node("Tile", ["x", "times"], ["t"]), *_pooled("t")], [_numbers("times", [1, 1, 256, 256])]
    ),
    "expand": lambda: _model(
        [
            _node("Reshape", ["x", "flat"], ["r"]),
            _node("Expand", ["r", "wide"], ["e"]),
            *_pooled("e"),
        ],
        [_numbers("flat", [-1, 3, 4096, 1]), _numbers("wide", [1, 3, 4096, 40000])],
    ),
    "sparse": lambda: _sparse(13 * GIB),
    "functions": lambda: _of_functions(40),
    "endless function": lambda: _of_functions(2, own=True),
    "classes": lambda: _of_classes(999_999),
}


def test_graphs_that_ask_for_memory_are_refused_before_they_get_it(
    tiny: Bundle, tmp_path: Path
) -> None:
    commands: list[Command] = []
    for name, make in BOMBS.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(make().SerializeToString())
        assert path.stat().st_size < 10_000
        commands += _commands(path, tiny, tmp_path / "built")[:2]
    for command, measured in zip(commands, run_measured(*commands), strict=True):
        expected = (0, 2) if command[0] == "inspect" else (2,)
        assert measured.code in expected, (command, measured)
        assert len(measured.lines) == (measured.code == 2), (command, measured)
        assert measured.grown_mib < 300, (command, measured)


@pytest.mark.parametrize("name", ["constant", "many constants", "tile", "sparse"])
def test_an_import_is_held_to_the_same_bound(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.onnx"
    path.write_bytes(BOMBS[name]().SerializeToString())
    with pytest.raises(UsageError, match=r"takes \d+.* GiB of memory at a batch of 8, by"):
        import_onnx(path, out=tmp_path / "built")


def test_many_classes_times_many_rows_are_refused(tmp_path: Path) -> None:
    """Half a kilobyte that was built, and took 12 GB in `verify`: 64 rows of a million classes."""
    path = tmp_path / "wide.onnx"
    path.write_bytes(_of_classes(999_999).SerializeToString())
    source = import_onnx(path, out=tmp_path / "built")
    manifest = source.bundle.manifest
    bundle = commit(source.bundle.path, lambda _: manifest, source.new_files)
    with pytest.raises(UsageError, match="64 rows of 999999 classes are 63999936 logits, expected"):
        verify(bundle, candidate=path)


def test_what_honest_graphs_take_is_far_from_the_bound(small_lite_original: Bundle) -> None:
    model = graph(small_lite_original)
    few, many = (peak_bytes(model, (rows, 3, 64, 64)) for rows in (1, 64))
    weights = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    assert weights < few < weights + (8 << 20)  # 96 channels of 32 x 32 are 384 KiB
    assert 30 << 20 < many - few < 200 << 20
    assert many < MAX_RUN_BYTES / 50


def test_branches_count_too() -> None:
    then, other = (
        helper.make_graph(
            [
                _node("ConstantOfShape", [f"{name}/shape"], [f"{name}/c"]),
                _node("ReduceMean", [f"{name}/c"], [f"{name}/y"], keepdims=0),
            ],
            name,
            [],
            [_value(f"{name}/y", [])],
            [_numbers(f"{name}/shape", [size])],
        )
        for name, size in (("then", GIB), ("else", 13 * GIB))
    )
    model = _model(
        [
            _node("ReduceMax", ["x"], ["largest"], keepdims=0),
            _node("Cast", ["largest"], ["is"], to=TensorProto.BOOL),
            _node("If", ["is"], ["c"], then_branch=then, else_branch=other),
            *_plus_mean_of("c"),
        ]
    )
    assert peak_bytes(model, (1, 3, 64, 64)) > 13 << 30


def _of_unknown_size(values: int) -> ModelProto:
    """A constant whose size no shape inference tells: a sum of ones."""
    return _model(
        [
            _node("ReduceProd", ["factors"], ["size"], keepdims=1),
            _node("ConstantOfShape", ["size"], ["c"]),
            *_plus_mean_of("c"),
        ],
        [_numbers("factors", [1 << 10, values >> 10])],
    )


def test_what_no_shape_tells_is_stopped_by_the_process_own_bound() -> None:
    model = _of_unknown_size(GIB)
    assert peak_bytes(model, (1, 3, 64, 64)) < 1 << 20
    image = {"x": np.zeros((1, 3, 64, 64), np.float32)}
    for ask in (
        lambda: GraphSession(model.SerializeToString()).run(image, ["y"]),
        lambda: bytearray(1 << 30),
        lambda: torch.zeros(1 << 28),
    ):
        with pytest.raises(RexdeployError) as refusal, bounded(1 << 29):
            ask()
        assert "\n" not in str(refusal.value)
    with bounded(1 << 29):
        GraphSession(_of_unknown_size(1 << 20).SerializeToString()).run(image, ["y"])
    assert len(bytearray(1 << 30)) == 1 << 30  # from here on as before


# Legal and absurd


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            _classifier(_value("x", [5000, 3, 64, 64]), _value("y", [5000, 10])),
            "a fixed batch of 5000, expected 1 to 4096",
        ),
        (
            _classifier(_value("x", [-1, 3, 64, 64]), _value("y", [-1, 10])),
            "a fixed batch of -1, expected 1 to 4096",
        ),
        (_classifier(_value("x", ["n", 3, 5000, 64])), "a side of 5000, expected 1 to 4096"),
        (_classifier(_value("x", ["n", 3, 64, -1])), "a side of -1, expected 1 to 4096"),
        (_of_classes(1_200_000), "classes of 1200000, expected 1 to 1000000"),
        (_classifier(_value("x", ["n", 3, 64, 64], 99)), "type 99 [0, 3, 64, 64]"),
        (_classifier(output=_value("y", ["n", 10], 99)), "type 99 [0, 10]"),
        (_classifier(_value("x", []), _value("y", [])), "float [], float []"),
    ],
    ids=["batch", "batch -1", "image", "image -1", "classes", "input 99", "output 99", "scalars"],
)
def test_absurd_classifiers_are_refused_in_one_line(
    model: ModelProto, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "absurd.onnx"
    path.write_bytes(model.SerializeToString())
    result = run_cli("build-trt", "--onnx", path, "--out", tmp_path / "built", cwd=tmp_path)
    assert_refused(result, "absurd.onnx", message)
    assert inspect(path).graph is not None


@pytest.mark.parametrize("rows", [5000, -1])
def test_a_candidate_of_absurd_batches_is_refused(rows: int, tiny: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "absurd.onnx"
    model = _classifier(_value("x", [rows, 3, 64, 64]), _value("y", [rows, 10]))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match=f"batches of exactly {rows}, expected 1 to 4096"):
        verify(tiny, candidate=path)


def test_types_that_do_not_exist_are_no_traceback(tiny: Bundle, tmp_path: Path) -> None:
    weights, cast = _classifier(), _classifier()
    weights.graph.initializer[0].data_type = 99
    cast.graph.node.insert(0, _node("Cast", ["x"], ["z"], to=99))
    cast.graph.node.insert(1, _node("Cast", ["z"], ["back"], to=TensorProto.FLOAT))
    cast.graph.node[2].input[0] = "back"
    matrix = _model(
        [_node("MatMul", ["x", "w"], ["y"])],
        [numpy_helper.from_array(np.ones((7, 7), np.float32), "w")],
        output=_value("y", ["n", 10]),
    )
    nothing = _model([_node("Constant", [], ["y"], value=_numbers("v", [1]))])
    del nothing.graph.input[:]
    for name, model in {"w": weights, "cast": cast, "matrix": matrix, "none": nothing}.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        for command in _commands(path, tiny, tmp_path / "built"):
            result = run_cli(*command, *["--fp16"][: command[0] == "build-trt"], cwd=tmp_path)
            if command[0] == "inspect":
                assert result.code == 0, result
            else:
                assert_refused(result)


# Weights beside a graph


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("hole.bin", "keeps 1099511627776 bytes of weights in other files, expected at most"),
        ("pipe", "pipe, which cannot be read (it is a named pipe, expected a plain file)"),
        ("link", "link, which cannot be read (it is a device, expected a plain file)"),
        ("/dev/zero", "/dev/zero, which cannot be read (it is a device, expected a plain file)"),
        ("gone.bin", "gone.bin, which cannot be read (No such file or directory)"),
        ("../outside.bin", "not a valid ONNX model"),
    ],
)
def test_weights_beside_a_graph_are_plain_files_of_a_size(
    location: str, message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with open(folder / "hole.bin", "wb") as hole:
        hole.truncate(1 << 40)
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("/dev/zero")
    (tmp_path / "outside.bin").write_bytes(bytes(1080))
    path = folder / "graph.onnx"
    path.write_bytes(_beside(location).SerializeToString())
    assert_refused(run_cli("inspect", path, cwd=tmp_path), message)
