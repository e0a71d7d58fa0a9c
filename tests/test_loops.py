"""Loop and Scan: cut with the graph around them where what turns can be told, left alone with a reason else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from bodies import BOOL, FLOAT, INT64, body, conv_of, ids, names_of, node, stored, wide
from builder import Builder, analysed, laid_open, pruned, run
from onnx import helper

from onnxprune.api import prune
from onnxprune.counting import count_model_macs
from onnxprune.plan import Plan
from onnxprune.rewrite import rewrite
from onnxprune.verify import silence


def loop() -> onnx.ModelProto:
    """Three turns that add what an outer convolution gave."""
    g = Builder()
    x = wide(g)
    infos = [
        helper.make_tensor_value_info("turn", INT64, []),
        helper.make_tensor_value_info("go", BOOL, []),
        helper.make_tensor_value_info("state", FLOAT, None),
    ]
    steps = [node("Identity", ["go"], "on"), node("Add", ["state", x], "next")]
    start = g.Relu(g.conv(x, 6, name="into_loop"))
    y = g.node("Loop", g.const(3), g.const(True), start, body=body(steps, infos, "on", "next"), name="loop")
    return g.model(conv_of(g, y, 6))


def scan() -> onnx.ModelProto:
    """A running sum over the positions of a sequence, scaled by an outer vector."""
    g = Builder()
    x = g.Relu(g.linear(g.Relu(g.linear(g.input("x", [5, 7]), 12, name="free_a")), 8, name="seen"))
    scale = g.weight(8, name="scale")
    infos = [helper.make_tensor_value_info(name, FLOAT, [8]) for name in ("state", "element")]
    steps = [
        node("Add", ["state", "element"], "next"),
        node("Mul", ["next", scale], "out"),
    ]
    made = g.node(
        "Scan",
        g.const(np.zeros(8, np.float32)),
        x,
        body=body(steps, infos, "next", "out"),
        num_scan_inputs=1,
        outputs=2,
        name="scan",
    )
    return g.model(g.linear(made[1], 3))


CASES = [(loop, "Loop"), (scan, "Scan")]


def in_a_loop(condition: bool = False) -> onnx.ModelProto:
    """Four turns with a layer of 8 x 8 in each, in a branch if need be, on 5 rows that a layer of 7 x 8 made."""
    g = Builder()
    x = g.Relu(g.linear(g.Relu(g.linear(g.input("x", [5, 7]), 16, name="free")), 8))
    weight = g.weight(8, 8)
    steps = [node("Identity", ["go"], "on"), node("MatMul", ["state", weight], "made"), node("Tanh", ["made"], "next")]
    if condition:
        layer = body([node("MatMul", ["state", weight], "t")], [], "t")
        other = body([node("MatMul", ["state", weight], "e")], [], "e")
        steps[1] = node("If", ["go"], "made", then_branch=layer, else_branch=other)
    infos = [helper.make_tensor_value_info("turn", INT64, []), helper.make_tensor_value_info("go", BOOL, [])]
    infos.append(helper.make_tensor_value_info("state", FLOAT, [5, 8]))
    y = g.node("Loop", g.const(4), g.const(True), x, body=body(steps, infos, "on", "next"), name="loop")
    return g.model(g.node("MatMul", y, g.weight(8, 3)))


def nested_loops() -> onnx.ModelProto:
    """Four turns of two turns with a layer of 8 x 8 in each, on 5 rows that a layer of 7 x 8 made."""
    g = Builder()
    x = g.Relu(g.linear(g.Relu(g.linear(g.input("x", [5, 7]), 16, name="free")), 8))
    count, weight = g.const(2), g.weight(8, 8)
    infos = [
        [
            helper.make_tensor_value_info(f"{level}_turn", INT64, []),
            helper.make_tensor_value_info(f"{level}_go", BOOL, []),
            helper.make_tensor_value_info(f"{level}_state", FLOAT, [5, 8]),
        ]
        for level in ("inner", "outer")
    ]
    steps = [node("Identity", ["inner_go"], "inner_on"), node("MatMul", ["inner_state", weight], "inner_next")]
    within = body(steps, infos[0], "inner_on", "inner_next")
    turned = node("Loop", [count, "outer_go", "outer_state"], "made", body=within, name="within")
    steps = [node("Identity", ["outer_go"], "outer_on"), turned, node("Tanh", ["made"], "outer_next")]
    around = body(steps, infos[1], "outer_on", "outer_next")
    return g.model(
        g.node("MatMul", g.node("Loop", g.const(4), g.const(True), x, body=around, name="loop"), g.weight(8, 3))
    )


def in_a_scan() -> onnx.ModelProto:
    """A layer of 8 x 8 for every one of 5 rows, and one of 8 x 8 for the state."""
    g = Builder()
    x = g.Relu(g.linear(g.Relu(g.linear(g.input("x", [5, 7]), 16, name="free")), 8))
    weights = [g.weight(8, 8), g.weight(8, 8)]
    infos = [helper.make_tensor_value_info(name, FLOAT, [8]) for name in ("state", "element")]
    steps = [
        node("MatMul", ["element", weights[0]], "a"),
        node("MatMul", ["state", weights[1]], "b"),
        node("Add", ["a", "b"], "next"),
        node("Relu", ["next"], "out"),
    ]
    start = g.const(np.zeros(8, np.float32))
    made = g.node("Scan", start, x, body=body(steps, infos, "next", "out"), num_scan_inputs=1, outputs=2, name="scan")
    return g.model(g.node("MatMul", made[1], g.weight(8, 3)))


TURNS: list[tuple[str, Callable[[], onnx.ModelProto], int, bool]] = [
    ("Loop", in_a_loop, 4 * 5 * 8 * 8, True),
    ("Loop", lambda: in_a_loop(True), 4 * 5 * 8 * 8 * 2, True),
    ("Loop", lambda: nested_loops(), 4 * 2 * 5 * 8 * 8, True),
    ("Loop", lambda: handed_on(), 4 * 5 * 8 * 8, False),
    ("Scan", in_a_scan, 5 * 2 * 8 * 8, True),
]


@pytest.mark.parametrize(("op", "make", "within", "opened"), TURNS)
def test_layers_in_loops_are_counted_once_a_turn(
    op: str, make: Callable[[], onnx.ModelProto], within: int, opened: bool
) -> None:
    model = make()
    outside = 5 * (7 * 16 + 16 * 8 + 8 * 3)
    assert count_model_macs(model) == outside + within
    result = prune(model, speedup=1.1, select="l1", reconstruct=False, threads=1)
    report = result.report
    assert count_model_macs(result.model) == report.after.macs < outside + within
    held = [f for f in report.frozen if f.reason.startswith("layers in the body")]
    said = any("are counted as often as the first sample runs them" in warning for warning in report.warnings)
    if opened:
        assert report.prunable_macs == 1.0 and not held and not said
    else:
        assert report.prunable_macs == pytest.approx(5 * (7 * 16 + 16 * 8) / (outside + within))
        assert [(f.op, f.macs) for f in held] == [(op, within)] and said


def recurrent(steps: int | str = "t", grows: bool = False) -> onnx.ModelProto:
    """A recurrent cell in a Loop, over a sequence that it takes apart itself, with a layer in front and one behind.

    The state starts at zero and is not zero later, not in a channel that is silenced either; what a turn gives is put
    together. ``grows``: a turn gives the products of the state with itself.
    """
    g = Builder()
    x = g.Relu(g.linear(g.input("x", [steps, 2 if grows else "n", 10]), 24, name="before"))
    for name, size in (("w_in", 24), ("w_state", 16)):
        g.weight(size, 16, name=name)
    nodes = [
        node("Identity", ["go"], "on"),
        node("Gather", [x, "turn"], "now", axis=0),
        node("MatMul", ["now", "w_in"], "a", name="cell"),
        node("MatMul", ["state", "w_state"], "b"),
        node("Add", ["a", "b"], "c"),
        node("Add", ["c", "cell_bias"], "d"),
        node("Sigmoid", ["d"], "next"),
        node("Identity", ["next"], "given"),
    ]
    if grows:  # rows by rows: a sum over channels that are zero in the first turn alone
        nodes[-1] = node("MatMul", ["state", "turned"], "given")
        nodes.insert(-1, node("Transpose", ["state"], "turned", perm=[1, 0]))
    infos = [helper.make_tensor_value_info("turn", INT64, []), helper.make_tensor_value_info("go", BOOL, [])]
    infos.append(helper.make_tensor_value_info("state", FLOAT, None))
    inner = stored(body(nodes, infos, "on", "next", "given"), cell_bias=(16,))
    count = g.Squeeze(g.Gather(g.Shape("x"), g.const([0])), g.const([0]))
    rows = g.Concat(g.Gather(g.Shape("x"), g.const([1])), g.const([16]), axis=0)
    first = g.ConstantOfShape(rows)
    last, every = g.node("Loop", count, g.const(True), first, body=inner, outputs=2, name="loop")
    behind = g.Relu(g.Add(g.node("MatMul", last, g.weight(16, 12), name="behind"), g.weight(12)))
    return g.model(g.MatMul(behind, g.weight(12, 3)), g.MatMul(every, g.const(np.ones((2 if grows else 16, 2)))))


def scanned() -> onnx.ModelProto:
    """A recurrent cell in a Scan along the second axis, its weights stored in the body, read from its output alone."""
    g = Builder()
    x = g.Relu(g.linear(g.input("x", [3, "t", 10]), 24, name="before"))
    infos = [
        helper.make_tensor_value_info("state", FLOAT, [3, 16]),
        helper.make_tensor_value_info("now", FLOAT, [3, 24]),
    ]
    nodes = [
        node("MatMul", ["now", "w_in"], "a", name="cell"),
        node("MatMul", ["state", "w_state"], "b"),
        node("Add", ["a", "b"], "c"),
        node("Tanh", ["c"], "next"),
        node("Mul", ["next", "scale"], "given"),
    ]
    inner = stored(body(nodes, infos, "next", "given"), w_in=(24, 16), w_state=(16, 16), scale=(16,))
    start = g.const(np.zeros((3, 16), np.float32))
    made = g.node(
        "Scan",
        start,
        x,
        body=inner,
        num_scan_inputs=1,
        scan_input_axes=[1],
        scan_output_axes=[1],
        outputs=2,
        name="scan",
    )
    behind = g.Relu(g.node("MatMul", made[1], g.weight(16, 12), name="behind"))
    return g.model(g.node("MatMul", behind, g.weight(12, 3)))


def branching(own: bool = True) -> onnx.ModelProto:
    """A Loop whose even turns go through two layers, and whose odd ones through another one; ``own`` weights or not."""
    g = Builder()
    x = g.Relu(g.linear(g.Relu(g.linear(g.input("x", ["n", 7]), 16, name="before")), 8, name="state"))
    shapes = {"even_a": (8, 12), "even_b": (12, 8), "odd_w": (8, 8)}
    one = [node("MatMul", ["now", "even_a"], "e1", name="wide"), node("Relu", ["e1"], "e2")]
    one.append(node("MatMul", ["e2", "even_b"], "e", name="narrow"))
    even, odd = body(one, [], "e"), body([node("MatMul", ["now", "odd_w"], "o", name="odd")], [], "o")
    for graph in (even, odd):
        mine = {name: shape for name, shape in shapes.items() if name.startswith(graph.output[0].name)}
        if own:
            stored(graph, **mine)
        else:
            for name, shape in mine.items():
                g.weight(*shape, name=name)
    two, zero = g.const(2), g.const(0)
    nodes = [
        node("Identity", ["go"], "on"),
        node("Mod", ["turn", two], "left"),
        node("Equal", ["left", zero], "is_even"),
        node("Relu", ["was"], "now"),
        node("If", ["is_even"], "made", then_branch=even, else_branch=odd, name="either"),
        node("Add", ["made", "was"], "next"),
    ]
    infos = [helper.make_tensor_value_info("turn", INT64, []), helper.make_tensor_value_info("go", BOOL, [])]
    infos.append(helper.make_tensor_value_info("was", FLOAT, None))
    y = g.node("Loop", g.const(3), g.const(True), x, body=body(nodes, infos, "on", "next"), name="loop")
    return g.model(g.node("MatMul", y, g.weight(8, 3), name="last"))


LOOPS: list[tuple[Callable[[], onnx.ModelProto], set[str]]] = [
    (in_a_loop, {"free", "matmul6"}),
    (in_a_scan, {"free", "matmul6", "a"}),
    (recurrent, {"before", "cell", "behind"}),
    (scanned, {"before", "cell", "behind"}),
    (lambda: recurrent(grows=True), {"before", "behind"}),
    (lambda: in_a_loop(True), {"free", "matmul6"}),
    (branching, {"before", "state", "wide"}),
    (lambda: branching(own=False), {"before", "state", "wide"}),
    (nested_loops, {"free", "matmul6"}),
    (lambda: scan_in_a_loop(), {"before", "cell", "open"}),
]


def scan_in_a_loop() -> onnx.ModelProto:
    """A recurrent cell over five rows, run three times; the outer loop has a layer of its own before and behind."""
    g = Builder()
    x = g.Relu(g.linear(g.input("x", [5, 2, 7]), 8, name="before"))
    for name, size in (("cell_in", (12, 10)), ("cell_state", (10, 10)), ("wide", (8, 12)), ("narrow", (10, 8))):
        g.weight(*size, name=name)
    start, count = g.const(np.zeros((2, 10), np.float32)), g.const(3)
    value = helper.make_tensor_value_info
    steps = [
        node("MatMul", ["row", "cell_in"], "a", name="cell"),
        node("MatMul", ["was", "cell_state"], "b"),
        node("Add", ["a", "b"], "c"),
        node("Tanh", ["c"], "is"),
        node("Identity", ["is"], "given"),
    ]
    infos = [value("was", FLOAT, [2, 10]), value("row", FLOAT, [2, 12])]
    scan = helper.make_node(
        "Scan", [start, "open"], ["last", "all"], num_scan_inputs=1, body=body(steps, infos, "is", "given")
    )
    steps = [
        node("Identity", ["go"], "on"),
        node("MatMul", ["state", "wide"], "opened", name="open"),
        node("Relu", ["opened"], "open"),
        scan,
        node("MatMul", ["all", "narrow"], "closed", name="close"),
        node("Add", ["closed", "state"], "next"),
    ]
    infos = [value("turn", INT64, []), value("go", BOOL, []), value("state", FLOAT, [5, 2, 8])]
    y = g.node("Loop", count, g.const(True), x, body=body(steps, infos, "on", "next"), name="loop")
    return g.model(g.node("MatMul", y, g.weight(8, 3), name="last_layer"))


@pytest.mark.parametrize(("make", "groups"), LOOPS)
def test_loops_are_cut_with_the_graph_around_them(make: Callable[[], onnx.ModelProto], groups: set[str]) -> None:
    model = make()
    analysis, flat = laid_open(model)
    assert flat.loops and {info.name for info in analysis.groups} == groups
    for seed in range(3):
        new, _, plan, proof = pruned(model, seed)
        assert proof.max_relative_difference < 1e-5 and proof.compared > 1
        silent = flat.closed(silence(analysis, plan))
        for found in analysis.shapes.probes:  # of as many turns as there are, at two lengths where they differ
            for wanted, got in zip(run(silent, found.feeds), run(new, found.feeds), strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("make", "_"), LOOPS)
def test_an_uncut_loop_stays_as_it_was(make: Callable[[], onnx.ModelProto], _: set[str]) -> None:
    model = make()
    analysis, flat = laid_open(model)
    same = flat.closed(rewrite(analysis, Plan("", {}), copies=flat.copies))
    assert names_of(same.graph) == names_of(model.graph)
    assert b"onnxprune." not in same.SerializeToString()  # no note is left
    feeds = analysis.shapes.probes[0].feeds
    for wanted, found in zip(run(model, feeds), run(same, feeds), strict=True):
        np.testing.assert_array_equal(found, wanted)


def handed_on(named: bool = False) -> onnx.ModelProto:
    """A weight that goes from turn to turn as a state: the body has it under no name of the file's."""
    g = Builder()
    x = g.Relu(g.linear(g.Relu(g.linear(g.input("x", [5, 7]), 16, name="free")), 8, name="seen"))
    nodes = [node("Identity", ["go"], "on"), node("MatMul", ["state", "weight"], "next")]
    infos = [helper.make_tensor_value_info("turn", INT64, []), helper.make_tensor_value_info("go", BOOL, [])]
    infos += [helper.make_tensor_value_info(name, FLOAT, None) for name in ("state", "weight")]
    nodes += [node("Identity", ["weight"], "same")] if named else []
    inner = body(nodes, infos, "on", "next", "same" if named else "weight")
    y, _ = g.node("Loop", g.const(4), g.const(True), x, g.weight(8, 8), body=inner, outputs=2, name="loop")
    return g.model(g.node("MatMul", y, g.weight(8, 3)))


@pytest.mark.parametrize(
    ("make", "reason", "remedy"),
    [
        (
            handed_on,
            "weight 'w11' comes in as a state that no turn changes",
            "export with the body reading it from out",
        ),
        (
            lambda: handed_on(named=True),
            "weight 'w11' comes in as a state that no turn changes",
            "export with the body reading it from out",
        ),
    ],
)
def test_a_loop_that_stays_says_why(make: Callable[[], onnx.ModelProto], reason: str, remedy: str) -> None:
    model = make()
    analysis, flat = laid_open(model)
    assert not flat.loops and {info.name for info in analysis.groups} == {"free"}
    report = prune(model, speedup=1.1, select="l1", reconstruct=False, threads=1).report
    (held,) = (f for f in report.frozen if f.reason.startswith("layers in the body"))
    assert held.reason.endswith(reason) and held.remedy.startswith(remedy)


def turning(g: Builder, x: str, channels: int) -> onnx.GraphProto:
    """The body of a Loop with two convolutions; nothing else sees the channels between them."""
    infos = [helper.make_tensor_value_info("turn", INT64, []), helper.make_tensor_value_info("go", BOOL, [])]
    steps = [
        node("Identity", ["go"], "on"),
        node("Conv", ["state", "l_a"], "l1", name="within"),
        node("Relu", ["l1"], "l2"),
        node("Conv", ["l2", "l_b"], "next"),
    ]
    infos.append(helper.make_tensor_value_info("state", FLOAT, None))
    return stored(body(steps, infos, "on", "next"), l_a=(14, channels, 1, 1), l_b=(channels, 14, 1, 1))


def a_loop_in_a_branch() -> onnx.ModelProto:
    g = Builder()
    condition, x = g.input("condition", [], BOOL), wide(g)
    steps = [
        node("Conv", [x, "then_w"], "t", name="then"),
        node("Loop", [g.const(3), g.const(True), "t"], "u", body=turning(g, "t", 8), name="loop"),
    ]
    one = stored(body(steps, [], "u"), then_w=(8, 6, 1, 1))
    other = stored(body([node("Conv", [x, "else_w"], "e")], [], "e"), else_w=(8, 6, 1, 1))
    return g.model(conv_of(g, g.node("If", condition, then_branch=one, else_branch=other, name="if"), 8))


def a_loop_before_branches() -> onnx.ModelProto:
    g = Builder()
    condition, x = g.input("condition", [], BOOL), wide(g)
    x = g.node("Loop", g.const(3), g.const(True), x, body=turning(g, x, 6), name="loop")
    steps = [node("Conv", [x, "t_a"], "t1", name="inner"), node("Relu", ["t1"], "t2"), node("Conv", ["t2", "t_b"], "t")]
    one = stored(body(steps, [], "t"), t_a=(12, 6, 1, 1), t_b=(8, 12, 1, 1))
    other = stored(body([node("Conv", [x, "else_w"], "e")], [], "e"), else_w=(8, 6, 1, 1))
    return g.model(conv_of(g, g.node("If", condition, then_branch=one, else_branch=other, name="if"), 8))


def branches_in_a_loop_in_a_branch() -> onnx.ModelProto:
    g = Builder()
    condition, x = g.input("condition", [], BOOL), wide(g)
    within = turning(g, "t", 8)
    parts = [stored(body([node("Conv", ["state", f"{n}_w"], n)], [], n), **{f"{n}_w": (14, 8, 1, 1)}) for n in "pq"]
    within.node[1].CopyFrom(node("If", ["go"], "l1", then_branch=parts[0], else_branch=parts[1], name="within"))
    del within.initializer[0]
    steps = [
        node("Conv", [x, "then_w"], "t", name="then"),
        node("Loop", [g.const(3), g.const(True), "t"], "u", body=within, name="loop"),
    ]
    one = stored(body(steps, [], "u"), then_w=(8, 6, 1, 1))
    other = stored(body([node("Conv", [x, "else_w"], "e")], [], "e"), else_w=(8, 6, 1, 1))
    return g.model(conv_of(g, g.node("If", condition, then_branch=one, else_branch=other, name="if"), 8))


BOTH: list[tuple[Callable[[], onnx.ModelProto], set[str]]] = [
    (a_loop_in_a_branch, {"free_a", "seen", "then", "within", "free_b"}),
    (a_loop_before_branches, {"free_a", "seen", "inner", "t", "within", "free_b"}),
    (branches_in_a_loop_in_a_branch, {"free_a", "seen", "then", "p", "free_b"}),
]


@pytest.mark.parametrize(("make", "groups"), BOTH, **ids)
def test_branches_and_loops_of_one_model_are_cut(make: Callable[[], onnx.ModelProto], groups: set[str]) -> None:
    model = make()
    analysis, flat = laid_open(model)
    assert flat.branches and flat.loops and {info.name for info in analysis.groups} == groups
    same = flat.closed(rewrite(analysis, Plan("", {}), copies=flat.copies))
    assert names_of(same.graph) == names_of(model.graph) and b"onnxprune." not in same.SerializeToString()
    new, _, plan, proof = pruned(model)
    assert proof.max_relative_difference < 1e-5
    silent = flat.closed(silence(analysis, plan))
    for taken in (True, False):
        feeds = analysis.shapes.probes[0].feeds | {"condition": np.array(taken)}
        for wanted, got in zip(run(silent, feeds), run(new, feeds), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_recurrent_cell_is_pruned_from_end_to_end() -> None:
    result = prune(recurrent(), speedup=1.5, threads=1)
    assert result.report.prunable_macs == 1.0 and 1.5 <= result.report.achieved.macs <= 1.6
    assert {"w_in", "w_state", "cell_bias"} <= set(result.report.removed)


@pytest.mark.parametrize(("make", "op"), CASES, **ids)
def test_what_a_body_sees_stays_and_the_rest_is_cut_exactly(make: Callable[[], onnx.ModelProto], op: str) -> None:
    model = make()
    analysis = analysed(model)[0]
    names = {info.name for info in analysis.groups}
    assert "free_a" in names and not names & {"seen", "into_loop", "sharing", "shared"}
    held = [f for f in analysis.frozen if f.op == op and "seen" in f.layers]
    assert held and all("has a body" in f.reason and "export" in f.remedy for f in held)
    for seed in range(3):
        _, _, _, proof = pruned(model, seed)
        assert proof.max_relative_difference < 1e-5 and proof.compared > 1


def test_what_stands_around_a_loop_is_pruned_from_end_to_end() -> None:
    result = prune(loop(), speedup=1.3, threads=1, best_effort=True)
    assert result.report.achieved.macs > 1.1
    assert not [w for w in result.report.warnings if "are not counted" in w]
