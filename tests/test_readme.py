"""README: every command in it runs, prints what README shows, and the scripts run them too."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import sklearn.datasets

from rexdeploy import gpu
from rexdeploy.models.zoo import paper_rows
from tests.helpers import ROOT, run_cli

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()
PHOTO = Path(sklearn.datasets.__path__[0]) / "images" / "flower.jpg"


def _sessions() -> list[tuple[str, list[str]]]:
    """Every `$ rexdeploy ...` of README's console blocks, with the output shown below it."""
    sessions: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                sessions.append((line[2:], []))
            elif line.strip():
                sessions[-1][1].append(line)
    return sessions


def _stable(line: str) -> str:
    """A line without what differs between machines: numbers, versions, paths, table rules."""
    line = re.sub(r"3\.\S+ at \S+", "PYTHON", line)
    line = re.sub(r"\d[\d.]*(e-?\d+)?", "#", line)
    return " ".join(re.sub(r"─+", "─", line).split())


@pytest.fixture(scope="module")
def readme_dir(tmp_path_factory: pytest.TempPathFactory, v1_checkpoint: Path, photos: Path) -> Path:
    """A folder with the files that README's commands speak of."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(PHOTO, folder)
    shutil.copy(v1_checkpoint, folder / "rexnetv1_1.0.pth")
    shutil.copytree(photos, folder / "photos")
    return folder


def test_readmes_commands_print_what_it_shows(readme_dir: Path) -> None:
    """In README's order, in one folder, as a reader would type them."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    sessions = _sessions()
    assert len(sessions) >= 8
    for command, shown in sessions:
        result = run_cli(*command.split()[1:], cwd=readme_dir)
        assert result.code == 0, (command, result.err)
        if not shown or (gpu.detect() is not None and "models" not in command):
            continue
        printed = [line for line in result.out.splitlines() if line.strip()]
        if "predict" in command:  # which classes an untrained network names depends on rounding
            assert len(printed) == len(shown)
            printed, shown = printed[:2], shown[:2]
        assert [_stable(line) for line in printed] == [_stable(line) for line in shown], command


def test_readmes_python_runs(readme_dir: Path) -> None:
    """After the commands above, which made the bundle it loads."""
    if not (readme_dir / "artifacts" / "rexnet_1.5").exists():
        pytest.skip("README's commands have not run before this")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    printed = io.StringIO()
    before = Path.cwd()
    os.chdir(readme_dir)
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, {})
    finally:
        os.chdir(before)
    assert len(printed.getvalue().splitlines()) == 6


def test_the_quickstart_script_runs_readmes_three_commands(tmp_path: Path) -> None:
    """In this very environment, as a new user's second run would find it."""
    if sys.prefix == sys.base_prefix:
        pytest.skip("not in a virtual environment; scripts/test.sh makes one")
    stamp = Path(sys.prefix) / ".rexdeploy-installed"
    if not stamp.exists():
        pytest.skip("this environment was not made by scripts/test.sh")
    answer = subprocess.run(
        [ROOT / "scripts" / "quickstart.sh", tmp_path],
        env={**os.environ, "VENV": sys.prefix},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    ran = re.findall(r"^\+ (rexdeploy .*)$", answer.stderr, re.MULTILINE)
    documented = re.findall(r"^    (rexdeploy .*)$", README, re.MULTILINE)[:3]
    assert ran[:3] == documented
    assert "flower.jpg" in answer.stdout
    assert (tmp_path / "artifacts" / "rexnet_1.5" / "verify.json").exists()


def _medians(file: str) -> dict[tuple[str, str, str, int, int], tuple[float, float]]:
    """Median milliseconds and those of the matrix rate, by network, backend, form and so on."""
    data = json.loads((ROOT / "artifacts" / "benchmarks" / file).read_text())
    assert data["machine"]["processor"]
    return {
        (row["network"], row["backend"], row["form"], row["batch"], row["threads"]): (
            statistics.median(row["samples_ms"]),
            row["matrix_ms"],
        )
        for row in data["latencies"]
    }


def test_readmes_speeds_are_those_of_the_committed_measurements() -> None:
    shown = re.findall(r"^\| (rexnet\S*) \|" + r" (\S+) \|" * 9 + "$", README, re.MULTILINE)
    assert len(shown) == 12
    ratios = []
    for network, batch, threads, *figures in shown:
        measured = _medians(f"cpu-{network}.json")

        def at(backend: str, form: str) -> float:
            return measured[network, backend, form, int(batch), int(threads)][0]  # noqa: B023

        ratio = at("onnxruntime", "published") / at("onnxruntime", "16")
        limit = measured[network, "onnxruntime", "16", int(batch), int(threads)][1]
        assert figures == [
            f"{at('onnxruntime', 'published'):.1f}",
            f"{at('onnxruntime', 'plain'):.1f}",
            f"{at('onnxruntime', '16'):.1f}",
            f"{ratio:.2f}",
            f"{limit / at('onnxruntime', '16'):.0%}",
            f"{at('openvino', 'published'):.1f}",
            f"{at('pytorch', 'plain'):.1f}",
        ], (network, batch, threads)
        ratios += [ratio] if "lite" not in network else []
    assert f"{min(ratios):.2f} to {max(ratios):.2f} times the speed" in README


def test_readmes_published_table_has_the_committed_figures() -> None:
    measured = _medians("cpu-paper.json")
    rows = re.findall(r"^\| (\S+) \| \d+x\d+ \|" + r" (\S+) \|" * 5 + "$", README, re.MULTILINE)
    assert [row[0] for row in rows] == [row.network for row in paper_rows()]
    for (network, top1, cost, cpu, pytorch, onnxruntime), row in zip(
        rows, paper_rows(), strict=True
    ):
        assert (top1, cost) == (f"{row.top1:.1f}", f"{row.gmacs}B/{row.params_m}M")
        assert cpu == f"{row.cpu_ms:.0f}ms"
        form = "timm" if "efficientnet" in network else "16"
        plain = form if form == "timm" else "plain"
        assert onnxruntime == f"{measured[network, 'onnxruntime', form, 1, 2][0]:.1f}ms"
        assert pytorch == f"{measured[network, 'pytorch', plain, 1, 2][0]:.1f}ms"


def test_readmes_figures_of_serving_are_the_committed_ones() -> None:
    folder = ROOT / "artifacts" / "benchmarks"
    text = " ".join(README.split())
    served = json.loads((folder / "serving-cpu.json").read_text())
    mixed = served["mixed"]
    assert (
        f"sent {mixed['sent']} requests over {served['connections']} connections, broken ones "
        f"among them, while a new version took over: {mixed['right']} right, "
        f"{mixed['refused']} refused as they should be, {mixed['wrong']} wrong, "
        f"{mixed['lost']} lost."
    ) in text
    one, eight, batched, alone = (f"{way['images_per_second']:.1f}" for way in served["ways"])
    assert (
        f"classified {one} JPEG files a second in one process, one by one, {eight} in batches of "
        f"8, and {batched} through the server ({alone} without its batching)"
    ) in text
    networks = json.loads((folder / "startup-cpu.json").read_text())["networks"]
    first, second, third = (f"{statistics.median(row['load_ms']) / 1e3:.2f}" for row in networks)
    assert (
        f"{first} s beyond importing onnxruntime for V1 1.0, {second} s for 2.0 and {third}" in text
    )


def test_links_and_files_that_readme_names_exist() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\./(scripts/[\w.]+)", README):
        assert (ROOT / name).is_file(), name
        assert os.access(ROOT / name, os.X_OK), name
