"""`triton` and `serve` together: one repository, backends that the server has, what is kept."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rexdeploy import load, machine
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import UsageError
from rexdeploy.images import sets
from rexdeploy.serving.config import Settings
from rexdeploy.serving.deploy import backend_here, deploy, servable
from rexdeploy.serving.front import free_port
from rexdeploy.serving.processes import Binary, find_server, start
from rexdeploy.serving.repository import DEFAULT_REPOSITORY, deployed
from tests.helpers import ROOT, assert_refused, run_cli, wait_until
from tests.test_repository import tree
from tests.test_serve import file_tensor, infer, needs_server, serving
from tests.test_triton import config, with_changed_weights

EVERYTHING = frozenset({"tensorrt", "onnxruntime", "python"})
without_gpu = pytest.mark.skipif(machine.detect() is not None, reason="this machine has a GPU")


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def documented_commands(bundle: str) -> list[list[str]]:
    """The commands at the beginning of docs/serving.md, for another bundle."""
    text = (ROOT / "docs" / "serving.md").read_text().partition("# Serving with Triton\n")[2]
    block = text.strip("\n").partition("\n\n")[0]
    lines = [line.partition("#")[0].split() for line in block.splitlines()]
    return [[bundle if word == "rexnet_1.5" else word for word in line[1:]] for line in lines]


@needs_server
@without_gpu
@pytest.mark.slow
def test_what_triton_adds_a_running_server_takes_up(
    small_v1: Bundle, small_lite: Bundle, photos: Path, tmp_path: Path
) -> None:
    """The page's commands, in order: a first version, the server, the next one; and a new model."""
    first, serve, second = documented_commands("small_v1")
    assert (first[0], serve, second) == ("triton", ["serve"], first)
    result = run_cli(*first, cwd=tmp_path)
    assert result.code == 0, result.err
    assert "small_v1: python backend (no NVIDIA GPU on this machine)" in result.out
    assert result.out.endswith("next: rexdeploy serve\n")
    path = sets.find(photos)[0]
    file = file_tensor(path.read_bytes())

    def expected(bundle: Bundle) -> Any:
        with load(bundle, "onnxruntime") as classifier:
            return classifier.run(classifier.prepare([path]))

    before = tree(tmp_path / "artifacts" / "triton")
    with serving(small_v1, tmp_path, adds=False) as served:

        def answers(model: str, wanted: Any) -> bool:
            if not served.http.is_model_ready(f"{model}_image"):
                return False
            got = infer(served.http, f"{model}_image", "image", file, gives="logits")
            return np.allclose(got, wanted, rtol=0, atol=1e-4)

        assert tree(tmp_path / "artifacts" / "triton") == before  # it serves, and adds nothing
        old = expected(small_v1)
        assert answers("small_v1", old)
        new = expected(with_changed_weights(small_v1))
        assert np.abs(new - old).max() > 1e-2
        assert ": version 2\n" in run_cli(*second, cwd=tmp_path).out
        assert run_cli("triton", "small_lite", cwd=tmp_path).code == 0
        wait_until(lambda: answers("small_v1", new))
        wait_until(lambda: answers("small_lite", expected(small_lite)))


@needs_server
@without_gpu
def test_a_repository_for_another_server_is_told_before_one_starts(
    small_v1: Bundle, tmp_path: Path
) -> None:
    if shutil.which("tritonserver") is not None:
        pytest.skip("there is another server than nvidia-pytriton's")
    made = run_cli("triton", "small_v1", "--backend", "onnxruntime", cwd=tmp_path)
    lacks = "not served here: no onnxruntime backend in the tritonserver in nvidia-pytriton\n"
    assert made.out.endswith(lacks)
    named = ["serve", "--repository", "artifacts/triton"]
    for arguments in (["serve"], ["serve", "small_v1"], named):
        assert_refused(
            run_cli(*arguments, "--port", str(free_port()), cwd=tmp_path),
            "artifacts/triton/small_v1 is for Triton's onnxruntime backend",
            "the tritonserver in nvidia-pytriton has only python; ",
            "--backend python",
            "--tritonserver",
        )
    assert_refused(
        run_cli("serve", "small_v1", "--backend", "tensorrt", "--repository", "x", cwd=tmp_path),
        "--backend tensorrt: the tritonserver in nvidia-pytriton has only python",
    )
    assert not (tmp_path / "x").exists()


def test_without_a_server_the_next_step_says_how_to_get_one(
    small_v1: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "pytriton", None)
    result = run_cli("triton", "small_v1", cwd=tmp_path)
    last = result.out.splitlines()[-1]
    assert "onnxruntime backend (the bundle has no engine that Triton runs)" in result.out
    assert last.startswith("not served here: no tritonserver on PATH")
    assert "pip install 'rexdeploy[serve]'" in last
    result = run_cli("serve", "small_v1", cwd=tmp_path)
    assert_refused(result, "no tritonserver on PATH", "pip install 'rexdeploy[serve]'")


@needs_server
def test_serve_adds_a_bundle_only_where_there_is_nothing(small_v1: Bundle, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run_cli("serve", "--port", str(free_port()), cwd=tmp_path / "empty")
    assert_refused(result, "no bundle in artifacts/")
    (tmp_path / "theirs" / "model").mkdir(parents=True)
    arguments = ["serve", "--repository", "theirs", "--port", str(free_port())]
    assert_refused(run_cli(*arguments, cwd=tmp_path), "theirs holds no model of rexdeploy's")
    deploy(small_v1, tmp_path / "artifacts" / "triton", "python")
    result = run_cli("serve", "--backend", "python", "--port", str(free_port()), cwd=tmp_path)
    assert_refused(result, "--backend is for a bundle that is added: name one")


def test_a_model_keeps_the_backend_that_it_has(small_v1: Bundle, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    only_python = Binary(Path("x"), "on PATH", backends=frozenset({"python"}))
    assert backend_here("auto", repository, "small_v1", None) == ("auto", "")
    assert backend_here("tensorrt", repository, "small_v1", only_python)[0] == "tensorrt"
    assert backend_here("auto", repository, "small_v1", only_python)[0] == "python"
    deploy(small_v1, repository, "onnxruntime")
    before = ("onnxruntime", "as its versions before")
    assert backend_here("auto", repository, "small_v1", only_python) == before
    assert backend_here("auto", repository, "another", only_python)[0] == "python"
    changed = with_changed_weights(small_v1)
    again = deploy(changed, repository, *before[:1], why=before[1])
    assert (again.version, again.reason) == (2, "as its versions before")


def test_a_repository_that_lacks_a_part_is_told(small_v1: Bundle, tmp_path: Path) -> None:
    server = Binary(Path("x"), "on PATH", backends=EVERYTHING)
    deploy(small_v1, tmp_path / "models", "python")
    assert [model.name for model in servable(tmp_path / "models", server)] == ["small_v1"]
    shutil.rmtree(tmp_path / "models" / "small_v1_image")
    with pytest.raises(UsageError, match="has small_v1 but not small_v1_image, which"):
        servable(tmp_path / "models", server)


def test_settings_stay_from_version_to_version(small_v1: Bundle, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    deploy(small_v1, repository, "python")
    found = Settings(batch=4, delay_us=2500, instances=2)
    assert not deploy(small_v1, repository, "python", settings=found).added
    assert list(config(repository / "small_v1").dynamic_batching.preferred_batch_size) == [4, 8]
    changed = with_changed_weights(small_v1)  # and without the engine, whose batches are the least
    assert deploy(changed, repository, "python").version == 2
    assert deployed(repository)[0].settings == found
    network = config(repository / "small_v1")
    assert network.instance_group[0].count == 2
    assert list(network.dynamic_batching.preferred_batch_size) == [4, 64]
    assert network.dynamic_batching.max_queue_delay_microseconds == 2500
    assert network.max_batch_size == 64  # that clients may send, whatever the settings
    deploy(changed, repository, "python", settings=Settings(batch=1))
    assert not config(repository / "small_v1").HasField("dynamic_batching")
    deploy(changed, repository, "python", settings=Settings())
    assert config(repository / "small_v1").dynamic_batching.max_queue_delay_microseconds == 0


@pytest.mark.parametrize("value", ["0", "-4", r"\"many\"", ""])
def test_settings_that_cannot_be_meant_are_the_usual_ones(
    value: str, small_v1: Bundle, tmp_path: Path
) -> None:
    deploy(small_v1, tmp_path / "models", "python", settings=Settings(batch=4))
    file = tmp_path / "models" / "small_v1" / "config.pbtxt"
    was = r"{\"batch\":4,"
    assert was in file.read_text()
    file.write_text(file.read_text().replace(was, was.replace("4", value)))
    deploy(small_v1, tmp_path / "models", "python")
    assert deployed(tmp_path / "models")[0].settings == Settings()
    assert config(tmp_path / "models" / "small_v1").max_batch_size == 8


def test_the_default_repository_is_one(tmp_path: Path) -> None:
    """What `triton` writes to is what `serve` serves."""
    import typer.main

    from rexdeploy.cli.app import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for command in ("triton", "serve", "tune-serving"):
        (option,) = (one for one in commands[command].params if one.name == "repository")
        assert option.default in (DEFAULT_REPOSITORY, str(DEFAULT_REPOSITORY))


def test_a_program_that_is_no_server_is_refused(small_v1_original: Bundle, tmp_path: Path) -> None:
    arguments = ("serve", small_v1_original.path, "--port", str(free_port()), "--tritonserver")
    assert_refused(run_cli(*arguments, "gone", cwd=tmp_path), "gone is not a program")
    for text, part in (
        ("#!/bin/sh\nexit 1", "ended while starting: exit code 1"),
        (
            "#!/bin/sh\n>&2 echo 'Error: Failed to initialize NVML'\n"
            ">&2 echo libx: no such library\nexit 127",
            "ended while starting: libx: no such library",
        ),
        ("not a program", "cannot be started"),
    ):
        result = run_cli(*arguments, program(tmp_path / "server", text), cwd=tmp_path)
        assert_refused(result, part)


@needs_server
@pytest.mark.parametrize(
    ("host", "port", "part"),
    [
        ("127.0.0.1", 0, "port: got 0"),
        ("127.0.0.1", 65534, "port: got 65534"),
        ("999.1.1.1", 8000, "cannot listen on 999.1.1.1:8000"),
        ("a..b", 8000, "cannot listen on a..b:8000"),
        ("::1", 8000, "host: got '::1', expected an IPv4 address"),
    ],
)
def test_unusable_addresses_are_refused(
    host: str, port: int, part: str, small_v1_original: Bundle, tmp_path: Path
) -> None:
    result = run_cli(
        "serve", small_v1_original.path, "--host", host, "--port", str(port), cwd=tmp_path
    )
    assert_refused(result, part)


def test_the_backend_is_one_that_the_server_has(tmp_path: Path) -> None:
    """The layout of a Triton installation, of which the folders decide."""
    for name in ("onnxruntime", "python"):
        (tmp_path / "backends" / name).mkdir(parents=True)
    server = find_server(program(tmp_path / "bin" / "tritonserver", "#!/bin/sh\n"))
    assert server.backends == {"onnxruntime", "python"}
    backends = ("tensorrt", "onnxruntime", "python")
    assert [server.lacks(backend) for backend in backends] == [True, False, False]


@without_gpu
def test_without_a_gpu_the_python_backend_serves(tmp_path: Path) -> None:
    server = Binary(Path("x"), "on PATH", backends=frozenset({"tensorrt", "onnxruntime", "python"}))
    wanted = backend_here("auto", tmp_path, "v1", server)
    assert wanted == ("python", "no NVIDIA GPU on this machine")


def test_the_models_import_the_package_that_started_the_server(tmp_path: Path) -> None:
    """And none of its parts by a bare name, as `files` or `text` of the user's own."""
    printing = program(tmp_path / "tritonserver", "#!/bin/sh\necho $PYTHONPATH >&2\n")
    process = start(Binary(printing, "here"), [], 0)
    first = process.communicate(timeout=20)[1].strip().split(":")[0]
    assert Path(first, "rexdeploy", "__init__.py").is_file()
