"""The installed C++ package: README's program is built with it, outside the tree, and run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import rexdeploy
from rexdeploy.bundle.store import Bundle
from rexdeploy.images import sets
from rexdeploy.inference.classifier import load
from tests.helpers import ROOT
from tests.test_cpp import BUILD, Programs, built, release, sanitized

__all__ = ["built", "release", "sanitized"]  # fixtures

pytestmark = pytest.mark.slow

README = (ROOT / "cpp" / "README.md").read_text()
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all"


def _block(language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return str(block)


def _commands(start: str) -> str:
    """README's indented lines from the one that begins with `start` to the next empty one."""
    (lines,) = re.findall(rf"(?m)^(    {re.escape(start)}.*\n(?:    .*\n)*)", README)
    return str(lines)


def _do(*command: str | Path, env: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
    """What a command that must not fail prints."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "CMAKE_BUILD_PARALLEL_LEVEL": "2", **(env or {})},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _flags(build: Path) -> str:
    """How CMake's files call the compiler, of Ninja or of make."""
    files = [build / "build.ninja", *build.rglob("flags.make")]
    return "\n".join(file.read_text() for file in files if file.exists())


@dataclass(frozen=True)
class Prefix:
    """A folder with an installed package, moved since."""

    path: Path
    kind: str

    @property
    def env(self) -> dict[str, str]:
        return {
            "CMAKE_PREFIX_PATH": str(self.path),
            "PKG_CONFIG_PATH": os.pathsep.join(map(str, self.path.rglob("pkgconfig"))),
            "CXXFLAGS": SANITIZERS if self.kind == "sanitized" else "",
        }

    @property
    def libraries(self) -> Path:
        (package,) = self.path.rglob("pkgconfig")
        return package.parent


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """A file in the builds' folder, for this process alone."""
    with open(BUILD / name, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def installed(release: Programs, sanitized: Programs, session_dir: Path) -> dict[str, Prefix]:
    """Static, static with the sanitizers, and shared as README's commands do it."""
    folder = session_dir / "installed"
    environment = {"HOME": str(folder / "home")}
    if shutil.which("ninja"):
        environment["CMAKE_GENERATOR"] = "Ninja"
    # Its own lock: those who ask scripts/cpp_build.sh for its builds need not wait for this one.
    with _locked("shared.lock"):
        _do("bash", "-ec", _commands("cmake -S"), env=environment)
    with _locked("lock"):  # scripts/cpp_build.sh's
        _do("cmake", "--install", release.folder, "--prefix", folder / "static")
        # The programs of this build are the tests' own.
        component = ("--component", "rexdeploy_Development")
        prefix = folder / "sanitized"
        _do("cmake", "--install", sanitized.folder, "--prefix", prefix, *component)
    (folder / "home" / "rexdeploy").rename(folder / "shared")
    (folder / "moved").mkdir()
    prefixes = {}
    for kind in ("static", "sanitized", "shared"):
        path = folder / "moved" / kind
        prefixes[kind] = Prefix((folder / kind).rename(path), kind)
    return prefixes


@pytest.fixture(scope="module")
def place(small_v1_original: Bundle, photos: Path, session_dir: Path) -> Path:
    """A folder in which README's program finds what it names."""
    folder = session_dir / "place"
    (folder / "artifacts").mkdir(parents=True)
    (folder / "artifacts" / "rexnet_1.5").symlink_to(small_v1_original.path)
    (folder / "flower.jpg").symlink_to(sets.find(photos)[0])
    return folder


@pytest.fixture(scope="module")
def expected(place: Path) -> list[tuple[str, float]]:
    with load(place / "artifacts" / "rexnet_1.5", "onnxruntime") as classifier:
        rows = classifier.classify([place / "flower.jpg"])[0]
    return [(row.label, row.probability) for row in rows]


def _answers(
    program: Path, place: Path, release: Programs, libraries: Path | None = None
) -> Iterator[tuple[str, float]]:
    """What README's program prints."""
    env = release.env | ({"LD_LIBRARY_PATH": str(libraries)} if libraries else {})
    for line in _do(program, cwd=place, env=env).splitlines():
        label, _, probability = line.rpartition(" ")
        yield label, float(probability)


def _near(expected: list[tuple[str, float]]) -> list[tuple[str, object]]:
    """What a program prints: six digits."""
    return [(label, pytest.approx(probability, rel=1e-5)) for label, probability in expected]


@pytest.mark.parametrize("kind", ["static", "sanitized", "shared"])
def test_readmes_program_is_built_by_cmake_and_right(
    installed: dict[str, Prefix],
    release: Programs,
    place: Path,
    expected: list[tuple[str, float]],
    kind: str,
    tmp_path: Path,
) -> None:
    """Under the sanitizers, too; and a project that asks for C++14 is given what we need."""
    (tmp_path / "CMakeLists.txt").write_text(_block("cmake"))
    (tmp_path / "flowers.cpp").write_text(_block("cpp"))
    build, prefix = tmp_path / "build", installed[kind]
    _do("cmake", "-S", tmp_path, "-B", build, "-DCMAKE_CXX_STANDARD=14", env=prefix.env)
    _do("cmake", "--build", build, env=prefix.env)
    assert "-Werror" not in _flags(build)
    assert list(_answers(build / "flowers", place, release)) == _near(expected)
    needed = _do("readelf", "-d", build / "flowers")
    assert ("librexdeploy.so.0.1" in needed) == (kind == "shared")


@pytest.mark.parametrize("kind", ["static", "shared"])
def test_readmes_program_is_built_by_pkg_config(
    installed: dict[str, Prefix],
    release: Programs,
    place: Path,
    expected: list[tuple[str, float]],
    kind: str,
    tmp_path: Path,
) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    (tmp_path / "flowers.cpp").write_text(_block("cpp"))
    prefix = installed[kind]
    _do("bash", "-ec", _commands("c++ -std"), env=prefix.env, cwd=tmp_path)
    answers = list(_answers(tmp_path / "flowers", place, release, prefix.libraries))
    assert answers == _near(expected)


def test_static_libraries_disappear_in_a_shared_one_of_ones_own(
    installed: dict[str, Prefix], tmp_path: Path
) -> None:
    """They are position-independent, and what they hold is not shown to others."""
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    source = _block("cpp").replace("int main()", 'extern "C" int classify()')
    (tmp_path / "flowers.cpp").write_text(source.replace("} catch", "    return 0;\n} catch"))
    build = _commands("c++ -std").replace("-o flowers", "-o flowers.so -shared -fPIC -Wl,-z,defs")
    _do("bash", "-ec", build, env=installed["static"].env, cwd=tmp_path)
    shown = _do("nm", "-D", "--defined-only", "--demangle", tmp_path / "flowers.so")
    assert " T classify\n" in shown
    assert not re.search(r" T .*rexdeploy::", shown)  # W: inline, of the headers


def test_there_is_one_version(installed: dict[str, Prefix], tmp_path: Path) -> None:
    version = rexdeploy.__version__
    prefix = installed["static"]
    header = (prefix.path / "include" / "rexdeploy" / "version.hpp").read_text()
    assert f'#define REXDEPLOY_VERSION "{version}"' in header
    numbers = re.findall(r"_(?:MAJOR|MINOR|PATCH) (\d+)", header)
    assert ".".join(numbers) == version
    for file in prefix.path.rglob("*.pc"):
        assert f"\nVersion: {version}\n" in file.read_text()
    libraries = installed["shared"].libraries
    minor = version.rpartition(".")[0]
    for name in ("librexdeploy.so", "librexdeploy_image.so"):
        assert (libraries / name).resolve().name == f"{name}.{version}"
        assert f"[{name}.{minor}]" in _do("readelf", "-d", libraries / name)

    major, middle, _ = map(int, version.split("."))
    wanted = [version, minor, f"{major}.{middle + 1}", f"{major + 1}"]
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(versions LANGUAGES NONE)\n"
        + "".join(
            f'find_package(rexdeploy {number} QUIET)\nmessage("{number} ${{rexdeploy_FOUND}}")\n'
            "unset(rexdeploy_DIR CACHE)\n"
            for number in wanted
        )
    )
    done = subprocess.run(
        ["cmake", "-S", tmp_path, "-B", tmp_path / "build"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **installed["shared"].env},
    )
    answers = [line for line in done.stderr.splitlines() if line.endswith((" 0", " 1"))]
    assert answers == [f"{number} {int(number in wanted[:2])}" for number in wanted]


def test_shared_libraries_show_only_what_the_headers_name(installed: dict[str, Prefix]) -> None:
    public = r"rexdeploy::(Classifier|Answers|Error|load_image|decode_image)\b"
    found = set()
    for name in ("librexdeploy.so", "librexdeploy_image.so"):
        symbols = _do(
            "nm", "-D", "--defined-only", "--demangle", installed["shared"].libraries / name
        )
        for line in symbols.splitlines():
            symbol = line.split(maxsplit=2)[2]
            if re.search(r"rexdeploy|nlohmann|\bOrt::|RexdeployOrt", symbol):
                match = re.match(rf"(?:typeinfo (?:name )?for |vtable for )?{public}", symbol)
                assert match is not None, symbol
                assert "Impl" not in symbol
                found.add(match[1])
    assert found == {"Classifier", "Answers", "Error", "load_image", "decode_image"}


def test_installed_programs_find_their_libraries(
    installed: dict[str, Prefix], release: Programs, place: Path
) -> None:
    for kind in ("static", "shared"):
        for program in ("rexdeploy-run", "rexdeploy-bench"):
            assert "Usage" in _do(installed[kind].path / "bin" / program, "--help")
    arguments = ("artifacts/rexnet_1.5", "flower.jpg", "--quiet")
    run = installed["shared"].path / "bin" / "rexdeploy-run"
    assert _do(run, *arguments, cwd=place, env=release.env) == ""


def test_warnings_are_errors_in_our_own_build_only(installed: dict[str, Prefix]) -> None:
    """Of what was configured by scripts/cpp_build.sh, and by README's commands for others."""
    assert "-Werror" in _flags(BUILD / "release")
    shared = _flags(BUILD / "shared")
    assert "-Wall" in shared
    assert "-Werror" not in shared


def test_a_project_around_ours_gets_the_same_targets(built: None, tmp_path: Path) -> None:
    """And neither our tests nor our strictness. Configured only: the build would be the same."""
    (tmp_path / "CMakeLists.txt").write_text(
        _block("cmake").replace(
            "find_package(rexdeploy 0.1 REQUIRED)", f'add_subdirectory("{ROOT}/cpp" rexdeploy)'
        )
    )
    (tmp_path / "flowers.cpp").write_text(_block("cpp"))
    _do("cmake", "-S", tmp_path, "-B", tmp_path / "build")
    flags = _flags(tmp_path / "build")
    assert "-Wall" in flags
    assert "-Werror" not in flags
    assert "rexdeploy-tests" not in flags
