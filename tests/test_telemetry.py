"""ONNX Runtime writes no id of this machine and looks up no server: its telemetry is off."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rexdeploy.bundle.store import Bundle
from tests.test_cpp import Programs, built, release  # noqa: F401 - fixtures

VARIABLE = "ORT_DISABLE_TELEMETRY"
PATIENCE = 30.0  # seconds; 1.32 looks its server up after nine

# In place of the C library's: notes the names that are looked up, and knows none.
LOOK_UP = """
#include <fcntl.h>
#include <netdb.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
    (void)service, (void)hints, (void)found;
    int log = open(getenv("LOOKED_UP"), O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (node == NULL || write(log, node, strlen(node)) < 0 || write(log, "\\n", 1) < 0) abort();
    close(log);
    return EAI_FAIL;
}
"""

# Each keeps a session open until stdin ends, which is when the test has seen enough.
OURS = """
import sys
import rexdeploy
with rexdeploy.load(sys.argv[1], "onnxruntime") as classifier:
    classifier.classify([sys.argv[2]])
    print("open", flush=True)
    sys.stdin.read()
"""
THEIRS = """
import sys
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print("open", flush=True)
sys.stdin.read()
"""


@dataclass
class Place:
    """A home and temporary folder for one process, and what it leaves behind."""

    folder: Path
    preload: Path | None = None
    setting: str | None = None  # of ORT_DISABLE_TELEMETRY
    home: Path = field(init=False)

    def __post_init__(self) -> None:
        self.home = self.folder / "home"
        self.home.mkdir(parents=True)

    @property
    def env(self) -> dict[str, str]:
        """As here, without the variable that importing rexdeploy has set."""
        env = {name: value for name, value in os.environ.items() if name != VARIABLE}
        env.pop("XDG_CACHE_HOME", None)
        env |= {name: str(self.home) for name in ("HOME", "TMPDIR")}
        env["LOOKED_UP"] = str(self.folder / "names")
        if self.preload is not None:
            env["LD_PRELOAD"] = str(self.preload)
        if self.setting is not None:
            env[VARIABLE] = self.setting
        return env

    @property
    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.home)) for path in self.home.rglob("*"))

    @property
    def names(self) -> set[str]:
        log = self.folder / "names"
        return set(log.read_text().split()) if log.exists() else set()

    def start(self, code: str, *arguments: Path) -> subprocess.Popen[str]:
        """Starts a snippet, and waits until its session is open."""
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.env,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        return process


@pytest.fixture
def preload(tmp_path: Path) -> Path:
    """The library that notes look-ups."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: look-ups cannot be seen")
    source, library = tmp_path / "look_up.c", tmp_path / "look_up.so"
    source.write_text(LOOK_UP)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library


@pytest.mark.slow
def test_no_id_is_written_and_no_name_looked_up(
    small_lite_original: Bundle, photos: Path, preload: Path, tmp_path: Path
) -> None:
    """A session of onnxruntime's own, beside ours, shows when it would have happened."""
    bundle, photo = small_lite_original.path, photos / "flower.png"
    ours, theirs = Place(tmp_path / "ours", preload), Place(tmp_path / "theirs", preload)
    with (
        ours.start(OURS, bundle, photo) as our,
        theirs.start(THEIRS, bundle / "fp32.onnx") as their,
    ):
        end = time.monotonic() + PATIENCE
        while not theirs.names and theirs.files and time.monotonic() < end:
            time.sleep(0.2)
        time.sleep(1)
        for process in (our, their):
            process.communicate()
            assert process.returncode == 0
    assert ours.files == []
    assert ours.names == set()
    if not theirs.names:
        pytest.skip("this onnxruntime looks nothing up, whatever is set")


def test_an_own_setting_stands(tmp_path: Path) -> None:
    """And it reaches what is started from here, as Triton is."""
    code = (
        "import subprocess, sys; import rexdeploy;"
        f"subprocess.run([sys.executable, '-c', 'import os; print(os.environ[\"{VARIABLE}\"])'])"
    )
    for setting, expected in ((None, "1"), ("0", "0"), ("", "")):
        place = Place(tmp_path / str(setting), setting=setting)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=place.env, check=True
        )
        assert done.stdout == f"{expected}\n"


@pytest.mark.slow
def test_cpp_writes_no_id(
    release: Programs,  # noqa: F811
    small_lite_original: Bundle,
    photos: Path,
    tmp_path: Path,
) -> None:
    """The id is written when telemetry starts, which the later look-up is a part of."""
    written = {}
    for setting in (None, "0"):
        place = Place(tmp_path / str(setting), setting=setting)
        done = subprocess.run(
            [release.folder / "rexdeploy-run", small_lite_original.path, photos / "flower.png"],
            capture_output=True,
            text=True,
            env={**place.env, **release.env},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        written[setting] = place.files
    assert written[None] == []
    if written["0"] == []:
        pytest.skip("this onnxruntime writes no id, whatever is set")
