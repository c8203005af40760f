"""The probe of onnxruntime's rounding, on which every judgement of a 16-bit graph rests."""

from __future__ import annotations

import pytest
from onnx import ModelProto

from rexdeploy import blocks
from rexdeploy.errors import BackendUnavailable


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Asks anew: a process asks once."""
    blocks._literal_sum.cache_clear()


def test_a_literal_graph_overflows_where_float16_does() -> None:
    blocks.check_literal()


def test_without_the_rounding_nothing_may_be_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph as it is, which onnxruntime computes in float32 between its ends."""

    def unrounded(model: ModelProto) -> ModelProto:
        return model

    monkeypatch.setattr(blocks, "literal", unrounded)
    with pytest.raises(BackendUnavailable, match="60000 \\+ 60000 gave 120000, expected infinity"):
        blocks.check_literal()
    blocks._literal_sum.cache_clear()
