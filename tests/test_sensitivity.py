"""Damage to the output: known values, and variants against whole models that are changed in the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import onnx
import pytest
from builder import RUNTIME, Builder, analysed, run
from onnx import TensorProto, helper
from scipy.special import softmax

from onnxprune import prune
from onnxprune.batches import Batches
from onnxprune.data import load_calibration
from onnxprune.divergence import deviation, unsquashed, yardsticks
from onnxprune.memory import Room
from onnxprune.progress import Progress
from onnxprune.sensitivity import Variants, measure

HALF = np.log([[0.5, 0.5]])  # does not vary
SKEW = np.log([[0.25, 0.75]])
SKEWED = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
IMAGE = np.array([[[[1.0, 3.0]]], [[[1.0, 3.0]]]])  # variance 1
MASKED = np.array([[0.0, 0.0, -np.inf]])

# name: original, changed, deviation
DEVIATIONS: dict[str, tuple[np.ndarray, np.ndarray, float]] = {
    "alike": (SKEW, SKEW, 0.0),
    "scores": (HALF, SKEW, SKEWED),
    "scores, two samples": (np.repeat(HALF, 2, 0), np.repeat(SKEW, 2, 0), 2 * SKEWED),
    "shifted scores": (HALF, HALF + 7.0, 0.0),
    "masked": (MASKED, MASKED + SKEW[0, 0], 0.0),
    "one column": (np.array([[1.0], [3.0]]), np.array([[1.0], [4.0]]), 0.5 / 1.0 * 2),
    "images": (IMAGE, IMAGE + 0.5, 0.25 * 2),
    "narrow images": (IMAGE.astype(np.float16), (IMAGE + 0.5).astype(np.float16), 0.25 * 2),
    "masked images": (np.append(IMAGE, IMAGE * -np.inf, 1), np.append(IMAGE + 0.5, IMAGE * -np.inf, 1), 0.125 * 2),
    "constant": (np.full((2, 1, 2), 3.0), np.full((2, 1, 2), 5.0), 4.0 * 2),
    "integers": (np.array([[1, 2]]), np.array([[5, 6]]), 0.0),
    "nothing": (np.zeros((0, 4)), np.zeros((0, 4)), 0.0),
    "not finite": (HALF, HALF * np.nan, np.inf),
    "infinite": (IMAGE, IMAGE * np.inf, np.inf),
}


@pytest.mark.parametrize("name", DEVIATIONS)
def test_deviation(name: str) -> None:
    original, changed, expected = DEVIATIONS[name]
    assert deviation({"y": original}, {"y": changed}) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_deviation_adds_up_over_outputs() -> None:
    found = deviation({"a": HALF, "b": IMAGE}, {"a": SKEW, "b": IMAGE + 0.5})
    assert found == pytest.approx(SKEWED + 0.5, rel=1e-12)


@pytest.mark.parametrize(("size", "classes"), [(0.1, 5), (1.0, 5), (10.0, 2), (10.0, 1000), (1e4, 10)])
def test_scores_are_compared_at_a_temperature_where_answers_are_uncertain(size: float, classes: int) -> None:
    a, b = size * np.random.default_rng(0).standard_normal((2, 40, classes))
    found = yardsticks([{"y": a[:10]}, {"y": a[10:]}])["y"]
    assert found.variance == pytest.approx(a.var()) and found.temperature is not None
    p, q = softmax(a / found.temperature, axis=1), softmax(b / found.temperature, axis=1)
    entropy = -(p * np.log(p)).sum(axis=1).mean() / np.log(classes)
    assert entropy == pytest.approx(0.25, rel=1e-2) if found.temperature > 1.0 else entropy > 0.25
    assert (found.temperature > 1.0) == (size > 1.0)
    expected = found.temperature**2 * (p * np.log(p / q)).sum() / found.variance
    assert deviation({"y": a}, {"y": b}) == pytest.approx(expected, rel=1e-6) and expected > 0


def test_scores_may_be_of_as_many_classes_as_a_sample_has_positions() -> None:
    rng = np.random.default_rng(0)
    parts = [{"y": 10.0 * rng.standard_normal((1, length))} for length in (3, 7, 50)]
    found = yardsticks(parts)["y"]
    assert found.temperature is not None and found.temperature > 1.0
    shares = []
    for p in (softmax(part["y"] / found.temperature, axis=1) for part in parts):
        shares.append(-(p * np.log(p)).sum() / np.log(p.shape[1]))
    assert np.mean(shares) == pytest.approx(0.25, rel=1e-2)


def test_what_is_masked_throughout_has_a_temperature_too() -> None:
    found = yardsticks([{"y": np.full((3, 4), -np.inf)}])["y"]
    assert found.temperature == 1.0 and found.variance == 1.0


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (lambda g, x: g.Softmax(x), "scores"),
        (lambda g, x: g.Sigmoid(x), "scores"),
        (lambda g, x: g.Reshape(g.LogSoftmax(g.Identity(x)), g.const(np.array([-1, 1, 3]), dtype=np.int64)), "scores"),
        (lambda g, x: g.Cast(g.ArgMax(g.Softmax(x), axis=1, keepdims=0), to=TensorProto.INT32), "scores"),
        (lambda g, x: g.node("TopK", x, g.const([2]), outputs=2)[1], "scores"),
        (lambda g, x: g.Greater(g.Cast(g.Sigmoid(x), to=TensorProto.FLOAT), g.const(0.5)), "scores"),
        (lambda g, x: g.Squeeze(g.Less(g.const(0.5), g.Unsqueeze(x, g.const([1]))), g.const([1])), "moved"),
        (lambda g, x: g.Cast(x, to=TensorProto.UINT8), "scores"),
        (lambda g, x: g.Greater(x, g.Neg(x)), "output"),
        (lambda g, x: g.Cast(x, to=TensorProto.FLOAT16), "output"),
        (lambda g, x: g.Tanh(x), "output"),
        (lambda g, x: g.Relu(g.Softmax(x)), "output"),
    ],
    ids=[
        "softmax",
        "sigmoid",
        "moved",
        "class",
        "order",
        "mark",
        "moved mark",
        "whole",
        "two",
        "narrow",
        "tanh",
        "inside",
    ],
)
def test_scores_are_compared_in_front_of_what_squashes_them(end: Callable[[Builder, str], str], expected: str) -> None:
    g = Builder(seed=0)
    scores = g.gemm(g.input("x", ["n", 4]), 3, name="scores")
    graph = analysed(g.model(end(g, scores)))[0].graph
    found = unsquashed(graph, graph.outputs[0])
    assert (
        graph.producer[found].op
        in {
            "scores": ("Gemm", "Identity"),
            "moved": ("Unsqueeze",),
            "output": (graph.nodes[-1].op,),
        }[expected]
    )


def test_classes_are_priced_as_the_scores_that_they_are_told_by() -> None:
    """Nothing but the classes comes out, which hardly ever change."""
    data = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)
    kept = []
    for end in (lambda g, x: x, lambda g, x: g.ArgMax(x, axis=1)):
        g = Builder()
        x = g.Relu(g.gemm(g.Relu(g.gemm(g.input("x", ["n", 6]), 12)), 16))
        result = prune(g.model(end(g, g.gemm(x, 4))), data=data, threads=1)
        kept.append([group.kept for group in result.report.groups])
    assert kept[0] == kept[1]


def test_findings_are_priced_as_what_they_are_found_by() -> None:
    """Of boxes there are as many as are found, and where others are, nothing can be said of them."""
    data = np.random.default_rng(0).standard_normal((40, 3, 6, 6)).astype(np.float32)
    kept = []
    for finds in (False, True):
        g = Builder()
        x = g.Relu(g.conv(g.Relu(g.conv(g.input("x", [1, 3, 6, 6]), 12)), 16))
        scores = g.Reshape(g.Sigmoid(g.conv(x, 2, 1)), g.const([1, 2, 36]))
        boxes = g.Transpose(g.Reshape(g.conv(x, 4, 1), g.const([1, 4, 36])), perm=[0, 2, 1])
        outputs = [scores, boxes]
        if finds:
            found = g.NonMaxSuppression(boxes, scores, g.const([9]), g.const(0.5), g.const(0.5))
            outputs = [g.Gather(boxes, g.Gather(found, g.const(2), axis=1), axis=1), found]
        kept.append([group.kept for group in prune(g.model(*outputs), data=data, threads=1).report.groups])
    assert kept[0] == kept[1]


def test_a_softmax_of_the_input_is_compared_itself() -> None:
    g = Builder(seed=0)
    graph = analysed(g.model(g.Softmax(g.input("x", ["n", 4]))))[0].graph
    assert unsquashed(graph, graph.outputs[0]) == graph.outputs[0]


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


@pytest.mark.parametrize(
    ("size", "frontier", "threads"),
    [(10, 1 << 30, 1), (3, 1 << 30, 1), (4, 0, 1), (4, 0, 2)],
    ids=["whole", "parts", "files", "threads"],
)
def test_variants_are_measured_as_whole_models(size: int, frontier: int, threads: int) -> None:
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
    given = {
        group: Variants(sorted(options[0]), options.__getitem__, len(options)) for group, options in variants.items()
    }
    runtime, room = replace(RUNTIME, threads=threads), Room(1 << 30, frontier=frontier)
    found = measure(analysis, given, Batches(data, size, 0), runtime, Progress(), room)
    assert found.keys() == places.keys()
    for group, options in variants.items():
        assert len(found[group]) == 3
        for option, damage in zip(options, found[group], strict=True):
            arrays = {k: v.astype(np.float32) for k, v in option.items()}
            outputs = dict(zip(graph.outputs, run(changed(graph.model, arrays), feeds), strict=True))
            direct = deviation(expected, outputs) / 10
            assert damage == pytest.approx(direct, rel=1e-3, abs=1e-9)
        assert min(found[group][:2]) > 1e-6
        assert abs(found[group][2]) < 1e-9


def test_variants_of_another_network_are_compared_with_what_is_its_own() -> None:
    analysis = analysed(network())[0]
    graph, rng = analysis.graph, np.random.default_rng(0)
    weights = {n.label: n.inputs[1] for n in graph.nodes if n.op in ("Conv", "Gemm")}

    def other(name: str) -> np.ndarray:
        return graph.array(name) * rng.uniform(0.5, 1.5, graph.array(name).shape).astype(np.float32)

    base = {weights[n]: other(weights[n]) for n in ("stem", "a2", "late")}
    options, reference = (
        [{weights["b1"]: other(weights["b1"])} for _ in range(2)],
        {weights["b1"]: other(weights["b1"])},
    )
    variants = {0: Variants([weights["b1"]], options.__getitem__, 2, lambda: reference)}
    x = np.random.default_rng(1).standard_normal((10, 3, 6, 6)).astype(np.float32)
    data = load_calibration(x, graph.inputs)
    feeds = data.feeds(range(10))
    found = measure(analysis, variants, Batches(data, 4, 0), RUNTIME, Progress(), Room(1 << 30), base)

    def outputs(variant: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(graph.outputs, run(changed(graph.model, {**base, **variant}), feeds), strict=True))

    compared = yardsticks([dict(zip(graph.outputs, run(graph.model, feeds), strict=True))])
    for option, damage in zip(options, found[0], strict=True):
        assert damage == pytest.approx(deviation(outputs(reference), outputs(option), compared) / 10, rel=1e-3)
        assert damage > 1e-6


def test_groups_without_variants_are_left_out() -> None:
    analysis = analysed(network())[0]
    weight = next(n.inputs[1] for n in analysis.graph.nodes if n.label == "b1")
    data = load_calibration(np.zeros((2, 3, 6, 6), np.float32), analysis.graph.inputs)
    one = {weight: analysis.graph.array(weight)}
    variants = {
        0: Variants([], {}.__getitem__, 0),
        1: Variants([weight], [one].__getitem__, 1),
        2: Variants([], [{}].__getitem__, 1),
    }
    found = measure(analysis, variants, Batches(data, 2, 0), RUNTIME, Progress(), Room(1 << 30))
    assert found.keys() == {1, 2} and found[2] == [np.inf]  # nothing that is stored says what that would cost


def test_an_output_that_is_a_list_of_tensors_is_no_answer_to_measure() -> None:
    g = Builder()
    y = g.conv(g.Relu(g.conv(g.input("x", ["n", 3, 8, 8]), 8)), 4)
    model = g.model(y)
    model.graph.node.append(helper.make_node("SplitToSequence", [y], ["parts"], axis=1))
    model.graph.output.append(helper.make_tensor_sequence_value_info("parts", onnx.TensorProto.FLOAT, None))
    x = np.random.default_rng(0).standard_normal((20, 3, 8, 8)).astype(np.float32)
    result = prune(model, data=x, speedup=1.5, threads=1)
    whole, parts = run(result.model, {"x": x})
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    assert result.report.achieved.macs >= 1.5


def test_an_input_that_is_handed_through_is_no_answer_to_measure() -> None:
    g = Builder()
    x = g.input("x", ["n", 3, 8, 8])
    model = g.model(g.conv(g.Relu(g.conv(x, 8)), 4))
    model.graph.output.append(model.graph.input[0])
    images = np.random.default_rng(0).standard_normal((20, 3, 8, 8)).astype(np.float32)
    result = prune(model, data=images, speedup=1.5, threads=1)
    np.testing.assert_array_equal(run(result.model, {"x": images})[1], images)
    assert result.report.achieved.macs >= 1.5
