"""What the committed measurement says of honest graphs and of defects, and that README shows it."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType

import pytest

from tests.helpers import ROOT

FOLDER = ROOT / "artifacts" / "limits"
DOCUMENT = json.loads((FOLDER / "limits.json").read_text())
EDGES = [row for row in DOCUMENT["honest"] if "edge" in row]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("limits", ROOT / "scripts" / "limits.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["limits"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_network_was_measured(script: ModuleType) -> None:
    honest = {row["network"] for row in EDGES}
    assert honest == {
        f"{family} {width:.1f}, {classes} classes"
        for family, width, classes in script.HONEST_NETWORKS
    }
    assert len(honest) == 17
    assert {row["images"] for row in EDGES} == {"synthetic", "photographs"}


def test_no_honest_graph_is_refused_or_fails() -> None:
    assert [row for row in EDGES if not row["passed"]] == []
    assert [row for row in DOCUMENT["honest"] if "refused" in row] == []
    walked = [row for row in DOCUMENT["honest"] if "walked" in row]
    assert max(row["own"] / row["limit"] for row in walked) < 0.5


def test_honest_graphs_leave_half_of_their_limits() -> None:
    """The stated margin on the honest side: twice, for every number of every edge.

    But bfloat16's, where half of a constant answer leaves less of it.
    """
    shares: dict[bool, list[float]] = {False: [], True: []}
    for row in EDGES:
        numbers, limits = row["numbers"], row["limits"]
        shares["-> bf16" in row["edge"]] += [
            numbers["error"] / limits["error"],
            numbers["rms"] / limits["rms"],
            (1 - numbers["correlation"]) / (1 - limits["correlation"]),
        ]
    assert min(map(len, shares.values())) > 150
    assert max(shares[False]) < 0.55
    assert max(shares[True]) < 0.75


def test_no_limit_comes_near_an_answer_that_ignores_its_image() -> None:
    for row in EDGES:
        for number in ("error", "rms"):
            assert row["limits"][number] <= 0.5 * row["constant"][number]
        assert row["limits"]["correlation"] >= 0.5


def test_every_defect_that_moves_a_logit_is_caught() -> None:
    rows = DOCUMENT["defects"]
    assert len(rows) == 6 * 3 * 7
    for row in rows:
        assert row["caught"] + len(row["missed"]) + row["no_effect"] == row["tried"]
    assert [row for row in rows if row["missed"]] == []
    # What moves no logit is biases that are all but zero, and not a fifteenth of all.
    assert {row["defect"] for row in rows if row["no_effect"] > 1} == {"a tensor of biases 5 % off"}
    assert sum(row["no_effect"] for row in rows) < 1 / 15 * sum(row["tried"] for row in rows)


def test_the_documented_tables_are_the_measurement(script: ModuleType) -> None:
    text = (FOLDER / "README.md").read_text()
    assert script.BEGIN + "\n" + script.tables(DOCUMENT) + script.END in text
