"""The layers: operators that hold multiply-accumulates, and those among them whose weights can be fitted again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from onnxprune.axes import BoundAxis, BoundRelation, Refusal
from onnxprune.graph import MOVING, Graph, Node
from onnxprune.macs import holds_macs
from onnxprune.rules.base import row_for

AxisId = tuple[str, int]
Operand = tuple[BoundAxis, ...]

FITTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})  # as matrix products, see `onnxprune.unfold`


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer whose weights can be fitted again: ``data_axis`` of ``data`` is contracted with that of ``weight``.

    A Gemm computes ``alpha`` times the product and ``beta`` times the bias.
    """

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
    alpha: float = 1.0
    beta: float = 1.0


def layer_of(node: Node, graph: Graph) -> Layer | None:
    """The layer that a node is, where its weights stand in the file."""
    if node.op not in FITTED or node.domain:
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
        contracted = 1 if node.attributes.get("transB", 0) else 0
        alpha, beta = (float(node.attributes.get(name, 1.0)) for name in ("alpha", "beta"))
        bias = bias if beta else ""
        # what is added has to be one number for each output, as the bias is that goes with the fitted weights
        width = graph.stored(weight).dims[1 - contracted]
        whole = not bias or list(graph.stored(bias).dims) in ([width], [1, width])
        if node.attributes.get("transA", 0) or not alpha or not whole:
            return None
        return Layer(node, data, weight, bias, 1, contracted, 1 - contracted, output, 1, 1, alpha, beta)
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


def silencing(graph: Graph, statistics: bool = False) -> frozenset[str]:
    """Tensors in which zeros silence a channel; they may reach their operator through others that only move them.

    ``statistics``: of what normalisations of fewer channels go by, every channel that went should be zero.
    """
    found: set[str] = set()
    for node in graph.nodes:
        if statistics and node.op == "Mul":  # the scale of a normalisation that is written out
            found.update(node.inputs)
        row = row_for(node.domain, node.op, graph.opsets.get(node.domain, 1))
        if row is not None:
            found.update(node.inputs[k] for k in row.weights if k < len(node.inputs))
    for node in reversed(graph.nodes):
        if node.op in MOVING and set(node.outputs) & found and set(node.outputs) <= graph.computed_from_constants:
            found.update(node.inputs if node.op == "Concat" else node.inputs[:1])
    return frozenset(found - {""})


def contracted_axes(node: Node, relation: BoundRelation | Refusal) -> set[AxisId]:
    """Axes of a layer's operands that the layer sums over."""
    if not holds_macs(node) or isinstance(relation, Refusal):
        return set()
    kept = {letter for operand in relation.outputs for axis in operand for letter in axis.letters}
    return {
        (name, k)
        for name, operand in zip(node.inputs, relation.inputs, strict=False)
        for k, axis in enumerate(operand)
        if set(axis.letters) - axis.mixed - kept
    }


def weighted_axes(node: Node, relation: BoundRelation | Refusal, constant: Collection[str]) -> list[AxisId]:
    """Axes of a layer's outputs that its weights have too: what its filters make, or scale one by one."""
    return [axis for axis, _ in _weighted(node, relation, constant)]


def made_axes(node: Node, relation: BoundRelation | Refusal, constant: Collection[str]) -> list[AxisId]:
    """Axes of a layer's outputs that come from its weights, and not from the data."""
    if isinstance(relation, Refusal):
        return []
    sides = zip(node.inputs, relation.inputs, strict=False)
    data: Operand = next((side for name, side in sides if name and name not in constant), ())
    words = {axis.letters for axis in data}
    return [axis for axis, letters in _weighted(node, relation, constant) if letters not in words]


def _weighted(
    node: Node, relation: BoundRelation | Refusal, constant: Collection[str]
) -> list[tuple[AxisId, tuple[str, ...]]]:
    if not holds_macs(node) or isinstance(relation, Refusal):
        return []
    sides = zip(node.inputs, relation.inputs, strict=False)
    ours = {x for name, side in sides if name in constant for axis in side for x in axis.letters}
    return [
        ((name, k), axis.letters)
        for name, operand in zip(node.outputs, relation.outputs, strict=True)
        for k, axis in enumerate(operand)
        if name and ours & set(axis.letters)
    ]
