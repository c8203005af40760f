"""The shape of the code: who may import whom, how large a part is, what is imported late."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import rexdeploy
from tests.helpers import ROOT

PACKAGE = Path(rexdeploy.__path__[0])
# A part imports parts of lower levels only: a package, or a module beside the packages.
LEVELS = [
    {"arrays", "errors", "files", "interleaved", "intervals", "journal", "machine"}
    | {"minimal_set", "progress", "text"},
    {"bundle"},
    {"graphs", "images", "models"},
    {"backends", "training"},
    {"parity"},
    {"detection"},
    {"inference"},
    {"serving", "steps", "timing"},
    {"cli"},
    {"__init__", "__main__", "triton_backend"},  # where Python and Triton come in
]
MAX_PACKAGES, MAX_FILES, MAX_LINES = 13, 10, 400
ON_TORCH = {"models", "graphs.from_torch", "timing.other_networks"}
ON_TORCH |= {"steps.export", "steps.finetune", "training"}
ON_TORCH |= {"detection.export"}
ON_ONNX = {"graphs", "parity", "steps"}
ON_ONNX |= {f"detection.{name}" for name in ("engines", "export", "judge")}
# Importing one of these at the top of a file is for these parts; the others import it when needed.
HEAVY = {
    **dict.fromkeys(("cuda", "huggingface_hub", "matplotlib", "model_signing", "onnxruntime"), ()),
    **dict.fromkeys(("onnxsim", "openvino", "pyarrow", "rich", "tensorrt", "tensorrt_rtx"), ()),
    **{"onnx": ON_ONNX, "safetensors": ON_TORCH, "timm": (), "torch": ON_TORCH, "torchvision": ()},
}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def _imports(module: str, at_the_top: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; what only a type checker sees does not count."""

    def names(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            if not (at_the_top and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
                yield from names(child)

    yield from names(ast.parse(MODULES[module].read_text()))


def _own_imports(module: str) -> Iterator[str]:
    """The modules of rexdeploy that a module imports, as MODULES names them."""
    for name in _imports(module):
        known, _, rest = name.partition(".")
        while known == "rexdeploy" and rest and rest not in MODULES:
            rest = rest.rpartition(".")[0]
        if rest in MODULES and known == "rexdeploy":
            yield rest


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_lower_levels_only(module: str) -> None:
    level = {part: number for number, parts in enumerate(LEVELS) for part in parts}
    own = module.split(".")[0]
    parts = {name.split(".")[0] for name in _own_imports(module)} - {own}
    ground = LEVELS[0] if own in LEVELS[0] else set[str]()
    assert [part for part in parts - ground if level[part] >= level[own]] == []
    top = {name.split(".")[0] for name in _imports(module, at_the_top=True)}
    assert [name for name in top & HEAVY.keys() if not {own, module} & set(HEAVY[name])] == []


def test_no_circles_and_no_part_too_large() -> None:
    graphlib.TopologicalSorter({name: set(_own_imports(name)) for name in MODULES}).prepare()
    assert {name.split(".")[0] for name in MODULES} == set[str]().union(*LEVELS)
    packages = [path.parent for path in PACKAGE.glob("*/__init__.py")]
    assert len(packages) <= MAX_PACKAGES
    for package in packages:
        files = [path for path in package.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= MAX_FILES or package.name == "cli", package
    for path in MODULES.values():
        assert len(path.read_text().splitlines()) <= MAX_LINES, path


def test_the_page_on_architecture_names_every_file_and_level() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    files = {path.relative_to(PACKAGE).as_posix() for path in MODULES.values()}
    named = re.findall(r"^\| `([\w/]+\.py)` \| \S", page, re.MULTILINE)
    assert len(set(named)) == len(named)  # each has one line
    assert {name for name in files if not name.endswith("/__init__.py")} <= set(named)
    for name in re.findall(r"`([\w/]+\.(?:py|cpp|toml))`", page):
        assert name in files or (ROOT / name).is_file(), name
    levels = re.findall(r"^\| (\d) \| (.*) \|$", page, re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", parts)) for _, parts in levels] == LEVELS
    assert [int(number) for number, _ in levels] == list(range(len(LEVELS)))
    assert f"{MAX_PACKAGES} packages, at most {MAX_FILES} files" in page
    assert f"no file over {MAX_LINES} lines" in page


def test_all_names_the_public_interface() -> None:
    for name in rexdeploy.__all__:
        assert getattr(rexdeploy, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rexdeploy.nothing
