"""README and docs/: every block runs and prints what the page shows; links, figures, formats."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import os
import re
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sklearn.datasets
import typer.main

from rexdeploy import machine
from rexdeploy.bundle.store import Bundle
from rexdeploy.cli.app import app
from rexdeploy.graphs import quantize as int8_graphs
from rexdeploy.steps import int8_search
from tests.drawn_images import write_digits
from tests.helpers import ROOT, run_cli, run_program

pytestmark = pytest.mark.slow

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES["README.md"]
LINKED = [
    *PAGES,
    "cpp/README.md",
    *("artifacts/README.md", "artifacts/benchmarks/README.md", "artifacts/limits/README.md"),
]
DIGITS = {"train": 300, "val": 100}  # images: enough to run all, and no page shows what they give
PHOTO = Path(sklearn.datasets.__path__[0]) / "images" / "flower.jpg"


def _blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language; every fence of it is opened and closed."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)
    return [text for name, text in fences if name == language]


def _pages_with(language: str) -> list[str]:
    return [page for page in PAGES if page != "README.md" and _blocks(page, language)]


def _sessions(page: str) -> list[tuple[str, list[str]]]:
    """Every `$ ...` of a page's console blocks, with the output shown below it."""
    sessions: list[tuple[str, list[str]]] = []
    for block in _blocks(page, "console"):
        for line in block.splitlines():
            if line.startswith("$ "):
                sessions.append((line[2:], []))
            elif line.strip():
                sessions[-1][1].append(line)
    return sessions


def _slugs(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"(?ms)^```.*?^```$", "", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


ROUNDING_FACTOR = 3.0
"""Between two machines, of what rounding does and of the limits that follow it.

An error is the largest or the mean of many differences between sums, which each processor's kernels
(Intel Xeon, AMD EPYC) add up in their own order. On an EPYC, PyTorch's AVX2 kernels in the place of
its AVX-512 ones left V1 1.5's error at 2.2e-4 and made its limit 0.0007 instead of 0.001. A factor
of 3 leaves room for that, and tells float32 from 16 bits, which are a hundred times as far.
"""
NOTHING = 1e-4  # of the signal: a float32 error below it may be any, down to 0
POINTS = 10.0  # per cent of top-1: of the images, some have no clear best class
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?%?(?!\w)")


def _text_and_numbers(line: str) -> tuple[str, list[str]]:
    """A line with a mark for each number, versions, paths and a table's rule masked; its numbers.

    Digits that belong to a name (fp16.onnx, sm80, rexnet_1.5) stay in the text.
    """
    line = re.sub(r"\d+(?:\.\d+){2,}", "VERSION", line)  # three parts or more
    line = re.sub(r"VERSION at \S+", "VERSION at PYTHON", line)
    line = re.sub(r"\b1-(\d\S*e-\d+)", lambda match: f"{1 - float(match[1]):.15f}", line)
    line = " ".join(re.sub(r"─+", "─", line).split())
    return _NUMBER.sub("#", line), _NUMBER.findall(line)


def _agree(printed: str, shown: str, measured: bool) -> bool:
    """Whether two numbers are the same or, if measured, both are what rounding may make of it.

    Integers (nodes, layers, batches, images) depend on no machine and are the same always, and so
    are sizes, costs and published accuracies, which are not measured. Correlations near 1 are
    compared by what they lack of it.
    """
    if printed == shown:
        return True
    if not (measured and {".", "e"} & set(printed + shown)):
        return False
    if printed.endswith("%") and shown.endswith("%"):
        return abs(float(printed[:-1]) - float(shown[:-1])) <= POINTS
    first, second = sorted((float(printed), float(shown)))
    if first > 0.9 and second <= 1:
        first, second = 1 - second, 1 - first
    return second < NOTHING or second <= ROUNDING_FACTOR * first


def _differences(command: str, printed: Sequence[str], shown: Sequence[str]) -> list[str]:
    """What a command prints otherwise than README shows it, line by line."""
    if len(printed) != len(shown):
        return [f"{len(printed)} lines, README has {len(shown)}"]
    wrong = []
    for one, other in zip(printed, shown, strict=True):
        (text, numbers), (wanted, figures) = _text_and_numbers(one), _text_and_numbers(other)
        same = text == wanted and all(
            _agree(number, figure, "verify" in command or "error" in text)
            for number, figure in zip(numbers, figures, strict=True)
        )
        if not same:
            wrong.append(f"printed {one!r}, README has {other!r}")
    return wrong


@pytest.fixture(scope="module", autouse=True)
def _plain_quantize() -> Iterator[None]:
    """INT8 by one way to take ranges, timed shortly: what comes out is on no page."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(int8_graphs, "METHODS", ("minmax",))
        patched.setattr(int8_search, "ROUNDS", 8)
        yield


@pytest.fixture(scope="module")
def readme_dir(
    tmp_path_factory: pytest.TempPathFactory,
    v1_checkpoint: Path,
    photos: Path,
    detector_original: Bundle,
) -> Path:
    """A folder with the files that README's commands speak of."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(PHOTO, folder)
    shutil.copy(v1_checkpoint, folder / "rexnetv1_1.0.pth")
    shutil.copytree(photos, folder / "photos")
    shutil.copytree(detector_original.path, folder / "artifacts" / "street")
    shutil.copy(ROOT / "tests" / "data" / "digits_v1.safetensors", folder)
    for name, held_back in (("train", False), ("val", True)):
        write_digits(folder / "digits" / name, held_back, most=DIGITS[name])
    return folder


@pytest.fixture(scope="module")
def quickstart(readme_dir: Path) -> dict[str, str]:
    """What each command of the quickstart script printed in README's folder.

    In this very environment, as a new user's second run would find it; empty in any other.
    """
    if not (Path(sys.prefix) / ".rexdeploy-installed").exists():
        return {}
    environment = {"VENV": sys.prefix, "BASH_XTRACEFD": "1"}
    script = ROOT / "scripts" / "quickstart.sh"
    answer = run_program(script, readme_dir, env=environment, timeout=None)
    assert answer.returncode == 0, answer.stderr
    parts = re.split(r"^\+ (rexdeploy .*)\n", answer.stdout, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module")
def readmes_outputs(readme_dir: Path, quickstart: dict[str, str]) -> list[tuple[str, str]]:
    """README's commands and what they printed, in its order, in the folder that other pages use.

    Those of the quickstart script have been run by it.
    """
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    return [
        (command, quickstart.get(command) or _output(command, readme_dir))
        for command, _ in _sessions("README.md")
    ]


@functools.cache
def _output(command: str, folder: Path) -> str:
    """What a command prints, which must end well; one that two pages have is run once."""
    program, *arguments = command.split()
    if program == "rexdeploy":
        result = run_cli(*arguments, cwd=folder)
        assert result.code == 0, (command, result.err)
        return result.out
    answer = run_program(program, *arguments, cwd=folder)
    assert answer.returncode == 0, (command, answer.stderr)
    return answer.stdout


def _check_output(command: str, out: str, shown: Sequence[str]) -> None:
    if not shown or (machine.detect() is not None and "models" not in command):
        return
    printed = [line for line in out.splitlines() if line.strip()]
    if "predict" in command:  # which classes an untrained network names depends on rounding
        printed, shown = (
            [*lines[:2], *(line.split()[0] for line in lines[2:])] for lines in (printed, shown)
        )
    assert _differences(command, printed, shown) == [], command


def test_readmes_commands_print_what_it_shows(readmes_outputs: list[tuple[str, str]]) -> None:
    assert len(readmes_outputs) >= 6
    for (command, out), (_, shown) in zip(readmes_outputs, _sessions("README.md"), strict=True):
        _check_output(command, out, shown)


@pytest.mark.parametrize("page", _pages_with("console"))
@pytest.mark.usefixtures("readmes_outputs")
def test_a_pages_commands_print_what_it_shows(page: str, readme_dir: Path) -> None:
    """After README's, in its folder; no page needs another one's."""
    if "openssl" in PAGES[page]:
        pytest.importorskip("model_signing", reason="model-signing is not installed")
    for command, shown in _sessions(page):
        _check_output(command, _output(command, readme_dir), shown)


@pytest.mark.parametrize(
    ("command", "printed", "shown", "same"),
    [
        ("export", "38.9 MiB, 213 nodes", "38.9 MiB, 213 nodes", True),
        ("export", "38.9 MiB, 213 nodes", "38.9 MiB, 214 nodes", False),
        ("export", "38.9 MiB, 213 nodes", "39.9 MiB, 213 nodes", False),
        ("models", "rexnet 1.0  77.9  4.797  agrees", "rexnet 1.0  77.9  4.707  agrees", False),
        ("build-trt", "rtx 1.7.1.116, batch 1:8:64", "rtx 1.8.0, batch 1:8:64", True),
        ("build-trt", "rtx 1.7.1.116, batch 1:8:64", "rtx 1.7.1.116, batch 1:8:32", False),
        ("export", "error 6.7e-05 of the signal", "error 1.5e-04 of the signal", True),
        ("export", "error 6.7e-05 of the signal", "error 2.9e-02 of the signal", False),
        ("verify", "a.onnx  0.19 / 0.38  ok", "a.onnx  0.1 / 0.2  ok", True),
        ("verify", "a.onnx  0.19 / 0.38  ok", "a.onnx  0.03 / 0.38  ok", False),
        ("verify", "a.onnx  0.9981 / 0.9942", "a.onnx  0.9970 / 0.9900", True),
        ("verify", "a.onnx  0.9981 / 0.9942", "a.onnx  0.9400 / 0.9942", False),
        ("verify", "a.onnx  1-1e-09 / 1-1e-07", "a.onnx  1 / 1-3e-08", True),
        ("verify", "a.onnx  1-1e-09 / 1-1e-07", "a.onnx  0.991 / 1-1e-07", False),
        ("verify", "a.onnx  100.0%  ok", "a.onnx  93.8%  ok", True),
        ("verify", "a.onnx  100.0%  ok", "a.onnx  75.0%  ok", False),
        ("build-trt", "(>99%), 100% of 1.1 GMACs", "(>99%), 98% of 1.1 GMACs", False),
        ("export", "error 2.2e-04 (limit 0.001)", "error 2.2e-04 (limit 0.0007)", True),
        ("verify", "a.onnx  0.19 / 0.38  ok", "b.onnx  0.19 / 0.38  ok", False),
        ("verify", "a.onnx  0.19 / 0.38  ok", "a.onnx  0.19 / 0.38  FAILED", False),
        ("verify", "a.onnx  0  ok", "a.onnx  2.1e-06  ok", True),
        ("verify", "batches 1, 5, 8, 64; 3 edges", "batches 1, 5, 8, 64; 4 edges", False),
        ("verify", "fp16.onnx  1.1  ok", "fp32.onnx  1.1  ok", False),
    ],
)
def test_numbers_that_differ_are_noticed(
    command: str, printed: str, shown: str, same: bool
) -> None:
    """A digit of README that nobody computes is what this file is to find."""
    assert (_differences(command, [printed], [shown]) == []) == same
    assert (_differences(command, [shown], [printed]) == []) == same


@pytest.mark.usefixtures("readmes_outputs")
def test_the_bundle_pages_example_is_what_readmes_commands_make(readme_dir: Path) -> None:
    """But for hashes, versions, the time and what an engine of another version has of layers."""

    def shape(document: dict[str, Any]) -> dict[str, Any]:
        names = {entry["sha256"]: entry["file"] for entry in document["artifacts"]}
        for entry in document["artifacts"]:
            entry["parent_sha256"] = names.get(entry["parent_sha256"])
            entry["built_with"] = {
                key: "VERSION" if value[:1].isdigit() else value
                for key, value in entry["built_with"].items()
            }
            if entry["proof"]:
                entry["proof"].update(layers=sorted(entry["proof"]["layers"]), macs={})
            del entry["sha256"]
        document["model"]["weights"]["sha256"] = document["updated_at"] = ""
        return document

    (example,) = _blocks("docs/bundle.md", "json")
    made = (readme_dir / "artifacts" / "rexnet_1.5" / "manifest.json").read_text()
    assert shape(json.loads(made)) == shape(json.loads(example))


@pytest.mark.parametrize("page", _pages_with("python"))
@pytest.mark.usefixtures("readmes_outputs")
def test_a_pages_python_runs(page: str, readme_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bundles that README's commands made; every block prints something."""
    monkeypatch.chdir(readme_dir)
    for code in _blocks(page, "python"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {"__name__": "__main__"})
        lines = printed.getvalue().splitlines()
        assert lines, code
        if "classifier.classify" in code:  # what runs it, and the five best classes
            assert len(lines) == 6


def test_the_quickstart_script_runs_readmes_three_commands(
    readme_dir: Path, quickstart: dict[str, str]
) -> None:
    if not quickstart:
        pytest.skip("this environment was not made by scripts/test.sh")
    documented = re.findall(r"^    (rexdeploy .*)$", README, re.MULTILINE)[:3]
    *ran, last = quickstart
    assert ran == documented
    assert "flower.jpg" in quickstart[last]
    assert (readme_dir / "artifacts" / "rexnet_1.5" / "verify.json").exists()


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    """The script that writes README's measured figures."""
    path = ROOT / "scripts" / "readme_figures.py"
    spec = importlib.util.spec_from_file_location("readme_figures", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_measured_figures_are_those_of_the_committed_files(figures: ModuleType) -> None:
    blocks = figures.figures()
    shown: list[str] = []
    for path in figures.TEXTS:
        text = path.read_text()
        assert figures.filled(text, blocks) == text, f"run scripts/readme_figures.py for {path}"
        shown += [match[2] for match in figures.BLOCK.finditer(text)]
    assert sorted(shown) == sorted(blocks)  # each once, and none is computed for nothing


def test_a_changed_figure_is_put_right(figures: ModuleType) -> None:
    blocks = figures.figures()
    for page, name in (("README.md", "headline"), ("docs/speed.md", "openvino")):
        text = PAGES[page].replace(blocks[name], "9.99 times")
        assert text != PAGES[page]
        assert figures.filled(text, blocks) == PAGES[page]


def test_the_speed_table_says_what_the_samples_say(figures: ModuleType) -> None:
    """Computed here once more from a committed file, apart from the script."""
    rows = json.loads((ROOT / "artifacts/benchmarks/cpu-rexnet_1.0.json").read_text())["latencies"]

    def samples(form: str) -> list[float]:
        (row,) = (
            row
            for row in rows
            if (row["backend"], row["form"], row["batch"], row["threads"])
            == ("onnxruntime", form, 1, 2)
        )
        times: list[float] = row["samples_ms"]
        return times

    speed = PAGES["docs/speed.md"]
    (line,) = re.findall(r"^\| rexnet_1.0 \| 1 \| 2 \| (.*) \|$", speed, re.MULTILINE)
    today, aligned, ratio, *_ = line.split(" | ")
    assert today == f"{statistics.median(samples('timm')):.1f} (timm)"
    assert aligned == f"{statistics.median(samples('16')):.1f}"
    ratios = [one / other for one, other in zip(samples("timm"), samples("16"), strict=True)]
    assert ratio.startswith(f"{statistics.median(ratios):.2f} (")
    (headline,) = re.findall(r"([\d.]+) to ([\d.]+) times \(95 % intervals from", README)
    assert float(headline[0]) <= statistics.median(ratios) + 0.005
    assert float(headline[1]) >= statistics.median(ratios) - 0.005


def test_figures_of_two_machines_share_no_table(
    figures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in figures.FOLDER.glob("cpu-*.json"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    other = tmp_path / "cpu-rexnet_1.5.json"
    document = json.loads(other.read_text())
    document["machine"]["processor"] = "AMD EPYC avx2"
    other.write_text(json.dumps(document))
    with pytest.raises(SystemExit, match="measure again: the files disagree: "):
        figures.figures()


@pytest.mark.parametrize("page", LINKED)
def test_links_anchors_and_scripts_of_a_page_exist(page: str) -> None:
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https:", "http:")):
            continue
        name, _, anchor = link.partition("#")
        target = folder / name if name else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in _slugs(target.read_text()), link
    for name in re.findall(r"(?<![\w/])(scripts/\w+\.\w+)", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\./(scripts/[\w.]+)", text):
        assert os.access(ROOT / name, os.X_OK), name


def test_a_page_that_is_not_linked_or_a_block_that_nobody_runs_is_noticed() -> None:
    assert len(README.splitlines()) <= 200
    for page, text in PAGES.items():
        assert page == "README.md" or f"]({page})" in README, page
        assert {*re.findall(r"^```(\w+)$", text, re.MULTILINE)} <= {"console", "python", "json"}
        assert text.count("\n```") % 2 == 0, page
        assert page == "docs/bundle.md" or not _blocks(page, "json")  # test_bundle_page.py reads it


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "rexdeploy " in text])
def test_commands_that_a_page_names_are_commands(page: str) -> None:
    """Also those that no test runs as they stand: their options exist, and take such values."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = PAGES[page]
    named = re.findall(r"(?m)^(?:    |\$ )rexdeploy ([^\n#]*)", text)
    named += re.findall(r"`rexdeploy ([a-z][^`]*)`", re.sub(r"(?ms)^```.*?^```$", "", text))
    for line in named:
        name, *arguments = line.split()
        if not set(arguments) & {"..."}:
            context = commands[name].make_context(name, arguments)  # raises a usage error
            assert context.info_name == name
