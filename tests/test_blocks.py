"""The probe of onnxruntime's rounding, on which every judgement of a 16-bit graph rests."""

from __future__ import annotations

import pytest
from onnx import ModelProto

from rexdeploy.errors import BackendUnavailable
from rexdeploy.graphs import emulate


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Asks anew: a process asks once."""
    emulate._literal_sum.cache_clear()


def test_a_literal_graph_overflows_where_float16_does() -> None:
    emulate.check_literal()


def test_without_the_rounding_nothing_may_be_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph as it is, which onnxruntime computes in float32 between its ends."""

    def unrounded(model: ModelProto) -> ModelProto:
        return model

    monkeypatch.setattr(emulate, "literal", unrounded)
    with pytest.raises(BackendUnavailable, match="60000 \\+ 60000 gave 120000, expected infinity"):
        emulate.check_literal()
    emulate._literal_sum.cache_clear()
