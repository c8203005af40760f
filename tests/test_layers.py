"""The shape of the code: who may import whom, and what must not be imported too early."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rexdeploy

PACKAGE = Path(rexdeploy.__path__[0])

# A module imports lower levels only: steps meet through the bundle, not through calls.
LEVELS = [
    {"errors", "progress", "gpu", "proof", "ratios", "text", "strict_json"},
    {"manifest", "rounds", "atomic", "image_limits", "loadgen", "files", "bounds", "memory"},
    {"bundle", "images", "compare", "precision", "shortcuts", "tensorrt_api", "triton_config"},
    {
        "models",
        "graph",
        "console",
        "blocks",
        "interface",
        "image_sets",
        "rounding",
        "labels",
        "metadata",
        "repository",
        "signing",
    },
    {"backends"},
    {"parity", "peers", "roofline", "walk", "forms"},
    {"answers", "probes"},
    {"subjects", "localize", "ranges", "judge"},
    {"competitors"},
    {"export", "build", "verify", "bench", "classify", "doctor", "inspection", "tune"},
    {"predictions"},
    {"results"},
    {"front_json", "front_gate", "leftovers", "process", "watch"},
    {"front_http", "front_grpc"},
    {"front"},
    {"serve"},
    {"triton", "triton_backend", "kserve"},
    {"tune_serving"},
    {"__init__", "show", "show_serving", "plot"},
    {"cli"},
    {"__main__"},
]
# Importing one of these at module level is for the modules named.
HEAVY = {
    "torch": {"export", "graph", "models", "peers"},
    "onnx": {
        "export",
        "graph",
        "build",
        "verify",
        "precision",
        "shortcuts",
        "interface",
        "blocks",
        "bounds",
        "walk",
        "forms",
        "parity",
        "ranges",
        "rounding",
        "judge",
        "tune",
    },
    "safetensors": {"export", "models"},
    "onnxruntime": set[str](),
    "onnxsim": set[str](),
    "tensorrt": set[str](),
    "tensorrt_rtx": set[str](),
    "cuda": set[str](),
    "openvino": set[str](),
    "timm": set[str](),
    "matplotlib": set[str](),
    "huggingface_hub": set[str](),
    "rich": set[str](),
    "pyarrow": set[str](),
    "model_signing": set[str](),
}


def _unit(path: Path) -> str:
    """`rexdeploy/models/zoo.py` is of the unit "models"."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _level(unit: str) -> int:
    return next(level for level, units in enumerate(LEVELS) if unit in units)


def _imports(node: ast.AST, top_level_only: bool) -> Iterator[str]:
    """Dotted names that a module imports; what only a type checker sees does not count."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        if not (top_level_only and is_function):
            yield from _imports(child, top_level_only)


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_lower_levels_only(path: Path) -> None:
    own = _unit(path)
    tree = ast.parse(path.read_text())
    wrong = []
    for name in _imports(tree, top_level_only=False):
        parts = name.split(".")
        if parts[0] != "rexdeploy" or parts[1:2] in ([], ["__version__"]):
            continue
        if parts[1] != own and _level(parts[1]) >= _level(own):
            wrong.append(name)
    assert wrong == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    own = _unit(path)
    tree = ast.parse(path.read_text())
    wrong = [
        name
        for name in _imports(tree, top_level_only=True)
        if own not in HEAVY.get(name.split(".")[0], {own})
    ]
    assert wrong == []


def test_every_module_is_of_a_level_and_every_level_has_its_modules() -> None:
    assert {_unit(path) for path in MODULES} == set[str]().union(*LEVELS)


def test_all_names_the_public_interface() -> None:
    for name in rexdeploy.__all__:
        assert getattr(rexdeploy, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rexdeploy.nothing
