"""Layers behind a ranking or a search: other rows in the pruned network than in the original, or none at all."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builder import Builder, analysed

from onnxprune import prune
from onnxprune.picks import picked
from onnxprune.readers import find_readers


def experts(g: Builder, x: str, count: int, width: int, name: str) -> str:
    """Every token goes through one expert, found by NonZero, and back to its place by ScatterND."""
    best = g.ArgMax(g.linear(x, count, name=f"{name}.router", bias=False), axis=1, keepdims=0)
    y = g.Mul(x, g.const(0.0))
    for k in range(count):
        rows = g.Transpose(g.NonZero(g.Equal(best, g.const(k))), perm=[1, 0])
        up = g.node("MatMul", g.GatherND(x, rows), g.weight(width, 20), name=f"{name}.up{k}")
        down = g.node("MatMul", g.Relu(up), g.weight(20, width), name=f"{name}.down{k}")
        y = g.ScatterND(y, rows, down)
    return g.Add(x, y)


def mixture(inside: bool = True) -> onnx.ModelProto:
    """Two mixtures of experts; the first router reads the input itself, unless a layer stands before it."""
    g = Builder()
    x = g.input("x", [5, 12])
    x = g.Relu(g.linear(x, 12, name="first")) if inside else x
    x = experts(g, experts(g, x, 4, 12, "one"), 4, 12, "two")
    return g.model(g.linear(x, 3, name="head"))


def points() -> onnx.ModelProto:
    """As many rows as places are found."""
    g = Builder()
    x = g.Relu(g.conv(g.input("x", [1, 3, 8, 8]), 12, name="first"))
    score = g.Squeeze(g.conv(x, 1, name="score"), g.const([1]))
    rows = g.Transpose(g.NonZero(g.Greater(score, g.const(0.1))), perm=[1, 0])
    x = g.node("MatMul", g.GatherND(g.Transpose(x, perm=[0, 2, 3, 1]), rows), g.weight(12, 16), name="up")
    return g.model(g.node("MatMul", g.Relu(x), g.weight(16, 4), name="down"))


def best_tokens() -> onnx.ModelProto:
    """As many as ever, but which ones?"""
    g = Builder()
    x = g.Relu(g.linear(g.input("x", [2, 9, 10]), 16, name="first"))
    _, index = g.node(
        "TopK", g.Squeeze(g.linear(x, 1, name="score"), g.const([2])), g.const([4]), outputs=2, axis=1, name="best"
    )
    index = g.Expand(g.Unsqueeze(index, g.const([2])), g.const([1, 1, 16]))
    x = g.linear(g.Relu(g.linear(g.GatherElements(x, index, axis=1), 12, name="up")), 4, name="down")
    return g.model(x)


def codebook() -> onnx.ModelProto:
    """The nearest entry of a table: every row is where it was."""
    g = Builder()
    x = g.linear(g.input("x", [2, 9, 10]), 16, name="first")
    x = g.Gather(g.weight(7, 16), g.ArgMax(g.linear(x, 7, name="near"), axis=2, keepdims=0))
    return g.model(g.linear(g.Relu(g.linear(x, 12, name="up")), 4, name="down"))


def by_the_input() -> onnx.ModelProto:
    """What the input says is the same for both networks."""
    g = Builder()
    x = g.input("x", [2, 9, 10])
    x = g.Relu(g.linear(x, 16, name="first"))
    last = g.ArgMax(g.ReduceSum(g.inputs[0].name, g.const([2]), keepdims=0), axis=1, keepdims=0)
    x = g.Gather(g.Reshape(x, g.const([18, 16])), last, axis=0)
    return g.model(g.linear(g.Relu(g.linear(x, 12, name="up")), 4, name="down"))


def by_sizes() -> onnx.ModelProto:
    """All rows, numbered by what exporters make of an index: how many there are is no value."""
    g = Builder()
    x = g.Relu(g.linear(g.input("x", [6, 10]), 16, name="first"))
    ones = g.ConstantOfShape(g.Slice(g.Shape(x), g.const([0]), g.const([1])))
    rows = g.Squeeze(g.NonZero(g.Add(ones, g.const(1.0))), g.const([0]))
    return g.model(g.linear(g.Relu(g.linear(g.Gather(x, rows, axis=0), 12, name="up")), 4, name="down"))


@pytest.mark.parametrize(
    ("model", "fitted"),
    [
        (mixture(), {"one.router", "two.router", "head"}),
        (points(), {"score"}),
        (best_tokens(), {"score"}),
        (codebook(), {"near", "up", "down"}),
        (by_the_input(), {"up", "down"}),
        (by_sizes(), {"up", "down"}),
    ],
    ids=["experts", "points", "best tokens", "codebook", "input", "sizes"],
)
def test_layers_that_read_what_is_picked_are_not_fitted(model: onnx.ModelProto, fitted: set[str]) -> None:
    analysis, _ = analysed(model)
    assert {reader.layer.node.label for reader in find_readers(analysis)} == fitted
    assert all(layer.data not in picked(analysis) for layer in analysis.layers if layer.node.label in fitted)


@pytest.mark.parametrize(
    "model",
    [mixture(), mixture(inside=False), points(), best_tokens()],
    ids=["inside", "at the input", "points", "best"],
)
@pytest.mark.parametrize("quick", [True, False])
def test_a_network_that_picks_is_pruned_and_the_rest_fitted(model: onnx.ModelProto, quick: bool) -> None:
    """An expert may have no token in a sample, or other ones than it had; that ended in an error."""
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    data = np.random.default_rng(0).standard_normal((24 * shape[0], *shape[1:])).astype(np.float32)
    result = prune(model, data=data, speedup=1.3, quick=quick, threads=1)
    assert result.report.achieved.macs >= 1.3
    assert any("what the network itself picks" in warning for warning in result.report.warnings)
