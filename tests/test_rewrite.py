"""Laws of whole graphs, and every way in which a graph states a size."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from builder import RUNTIME, Builder, analysed, pruned, random_plan, run, shapes_of
from onnx import TensorProto, helper, numpy_helper

from onnxprune.analysis import Analysis
from onnxprune.costs import CostModel
from onnxprune.counting import count_model_macs, nominal_shapes
from onnxprune.plan import Plan, removed_positions
from onnxprune.rewrite import rewrite
from onnxprune.verify import prove, silence

# ------------------------------------------------------------------------------------------------------------ graphs

GRAPHS: dict[str, Callable[[], onnx.ModelProto]] = {}


def graph(make: Callable[[], onnx.ModelProto]) -> Callable[[], onnx.ModelProto]:
    """Register a graph of which something can go."""
    GRAPHS[make.__name__] = make
    return make


def image(g: Builder, *, dynamic: bool = False) -> str:
    """An input of images, of any batch and size if it is dynamic."""
    return g.input("x", ["n", 3, "h", "w"] if dynamic else [2, 3, 6, 6])


@graph
def residual() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.batch_norm(g.conv(image(g), 8)))
    x = g.Relu(g.Add(x, g.conv(g.Relu(g.conv(x, 6)), 8)))
    return g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 5))


@graph
def unet() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.conv(image(g), 4))
    y = g.Relu(g.conv(g.MaxPool(x, kernel_shape=[2, 2], strides=[2, 2]), 6))
    y = g.Resize(y, "", g.const(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
    return g.model(g.conv(g.Relu(g.conv(g.Concat(x, y, axis=1), 5)), 2))


@graph
def reshape_to_constants() -> onnx.ModelProto:
    g = Builder()
    return g.model(g.gemm(g.Reshape(g.conv(image(g), 4), g.const([2, 144])), 5))


@graph
def reshape_to_constants_of_a_node() -> onnx.ModelProto:
    g = Builder()
    target = g.node("Constant", value=numpy_helper.from_array(np.array([2, 144])))
    return g.model(g.gemm(g.Reshape(g.conv(image(g), 4), target), 5))


@graph
def reshape_to_zero_and_minus_one() -> onnx.ModelProto:
    g = Builder()
    x = g.Reshape(g.conv(image(g), 4), g.const([0, 0, -1]))
    return g.model(g.Relu(g.MatMul(g.weight(7, 4), x)))


@graph
def reshape_of_sequences() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.linear(g.input("x", ["n", "t", 6]), 12))
    x = g.Reshape(x, g.const([0, -1, 3, 4]))
    x = g.Reshape(g.Tanh(g.Transpose(x, perm=[0, 2, 1, 3])), g.const([0, 3, -1, 4]))
    x = g.Reshape(g.Transpose(x, perm=[0, 2, 1, 3]), g.const([0, 0, 12]))
    return g.model(g.linear(x, 5))


def sizes(g: Builder, x: str, *axes: int | str) -> str:
    """A shape that is put together as exporters do: an integer is that axis of x, a text a number."""
    shape = g.node("Shape", x)
    parts = []
    for axis in axes:
        if isinstance(axis, int):
            part = g.Unsqueeze(g.Gather(shape, g.const(np.array(axis)), axis=0), g.const([0]))
        else:
            part = g.const([int(axis)])
        parts.append(part)
    return g.Concat(*parts, axis=0)


@graph
def reshape_to_computed_sizes() -> onnx.ModelProto:
    g = Builder()
    x = g.conv(image(g), 4)
    return g.model(g.gemm(g.Reshape(x, sizes(g, x, 0, "-1")), 5))


@graph
def reshape_to_computed_sizes_and_a_number() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.conv(image(g, dynamic=True), 4))
    y = g.Transpose(g.Reshape(x, sizes(g, x, 0, "4", "-1")), perm=[0, 2, 1])
    y = g.Reshape(g.Transpose(y, perm=[0, 2, 1]), sizes(g, x, 0, "4", 2, 3))
    return g.model(g.conv(y, 5, bias=False, name="last") if False else g.Conv(y, g.weight(5, 4, 3, 3)))


@graph
def reshape_to_a_product_of_sizes() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.conv(image(g, dynamic=True), 4))
    shape = g.node("Shape", x)
    n, c, h, w = (g.Gather(shape, g.const([k]), axis=0) for k in range(4))
    y = g.Reshape(x, g.Concat(n, c, g.Mul(h, w), axis=0))
    y = g.Reshape(g.Sigmoid(y), g.Concat(n, c, h, w, axis=0))
    return g.model(g.Conv(y, g.weight(5, 4, 3, 3)))


@graph
def one_shape_for_several_reshapes() -> onnx.ModelProto:
    g = Builder()
    x = g.input("x", ["n", "t", 6])
    target = sizes(g, x, 0, 1, "3", "4")
    q, k, v = (
        g.Transpose(g.Reshape(g.linear(x, 12), target), perm=p) for p in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    )
    y = g.Transpose(g.MatMul(g.Softmax(g.MatMul(q, k), axis=-1), v), perm=[0, 2, 1, 3])
    return g.model(g.linear(g.Reshape(y, sizes(g, x, 0, 1, "12")), 6))


@graph
def shuffle_with_computed_groups() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.conv(image(g, dynamic=True), 6))
    shape = g.node("Shape", x)
    n, c, h, w = (g.Gather(shape, g.const([k]), axis=0) for k in range(4))
    two = g.const([2])
    y = g.Reshape(x, g.Concat(n, two, g.Div(c, two), h, w, axis=0))
    y = g.Reshape(g.Transpose(y, perm=[0, 2, 1, 3, 4]), g.Concat(n, g.const([-1]), h, w, axis=0))
    return g.model(g.Conv(y, g.weight(5, 6, 3, 3)))


@graph
def a_size_used_as_a_value() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.linear(g.input("x", ["n", "t", 6]), 9))
    width = g.Cast(g.Gather(g.node("Shape", x), g.const(np.array(-1)), axis=0), to=TensorProto.FLOAT)
    return g.model(g.linear(g.Div(x, g.Sqrt(width)), 5))


@graph
def resize_to_computed_sizes() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.conv(image(g, dynamic=True), 4))
    y = g.Relu(g.node("Conv", x, g.weight(6, 4, 3, 3), pads=[1] * 4, strides=[2, 2]))
    front = g.Slice(g.node("Shape", y), g.const([0]), g.const([2]), g.const([0]))
    back = g.Slice(g.node("Shape", x), g.const([2]), g.const([4]), g.const([0]))
    y = g.Resize(y, "", "", g.Concat(front, back, axis=0), mode="nearest")
    return g.model(g.Conv(g.Concat(x, y, axis=1), g.weight(2, 10, 3, 3)))


@graph
def resize_to_constant_sizes() -> onnx.ModelProto:
    g = Builder()
    x = g.Resize(g.conv(image(g), 4), "", "", g.const([2, 4, 9, 9]), mode="nearest")
    return g.model(g.Conv(x, g.weight(2, 4, 3, 3)))


@graph
def split_into_sizes() -> onnx.ModelProto:
    g = Builder()
    one, two = g.node("Split", g.conv(image(g), 7), g.const([3, 4]), outputs=2, axis=1)
    return g.model(g.conv(one, 3), g.conv(g.Relu(two), 2))


@graph
def split_evenly() -> onnx.ModelProto:
    g = Builder(opset=18)
    one, two = g.node("Split", g.conv(image(g), 8), outputs=2, axis=1, num_outputs=2)
    return g.model(g.conv(one, 3), g.conv(g.Relu(two), 2))


@graph
def slices_of_channels() -> onnx.ModelProto:
    g = Builder()
    x = g.conv(image(g), 7)
    one = g.Slice(x, g.const([0]), g.const([3]), g.const([1]))
    two = g.Slice(x, g.const([3]), g.const([2**62]), g.const([1]), g.const([1]))
    return g.model(g.conv(g.Relu(one), 3), g.conv(two, 2))


@graph
def slices_at_computed_bounds() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.conv(image(g, dynamic=True), 8))
    shape = g.node("Shape", x)
    half = g.Div(g.Gather(shape, g.const([1]), axis=0), g.const([2]))
    one = g.Slice(x, g.const([0]), half, g.const([1]))
    two = g.Slice(x, half, g.Mul(half, g.const([2])), g.const([1]))
    return g.model(g.Conv(g.Mul(one, g.Sigmoid(two)), g.weight(3, 4, 1, 1)))


@graph
def focus_slices() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.conv(image(g), 4))
    parts = []
    for i in (0, 1):
        rows = g.Slice(x, g.const([i]), g.const([2**31]), g.const([2]), g.const([2]))
        parts += [g.Slice(rows, g.const([j]), g.const([2**31]), g.const([3]), g.const([2])) for j in (0, 1)]
    return g.model(g.conv(g.Concat(*parts, axis=1), 3))


@graph
def gather_of_channels() -> onnx.ModelProto:
    g = Builder()
    return g.model(g.conv(g.Gather(g.conv(image(g), 6), g.const([0, 3, 1, 4, 2, 5]), axis=1), 3))


@graph
def gather_with_negative_indices() -> onnx.ModelProto:
    g = Builder()
    return g.model(g.conv(g.Gather(g.conv(image(g), 6), g.const([-1, -2, 0, 1]), axis=1), 3))


@graph
def pad_of_channels() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.conv(image(g), 4))
    short = g.Pad(x, g.const([0, 1, 0, 0, 0, 2, 0, 0]))
    return g.model(g.conv(g.Add(short, g.conv(x, 7)), 2))


@graph
def expanded_token() -> onnx.ModelProto:
    g = Builder()
    x = g.linear(g.input("x", ["n", "t", 6]), 8)
    token = g.Expand(g.weight(1, 1, 8, name="token"), sizes(g, x, 0, "1", "8"))
    return g.model(g.linear(g.Relu(g.Concat(token, x, axis=1)), 5))


@graph
def response_normalisation() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.conv(image(g), 8))
    energy = g.ReduceL2(x, axes=[2, 3])
    share = g.Div(energy, g.Add(g.ReduceMean(energy, axes=[1]), g.const(1e-6)))
    return g.model(g.conv(g.Mul(x, share), 3))


@graph
def embedding_and_root_mean_square() -> onnx.ModelProto:
    """A stream of a width that only its own layers see: the table's columns are silenced, and the mean counts on."""
    g = Builder()
    x = g.Gather(g.weight(11, 16, name="table"), g.input("tokens", [2, 5], TensorProto.INT64))

    def unit(x: str) -> str:
        mean = g.ReduceMean(g.Pow(x, g.const(2.0)), axes=[-1], keepdims=1)
        return g.Mul(g.Div(x, g.Sqrt(g.Add(mean, g.const(1e-5)))), g.weight(16))

    x = g.Add(x, g.linear(g.Relu(g.linear(unit(x), 12)), 16))
    return g.model(g.linear(unit(x), 3))


@graph
def block_assignment() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.conv(image(g), 6))
    rows = np.meshgrid(np.arange(2), np.arange(6), np.arange(1, 6), indexing="ij")
    part = g.Slice(g.conv(x, 6), g.const([0]), g.const([5]), g.const([2]))
    return g.model(g.conv(g.ScatterND(x, g.const(np.stack(rows, axis=-1)), part), 3))


@graph
def heads_beside_the_batch() -> onnx.ModelProto:
    g = Builder()
    x = g.input("x", ["n", "t", 6])
    shape = g.Shape(x)
    batch, length = (g.Gather(shape, g.const([k])) for k in (0, 1))

    def heads(width: int) -> str:
        y = g.LpNormalization(g.Reshape(g.linear(x, 4 * width), g.const([0, 0, 4, width])))  # only whole heads may go
        flat = g.Concat(g.Mul(batch, g.const([4])), length, g.const([width]), axis=0)
        return g.Reshape(g.Transpose(y, perm=[0, 2, 1, 3]), flat)

    scores = g.Softmax(g.MatMul(heads(3), g.Transpose(heads(3), perm=[0, 2, 1])), axis=-1)
    back = g.Reshape(g.MatMul(scores, heads(5)), g.Concat(batch, g.const([4]), length, g.const([5]), axis=0))
    y = g.Reshape(g.Transpose(back, perm=[0, 2, 1, 3]), g.const([0, 0, 20]))
    return g.model(g.MatMul(y, g.weight(20, 5)))


@graph
def grouped_convolution() -> onnx.ModelProto:
    g = Builder()
    return g.model(g.conv(g.conv(g.Relu(g.conv(image(g), 8)), 12, group=4), 3))


@graph
def depthwise_convolution() -> onnx.ModelProto:
    g = Builder()
    return g.model(g.conv(g.conv(g.Relu(g.conv(image(g), 8)), 8, group=8), 3))


@graph
def weights_in_constant_nodes() -> onnx.ModelProto:
    g = Builder()

    def weight(*shape: int) -> str:
        return g.node("Constant", value=numpy_helper.from_array(g.rng.standard_normal(shape).astype(np.float32)))

    x = g.Conv(image(g), weight(6, 3, 3, 3), weight(6))
    return g.model(g.Conv(g.Relu(x), weight(4, 6, 3, 3)))


@graph
def shared_weights() -> onnx.ModelProto:
    g = Builder()
    w, b, v = g.weight(6, 6, 3, 3, name="w"), g.weight(6, name="b"), g.weight(2, 6, 1, 1, name="v")
    x = g.Relu(g.conv(image(g), 6, name="first"))
    one = g.Relu(g.Conv(x, w, b, pads=[1] * 4))
    two = g.Relu(g.Conv(one, w, b, pads=[1] * 4))
    return g.model(g.Conv(one, v), g.Conv(two, v))


@graph
def weights_behind_other_nodes() -> onnx.ModelProto:
    g = Builder()
    x = g.input("x", [2, 5, 6])
    one = g.Transpose(g.weight(8, 6), perm=[1, 0])
    two = g.Cast(g.Identity(g.const(np.ones((8, 4)) * 0.1, dtype=np.float64)), to=TensorProto.FLOAT)
    bias = g.Reshape(g.weight(2, 4), g.const([8]))
    return g.model(g.MatMul(g.Relu(g.Add(g.MatMul(x, one), bias)), two))


@graph
def merged_constants() -> onnx.ModelProto:
    g = Builder()
    ones, zeros = g.const(np.ones(6)), g.const(np.zeros(6))
    x = image(g)
    for _ in range(3):
        x = g.Relu(g.InstanceNormalization(g.conv(x, 6), g.Identity(ones), zeros))
    return g.model(g.conv(x, 2))


@graph
def initializers_that_are_inputs() -> onnx.ModelProto:
    g = Builder(opset=8, ir=3)
    x = g.Relu(g.batch_norm(g.conv(image(g), 6)))
    return g.model(g.gemm(g.Reshape(x, g.const([2, 216])), 5))


@graph
def attributes_of_old_opsets() -> onnx.ModelProto:
    g = Builder(opset=7)
    x = g.Relu(g.conv(image(g), 8))
    x = g.Pad(x, pads=[0, 1, 1, 0, 0, 1, 1, 0])
    one, two = g.node("Split", x, outputs=2, axis=1, split=[4, 6])
    two = g.Slice(two, starts=[1], ends=[5], axes=[1])
    y = g.Squeeze(g.Unsqueeze(g.Mul(one, g.Sigmoid(two)), axes=[0]), axes=[0])
    return g.model(g.conv(y, 3))


@graph
def old_upsampling() -> onnx.ModelProto:
    g = Builder(opset=9)
    x = g.Upsample(g.Relu(g.conv(image(g), 8)), g.const(np.array([1, 1, 2, 2], np.float32)))
    return g.model(g.Conv(x, g.weight(3, 8, 1, 1)))


@graph
def half_precision() -> onnx.ModelProto:
    g = Builder()
    x = g.Cast(image(g), to=TensorProto.FLOAT16)
    w = [g.const(g.rng.standard_normal(s) * 0.3, dtype=np.float16) for s in ((6, 3, 3, 3), (6,), (4, 6, 1, 1))]
    return g.model(g.Cast(g.Conv(g.Relu(g.Conv(x, *w[:2])), w[2]), to=TensorProto.FLOAT))


@graph
def first_state_of_zeros() -> onnx.ModelProto:
    """Zeros as many as an activation has meet weights before anything is read, as in an unrolled recurrence."""
    g = Builder(opset=13)
    x = g.input("x", ["n", 5, 6])
    inside, back, decay = g.weight(6, 12), g.weight(12, 12), g.weight(12)
    state = g.ConstantOfShape(g.Shape(g.MatMul(g.Gather(x, g.const(0), axis=1), inside)))
    for step in range(2):
        seen = g.MatMul(g.Gather(x, g.const(step), axis=1), inside)
        state = g.Tanh(g.Add(seen, g.Sub(g.MatMul(state, back), g.Mul(state, decay))))
    wide = g.Reshape(state, g.Concat(g.Slice(g.Shape(state), g.const([0]), g.const([1])), g.const([3, 4]), axis=0))
    return g.model(g.MatMul(g.Reshape(wide, g.const([0, 12])), g.weight(12, 3)))


@graph
def declared_shapes() -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(residual())


# ------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("name", GRAPHS)
def test_a_random_plan_is_proven(name: str) -> None:
    model = GRAPHS[name]()
    new, analysis, _, proof = pruned(model, seed=3)
    assert analysis.groups, "nothing to prune"
    assert proof.max_relative_difference < (2e-2 if "half" in name else 1e-5)
    assert proof.compared
    assert sum(t.ByteSize() for t in new.graph.initializer) < sum(t.ByteSize() for t in model.graph.initializer) or any(
        n.op_type == "Constant" for n in model.graph.node
    )


@pytest.mark.parametrize("name", GRAPHS)
def test_keeping_everything_changes_nothing(name: str) -> None:
    model = GRAPHS[name]()
    analysis, copies = analysed(model)
    plan = Plan("", {g.name: tuple(range(g.units)) for g in analysis.groups})
    same = rewrite(analysis, plan, copies=copies)
    for probe in analysis.shapes.probes:
        for a, b in zip(run(model, probe.feeds), run(same, probe.feeds), strict=True):
            assert np.array_equal(a, b)


def test_a_mean_in_half_precision() -> None:
    """What it has to be multiplied by is no number of that type: 12 of 23 channels."""
    g = Builder()
    x = g.Cast(image(g), to=TensorProto.FLOAT16)
    w = [g.const(g.rng.standard_normal(s) * 0.3, dtype=np.float16) for s in ((23, 3, 3, 3), (23,), (4, 23, 1, 1))]
    x = g.Relu(g.Conv(x, *w[:2]))
    x = g.Mul(x, g.ReduceMean(x, axes=[1], keepdims=1))
    new, _, plan, proof = pruned(g.model(g.Cast(g.Conv(x, w[2]), to=TensorProto.FLOAT)))
    assert [len(kept) for kept in plan.kept.values()] == [12]
    assert proof.max_relative_difference < 1e-5
    assert sum(n.op_type == "Cast" for n in new.graph.node) == 4


# a size that was scaled once is a quotient, and a quotient is not scaled: those heads stay the second time
@pytest.mark.parametrize("name", sorted(set(GRAPHS) - {"heads_beside_the_batch"}))
def test_two_prunings_compose(name: str) -> None:
    model = GRAPHS[name]()
    analysis, copies = analysed(model)
    first = random_plan(analysis, 5, 0.7)
    once = rewrite(analysis, first, copies=copies)
    again, more = analysed(once)
    second = random_plan(again, 6, 0.7)
    twice = rewrite(again, second, copies=more)
    prove(again, second, twice, [p.feeds for p in again.shapes.probes], RUNTIME)
    if numbered(again) != numbered(analysis, first):
        return  # another factor of an axis is the better one to cut by now
    kept = {}
    for group in analysis.groups:
        units = np.array(first.kept[group.name])
        kept[group.name] = tuple(units[list(second.kept[group.name])].tolist())
    direct = rewrite(analysis, Plan("", kept), copies=copies)
    for probe in analysis.shapes.probes:
        for a, b in zip(run(twice, probe.feeds), run(direct, probe.feeds), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def numbered(analysis: Analysis, plan: Plan | None = None) -> dict[tuple[str, str, int], list[list[int]]]:
    """Positions of every unit on every axis, as they are numbered after the plan."""
    gone = removed_positions(analysis, plan) if plan else {}
    found = {}
    for info in analysis.groups:
        for axis in info.group.axes:
            positions = axis.positions if plan is None else axis.positions[list(plan.kept[info.name])]
            before = gone.get((axis.tensor, axis.axis), np.empty(0, np.int64))
            found[info.name, axis.tensor, axis.axis] = (positions - np.searchsorted(before, positions)).tolist()
    return found


@pytest.mark.parametrize("name", GRAPHS)
def test_removing_channels_that_are_zero_changes_no_output(name: str) -> None:
    analysis, copies = analysed(GRAPHS[name]())
    plan = random_plan(analysis, 7)
    silent = silence(analysis, plan)
    again, more = analysed(silent)
    new = rewrite(again, plan, copies=copies | more)
    for probe in analysis.shapes.probes:
        for a, b in zip(run(silent, probe.feeds), run(new, probe.feeds), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3 if "half" in name else 1e-4, atol=1e-5)


@pytest.mark.parametrize("name", GRAPHS)
def test_names_and_face_are_kept(name: str) -> None:
    model = GRAPHS[name]()
    helper.set_model_props(model, {"author": "someone"})
    model.doc_string, model.producer_name, model.graph.doc_string = "doc", "maker", "graph doc"
    before = copy.deepcopy(model)
    new, *_ = pruned(model)
    assert model == before, "the caller's model was changed"
    assert [(p.key, p.value) for p in new.metadata_props] == [("author", "someone")]
    assert (new.doc_string, new.producer_name, new.graph.doc_string) == ("doc", "maker", "graph doc")
    assert new.ir_version == model.ir_version
    assert list(new.opset_import) == list(model.opset_import)
    assert list(new.graph.output) == list(model.graph.output)
    stored = set(shapes_of(model))
    assert [i for i in new.graph.input if i.name not in stored] == [
        i for i in model.graph.input if i.name not in stored
    ]
    assert {n.name for n in new.graph.node} >= {n.name for n in new.graph.node if n.name in before.graph.node}
    # declared shapes are true
    inferred = onnx.shape_inference.infer_shapes(new, strict_mode=True, data_prop=True)
    assert inferred


# ---------------------------------------------------------------------------------------------------------- details


def test_group_attribute_follows() -> None:
    new, *_ = pruned(depthwise_convolution(), share=0.5)
    groups = [helper.get_node_attr_value(n, "group") for n in new.graph.node if n.op_type == "Conv"]
    assert groups == [1, 4, 1]
    assert shapes_of(new)[new.graph.node[2].input[1]] == (4, 1, 3, 3)


def test_shared_weights_are_cut_once() -> None:
    new, *_ = pruned(shared_weights(), share=0.5)
    assert shapes_of(new)["w"] == (3, 3, 3, 3)
    assert [n.input[1] for n in new.graph.node if n.op_type == "Conv"].count("w") == 2


def test_copies_that_end_alike_are_one_again() -> None:
    analysis, copies = analysed(merged_constants())
    assert copies
    same = rewrite(analysis, Plan("", {}), copies=copies)
    assert not set(copies) & set(shapes_of(same))


def test_initializers_that_are_inputs_declare_their_new_shape() -> None:
    new, *_ = pruned(initializers_that_are_inputs())
    declared = {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in new.graph.input}
    assert {name: declared[name] for name in shapes_of(new)} == shapes_of(new)
    assert set(declared) == {"x", *shapes_of(new)}


def test_new_values_of_weights_are_sliced_like_the_old() -> None:
    model = residual()
    analysis, copies = analysed(model)
    plan = random_plan(analysis)
    arrays = {t.name: numpy_helper.to_array(t) * np.float32(2) for t in model.graph.initializer if len(t.dims) == 4}
    plain, scaled = rewrite(analysis, plan, copies=copies), rewrite(analysis, plan, arrays, copies)
    for a, b in zip(plain.graph.initializer, scaled.graph.initializer, strict=True):
        factor = 2 if len(a.dims) == 4 else 1
        assert np.array_equal(numpy_helper.to_array(a) * np.float32(factor), numpy_helper.to_array(b))


def test_a_dynamic_model_stays_dynamic() -> None:
    for make in (reshape_to_computed_sizes_and_a_number, shuffle_with_computed_groups, one_shape_for_several_reshapes):
        model = make()
        analysis, copies = analysed(model)
        plan = random_plan(analysis)
        new = rewrite(analysis, plan, copies=copies)
        dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
        sizes_now = iter((4, 11, 13))  # none of them seen by the probes
        feeds = {"x": np.random.default_rng(0).standard_normal([d or next(sizes_now) for d in dims]).astype(np.float32)}
        assert prove(analysis, plan, new, [feeds], RUNTIME).max_relative_difference < 1e-5


@pytest.mark.parametrize("channels", ["computed", "hard-coded"])
def test_a_number_of_findings_is_not_taken_for_a_size(channels: str) -> None:
    """Zero rows are found in the inputs that the model is probed with; others may be found later."""
    g = Builder()
    x = g.Relu(g.conv(image(g), 6))
    count = g.Shape(g.NonZero(g.Greater(g.input("y", [7]), g.const(100.0))), start=1, end=2)
    rest = g.Shape(x, start=1) if channels == "computed" else g.const([6, 6, 6])
    more = g.ConstantOfShape(g.Concat(count, rest, axis=0))
    model = g.model(g.conv(g.Concat(x, more, axis=0), 3))
    new, analysis, plan, _ = pruned(model)
    assert analysis.groups
    y = np.array([0, 200, 0, 0, 300, 0, 0], np.float32)
    feeds = {"x": np.ones((2, 3, 6, 6), np.float32), "y": y}
    assert run(new, feeds)[0].shape[0] == 4
    prove(analysis, plan, new, [feeds], RUNTIME)


def test_heads_beside_the_batch_are_counted_at_any_size() -> None:
    model = heads_beside_the_batch()
    analysis, _ = analysed(model)
    assert [group.units for group in analysis.groups] == [4]
    data = {"x": np.zeros((7, 11, 6), np.float32)}
    there = dataclasses.replace(analysis, nominal=nominal_shapes(analysis.graph, RUNTIME, data))
    plan = random_plan(analysis)
    new = rewrite(analysis, plan)
    assert CostModel(there).total(plan.counts(analysis)) == count_model_macs(new, data)


@pytest.mark.parametrize("sizes", [("h", "w"), (9, 12)])
def test_sizes_that_the_caller_reads_keep_their_numbers(sizes: tuple[int | str, int | str]) -> None:
    """Some that a Reshape and a scale inside follow, too."""
    g = Builder(opset=13)
    x = g.Relu(g.conv(g.Relu(g.conv(g.input("x", ["n", 3, *sizes]), 10, name="a")), 8, name="b"))
    shape = g.Shape(x)
    channels = g.Gather(shape, g.const(1))
    y = g.Reshape(g.Div(x, g.Sqrt(g.Cast(channels, to=TensorProto.FLOAT))), shape)
    outputs = [shape, g.Mul(channels, g.const(3)), g.Size(x), g.Cast(g.Shape(y), to=TensorProto.FLOAT)]
    model = g.model(g.node("Conv", y, g.weight(3, 8, 1, 1)), *outputs)
    new, analysis, _, proof = pruned(model)
    assert {info.name for info in analysis.groups} == {"a", "b"} and proof.max_relative_difference < 1e-5
    assert [o.name for o in new.graph.output] == [o.name for o in model.graph.output]
    for probe in analysis.shapes.probes:
        for before, after in zip(run(model, probe.feeds)[1:], run(new, probe.feeds)[1:], strict=True):
            np.testing.assert_array_equal(after, before)


def _over(of: str) -> Callable[[Builder, str], str]:
    return lambda g, x: g.Div(x, g.node(of, x, axes=[2, 3], keepdims=1))


@pytest.mark.parametrize(
    ("pole", "free"),
    [
        (_over("ReduceMax"), False),
        (_over("ReduceL2"), False),
        (lambda g, x: g.Mul(x, g.Reciprocal(g.ReduceMean(x, axes=[2, 3], keepdims=1))), False),
        (lambda g, x: g.Mul(x, g.Pow(g.ReduceMean(x, axes=[2, 3], keepdims=1), g.const(-0.5))), False),
        (lambda g, x: g.Log(x), False),
        (lambda g, x: g.MeanVarianceNormalization(x, axes=[0, 2, 3]), False),
        (lambda g, x: g.Div(x, g.Add(g.ReduceMax(x, axes=[2, 3], keepdims=1), g.const(1e-6))), True),
        (lambda g, x: g.Log(g.Sigmoid(x)), True),
        (lambda g, x: g.Div(x, g.const(2.0)), True),
    ],
)
def test_where_zeros_are_not_finite_no_channel_is_silenced(pole: Callable[[Builder, str], str], free: bool) -> None:
    g = Builder(opset=13)
    x = g.Relu(g.conv(g.Relu(g.conv(image(g), 10, name="before")), 8, name="normalised"))
    model = g.model(g.conv(pole(g, x), 3))
    assert {info.name for info in analysed(model)[0].groups} == {"before", *(["normalised"] if free else [])}
    _, analysis, _, proof = pruned(model)
    assert proof.max_relative_difference < 1e-5
    if not free:
        assert any(found.remedy.startswith("a small number added") for found in analysis.frozen)
