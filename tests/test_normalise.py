"""What normalisation does to a graph: it computes the same, and says it more plainly."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builder import RUNTIME, Builder, analysed, pruned, run, table
from onnx import TensorProto, helper, numpy_helper

from onnxprune.graph import Graph
from onnxprune.normalise import normalise
from onnxprune.plan import Plan
from onnxprune.rewrite import CannotRepair, rewrite
from onnxprune.runtime import expose


def plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """The normalised model, after it has computed the same."""
    found, _ = normalise(Graph(model), RUNTIME)
    rng = np.random.default_rng(0)
    feeds = {
        spec.name: rng.standard_normal([d or 3 for d in spec.shape]).astype(spec.dtype) for spec in Graph(model).inputs
    }
    for a, b in zip(run(model, feeds), run(found, feeds), strict=True):
        np.testing.assert_array_equal(a, b)
    return found


def ops(model: onnx.ModelProto) -> list[str]:
    """The operators of the main graph."""
    return [node.op_type for node in model.graph.node]


def branch(
    name: str, *nodes: onnx.NodeProto, output: str, stored: tuple[onnx.TensorProto, ...] = ()
) -> onnx.GraphProto:
    """A body that takes everything from outside."""
    return helper.make_graph(list(nodes), name, [], [helper.make_empty_tensor_value_info(output)], list(stored))


def one_or_other(g: Builder, x: str, condition: str) -> str:
    """``x`` otherwise if the condition says so, as exporters write it (with Squeeze)."""
    then = branch("then", helper.make_node("Neg", [x], ["inner"]), output="inner")
    other = branch("else", helper.make_node("Identity", [x], ["inner"]), output="inner")
    return g.node("If", condition, then_branch=then, else_branch=other)


def size_is_one(g: Builder, x: str, axis: int) -> str:
    return g.Equal(g.Gather(g.node("Shape", x), g.const(axis), axis=0), g.const(1))


@pytest.mark.parametrize("batch", [2, "n"])
def test_an_if_on_a_static_size_is_inlined_whatever_the_batch(batch: int | str) -> None:
    g = Builder()
    x = g.Relu(g.node("Conv", g.input("x", [batch, 3, 6, 6]), g.weight(4, 3, 3, 3)))
    y = one_or_other(g, x, size_is_one(g, x, 1))
    y = one_or_other(g, y, size_is_one(g, y, 1))  # the same names within
    model = g.model(g.node("Conv", y, g.weight(2, 4, 1, 1)))
    assert "If" not in ops(plain(model))
    analysis, _ = analysed(model)
    assert [info.units for info in analysis.groups] == [4]


def test_an_if_on_a_dynamic_size_stays() -> None:
    g = Builder()
    x = g.Relu(g.node("Conv", g.input("x", [2, 3, "h", 6]), g.weight(4, 3, 1, 1)))
    assert "If" in ops(plain(g.model(one_or_other(g, x, size_is_one(g, x, 2)))))


def test_a_constant_condition_chooses_among_weights_within() -> None:
    g = Builder()
    x = g.input("x", [2, 4])
    taken = g.const(np.ones((4, 4)), "w")
    bodies = [
        branch(
            name,
            helper.make_node("MatMul", [x, "inner_w"], ["h"]),
            helper.make_node("Add", ["h", taken_name], ["y"]),
            output="y",
            stored=(numpy_helper.from_array(np.full((4, 4), value, np.float32), "inner_w"),),
        )
        for name, value, taken_name in (("then", 2.0, "bias"), ("else", 3.0, "bias"))
    ]
    g.const(np.zeros(4), "bias")
    condition = g.Not(g.const(np.array(True)))
    y = g.node("If", condition, then_branch=bodies[0], else_branch=bodies[1])
    found = plain(g.model(g.MatMul(y, taken)))
    assert ops(found) == ["MatMul", "Add", "MatMul"]


def test_a_function_of_the_model_is_inlined() -> None:
    g = Builder()
    g.domains["local"] = 1
    x = g.node("Conv", g.input("x", [2, 3, 6, 6]), g.weight(4, 3, 3, 3, name="a.w"), name="a")
    y = g.node("twice", x, domain="local")
    model = g.model(g.node("Conv", y, g.weight(2, 4, 1, 1, name="b.w"), name="b"))
    body = [helper.make_node("Add", ["t", "t"], ["sum"]), helper.make_node("Relu", ["sum"], ["u"])]
    opset = [helper.make_opsetid("", g.opset)]
    model.functions.append(helper.make_function("local", "twice", ["t"], ["u"], body, opset))
    assert ops(plain(model)) == ["Conv", "Add", "Relu", "Conv"]
    assert table(analysed(model)[0]) == ["a x4: a.w.0:1 b.w.1:1"]


def test_aliases_of_one_weight_are_cut_apart() -> None:
    g = Builder()
    w = g.weight(4, 3, 1, 1, name="w")
    x, z = g.input("x", [2, 3, 6, 6]), g.input("z", [2, 3, 6, 6])
    ends = []
    for k, (source, weight) in enumerate(((x, w), (z, g.Identity(w)))):
        y = g.node("Conv", source, weight, name=f"in{k}")
        ends.append(g.node("Conv", y, g.weight(2, 4, 1, 1), name=f"out{k}"))
    new, analysis, _, proof = pruned(g.model(*ends), share=0.5)
    assert [info.name for info in analysis.groups] == ["in0", "in1"]
    assert proof.max_relative_difference < 1e-5
    assert len(new.graph.initializer) == 4


def test_quantised_weights_stay_quantised_and_are_cut_with_their_scales() -> None:
    g = Builder()

    def quantised(x: str, out: int, channels: int, name: str) -> str:
        scale = g.const(g.rng.uniform(0.01, 0.02, out), f"{name}.scale")
        weight = g.const(g.rng.integers(-100, 100, (out, channels, 3, 3)), f"{name}.w", np.int8)
        weight = g.DequantizeLinear(weight, scale, g.const(np.zeros(out), dtype=np.int8), axis=0)
        bias = g.const(g.rng.integers(-99, 99, out), f"{name}.b", np.int32)
        bias = g.DequantizeLinear(bias, g.const(np.full(out, 0.01)), g.const(np.zeros(out), dtype=np.int32), axis=0)
        return g.node("Conv", x, weight, bias, name=name, pads=[1] * 4)

    def activation(x: str) -> str:
        scale, point = g.const(np.float32(0.05)), g.const(np.array(120), dtype=np.uint8)
        return g.DequantizeLinear(g.QuantizeLinear(x, scale, point), scale, point)

    x = activation(g.input("x", [2, 3, 6, 6]))
    y = activation(g.Relu(quantised(x, 8, 3, "a")))
    new, analysis, _, proof = pruned(g.model(quantised(y, 5, 8, "b")), share=0.5)
    assert [info.units for info in analysis.groups] == [8]
    assert proof.max_relative_difference < 1e-5
    sizes = {t.name: (tuple(t.dims), t.data_type) for t in new.graph.initializer}
    assert sizes["a.w"] == ((4, 3, 3, 3), TensorProto.INT8)
    assert sizes["b.w"] == ((5, 4, 3, 3), TensorProto.INT8)
    assert sizes["a.scale"] == ((4,), TensorProto.FLOAT)


def test_a_size_that_cannot_be_traced_names_the_axes_to_freeze() -> None:
    g = Builder()
    x = g.node("Conv", g.input("x", ["n", 3, "t"]), g.weight(8, 3, 1), name="a")
    shape = g.node("Shape", x)
    one, two = (g.Gather(shape, g.const([k]), axis=0) for k in (1, 2))
    length = g.Div(g.Mul(one, two), g.const([8]))  # right only while there are eight channels
    target = g.Concat(g.Gather(shape, g.const([0]), axis=0), g.const([8]), length, axis=0)
    y = g.Reshape(x, target)
    analysis, _ = analysed(g.model(g.node("Conv", y, g.weight(2, 8, 1), name="b")))
    half = Plan("", {info.name: tuple(range(info.units // 2)) for info in analysis.groups})
    with pytest.raises(CannotRepair, match=r"Reshape .* takes sizes from .*, which cannot be traced") as caught:
        rewrite(analysis, half)
    assert caught.value.axes == (1,)


@pytest.mark.parametrize("sizes", [np.array([2, 4]), np.array(4), np.array(3)])
def test_a_list_of_parts_is_written_out(sizes: np.ndarray) -> None:
    g = Builder()
    x = g.Relu(g.conv(g.input("x", [2, 3, 6, 6]), 6))
    parts = g.SplitToSequence(x, g.const(sizes), axis=1)
    one, two = (g.SequenceAt(parts, g.const(k)) for k in (0, 1))
    both = g.ConcatFromSequence(g.SequenceConstruct(two, g.Neg(one)), axis=1)
    last = g.SequenceAt(g.SequenceConstruct(one, both), g.const(-1))
    model = g.model(g.Conv(last, g.weight(2, 6, 1, 1)))
    assert not any("Sequence" in op for op in ops(plain(model)))
    _, analysis, _, _ = pruned(model)
    assert analysis.prunable_macs == 1


@pytest.mark.parametrize("opset", [11, 17])
def test_a_list_that_grew_is_written_out(opset: int) -> None:
    g = Builder(opset)
    x = g.Relu(g.conv(g.input("x", [2, 3, 6, 6]), 6))
    grown = g.SequenceInsert(g.SequenceInsert(g.SequenceEmpty(), x), g.Neg(x), g.const(0))
    parts = g.SplitToSequence(g.Abs(x), g.const([2, 4]), axis=1)
    grown = g.SequenceErase(g.SequenceInsert(grown, g.Tanh(x)), g.const(-2))  # what was negated, and Tanh
    both = g.ConcatFromSequence(grown, axis=1, new_axis=1)
    count = g.Cast(g.SequenceLength(grown), to=TensorProto.FLOAT)
    y = g.Div(g.Add(g.ReduceMax(both, axes=[1], keepdims=0), g.ConcatFromSequence(parts, axis=1)), count)
    model = g.model(g.Conv(y, g.weight(2, 6, 1, 1)))
    assert not any("Sequence" in op for op in ops(plain(model)))
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)}
    np.testing.assert_allclose(run(plain(model), feeds)[0], run(model, feeds)[0], rtol=1e-6, atol=1e-6)
    _, analysis, _, _ = pruned(model)
    assert analysis.prunable_macs == 1


def test_a_list_that_is_read_at_a_computed_place_stays() -> None:
    g = Builder()
    place = g.Cast(g.ReduceMax(g.input("k", [1]), keepdims=0), to=TensorProto.INT64)
    model = g.model(g.SequenceAt(g.SplitToSequence(g.input("x", [4, 6]), g.const(2)), place))
    found, _ = normalise(Graph(model), RUNTIME)
    assert [op for op in ops(found) if "Sequence" in op] == ["SplitToSequence", "SequenceAt"]


def test_layers_that_start_from_the_same_zeros_have_nothing_to_do_with_one_another() -> None:
    g = Builder()
    x = g.input("x", [2, "t", 5])
    start = g.ConstantOfShape(g.Concat(g.const([1]), g.Gather(g.Shape(x), g.const([0])), g.const([12]), axis=0))
    steps, found = g.Transpose(x, perm=[1, 0, 2]), []
    for size in (5, 12, 12):
        weights = g.weight(1, 36, size), g.weight(1, 36, 12), g.weight(1, 72)
        made = g.node("GRU", steps, *weights, "", start, hidden_size=12, outputs=2)
        steps, last = g.Squeeze(made[0], g.const([1])), g.Squeeze(made[1], g.const([0]))
        found.append(last)
    model = g.model(found[0], g.gemm(found[2], 3))  # the first state is an output, and stays
    starts = [node.output[0] for node in plain(model).graph.node if node.op_type == "ConstantOfShape"]
    assert len(set(starts)) == 3
    new, analysis, _, _ = pruned(model)
    assert len(analysis.groups) == 2 and not [f for f in analysis.frozen if "no rule" in f.reason]
    assert run(new, analysis.shapes.probes[0].feeds)[0].shape == (2, 12)


@pytest.mark.parametrize("copied", [False, True])
def test_what_is_computed_of_a_table_that_layers_read_follows_its_channels(copied: bool) -> None:
    """A codebook: distances of its vectors, whose norms follow from constants alone, and the nearest one picked.

    Exporters turn it beforehand; distances are then no matter of the channels that the decoder does without.
    """
    g = Builder()
    x = g.Relu(g.conv(g.input("x", [2, 3, 6, 6]), 12, name="encoder"))
    z = g.Transpose(g.conv(x, 8, name="code"), perm=[0, 2, 3, 1])
    book = g.weight(12, 8, name="book")
    norms = g.ReduceSum(g.Mul(book, book), g.const([1]), keepdims=0)
    whole = numpy_helper.to_array(g.initializers[-2])
    turned = g.const(whole.T) if copied else g.Transpose(book, perm=[1, 0])
    distance = g.Sub(norms, g.Mul(g.MatMul(z, turned), g.const(2.0)))
    picked = g.Transpose(g.Gather(book, g.ArgMin(distance, axis=-1, keepdims=0)), perm=[0, 3, 1, 2])
    model = g.model(g.node("Conv", picked, g.weight(4, 8, 1, 1), name="decoder"))
    new, _, _, proof = pruned(model)
    assert proof.max_relative_difference < 1e-6
    left = next(numpy_helper.to_array(t) for t in new.graph.initializer if t.name == "book")
    assert left.shape == (12, 4)
    got = run(expose(new, [norms]), {"x": np.zeros((2, 3, 6, 6), np.float32)}, [norms])[0]
    np.testing.assert_allclose(got, np.square(whole if copied else left).sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("same", [False, True])
def test_a_bias_that_layers_share_is_cut_once(same: bool) -> None:
    """Exporters write a turned copy of a shared weight for every use; biases of one number are shared by chance."""
    g = Builder()
    bias = g.const(np.full(12, 0.5) if same else g.rng.standard_normal(12), name="bias")
    x, outs = g.input("x", [2, 7, 6]), []
    for name in ("first", "second"):
        hidden = g.Add(g.node("MatMul", x, g.weight(6, 12), name=name), bias)
        outs.append(g.linear(g.Relu(hidden), 3))
    new, analysis, _, _ = pruned(g.model(*outs))
    assert [info.producers for info in analysis.groups] == (
        [("first",), ("second",)] if same else [("first", "second")]
    )
    if not same:
        assert [tuple(t.dims) for t in new.graph.initializer if t.name.startswith("bias")] == [(6,)]
