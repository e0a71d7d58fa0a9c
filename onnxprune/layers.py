"""The layers: operators that hold multiply-accumulates and weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.axes import BoundRelation, Refusal
from onnxprune.graph import Graph, Node
from onnxprune.probe import Shapes

AxisId = tuple[str, int]

LAYER_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True, eq=False)
class MacTerm:
    """Multiply-accumulates of one node: a coefficient times the sizes of some axes."""

    node: str
    coefficient: float
    axes: tuple[AxisId, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer with stored weights: ``data`` is contracted with ``weight`` along ``data_axis``/``weight_axis``."""

    node: Node
    data: str
    weight: str
    bias: str  # empty where there is none; of a MatMul, what the Add behind it adds
    data_axis: int
    weight_axis: int  # the contracted axis of the weight (of one group)
    out_axis: int  # of the weight; the one that makes the output's channels
    output: str
    channel_axis: int  # of the output
    group: int


def mac_term(node: Node, shapes: Shapes) -> MacTerm | None:
    """The cost of a node as a product of axis sizes; None where it holds no multiply-accumulates."""
    if node.op not in LAYER_OPS or node.domain:
        return None
    left, right, out = node.inputs[0], node.inputs[1], node.outputs[0]
    a, w, y = shapes.shape(left), shapes.shape(right), shapes.shape(out)
    if a is None or w is None or y is None:
        return None
    if node.op in ("Conv", "ConvTranspose"):
        spatial = y[2:] if node.op == "Conv" else a[2:]
        coefficient = float(np.prod([a[0], *w[2:], *spatial], dtype=np.float64))
        return MacTerm(node.label, coefficient, ((right, 0), (right, 1)))
    if node.op == "Gemm":
        contracted = 0 if node.attributes.get("transA", 0) else 1
        return MacTerm(node.label, float(y[0]), ((left, contracted), (out, 1)))
    axes = [(out, k) for k in range(len(y))] + [(left, len(a) - 1)]
    return MacTerm(node.label, 1.0, tuple(axes))


def layer_of(node: Node, graph: Graph) -> Layer | None:
    """The layer that a node is, where its weights stand in the file."""
    if node.op not in LAYER_OPS or node.domain:
        return None
    data, weight = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else ""
    if not graph.is_stored(weight) or data in graph.computed_from_constants:
        return None
    if bias and not graph.is_stored(bias):
        return None
    rank = len(graph.stored(weight).dims)
    output = node.outputs[0]
    group = int(node.attributes.get("group", 1))
    if node.op == "Conv":
        return Layer(node, data, weight, bias, 1, 1, 0, output, 1, group)
    if node.op == "ConvTranspose":
        return Layer(node, data, weight, bias, 1, 0, 1, output, 1, group)
    if node.op == "Gemm":
        if node.attributes.get("transA", 0):
            return None
        contracted = 1 if node.attributes.get("transB", 0) else 0
        return Layer(node, data, weight, bias, 1, contracted, 1 - contracted, output, 1, 1)
    if rank != 2:
        return None
    return Layer(node, data, weight, _added_bias(node, graph), -1, 0, 1, output, -1, 1)


def _added_bias(node: Node, graph: Graph) -> str:
    """The stored vector that the only reader of a matrix product adds to it; empty where there is none."""
    readers = graph.consumers.get(node.outputs[0], ())
    if len(readers) != 1 or readers[0].op != "Add" or node.outputs[0] in graph.outputs:
        return ""
    other = [name for name in readers[0].inputs if name != node.outputs[0]]
    width = graph.stored(node.inputs[1]).dims[1]
    fits = len(other) == 1 and graph.is_stored(other[0]) and list(graph.stored(other[0]).dims) == [width]
    return other[0] if fits else ""


def contracted_axes(node: Node, relation: BoundRelation | Refusal) -> set[AxisId]:
    """Axes of a layer's operands that the layer sums over."""
    if node.op not in LAYER_OPS or isinstance(relation, Refusal):
        return set()
    kept = {letter for operand in relation.outputs for axis in operand for letter in axis.letters}
    return {
        (name, k)
        for name, operand in zip(node.inputs, relation.inputs, strict=False)
        for k, axis in enumerate(operand)
        if axis.letters and not set(axis.letters) <= kept
    }
