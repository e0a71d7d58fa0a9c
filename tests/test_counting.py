"""The budget's multiply-accumulates are those counted on the files, whatever the probed sizes were."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builder import RUNTIME, Builder
from onnx import parser

from onnxprune.api import compare, prune
from onnxprune.counting import count, count_model_macs, findings


def conv_then_tokens() -> onnx.ModelProto:
    g = Builder()
    y = g.node("Conv", g.input("x", ["n", 3, 8, 8]), g.weight(16, 3, 3, 3), g.weight(16), pads=[1] * 4)
    y = g.node("Conv", g.Relu(y), g.weight(16, 16, 3, 3), g.weight(16), pads=[1] * 4)
    y = g.Transpose(g.Relu(y), perm=[0, 2, 3, 1])
    return g.model(g.linear(g.Relu(g.linear(y, 64)), 10))


@pytest.mark.parametrize("speedup", [1.5, 2.0, 3.0])
def test_a_dynamic_batch_weighs_products_and_convolutions_alike(speedup: float) -> None:
    model = conv_then_tokens()
    result = prune(model, speedup=speedup, threads=1)
    data = {"x": np.zeros((1, 3, 8, 8), np.float32)}
    counted = count_model_macs(model, data) / count_model_macs(result.model, data)
    assert speedup <= counted <= speedup * 1.05
    assert result.report.achieved.macs == pytest.approx(counted)


def test_functions_are_counted_as_what_they_stand_for() -> None:
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 17, "own" : 1]>
        g (float[n, 8] x) => (float[n, 4] y) <float[8, 16] a = {0}, float[16, 4] b = {0}> {
            h = own.product(x, a)
            y = own.product(h, b)
        }
        <domain: "own", opset_import: ["" : 17]> product (x, w) => (y) { z = MatMul(x, w) y = Relu(z) }""".replace(
            "{0}", "{" + "0," * 127 + "0}", 1
        ).replace("{0}", "{" + "0," * 63 + "0}", 1)
    )
    assert count_model_macs(model, {"x": np.zeros((1, 8), np.float32)}) == 8 * 16 + 16 * 4


def detector(above: float = 0.0) -> onnx.ModelProto:
    """What lies above the mean is looked at by two more layers: how much that is goes by the weights before."""
    g = Builder()
    x = g.Relu(g.conv(g.input("x", [1, 3, 12, 12]), 16))
    x = g.Relu(g.conv(x, 12))
    score = g.Reshape(g.conv(x, 1, 1), g.const([-1]))
    places = g.Reshape(
        g.node("NonZero", g.Greater(g.Sub(score, g.ReduceMean(score)), g.const(above)), name="found"), g.const([-1])
    )
    rows = g.Gather(g.Reshape(g.Transpose(x, perm=[0, 2, 3, 1]), g.const([144, 12])), places, axis=0)
    inner = g.Relu(g.Add(g.MatMul(rows, g.weight(12, 300)), g.weight(300)))
    return g.model(g.MatMul(inner, g.weight(300, 4)), places)


def test_a_cut_model_that_finds_more_or_less_is_counted_on_what_the_original_found() -> None:
    model = detector(above=0.1)
    data = np.random.default_rng(1).standard_normal((1, 3, 12, 12)).astype(np.float32)
    result = prune(model, speedup=1.5, data=data, select="random", reconstruct=False, threads=1)
    feeds = {"x": data}
    found = findings(model, feeds, RUNTIME)
    assert set(found) == {"found"} and 10 < found["found"].size < 134
    assert findings(result.model, feeds, RUNTIME)["found"].size != found["found"].size
    counted = count(result.model, feeds, RUNTIME, found)[0]
    assert counted != count_model_macs(result.model, feeds)
    assert result.report.before.macs == count_model_macs(model, feeds) == count(model, feeds, RUNTIME, found)[0]
    assert result.report.after.macs == counted
    assert 1.5 <= result.report.achieved.macs <= 1.5 * 1.05
    sides = compare(model, result.model, data=data, threads=1)
    assert (sides.a.macs, sides.b.macs) == (result.report.before.macs, counted)


def test_a_detector_that_finds_nothing_is_pruned_as_well() -> None:
    result = prune(detector(above=1e9), speedup=1.5, threads=1, reconstruct=False, select="l1")
    assert result.report.achieved.macs >= 1.5


def test_what_a_stored_condition_takes_is_no_finding() -> None:
    """A cut model takes fewer channels than the original."""
    g = Builder()
    taken = g.const(np.array([1, 0, 1, 1, 0, 1, 1, 1], bool))
    x = g.Compress(g.Relu(g.conv(g.input("x", ["n", 3, 8, 8]), 8)), taken, axis=1)
    model = g.model(g.node("Conv", x, g.weight(4, 6, 3, 3)))
    result = prune(model, speedup=1.5, select="l1", reconstruct=False, threads=1)
    assert result.report.achieved.macs == count_model_macs(model) / count_model_macs(result.model) >= 1.5
