"""The budget's multiply-accumulates are those counted on the files, whatever the probed sizes were."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builder import Builder
from onnx import parser

from onnxprune.api import prune
from onnxprune.counting import count_model_macs


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
