"""Bodies of If, Loop and Scan: what they see of the graph around them stays, and everything else is cut exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from builder import Builder, analysed, pruned
from onnx import TensorProto, helper

from onnxprune.api import prune

BOOL, INT64, FLOAT = TensorProto.BOOL, TensorProto.INT64, TensorProto.FLOAT


def body(nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], *outputs: str) -> onnx.GraphProto:
    infos = [helper.make_empty_tensor_value_info(name) for name in outputs]
    return helper.make_graph(nodes, f"body_of_{outputs[0]}", inputs, infos)


def node(op: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], **attributes)


def wide(g: Builder) -> str:
    """Two convolutions whose inner channels nothing else sees, then 6 channels."""
    x = g.Relu(g.conv(g.input("x", [2, 3, 6, 6]), 12, name="free_a"))
    return g.Relu(g.conv(x, 6, name="seen"))


def conv_of(g: Builder, x: str, channels: int) -> str:
    """Two convolutions on a tensor whose shape inference does not know."""
    y = g.Relu(g.node("Conv", x, g.weight(10, channels, 1, 1), g.weight(10), name="free_b"))
    return g.node("Conv", y, g.weight(4, 10, 1, 1), name="last")


def branches() -> onnx.ModelProto:
    """A condition that only the caller knows; one branch reads an activation, the other a layer's weight as well."""
    g = Builder()
    condition, x = g.input("condition", [], BOOL), wide(g)
    weight = g.weight(6, 6, 1, 1, name="shared")
    one = body([node("Conv", [x, weight], "u1"), node("Relu", ["u1"], "u")], [], "u")
    other = body([node("Neg", [x], "v")], [], "v")
    y = g.node("If", condition, then_branch=one, else_branch=other, name="if")
    y = g.Add(y, g.node("Conv", x, weight, name="sharing"))
    return g.model(conv_of(g, y, 6))


def nested() -> onnx.ModelProto:
    """The inner If of a branch sees the outermost graph."""
    g = Builder()
    condition, x = g.input("condition", [], BOOL), wide(g)
    inner = [body([node(op, [x], name)], [], name) for op, name in (("Relu", "i"), ("Neg", "j"))]
    one = body([node("If", [condition], "u", then_branch=inner[0], else_branch=inner[1])], [], "u")
    other = body([node("Abs", [x], "v")], [], "v")
    return g.model(conv_of(g, g.node("If", condition, then_branch=one, else_branch=other, name="if"), 6))


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


CASES = [(branches, "If"), (nested, "If"), (loop, "Loop"), (scan, "Scan")]


@pytest.mark.parametrize(("make", "op"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_what_a_body_sees_stays_and_the_rest_is_cut_exactly(make: Callable[[], onnx.ModelProto], op: str) -> None:
    model = make()
    analysis = analysed(model)[0]
    names = {info.name for info in analysis.groups}
    assert "free_a" in names and not names & {"seen", "into_loop", "sharing", "shared"}
    held = [f for f in analysis.frozen if f.op == op and "seen" in f.layers]
    assert held and all("has a body" in f.reason and "export" in f.remedy for f in held)
    for seed in range(3):
        _, _, _, proof = pruned(model, seed)
        assert proof.max_relative_difference < 1e-5 and proof.compared > 2


@pytest.mark.parametrize("make", [branches, loop], ids=lambda make: make.__name__)
def test_pruned_from_end_to_end(make: Callable[[], onnx.ModelProto]) -> None:
    result = prune(make(), speedup=1.3, threads=1, best_effort=True)
    assert result.report.achieved.macs > 1.1
    said = [w for w in result.report.warnings if "are not counted" in w]
    assert len(said) == (1 if make is branches else 0)
