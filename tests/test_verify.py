"""The proof: what rounding explains passes, and a wrong cut does not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builder import RUNTIME, Builder, analysed, random_plan

from onnxprune.errors import InternalError
from onnxprune.rewrite import rewrite
from onnxprune.verify import prove


def saturated() -> onnx.ModelProto:
    """Scores of tens of thousands in front of a softmax: what sums are rounded by decides between answers."""
    g = Builder(seed=2)
    x = g.Relu(g.conv(g.input("x", [2, 3, 12, 12]), 48))
    scores = g.Mul(g.conv(g.Relu(g.conv(x, 64)), 5), g.const(np.float32(3e4)))
    return g.model(g.Softmax(scores, axis=1))


def test_what_rounding_does_is_told_apart_from_a_wrong_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = analysed(saturated())[0]
    plan, other = (random_plan(analysis, seed) for seed in (0, 1))
    feeds = [p.feeds for p in analysis.shapes.probes]
    monkeypatch.setattr("onnxprune.verify._TOLERANCE", {"float32": 1e-9})  # less than rounding anywhere
    proof = prove(analysis, plan, rewrite(analysis, plan), feeds, RUNTIME)
    assert 1e-9 < proof.max_relative_difference < 1e-2
    assert "roundings" in proof.inputs
    with pytest.raises(InternalError, match="the proof failed"):
        prove(analysis, plan, rewrite(analysis, other), feeds, RUNTIME)
