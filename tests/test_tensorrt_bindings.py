"""What the TensorRT adapter uses exists in every supported release's own Python bindings.

NVIDIA's bindings are imported as they are, without a GPU and without TensorRT itself: stub
libraries export the few C functions that the bindings link to, and refuse to start.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import rexdeploy

pytestmark = pytest.mark.slow

FULL = (
    "tensorrt_cu12_bindings==10.13.3.9",
    "tensorrt_cu12_bindings==10.16.1.11",
    "tensorrt_cu13_bindings==11.4.0.106",
)
TOO_OLD = "tensorrt_cu12_bindings==10.12.0.36"
RTX = "tensorrt_rtx"

PACKAGE = Path(rexdeploy.__file__).parent
ADAPTER = (
    PACKAGE / "backends" / "tensorrt_api.py",
    PACKAGE / "backends" / "tensorrt_build.py",
    PACKAGE / "backends" / "trt.py",
    PACKAGE / "backends" / "trt_load.py",
)

# The TensorRT class of what the adapter calls by this name, or by this name on self ("_engine").
CLASSES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "runtime_config": "IRuntimeConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "error": "ParserError",
    "image": "ITensor",
    "inspector": "EngineInspector",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
}
# Used on RTX's path only: full TensorRT has none of it.
RTX_ONLY = {
    "ComputeCapability",
    "DynamicShapesKernelSpecializationStrategy",
    "EngineInvalidityDiagnostics",
    "EngineValidity",
    "REQUIRE_USER_ALLOCATION",
    "dynamic_shapes_kernel_specialization_strategy",
    "get_engine_validity",
    "is_stream_capturable",
    "num_compute_capabilities",
    "set_compute_capability",
}

LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
REFUSAL = "CUDA initialization failure"
# ILogger::log in the table of virtual functions: TensorRT 11 put four of a new base class first.
LOG_SLOT = {"10": 0, "11": 4}
# The builder says why it refuses, as TensorRT's does without a GPU, with severity 1 (error).
STUB = f"""
typedef void (*Log)(void *logger, int severity, const char *text);

void *createInferBuilder_INTERNAL(void *logger, int version) {{
    (*(Log **)logger)[LOG_SLOT](logger, 1, "{REFUSAL}");
    return 0;
}}
void *createInferRefitter_INTERNAL(void) {{ return 0; }}
void *createInferRuntime_INTERNAL(void) {{ return 0; }}
void *createNvOnnxParserRefitter_INTERNAL(void) {{ return 0; }}
void *createNvOnnxParser_INTERNAL(void) {{ return 0; }}
void *getBuilderPluginRegistry(void) {{ return 0; }}
void *getPluginRegistry(void) {{ return 0; }}
int getNvOnnxParserVersion(void) {{ return 0; }}
int initLibNvInferPlugins(void) {{ return 0; }}
"""

FIND_MISSING = """
import importlib, json, operator, sys

module = importlib.import_module(sys.argv[1])
missing = []
for name in sys.argv[2:]:
    try:
        operator.attrgetter(name)(module)
    except AttributeError:
        missing.append(name)
print(json.dumps(missing))
"""
LOAD = """
import json
from rexdeploy.backends import tensorrt_api

try:
    print(json.dumps(["loaded", tensorrt_api.load("tensorrt").__version__]))
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""
BUILD = """
import json
from rexdeploy.backends import tensorrt_build
from rexdeploy.bundle.manifest import BatchRange

try:
    tensorrt_build.build(b"", tensorrt_build.EngineSettings("tensorrt", BatchRange(1, 1, 1)))
    print(json.dumps(["built", ""]))
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


@dataclass(frozen=True)
class Bindings:
    """One release's bindings: how to import them in a process of their own, and what they are."""

    module: str
    version: str
    environment: dict[str, str] = field(repr=False)  # may hold secrets

    def run(self, code: str, *arguments: str) -> Any:
        """What the code prints, as JSON; a crash of the bindings ends only its own process."""
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiler() -> str:
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found is None:
        pytest.skip("no C compiler for the stub libraries")
    return found


@pytest.fixture(scope="module")
def bindings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bindings:
    """The bindings that the test's parameter asks for, each fetched once."""
    requirement: str = request.param
    if requirement == RTX:
        if importlib.util.find_spec(RTX) is None:
            pytest.skip(f"{RTX} is not installed")
        return Bindings(RTX, "", dict(os.environ))
    compiler: str = request.getfixturevalue("compiler")  # RTX needs none
    folder = tmp_path_factory.mktemp("bindings")
    version = requirement.partition("==")[2]
    fetch(requirement, folder)
    write_shims(folder)
    write_stubs(folder, compiler, major=version.partition(".")[0])
    environment = dict(os.environ)
    for variable in ("PYTHONPATH", "LD_LIBRARY_PATH"):
        inherited = os.environ.get(variable)
        environment[variable] = os.pathsep.join(filter(None, (str(folder), inherited)))
    return Bindings("tensorrt", version, environment)


def fetch(requirement: str, folder: Path) -> None:
    """Downloads the wheel for this Python and unpacks it into the folder; skips if it cannot."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    # With its dependencies it would bring TensorRT itself; a source archive cannot be unzipped.
    command += ["--no-deps", "--only-binary", ":all:", "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"pip cannot download {requirement}: {done.stderr.strip()[-500:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)


def write_shims(folder: Path) -> None:
    """Adds what NVIDIA's metapackage adds to the bindings, and hides an installed TensorRT."""
    (folder / "tensorrt").mkdir()
    (folder / "tensorrt" / "__init__.py").write_text(
        "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    )
    # The bindings load the libraries of an importable tensorrt_libs in place of the stubs.
    (folder / "tensorrt_libs").mkdir()
    (folder / "tensorrt_libs" / "__init__.py").touch()


def write_stubs(folder: Path, compiler: str, major: str) -> None:
    """Compiles TensorRT's three libraries into the folder: one stub that does for all of them."""
    source, library = folder / "stub.c", folder / "stub.so"
    source.write_text(STUB)
    slot = f"-DLOG_SLOT={LOG_SLOT[major]}"
    subprocess.run([compiler, "-shared", "-fPIC", slot, "-o", library, source], check=True)
    for name in LIBRARIES:
        shutil.copy(library, folder / f"lib{name}.so.{major}")


def used_names() -> set[str]:
    """Every name of TensorRT in the adapter's source, such as "Builder.create_network"."""
    names = set()
    for path in ADAPTER:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        caught = caught_exceptions(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.value not in caught:
                names.add(tensorrt_name(node))
    return {name for name in names if name}


def caught_exceptions(tree: ast.Module) -> set[ast.AST]:
    """Every `error` that stands for what was caught, and so not for a parser's error."""
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    return {
        node
        for handler in handlers
        for node in ast.walk(handler)
        if isinstance(node, ast.Name) and node.id == handler.name
    }


def tensorrt_name(node: ast.expr) -> str | None:
    """The dotted name in TensorRT's module ("" is the module); None if the node is not of it."""
    match node:
        case ast.Name(id="trt") | ast.Attribute(value=ast.Name(id="self"), attr="_trt"):
            return ""
        case ast.Name(id=name):
            return CLASSES.get(name)
        case ast.Attribute(value=ast.Name(id="self"), attr=attribute):
            return CLASSES.get(attribute.removeprefix("_"))
        case ast.Attribute(value=owner, attr=attribute):
            parent = tensorrt_name(owner)
            return None if parent is None else f"{parent}.{attribute}".removeprefix(".")
    return None


def is_rtx_only(name: str) -> bool:
    return not RTX_ONLY.isdisjoint(name.split("."))


def test_the_adapters_names_are_found() -> None:
    names = used_names()
    assert names >= {
        "Builder.build_serialized_network",
        "BuilderFlag.TF32",
        "IExecutionContext.execute_async_v3",
        "MemoryPoolType.WORKSPACE",
        "nptype",
    }
    # A variable or method that was renamed would hide all that is used on it.
    used_on = {name.partition(".")[0] for name in names if "." in name}
    assert set(CLASSES.values()) <= used_on
    assert {part for name in names for part in name.split(".")} >= RTX_ONLY


@pytest.mark.parametrize("bindings", [*FULL, RTX], indirect=True)
def test_the_bindings_have_every_name(bindings: Bindings) -> None:
    names = used_names()
    if bindings.module != RTX:
        names = {name for name in names if not is_rtx_only(name)}
    assert bindings.run(FIND_MISSING, bindings.module, *sorted(names)) == []


@pytest.mark.parametrize("bindings", FULL, indirect=True)
def test_full_tensorrt_has_nothing_of_rtx_only(bindings: Bindings) -> None:
    names = sorted(name for name in used_names() if is_rtx_only(name))
    # What it gains must leave RTX_ONLY, or nothing checks it there.
    assert bindings.run(FIND_MISSING, bindings.module, *names) == names


@pytest.mark.parametrize("bindings", FULL, indirect=True)
def test_load_accepts_a_supported_release(bindings: Bindings) -> None:
    assert bindings.run(LOAD) == ["loaded", bindings.version]


@pytest.mark.parametrize("bindings", [TOO_OLD], indirect=True)
def test_load_refuses_an_older_release(bindings: Bindings) -> None:
    error, text = bindings.run(LOAD)
    assert error == "BackendUnavailable"
    assert f"got TensorRT {bindings.version}, expected 10.13 or later" in text


@pytest.mark.parametrize("bindings", FULL, indirect=True)
def test_build_says_why_tensorrt_cannot_start(bindings: Bindings) -> None:
    error, text = bindings.run(BUILD)
    assert (error, text) == ("BackendUnavailable", f"TensorRT cannot start here: {REFUSAL}")


@pytest.mark.parametrize("bindings", FULL, indirect=True)
def test_load_names_a_library_that_cannot_be_loaded(bindings: Bindings, tmp_path: Path) -> None:
    """Bindings without their libraries: an ImportError that carries the module's own name."""
    broken = tmp_path / f"libnvinfer.so.{bindings.version.partition('.')[0]}"
    broken.touch()
    path = f"{tmp_path}{os.pathsep}{bindings.environment['LD_LIBRARY_PATH']}"
    environment = {**bindings.environment, "LD_LIBRARY_PATH": path}
    error, text = replace(bindings, environment=environment).run(LOAD)
    assert error == "BackendUnavailable"
    assert text.startswith("TensorRT cannot be loaded")
    assert broken.name in text
