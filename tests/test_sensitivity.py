"""Damage to the output: known values, and variants against whole models that are changed in the same way."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from builder import RUNTIME, Builder, analysed, run
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from onnxprune.batches import Batches
from onnxprune.data import load_calibration
from onnxprune.memory import Room
from onnxprune.progress import Progress
from onnxprune.sensitivity import Variants, divergence, measure

HALF = np.log([[0.5, 0.5]])
SKEW = np.log([[0.25, 0.75]])
SKEWED = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
IMAGE = np.array([[[[1.0, 3.0]]], [[[1.0, 3.0]]]])  # variance 1

# name: original, changed, divergence
DIVERGENCES: dict[str, tuple[np.ndarray, np.ndarray, float]] = {
    "alike": (SKEW, SKEW, 0.0),
    "logits": (HALF, SKEW, SKEWED),
    "logits, two samples": (np.repeat(HALF, 2, 0), np.repeat(SKEW, 2, 0), 2 * SKEWED),
    "shifted logits": (SKEW, SKEW + 7.0, 0.0),
    "probabilities": (np.exp(HALF), np.exp(SKEW), SKEWED),
    "a probability of zero": (np.array([[0.0, 1.0]]), np.array([[0.5, 0.5]]), np.log(2)),
    "one column": (np.array([[1.0], [3.0]]), np.array([[1.0], [4.0]]), 0.5 / 1.0 * 2),
    "images": (IMAGE, IMAGE + 0.5, 0.25 * 2),
    "constant": (np.full((2, 1, 2), 3.0), np.full((2, 1, 2), 5.0), 4.0 * 2),
    "integers": (np.array([[1, 2]]), np.array([[5, 6]]), 0.0),
    "nothing": (np.zeros((0, 4)), np.zeros((0, 4)), 0.0),
    "not finite": (HALF, np.array([[np.nan, 0.0]]), np.inf),
    "infinite": (IMAGE, IMAGE * np.inf, np.inf),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence(name: str) -> None:
    original, changed, expected = DIVERGENCES[name]
    assert divergence({"y": original}, {"y": changed}) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_divergence_adds_up_over_outputs() -> None:
    found = divergence({"a": HALF, "b": IMAGE}, {"a": SKEW, "b": IMAGE + 0.5})
    assert found == pytest.approx(SKEWED + 0.5, rel=1e-12)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_divergence_is_that_of_the_distributions_and_never_negative(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 4, 5))
    p, q = softmax(a, axis=1), softmax(b, axis=1)
    expected = float((p * np.log(p / q)).sum())
    assert divergence({"y": a}, {"y": b}) == pytest.approx(expected, rel=1e-9)
    assert divergence({"y": p}, {"y": q}) == pytest.approx(expected, rel=1e-9)
    assert expected > 0


def network() -> onnx.ModelProto:
    """Two blocks; one output comes out between them."""
    g = Builder(seed=2)
    x = g.Relu(g.conv(g.input("x", ["n", 3, 6, 6]), 4, name="stem"))
    x = g.Relu(g.Add(x, g.conv(g.Relu(g.conv(x, 6, name="a1")), 4, name="b1")))
    early = g.gemm(g.Flatten(g.GlobalAveragePool(x)), 3, name="early")
    x = g.Relu(g.Add(g.conv(x, 4, k=1, name="short"), g.conv(g.Relu(g.conv(x, 6, name="a2")), 4, name="b2")))
    return g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 5, name="late"), early, x)


def changed(model: onnx.ModelProto, arrays: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    new = onnx.ModelProto()
    new.CopyFrom(model)
    for tensor in new.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[tensor.name], tensor.name))
    return new


@pytest.mark.parametrize(("size", "frontier"), [(10, 1 << 30), (3, 1 << 30), (4, 0)], ids=["whole", "parts", "files"])
def test_variants_are_measured_as_whole_models(size: int, frontier: int) -> None:
    analysis = analysed(network())[0]
    graph, rng = analysis.graph, np.random.default_rng(0)
    weights = {n.label: n.inputs[1] for n in graph.nodes if n.op in ("Conv", "Gemm")}
    places = {0: ["b1"], 1: ["b2"], 2: ["a1", "a2", "short", "early"], 3: ["stem"], 4: ["late"], 5: ["a2", "short"]}
    variants = {
        group: [
            {weights[n]: graph.array(weights[n]) * rng.uniform(0.5, 1.5, graph.array(weights[n]).shape) for n in nodes}
            for _ in range(2)
        ]
        + [{weights[n]: graph.array(weights[n]).astype(np.float64) for n in nodes}]
        for group, nodes in places.items()
    }
    x = np.random.default_rng(1).standard_normal((10, 3, 6, 6)).astype(np.float32)
    data = load_calibration(x, graph.inputs)
    feeds = data.feeds(range(10))
    expected = dict(zip(graph.outputs, run(graph.model, feeds), strict=True))
    given = {group: Variants(sorted(options[0]), iter(options), len(options)) for group, options in variants.items()}
    found = measure(analysis, given, Batches(data, size, 0), RUNTIME, Progress(), Room(1 << 30, frontier=frontier))
    assert found.keys() == places.keys()
    for group, options in variants.items():
        assert len(found[group]) == 3
        for option, damage in zip(options, found[group], strict=True):
            arrays = {k: v.astype(np.float32) for k, v in option.items()}
            outputs = dict(zip(graph.outputs, run(changed(graph.model, arrays), feeds), strict=True))
            direct = divergence(expected, outputs) / 10
            assert damage == pytest.approx(direct, rel=1e-3, abs=1e-9)
        assert min(found[group][:2]) > 1e-6
        assert abs(found[group][2]) < 1e-9


def test_groups_without_variants_are_left_out() -> None:
    analysis = analysed(network())[0]
    weight = next(n.inputs[1] for n in analysis.graph.nodes if n.label == "b1")
    data = load_calibration(np.zeros((2, 3, 6, 6), np.float32), analysis.graph.inputs)
    one = {weight: analysis.graph.array(weight)}
    variants = {0: Variants([], [], 0), 1: Variants([weight], [one], 1), 2: Variants([], [{}], 1)}
    found = measure(analysis, variants, Batches(data, 2, 0), RUNTIME, Progress(), Room(1 << 30))
    assert found.keys() == {1, 2} and found[2] == [np.inf]  # nothing that is stored says what that would cost
