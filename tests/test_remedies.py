"""Every frozen place says the node, its rule, and what would free it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from builder import Builder, analysed

from onnxprune.positions import Kind
from onnxprune.remedies import REMEDIES

Between = Callable[[Builder, str], str]


def linear(between: Between) -> onnx.ModelProto:
    """[2, 8, 6] -> a (8) -> something -> b (3)."""
    g = Builder()
    x = g.node("MatMul", g.input("x", [2, 8, 6]), g.weight(6, 8), name="a")
    y = between(g, x)
    g.node("MatMul", y, g.weight(8, 3), name="b")
    return g.model("b")


def sums(g: Builder, x: str) -> str:
    gate = g.ReduceSum(g.Sigmoid(x), g.const([2]), keepdims=1, name="sum")
    return g.Mul(g.Relu(x), gate)


def positions(g: Builder, x: str) -> str:
    return g.node(
        "ScatterElements", x, g.const(np.zeros((2, 8, 1), int)), g.const(np.ones((2, 8, 1))), axis=2, name="s"
    )


PLACES: dict[str, tuple[Between, str, str, str]] = {
    # operator of the place, its rule, what would free it
    "unknown": (lambda g, x: g.Inverse(x, domain="com.microsoft"), "Inverse", "", "a row for Inverse in the table"),
    "mixed": (
        lambda g, x: g.Softmax(x, axis=-1),
        "Softmax",
        "a0 a1 !a2 -> a0 a1 !a2",
        "nothing that is exact: every value that Softmax gives",
    ),
    "summed": (sums, "ReduceSum", "a0 a1 ~a2, * -> a0 a1 *", "an activation that maps zero to zero"),
    "normalised": (
        lambda g, x: g.LayerNormalization(x, g.weight(8), axis=-1),
        "LayerNormalization",
        "a0 a1 !a2, !a2 -> a0 a1 !a2",
        "with --approximate LayerNormalization goes by the channels that are left",
    ),
    "refused": (
        lambda g, x: g.DequantizeLinear(*g.node("DynamicQuantizeLinear", x, outputs=3)),
        "DynamicQuantizeLinear",
        "",
        "prune the float or the QDQ model, and quantise afterwards",
    ),
    "refused, no advice": (lambda g, x: g.Bernoulli(g.Sigmoid(x), dtype=1), "Bernoulli", "", "other operators do what"),
    "mixed by scattering": (positions, "ScatterElements", "a0 a1 !d", "nothing that is exact"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_that_holds_channels_says_what_would_free_them(name: str) -> None:
    between, op, rule, remedy = PLACES[name]
    analysis = analysed(linear(between))[0]
    place = next(f for f in analysis.frozen if f.op == op)
    assert set(place.layers) == {"a", "b"} or place.layers == ("a",)
    assert place.channels == 8 and place.macs >= 2 * 8 * 6 * 8
    assert rule in place.rule and bool(rule) == bool(place.rule)
    assert remedy in place.remedy


def test_the_faces_of_a_graph_name_who_reads_and_who_makes_them() -> None:
    analysis = analysed(linear(lambda g, x: g.Relu(x)))[0]
    assert [(f.reason, f.node, f.channels, f.layers) for f in analysis.frozen] == [
        ("an input of the graph", "a", 6, ("a",)),
        ("an output of the graph", "b", 3, ("b",)),
    ]


def test_layers_that_are_not_chosen() -> None:
    analysis = analysed(linear(lambda g, x: g.Relu(x)), exclude="^a$")[0]
    place = next(f for f in analysis.frozen if f.node == "a" and f.channels == 8)
    assert (place.tensor, place.axis, place.remedy) == ("a", 2, REMEDIES[Kind.CHOSEN])


def test_every_kind_of_reason_has_its_remedy() -> None:
    assert set(REMEDIES) == set(Kind)
    assert all(text.format(op="Erf") and not text.endswith(".") for text in REMEDIES.values())
