"""A graph run piece by piece gives what it gives as a whole, wherever it is cut."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import pytest
from builder import RUNTIME, Builder, run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxprune.graph import Graph
from onnxprune.probe import probe
from onnxprune.segments import Segments, late_order


def winding() -> onnx.ModelProto:
    """Branches, a late use of the input, computed constants, a body with captured tensors, an output half-way."""
    g = Builder(seed=1)
    x = g.input("x", ["n", 3, 6, 6])
    stem = g.Relu(g.conv(x, 4, name="stem"), name="stem_relu")
    branch = g.batch_norm(g.conv(g.Relu(g.conv(stem, 5, name="b1")), 4, name="b2"))
    total = g.Add(branch, stem, name="sum")
    g.node("Constant", name="half", value=helper.make_tensor("", TensorProto.FLOAT, [1], [0.5]))  # as PyTorch writes it
    g.const(np.array([2.0]), name="two")
    one = g.Mul("half", g.Identity("two", name="copied"), name="one")  # from constants alone
    g.Add(total, one, name="lifted")
    sign = g.Greater(g.ReduceSum(x, keepdims=0, name="mass"), g.const(np.array(0.0)), name="sign")
    bodies = {}
    for name, op in (("then_branch", "Add"), ("else_branch", "Sub")):
        node = helper.make_node(op, ["lifted", "two"], [f"{name}_out"])
        output = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, ["n", 4, 6, 6])
        bodies[name] = helper.make_graph([node], name, [], [output])
    chosen = g.If(sign, name="choice", **bodies)
    late = g.Add(chosen, g.conv(x, 4, k=1, name="shortcut"), name="late")
    pooled = g.Flatten(g.GlobalAveragePool(g.conv(late, 6, name="last")))
    model = g.model(g.gemm(pooled, 3, name="head"), "lifted")
    onnx.checker.check_model(model)
    return model


MODEL = winding()
GRAPH = Graph(MODEL)
NODES = len(GRAPH.nodes)
OUTPUTS = ["head", "lifted"]
FEEDS = [
    {"x": np.random.default_rng(seed).standard_normal((n, 3, 6, 6)).astype(np.float32) + shift}
    for seed, n, shift in ((0, 2, 1), (1, 3, -1))  # either way through the body
]
ORDERS = {
    "as it stands": list(range(NODES)),
    "branch late": late_order(GRAPH, {n.index for n in GRAPH.nodes if n.label in ("b2", "head")}),
    "stem late": late_order(GRAPH, {n.index for n in GRAPH.nodes if n.label in ("stem", "sum", "choice")}),
}


def index(label: str) -> int:
    return next(n.index for n in GRAPH.nodes if n.label == label)


def whole(feeds: Mapping[str, np.ndarray], model: onnx.ModelProto = MODEL) -> dict[str, np.ndarray]:
    return dict(zip(OUTPUTS, run(model, feeds, OUTPUTS), strict=True))


def assert_close(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=3e-6 * np.abs(array).max())


def composed(segments: Segments, cuts: Sequence[int], feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run from cut to cut with nothing but the frontier, and the model's outputs, in between."""
    state, found = dict(feeds), {}
    edges = [0, *sorted(cuts), NODES]
    for start, stop in itertools.pairwise(edges):
        made = {n for k in segments.order[start:stop] for n in GRAPH.nodes[k].outputs}
        ahead, outputs = segments.frontier(stop), [n for n in OUTPUTS if n in made]
        now = segments.piece(start, stop, list(dict.fromkeys([*ahead, *outputs])), state).run(state)
        found |= {name: now[name] for name in outputs}
        state = {name: now[name] for name in ahead}
    assert not state
    return found


@given(st.sampled_from(sorted(ORDERS)), st.lists(st.integers(0, NODES), max_size=4), st.integers(0, 1))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_pieces_over_any_cuts_give_the_whole(order: str, cuts: list[int], which: int) -> None:
    segments = Segments(GRAPH, ORDERS[order], RUNTIME)
    assert_close(composed(segments, cuts, FEEDS[which]), whole(FEEDS[which]))


@pytest.mark.parametrize("order", ORDERS)
def test_a_cut_between_all_nodes_gives_the_whole(order: str) -> None:
    segments = Segments(GRAPH, ORDERS[order], RUNTIME)
    assert_close(composed(segments, range(1, NODES), FEEDS[0]), whole(FEEDS[0]))


def test_the_frontier_is_what_has_been_made_and_is_still_read() -> None:
    segments = Segments(GRAPH, range(NODES), RUNTIME)
    assert segments.frontier(0) == ["x"]
    assert segments.frontier(index("b1")) == ["x", "stem_relu"]
    assert set(segments.frontier(index("sum") + 1)) == {"x", "sum"}
    assert set(segments.frontier(index("lifted"))) == {"x", "sum"}  # constants are part of every piece
    assert set(segments.frontier(index("choice"))) == {"x", "lifted", "sign"}  # read from within the body
    assert segments.frontier(NODES) == []


def test_a_tensor_that_is_only_passed_on_needs_no_session() -> None:
    segments = Segments(GRAPH, range(NODES), RUNTIME)
    piece = segments.piece(0, 0, ["x"], FEEDS[0])
    assert piece.session is None
    assert piece.run(FEEDS[0])["x"] is FEEDS[0]["x"]


def changed(arrays: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(MODEL)
    for tensor in model.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[tensor.name], tensor.name))
    for node in model.graph.node:
        if node.output[0] in arrays:
            node.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(arrays[node.output[0]], node.output[0]))
    return model


CHANGED = {
    "a weight": ["stem"],
    "weights in several places": ["stem", "b2", "head"],
    "a computed constant's source": ["two"],
    "the output of a Constant": ["half"],
}


def new_values(which: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    names = [GRAPH.nodes[index(n)].inputs[1] if n not in ("two", "half") else n for n in CHANGED[which]]
    return {n: rng.standard_normal(GRAPH.array(n).shape).astype(np.float32) for n in names}


@pytest.mark.parametrize("which", CHANGED)
def test_replaced_tensors_are_those_of_a_changed_model(which: str) -> None:
    arrays = new_values(which)
    piece = Segments(GRAPH, range(NODES), RUNTIME).piece(0, NODES, OUTPUTS, FEEDS[0], arrays)
    expected = whole(FEEDS[0], changed(arrays))
    assert_close(piece.run(FEEDS[0]), expected)
    assert np.abs(expected["head"] - whole(FEEDS[0])["head"]).max() > 1e-2


@pytest.mark.parametrize("which", CHANGED)
def test_free_tensors_are_fed_at_every_call(which: str) -> None:
    arrays = new_values(which)
    piece = Segments(GRAPH, range(NODES), RUNTIME).piece(0, NODES, OUTPUTS, FEEDS[0], free=sorted(arrays))
    for values in (arrays, {n: GRAPH.array(n) for n in arrays}, {n: 2 * a for n, a in arrays.items()}):
        assert_close(piece.run(FEEDS[0], values), whole(FEEDS[0], changed(values)))


def test_a_piece_takes_batches_of_other_sizes_than_its_example() -> None:
    piece = Segments(GRAPH, range(NODES), RUNTIME).piece(0, NODES, OUTPUTS, FEEDS[0])
    assert_close(piece.run(FEEDS[1]), whole(FEEDS[1]))


def resized() -> onnx.ModelProto:
    """An image brought to the size of another one, by sizes that are put together from two shapes."""
    g = Builder(opset=13)
    x = g.input("x", ["n", 3, "h", "w"])
    small = g.MaxPool(g.Relu(x), kernel_shape=[2, 2], strides=[2, 2])
    parts = [g.Slice(g.Shape(t), g.const([a]), g.const([a + 2])) for t, a in ((small, 0), (x, 2))]
    return g.model(g.node("Resize", small, "", "", g.Concat(*parts, axis=0), mode="nearest"))


@pytest.mark.parametrize("cut", range(8))
def test_a_list_of_sizes_keeps_its_length(cut: int) -> None:
    graph = Graph(resized())
    shapes = probe(graph, RUNTIME)
    segments = Segments(graph, range(len(graph.nodes)), RUNTIME, shapes)
    for found in shapes.probes:
        tensors = segments.piece(0, cut, segments.frontier(cut), found.feeds).run(found.feeds)
        piece = segments.piece(cut, len(graph.nodes), graph.outputs, tensors)
        assert [a.shape for a in piece.run(tensors).values()] == [found.shapes[n] for n in graph.outputs]


# -------------------------------------------------------------------------------------------------------- the order


def ancestors() -> list[set[int]]:
    found: list[set[int]] = []
    for node in GRAPH.nodes:
        direct = {GRAPH.producer[n].index for n in (*node.inputs, *node.captured) if n in GRAPH.producer}
        found.append(direct.union(*(found[k] for k in direct)))
    return found


@given(st.sets(st.integers(0, NODES - 1), max_size=5))
@settings(max_examples=60, deadline=None)
def test_late_order_is_topological_and_late(late: set[int]) -> None:
    order, before = late_order(GRAPH, late), ancestors()
    assert sorted(order) == list(range(NODES))
    for place, node in enumerate(order):
        assert before[node] <= set(order[:place])
        if node in late:  # whatever comes after it had to wait for it, or for a late node after it
            waited_for = late & set(order[place:])
            for other in set(order[place:]) - late:
                assert before[other] & waited_for


def test_without_late_nodes_the_order_is_the_graph_s() -> None:
    assert late_order(GRAPH, ()) == list(range(NODES))


def test_the_last_layer_of_a_branch_waits_for_the_other_branch() -> None:
    order = late_order(GRAPH, {index("b2")})
    assert order.index(index("shortcut")) < order.index(index("b2")) < order.index(index("sum"))
