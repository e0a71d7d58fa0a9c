"""Bodies of If, Loop and Scan for test graphs, and layers around them."""

from __future__ import annotations

import numpy as np
import onnx
from builder import Builder
from onnx import TensorProto, helper, numpy_helper

BOOL, INT64, FLOAT = TensorProto.BOOL, TensorProto.INT64, TensorProto.FLOAT

ids = {"ids": lambda case: getattr(case, "__name__", "")}  # of models by what makes them


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


def stored(graph: onnx.GraphProto, **shapes: tuple[int, ...]) -> onnx.GraphProto:
    """The body with weights of its own."""
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        array = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1.0)
        graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    return graph


def names_of(graph: onnx.GraphProto) -> list[object]:
    """Names of nodes, tensors and weights, body by body."""
    inner = [names_of(a.g) for n in graph.node for a in n.attribute if a.HasField("g")]
    nodes = [(n.name, n.op_type, tuple(n.input), tuple(n.output)) for n in graph.node]
    return [nodes, sorted(t.name for t in graph.initializer), [o.name for o in graph.output], inner]
