"""Branches of an If are cut like the graph around them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from bodies import BOOL, FLOAT, INT64, body, conv_of, ids, names_of, node, stored, wide
from builder import IR, RUNTIME, Builder, laid_open, pruned, random_plan, run
from onnx import TensorProto, helper, numpy_helper

from onnxprune.api import prune
from onnxprune.counting import count_model_macs
from onnxprune.errors import InputError, InternalError
from onnxprune.plan import Plan
from onnxprune.rewrite import rewrite
from onnxprune.verify import prove, prove_alike, silence


def branches(ir: int = IR) -> onnx.ModelProto:
    """A condition that only the caller knows; one branch reads an activation, the other a layer's weight as well."""
    g = Builder(ir=ir)
    condition, x = g.input("condition", [], BOOL), wide(g)
    weight = g.weight(6, 6, 1, 1, name="shared")
    one = body([node("Conv", [x, weight], "u1"), node("Relu", ["u1"], "u")], [], "u")
    other = body([node("Neg", [x], "v")], [], "v")
    y = g.node("If", condition, then_branch=one, else_branch=other, name="if")
    y = g.Add(y, g.node("Conv", x, weight, name="sharing"))
    return g.model(conv_of(g, y, 6))


def own_weights() -> onnx.ModelProto:
    """Branches with layers and weights of their own; one of them is a layer deeper."""
    g = Builder()
    condition, x = g.input("condition", [], BOOL), wide(g)
    steps = [
        node("Conv", [x, "then_a", "then_bias"], "t1", pads=[1] * 4, name="inner"),
        node("Relu", ["t1"], "t2"),
        node("Conv", ["t2", "then_b"], "t3", name="then"),
    ]
    one = stored(body(steps, [], "t3"), then_a=(14, 6, 3, 3), then_bias=(14,), then_b=(8, 14, 1, 1))
    other = stored(body([node("Conv", [x, "else_a"], "e", name="else")], [], "e"), else_a=(8, 6, 1, 1))
    return g.model(conv_of(g, g.node("If", condition, then_branch=one, else_branch=other, name="if"), 8))


def skipped() -> onnx.ModelProto:
    """A residual block that is left out where the condition says so, with weights from outside."""
    g = Builder()
    condition, x = g.input("condition", [], BOOL), wide(g)
    weights = [g.weight(10, 6, 3, 3), g.weight(6, 10, 3, 3)]
    steps = [
        node("Conv", [x, weights[0]], "r1", pads=[1] * 4, name="inner"),
        node("Relu", ["r1"], "r2"),
        node("Conv", ["r2", weights[1]], "r3", pads=[1] * 4),
        node("Add", ["r3", x], "u"),
    ]
    one, other = body(steps, [], "u"), body([node("Identity", [x], "v")], [], "v")
    return g.model(conv_of(g, g.node("If", condition, then_branch=one, else_branch=other, name="if"), 6))


def called_alike() -> onnx.ModelProto:
    """Two branches whose nodes and tensors have the same names."""
    g = Builder()
    condition, x = g.input("condition", [], BOOL), wide(g)
    one, other = (
        body([node("Conv", [x, g.weight(8, 6, 1, 1)], "inner", name="layer"), node(op, ["inner"], "out")], [], "out")
        for op in ("Relu", "Sigmoid")
    )
    return g.model(conv_of(g, g.node("If", condition, then_branch=one, else_branch=other, name="if"), 8))


def deep() -> onnx.ModelProto:
    """Layers in an If within an If."""
    g = Builder()
    condition, second, x = g.input("condition", [], BOOL), g.input("second", [], BOOL), wide(g)
    inner = [
        stored(body([node("Conv", [x, "i_w"], "i", name="i_layer")], [], "i"), i_w=(8, 6, 1, 1)),
        stored(body([node("Conv", [x, "j_w"], "j1"), node("Relu", ["j1"], "j")], [], "j"), j_w=(8, 6, 1, 1)),
    ]
    within = node("If", [second], "k", then_branch=inner[0], else_branch=inner[1], name="within")
    one = body([within, node("Sigmoid", ["k"], "u")], [], "u")
    other = stored(body([node("Conv", [x, "o_w"], "v")], [], "v"), o_w=(8, 6, 1, 1))
    return g.model(conv_of(g, g.node("If", condition, then_branch=one, else_branch=other, name="if"), 8))


def sized() -> onnx.ModelProto:
    """Two outputs, of sizes that the branches state."""
    g = Builder()
    condition, x = g.input("condition", [], BOOL), wide(g)
    bodies = []
    for part, target in (("one", [2, 8, 36]), ("two", [2, 8, -1])):
        steps = [
            node("Conv", [x, f"{part}_w"], f"{part}_a"),
            node("Reshape", [f"{part}_a", f"{part}_shape"], f"{part}_b"),
            node("GlobalMaxPool", [f"{part}_a"], f"{part}_m"),
        ]
        made = stored(body(steps, [], f"{part}_b", f"{part}_m"), **{f"{part}_w": (8, 6, 1, 1)})
        made.initializer.append(numpy_helper.from_array(np.array(target), f"{part}_shape"))
        bodies.append(made)
    flat, scale = g.node("If", condition, then_branch=bodies[0], else_branch=bodies[1], name="if", outputs=2)
    return g.model(conv_of(g, g.Mul(g.Reshape(flat, g.const([2, 8, 6, 6])), scale), 8))


def turned() -> onnx.ModelProto:
    """An outer weight that a branch turns before it reads it, at a dynamic batch."""
    g = Builder()
    condition, x = g.input("condition", [], BOOL), g.Relu(g.linear(g.input("x", ["n", 12]), 24, name="seen"))
    weight = g.weight(32, 24, name="outer_w")
    steps = [
        node("Transpose", [weight], "turned", perm=[1, 0]),
        node("MatMul", [x, "turned"], "a", name="inner"),
        node("Gemm", ["a", "then_w", "then_b"], "t", transB=1),
    ]
    one = stored(body(steps, [], "t"), then_w=(20, 32), then_b=(20,))
    other = stored(body([node("Gemm", [x, "else_w"], "e", transB=1)], [], "e"), else_w=(20, 24))
    y = g.node("If", condition, then_branch=one, else_branch=other, name="if")
    return g.model(g.MatMul(g.Relu(y), g.weight(20, 5)))


def unlike() -> onnx.ModelProto:
    """Branches that give images of unlike size, of which only the channels belong together."""
    g = Builder()
    condition, x = g.input("condition", [], BOOL), wide(g)
    one = stored(body([node("Conv", [x, "then_w"], "t")], [], "t"), then_w=(8, 6, 1, 1))
    other = stored(body([node("Conv", [x, "else_w"], "e", strides=[2, 2])], [], "e"), else_w=(8, 6, 1, 1))
    y = g.node("If", condition, then_branch=one, else_branch=other, name="if")
    return g.model(g.node("GlobalAveragePool", conv_of(g, y, 8)))


def denied() -> onnx.ModelProto:
    """A condition that is computed from a scalar input."""
    g = Builder()
    condition, x = g.Not(g.input("condition", [], BOOL)), wide(g)
    one = stored(body([node("Conv", [x, "then_w"], "t")], [], "t"), then_w=(8, 6, 1, 1))
    other = stored(body([node("Conv", [x, "else_w"], "e")], [], "e"), else_w=(8, 6, 1, 1))
    return g.model(conv_of(g, g.node("If", condition, then_branch=one, else_branch=other, name="if"), 8))


def nested() -> onnx.ModelProto:
    """The inner If of a branch sees the outermost graph."""
    g = Builder()
    condition, x = g.input("condition", [], BOOL), wide(g)
    inner = [body([node(op, [x], name)], [], name) for op, name in (("Relu", "i"), ("Neg", "j"))]
    one = body([node("If", [condition], "u", then_branch=inner[0], else_branch=inner[1])], [], "u")
    other = body([node("Abs", [x], "v")], [], "v")
    return g.model(conv_of(g, g.node("If", condition, then_branch=one, else_branch=other, name="if"), 6))


IFS: list[tuple[Callable[[], onnx.ModelProto], set[str]]] = [
    (branches, {"free_a", "seen", "free_b"}),
    (nested, {"free_a", "seen", "free_b"}),
    (own_weights, {"free_a", "seen", "inner", "then", "free_b"}),
    (skipped, {"free_a", "seen", "inner", "free_b"}),
    (called_alike, {"free_a", "seen", "layer", "free_b"}),
    (deep, {"free_a", "seen", "i_layer", "free_b"}),
    (sized, {"free_a", "seen", "one_a", "free_b"}),
    (turned, {"seen", "inner", "t"}),
    (unlike, {"free_a", "seen", "t", "free_b"}),
    (denied, {"free_a", "seen", "t", "free_b"}),
]


@pytest.mark.parametrize(("make", "groups"), IFS, **ids)
def test_both_branches_are_cut_together(make: Callable[[], onnx.ModelProto], groups: set[str]) -> None:
    model = make()
    analysis, flat = laid_open(model)
    assert {info.name for info in analysis.groups} == groups
    for seed in range(3):
        new, _, plan, proof = pruned(model, seed)
        assert proof.max_relative_difference < 1e-5 and proof.compared > 1
        silent = flat.closed(silence(analysis, plan))
        feeds = dict(analysis.shapes.probes[0].feeds)
        for taken in range(4):
            feeds |= {k: np.array(bool(taken & 1 << i)) for i, k in enumerate(("condition", "second")) if k in feeds}
            for wanted, found in zip(run(silent, feeds), run(new, feeds), strict=True):
                np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [make for make, _ in IFS], **ids)
def test_names_stay_and_where_everything_is_kept_the_model_stays(make: Callable[[], onnx.ModelProto]) -> None:
    model = make()
    analysis, flat = laid_open(model)
    same = flat.closed(rewrite(analysis, Plan("", {}), copies=flat.copies))
    assert names_of(same.graph) == names_of(model.graph)
    feeds = analysis.shapes.probes[0].feeds
    for wanted, found in zip(run(model, feeds), run(same, feeds), strict=True):
        np.testing.assert_array_equal(found, wanted)
    cut = flat.closed(rewrite(analysis, random_plan(analysis), copies=flat.copies))
    assert names_of(cut.graph) == names_of(model.graph)


def shadowing() -> onnx.ModelProto:
    """Two branches that each store a weight under the same name: a report could not tell them apart."""
    g = Builder()
    condition, x = g.input("condition", [], BOOL), wide(g)
    one, other = (stored(body([node("Conv", [x, "w"], out)], [], out), w=(8, 6, 1, 1)) for out in "uv")
    return g.model(conv_of(g, g.node("If", condition, then_branch=one, else_branch=other, name="if"), 8))


def not_both() -> onnx.ModelProto:
    """A branch that does not run on data that are not meant for it."""
    g = Builder()
    condition, x = g.input("condition", [], BOOL), wide(g)
    places = g.Add(g.const([9, 9]), g.Cast(g.ReduceMax(g.Abs("x"), keepdims=0), to=INT64))
    one = body([node("Conv", [x, g.weight(6, 6, 1, 1)], "u")], [], "u")
    other = body([node("Gather", [x, places], "v")], [], "v")
    return g.model(conv_of(g, g.node("If", condition, then_branch=one, else_branch=other, name="if"), 6))


def in_a_sequence() -> onnx.ModelProto:
    """Branches that give sequences of one tensor each."""
    g = Builder()
    condition, x = g.input("condition", [], BOOL), wide(g)
    one, other = (
        body([node("Conv", [x, g.weight(6, 6, 1, 1)], f"{u}1"), node("SequenceConstruct", [f"{u}1"], u)], [], u)
        for u in "uv"
    )
    y = g.node("If", condition, then_branch=one, else_branch=other, name="if")
    return g.model(conv_of(g, g.node("SequenceAt", y, g.const(0)), 6))


@pytest.mark.parametrize("make", [shadowing, not_both, in_a_sequence], **ids)
def test_branches_that_cannot_be_laid_open_stay(make: Callable[[], onnx.ModelProto]) -> None:
    result = prune(make(), speedup=1.3, threads=1)
    assert {group.name for group in result.report.groups} == {"free_a", "free_b"}
    assert any("has a body" in f.reason and "seen" in f.layers for f in result.report.frozen)
    assert any("are not counted" in warning for warning in result.report.warnings)


def test_in_a_file_of_ir_3_new_tensors_are_constants() -> None:
    """There every initializer is an input, and the inputs stay; layers without a bias get one, and branches are cut."""
    model = branches(ir=3)
    result = prune(model, speedup=1.5, samples=8, threads=1, samplers=False)
    assert {"free_a", "seen", "free_b"} == {group.name for group in result.report.groups}
    new = result.model
    assert new.ir_version == 3
    assert [i.name for i in new.graph.input] == [i.name for i in model.graph.input]
    assert {t.name for t in new.graph.initializer} <= {i.name for i in new.graph.input}
    biases = {n.output[0] for n in new.graph.node if n.op_type == "Constant"}
    assert {"sharing.bias", "u1.bias"} <= biases
    onnx.checker.check_model(new)
    feeds = {"condition": np.array(True), "x": np.ones((2, 3, 6, 6), np.float32)}
    assert np.isfinite(run(new, feeds)[0]).all()


def test_both_branches_are_counted() -> None:
    model = own_weights()
    inner = 2 * 36 * (14 * 6 * 9 + 8 * 14 + 8 * 6)
    outer = 2 * 36 * (12 * 3 * 9 + 6 * 12 * 9 + 10 * 8 + 4 * 10)
    feeds = laid_open(model)[0].shapes.probes[0].feeds
    assert count_model_macs(model, feeds) == inner + outer
    report = prune(model, speedup=1.5, select="l1", reconstruct=False, threads=1).report
    assert report.prunable_macs == 1.0 and report.achieved.macs >= 1.5
    assert {"then_a", "then_b", "else_a"} <= set(report.removed)
    assert any("both branches of 1 If node are counted" in warning for warning in report.warnings)


def one_or_more(closed: bool = False) -> onnx.ModelProto:
    """Branches of 8 channels and of one, which an addition broadcasts: which of them was seen must not matter."""
    g = Builder()
    condition, x = g.input("condition", [], BOOL), wide(g)
    one, other = (
        stored(body([node("Conv", [x, f"{w}_w"], out)], [], out), **{f"{w}_w": (channels, 6, 1, 1)})
        for out, w, channels in (("u", "u", 1), ("v", "u" if closed else "v", 8))
    )
    y = g.node("If", condition, then_branch=one, else_branch=other, name="if")
    return g.model(conv_of(g, g.Relu(g.Add(y, g.conv(x, 8, name="held"))), 8))


def one_after_a_turn() -> onnx.ModelProto:
    """A state of 8 channels that a turn sums up: without turns, it stays as long as it came."""
    g = Builder()
    x = g.Relu(g.linear(g.Relu(g.linear(g.input("x", [5, 7]), 16, name="free_a")), 8, name="held"))
    nodes = [
        node("Identity", ["go"], "on"),
        node("MatMul", ["state", "w"], "made"),
        node("ReduceSum", ["made", "last"], "sum"),
        node("Add", ["sum", x], "next"),
        node("Identity", ["sum"], "given"),
    ]
    infos = [helper.make_tensor_value_info("turn", INT64, []), helper.make_tensor_value_info("go", BOOL, [])]
    infos += [helper.make_tensor_value_info(name, FLOAT, None) for name in ("state", "before")]
    inner = stored(body(nodes, infos, "on", "next", "given"), w=(8, 8))
    inner.initializer.append(numpy_helper.from_array(np.array([1]), "last"))
    count = g.Squeeze(g.Shape(g.input("turns", ["t"])), g.const([0]))
    made = g.node("Loop", count, g.const(True), x, g.Neg(x), body=inner, outputs=2, name="loop")
    y = g.Relu(g.node("MatMul", g.Add(*made), g.weight(8, 10), name="free_b"))
    return g.model(g.MatMul(y, g.weight(10, 3)))


UNSURE: list[tuple[Callable[[], onnx.ModelProto], set[str], list[dict[str, np.ndarray]]]] = [
    (one_or_more, {"free_a", "seen", "free_b"}, [{"condition": np.array(taken)} for taken in (True, False)]),
    (lambda: one_or_more(True), {"free_a", "free_b"}, [{"condition": np.array(taken)} for taken in (True, False)]),
    (one_after_a_turn, {"free_a", "made", "free_b"}, [{"turns": np.zeros(count, np.float32)} for count in (0, 1, 3)]),
]


@pytest.mark.parametrize(("make", "groups", "given"), UNSURE, **ids)
def test_what_broadcasts_by_where_the_data_lead_stays(
    make: Callable[[], onnx.ModelProto], groups: set[str], given: list[dict[str, np.ndarray]]
) -> None:
    model = make()
    analysis, flat = laid_open(model)
    assert {info.name for info in analysis.groups} == groups
    assert any("gives one of something here that it may give more of" in f.reason for f in analysis.frozen)
    new, _, plan, _ = pruned(model)
    silent = flat.closed(silence(analysis, plan))
    feeds = dict(analysis.shapes.probes[0].feeds)
    for each in given:
        for wanted, found in zip(run(silent, feeds | each), run(new, feeds | each), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_branch_that_gives_one_tensor_twice_is_refused() -> None:
    g = Builder()
    condition, x = g.input("condition", [], BOOL), wide(g)
    one, other = (body([node(op, [x], "u")], [], "u", "u") for op in ("Relu", "Neg"))
    first, second = g.node("If", condition, then_branch=one, else_branch=other, name="if", outputs=2)
    with pytest.raises(InputError, match=r"branch of If 'if' gives 'u' twice.*put an Identity behind"):
        prune(g.model(conv_of(g, g.Add(first, second), 6)), speedup=1.1)


@pytest.mark.parametrize("taken", [True, False])
def test_a_cut_that_is_wrong_in_one_branch_alone_is_refused(taken: bool) -> None:
    model = own_weights()
    analysis, _ = laid_open(model)
    wrong = onnx.ModelProto()
    wrong.CopyFrom(analysis.graph.model)
    choice = next(n for n in wrong.graph.node if n.op_type == "If")
    branch = next(a.g for a in choice.attribute if a.name == ("else_branch" if taken else "then_branch"))
    branch.node[0].op_type = "Relu"
    feeds = [analysis.shapes.probes[0].feeds | {"condition": np.array(taken)}]
    with pytest.raises(InternalError, match=r"the proof failed: .* differs"):
        prove(analysis, Plan("", {}), wrong, feeds, RUNTIME)


def halves() -> onnx.ModelProto:
    """Branches of numbers with few bits, which runtimes widen here and there."""
    g = Builder()
    condition, x = g.input("condition", [], BOOL), g.input("x", ["n", 3, 8, 8], TensorProto.FLOAT16)

    def weight(*shape: int) -> str:
        return g.const(g.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:])), dtype=np.float16)

    x = g.Relu(g.Conv(x, weight(16, 3, 3, 3), pads=[1] * 4))
    one = body([node("Conv", [x, weight(12, 16, 1, 1)], "u")], [], "u")
    deeper = [node("Conv", [x, weight(12, 16, 3, 3)], "v1", pads=[1] * 4), node("Relu", ["v1"], "v")]
    y = g.node("If", condition, then_branch=one, else_branch=body(deeper, [], "v"), name="if")
    return g.model(g.Conv(g.Relu(y), weight(4, 12, 1, 1)))


@pytest.mark.parametrize("make", [branches, halves], ids=lambda make: make.__name__)
def test_pruned_from_end_to_end(make: Callable[[], onnx.ModelProto]) -> None:
    result = prune(make(), speedup=1.3, threads=1, best_effort=True)
    assert result.report.achieved.macs > 1.1
    assert not [w for w in result.report.warnings if "are not counted" in w]


@pytest.mark.parametrize(("width", "fits"), [(3, True), (2, False)])
def test_a_cut_that_fails_in_the_other_branch_only_is_refused(width: int, fits: bool) -> None:
    def choosing(size: int) -> onnx.ModelProto:
        return onnx.parser.parse_model(
            f"""<ir_version: 8, opset_import: ["" : 17]>
            g (float[n, 3] x, bool c) => (float[a, b] y) <int64[2] w = {{2, {size}}}> {{
                y = If (c) <then_branch = t () => (float[n, 3] a) {{ a = Relu (x) }},
                            else_branch = e () => (float[n, 3] b) {{ b = Reshape (x, w) }}>
            }}"""
        )

    feeds = [{"x": np.ones((2, 3), np.float32), "c": np.array(True)}]
    analysis = laid_open(choosing(3))[0]
    with contextlib.nullcontext() if fits else pytest.raises(InternalError, match="the original runs and the cut"):
        prove(analysis, Plan("", {}), choosing(width), feeds, RUNTIME)
    with contextlib.nullcontext() if fits else pytest.raises(InternalError, match="does not run any more"):
        prove_alike(choosing(3), choosing(width), feeds, RUNTIME)
