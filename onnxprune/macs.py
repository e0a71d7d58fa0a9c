"""Multiply-accumulates: what every operator that holds some costs, as products of the sizes of its axes.

Counted are products that are summed up: convolutions, matrix products, recurrent cells and attention. Work on every
element by itself (activations, normalisations, pooling, interpolation) is not, as in the papers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnxprune.graph import Node
from onnxprune.probe import Shapes
from onnxprune.tensors import bodies

AxisId = tuple[str, int]
Shape = tuple[int, ...]
_MS = "com.microsoft"


@dataclass(frozen=True, eq=False)
class MacTerm:
    """Multiply-accumulates of one node: a coefficient times the sizes of some axes. A node may have several terms."""

    node: str
    index: int  # of the node
    coefficient: float
    axes: tuple[AxisId, ...]

    def at(self, shapes: Shapes) -> float:
        """Its value at these shapes."""
        return self.coefficient * float(np.prod([shapes.size(*axis) for axis in self.axes]))


Part = tuple[float, tuple[AxisId, ...]]  # a coefficient, and axes whose sizes it is multiplied by
Count = Callable[[Node, Callable[[int], Shape], Shape], list[Part]]  # of a node, its inputs' shapes, its output's shape


def mac_terms(node: Node, shapes: Shapes) -> tuple[MacTerm, ...]:
    """The cost of a node as a sum of products of axis sizes; empty where it holds none, or its shapes are not known."""
    count = _TABLE.get((node.domain, node.op))
    out = shapes.shape(node.outputs[0]) if count is not None and node.outputs else None
    if count is None or out is None:
        return ()

    def shape(k: int) -> Shape:
        found = shapes.shape(node.inputs[k]) if k < len(node.inputs) else None
        if found is None:
            raise LookupError
        return found

    try:
        parts = count(node, shape, out)
    except LookupError:
        return ()
    return tuple(MacTerm(node.label, node.index, coefficient, axes) for coefficient, axes in parts)


def all_terms(nodes: Iterable[Node], shapes: Shapes) -> tuple[MacTerm, ...]:
    """The cost of all nodes; what is in bodies that run several times is a number of its own."""
    found: list[MacTerm] = []
    for node in nodes:
        found += [replace(term, axes=(*term.axes, *node.often)) for term in mac_terms(node, shapes)]
        if node.index in shapes.turns:
            found.append(MacTerm(node.label, node.index, shapes.turns[node.index], node.often))
    return tuple(found)


def layers_within(node: onnx.NodeProto) -> int:
    """How many operators in the bodies of a node hold multiply-accumulates."""
    inner = [each for body in bodies(node) for each in body.node]
    return sum((each.domain, each.op_type) in _TABLE for each in inner) + sum(map(layers_within, inner))


def holds_macs(node: Node) -> bool:
    """Whether the operator is one of those that are counted: a layer, in the words of a user."""
    return (node.domain, node.op) in _TABLE


def _size(*numbers: int) -> float:
    return float(np.prod(numbers, dtype=np.float64))


def _all(name: str, shape: Shape) -> tuple[AxisId, ...]:
    return tuple((name, axis) for axis in range(len(shape)))


def _conv(weight: int) -> Count:
    """Every element of the output costs one filter."""

    def count(node: Node, shape: Callable[[int], Shape], out: Shape) -> list[Part]:
        w, name = shape(weight), node.inputs[weight]
        return [(_size(*out, *w[2:]) / w[0], ((name, 0), (name, 1)))]

    return count


def _conv_transpose(node: Node, shape: Callable[[int], Shape], out: Shape) -> list[Part]:
    """Every element of the input is spread by one filter."""
    x, w = shape(0), shape(1)
    return [(_size(x[0], *x[2:], *w[2:]), ((node.inputs[1], 0), (node.inputs[1], 1)))]


def _product(node: Node, shape: Callable[[int], Shape], out: Shape) -> list[Part]:
    """Every element of the output costs one row of the left operand, which comes first."""
    left = shape(0)
    contracted = len(left) - 1
    if node.attributes.get("transA", 0):
        contracted = 0 if node.attributes.get("transBatchA", 0) else len(left) - 2
    return [(1.0, (*_all(node.outputs[0], out), (node.inputs[0], contracted)))]


def _einsum(node: Node, shape: Callable[[int], Shape], out: Shape) -> list[Part]:
    """Operands are multiplied one after the other; letters that no later one and not the output have are summed up."""
    equation = node.attributes["equation"]
    text = (equation.decode() if isinstance(equation, bytes) else str(equation)).replace(" ", "")
    left, arrow, result = text.partition("->")
    words = [_letters(word, len(shape(k))) for k, word in enumerate(left.split(","))]
    places = {letter: (node.inputs[k], axis) for k, word in reversed(list(enumerate(words))) for axis, letter in word}
    for k, word in enumerate(words):  # an axis of size one is broadcast
        places |= {letter: (node.inputs[k], axis) for axis, letter in word if shape(k)[axis] > 1}
    if arrow:
        made = {letter for _, letter in _letters(result, len(out))}
    else:
        every = [letter for word in words for _, letter in word]
        made = {letter for letter in every if every.count(letter) == 1 or letter.startswith(".")}
    parts: list[Part] = []
    have = {letter for _, letter in words[0]}
    for k, word in enumerate(words[1:], start=1):
        have |= {letter for _, letter in word}
        kept = have & (made | {letter for other in words[k + 1 :] for _, letter in other})
        if kept != have:
            parts.append((1.0, tuple(places[letter] for letter in sorted(have))))
        have = kept
    return parts


def _letters(word: str, rank: int) -> list[tuple[int, str]]:
    """The letter of every axis; those of an ellipsis are numbered from the end."""
    names: list[str] = []
    for part in re.findall(r"\.\.\.|.", word):
        hidden = rank - len(word.replace("...", ""))
        names += [f".{hidden - k}" for k in range(hidden)] if part == "..." else [part]
    return list(enumerate(names))


def _recurrent(node: Node, shape: Callable[[int], Shape], out: Shape) -> list[Part]:
    """Per step and direction, the weights of the input and those of the state."""
    steps = _size(*shape(0)[:2])
    return [(steps, _all(node.inputs[k], shape(k))) for k in (1, 2)]


def _attention(node: Node, shape: Callable[[int], Shape], out: Shape) -> list[Part]:
    """Scores, then the values gathered by them; keys of a cache count."""
    query, key = shape(0), shape(1)
    cached = shape(4)[2] if len(node.inputs) > 4 and node.inputs[4] else 0
    axis = 1 if len(key) == 3 else 2
    over = (node.inputs[1], axis)
    pairs = [(node.inputs[0], query), (node.outputs[0], out)]
    parts: list[Part] = [(1.0, (*_all(name, dims), over)) for name, dims in pairs]
    return parts + [(float(cached), _all(name, dims)) for name, dims in pairs if cached]


def _packed_attention(past: int) -> Count:
    """The projection to queries, keys and values, and the attention itself; keys of a cache count."""

    def count(node: Node, shape: Callable[[int], Shape], out: Shape) -> list[Part]:
        x, w, weight, made = shape(0), shape(1), node.inputs[1], node.outputs[0]
        sizes = node.attributes.get("qkv_hidden_sizes")
        query = int(sizes[0]) if sizes else (w[1] - out[2]) // 2
        keys = x[1] + (shape(past)[3] if len(node.inputs) > past and node.inputs[past] else 0)
        projection: Part = (_size(*x[:2]), ((weight, 0), (weight, 1)))
        if query == out[2]:
            return [projection, (2.0 * keys, _all(made, out))]
        return [projection, (_size(x[0], x[1], keys, query), ()), (float(keys), _all(made, out))]

    return count


def _multi_head_attention(node: Node, shape: Callable[[int], Shape], out: Shape) -> list[Part]:
    """As attention; queries may come with keys and values packed beside them."""
    query = shape(0)
    key = shape(1) if len(node.inputs) > 1 and node.inputs[1] else query
    cached = shape(6)[2] if len(node.inputs) > 6 and node.inputs[6] else 0
    keys = (key[2] if len(key) == 4 else key[1]) + cached
    if len(query) == 3:
        return [(float(keys), _all(node.inputs[0], query)), (float(keys), _all(node.outputs[0], out))]
    return [(2.0 * keys, _all(node.outputs[0], out))]


def _grouped_attention(node: Node, shape: Callable[[int], Shape], out: Shape) -> list[Part]:
    """As attention; several heads of queries share keys and values, which may be packed behind the queries."""
    cached = shape(3)[2] if len(node.inputs) > 3 and node.inputs[3] else 0
    return [(2.0 * (shape(0)[1] + cached), _all(node.outputs[0], out))]


def _low_bits(node: Node, shape: Callable[[int], Shape], out: Shape) -> list[Part]:
    """Weights packed into few bits: their sizes are attributes."""
    return [(float(node.attributes["K"]), _all(node.outputs[0], out))]


_TABLE: dict[tuple[str, str], Count] = {}
for _domain, _names, _count in (
    ("", "Conv DeformConv ConvInteger", _conv(1)),
    ("", "QLinearConv", _conv(3)),
    ("", "ConvTranspose", _conv_transpose),
    ("", "Gemm MatMul MatMulInteger QLinearMatMul", _product),
    ("", "Einsum", _einsum),
    ("", "GRU LSTM RNN", _recurrent),
    ("", "Attention", _attention),
    (_MS, "FusedConv NhwcConv NhwcFusedConv", _conv(1)),
    (_MS, "QLinearConv", _conv(3)),
    (f"{_MS}.nchwc", "Conv", _conv(1)),
    (_MS, "DynamicQuantizeMatMul FusedGemm FusedMatMul MatMulIntegerToFloat QGemm TransposeMatMul", _product),
    (_MS, "MatMulBnb4 MatMulNBits", _low_bits),
    (_MS, "DynamicQuantizeLSTM", _recurrent),
    (_MS, "Attention", _packed_attention(4)),
    (_MS, "QAttention", _packed_attention(8)),
    (_MS, "MultiHeadAttention", _multi_head_attention),
    (_MS, "GroupQueryAttention", _grouped_attention),
):
    _TABLE.update(((_domain, _name), _count) for _name in _names.split())
