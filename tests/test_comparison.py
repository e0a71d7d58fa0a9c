"""Fidelity, latency and parameters of two models, on graphs whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.comparison import _Tally, common_inputs, compare, measure_fidelity, wilson
from onnxprune.cost import measure_latency, params
from onnxprune.data import load_calibration
from onnxprune.errors import InputError
from onnxprune.graph import Graph
from onnxprune.report.text import fidelity_lines
from onnxprune.runtime import Runtime

CPU = Runtime("cpu", 1)
KINDS = {"f": TensorProto.FLOAT, "d": TensorProto.DOUBLE, "i": TensorProto.INT64}


def linear(
    weight,
    *,
    batch: int | str = "N",
    input_name="x",
    output_name="y",
    kind="f",
    more_outputs=(),
    out_shape=None,
) -> onnx.ModelProto:
    """y = x @ weight, and what else is asked for."""
    weight = np.asarray(weight, {"f": np.float32, "d": np.float64}[kind])
    nodes = [helper.make_node("MatMul", [input_name, "w"], [output_name], "layer")]
    outputs = [helper.make_tensor_value_info(output_name, KINDS[kind], out_shape or [batch, weight.shape[1]])]
    for op, name, element in more_outputs:
        nodes.append(helper.make_node(op, [output_name], [name], name))
        outputs.append(helper.make_tensor_value_info(name, KINDS[element], None))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info(input_name, KINDS[kind], [batch, weight.shape[0]])],
        outputs,
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])


def rows(count=40, width=3, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def fidelity(a, b, data, batch=7):
    return measure_fidelity(a, b, load_calibration(data, Graph(a).inputs), batch, CPU)


EYE = np.eye(3)
SWAPPED = EYE[:, [1, 0, 2]]


def test_a_model_agrees_with_itself():
    found = fidelity(linear(EYE), linear(EYE), rows())
    assert found.samples == 40
    assert found.agreement == found.agreement_high == 1.0
    assert found.agreement_low == pytest.approx(wilson(40, 40)[0], abs=0)
    assert found.relative_error == {"y": 0.0}
    assert not found.is_random


@pytest.mark.parametrize("batch", [1, 7, 40, 1000])
def test_numbers_are_those_of_numpy(batch):
    data = rows()
    found = fidelity(linear(EYE), linear(SWAPPED), data, batch)
    other = data[:, [1, 0, 2]]
    assert found.agreement == np.mean(data.argmax(1) == other.argmax(1))
    assert found.relative_error["y"] == pytest.approx(np.linalg.norm(data - other) / np.linalg.norm(data), rel=1e-6)
    assert (found.agreement_low, found.agreement_high) == wilson(round(40 * found.agreement), 40)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998, table I, method 3 (score without continuity correction)
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval_is_that_of_the_literature(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_fixed_batches_and_other_outputs():
    more = [("ArgMax", "best", "i"), ("Relu", "positive", "f")]
    model = linear(EYE, batch=4, more_outputs=more)
    found = fidelity(model, model, rows(24))
    assert found.samples == 24
    assert list(found.relative_error) == ["y", "positive"]
    assert found.equal == {"best": 1.0}


def test_outputs_of_whole_numbers_are_counted_where_they_are_the_same():
    """As the classes that a network ends in; where one of two outputs has more of them, none are."""
    first, second = (linear(EYE[:, order], more_outputs=[("ArgMax", "best", "i")]) for order in ([0, 1, 2], [0, 2, 1]))
    data = load_calibration(rows(), Graph(first).inputs)
    found = measure_fidelity(first, second, data, 8, CPU)
    best = data.feeds(range(40))["x"].reshape(5, 8, 3).argmax(axis=1)  # of every batch, along its first axis
    assert found.equal == {"best": (best == best[:, [0, 2, 1]]).mean()} and 0 < found.equal["best"] < 1
    assert "same output" in " ".join(fidelity_lines(found)) and not found.doubts
    tally = _Tally(["found"])
    tally.add([np.arange(3)], [np.arange(3)])
    tally.add([np.arange(3)], [np.arange(5)])
    assert tally.fidelity(2, False).equal == {"found": 3 / 8}


def test_what_has_another_shape_is_said_to_be_no_counterpart():
    tally = _Tally(["boxes"])
    tally.add([np.ones((3, 4))], [np.ones((2, 4))])
    (doubt,) = tally.fidelity(1, False).doubts
    assert "'boxes' has another shape" in doubt


@pytest.mark.parametrize("weight", [np.ones((3, 1)), np.ones((3, 4))[:, :1]])
def test_no_agreement_without_classes(weight):
    found = fidelity(linear(weight), linear(weight), rows())
    assert (found.agreement, found.agreement_low, found.agreement_high) == (None, None, None)
    assert found.samples == 40
    assert found.relative_error == {"y": 0.0}


def test_errors_that_are_not_finite():
    nothing, something = linear(np.zeros((3, 2))), linear(np.ones((3, 2)))
    assert fidelity(nothing, nothing, rows()).relative_error == {"y": 0.0}
    assert fidelity(nothing, something, rows()).relative_error == {"y": math.inf}
    assert math.isnan(fidelity(linear(np.full((3, 2), np.nan)), something, rows()).relative_error["y"])


@pytest.mark.parametrize(
    ("other", "fragment"),
    [
        (linear(EYE, input_name="z"), "inputs: expected 'x' as in the first, found 'z'"),
        (linear(EYE, output_name="z"), "outputs: expected 'y' as in the first, found 'z'"),
        (linear(np.ones((4, 3))), "input 'x': expected float32 [N, 3] as in the first, found float32 [N, 4]"),
        (linear(EYE, kind="d"), "input 'x': expected float32 [N, 3] as in the first, found float64 [N, 3]"),
        (linear(EYE, more_outputs=[("Relu", "r", "f")]), "outputs: expected 'y' as in the first, found 'y', 'r'"),
    ],
)
def test_models_that_cannot_be_compared(other, fragment):
    with pytest.raises(InputError, match="the two models differ") as caught:
        compare(linear(EYE), other, data=rows())
    assert fragment in str(caught.value)


def test_a_dimension_is_fixed_where_one_of_the_two_fixes_it():
    (spec,) = common_inputs(linear(EYE), linear(EYE, batch=4))
    assert spec.shape == (4, 3)
    assert compare(linear(EYE), linear(EYE, batch=4), data=rows()).fidelity.agreement == 1.0


def test_models_that_the_runtime_cannot_run():
    model = linear(EYE)
    model.graph.input[0].type.tensor_type.shape.dim[1].ClearField("dim_value")
    with pytest.raises(InputError, match="cannot run the model on the data"):
        fidelity(model, model, rows(width=4))


def test_comparison_of_costs():
    found = compare(linear(np.ones((3, 8))), linear(np.ones((3, 4))), data=rows(), batch_size=5)
    assert (found.a.macs, found.b.macs) == (24, 12)
    assert (found.a.params, found.b.params) == (24, 12)
    assert found.a.bytes > found.b.bytes > 48
    assert found.batch == 5
    assert found.a.latency_ms.runs == found.b.latency_ms.runs >= 10
    assert math.isinf(found.fidelity.relative_error["y"])  # shapes differ
    assert found.fidelity.agreement is None


def test_random_data_say_so():
    found = compare(linear(EYE), linear(EYE), samples=5)
    assert found.fidelity.is_random and found.fidelity.samples == 5
    assert "random numbers" in found.warnings[0]


@pytest.mark.parametrize("batch_size", [0, -3])
def test_batch_size_below_one(batch_size):
    with pytest.raises(InputError, match="batch size: expected at least 1"):
        compare(linear(EYE), linear(EYE), batch_size=batch_size)


# ----------------------------------------------------------------------------------------------- cost


def test_latencies_come_in_the_models_order_with_equal_runs():
    small, large = linear(np.ones((256, 4))), linear(np.ones((256, 4096)))
    feeds = {"x": rows(64, 256)}
    found = measure_latency([small, large.SerializeToString()], feeds, CPU, seconds=0.1, min_runs=12, max_runs=20)
    assert found[0].runs == found[1].runs and 12 <= found[0].runs <= 20
    for each in found:
        assert 0 < each.p10 <= each.median <= each.p90


@pytest.mark.parametrize(("seconds", "runs"), [(0.0, 3), (1e9, 6)])
def test_bounds_of_the_number_of_runs(seconds, runs):
    (found,) = measure_latency([linear(EYE)], {"x": rows()}, CPU, seconds=seconds, min_runs=3, max_runs=6)
    assert found.runs == runs


@pytest.mark.parametrize("feeds", [{"x": rows(width=4)}, {}, {"z": rows()}])
def test_latency_of_feeds_that_do_not_suit(feeds):
    with pytest.raises(InputError, match="cannot run the model on the inputs that it is timed with"):
        measure_latency([linear(EYE)], feeds, CPU)


def test_parameters_count_floats_only():
    model = linear(np.ones((3, 5)))
    model.graph.initializer.append(numpy_helper.from_array(np.arange(7), "shape"))
    tensor = numpy_helper.from_array(np.ones((2, 2), np.float16), "c")
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    assert params(model) == 15 + 4
