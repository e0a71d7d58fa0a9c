"""Lists of tensors whose elements are known beforehand are a detour: what is read from them are ordinary tensors.

Exporters write lists that a program grew one by one (SequenceEmpty, SequenceInsert), took parts from or put together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune.tensors import graphs

Add = Callable[[onnx.TensorProto], None]


@dataclass(frozen=True)
class _Part:
    """A part of a split, from one position to another along an axis."""

    tensor: str
    axis: int
    start: int
    end: int


@dataclass(frozen=True)
class _Parts:
    """A split into parts of one size: how many there are depends on the data."""

    tensor: str
    axis: int
    size: int


_Element = str | _Part


def unpack_sequences(model: onnx.ModelProto, add: Add) -> None:
    """Write tensor operators where a list of tensors is only a detour, in place.

    SequenceAt becomes an Identity or, of SplitToSequence, a Slice; ConcatFromSequence a Concat, behind an Unsqueeze of
    every element where it stacks them; SequenceLength a constant. That needs positions and sizes that are stored. Lists
    that nothing reads any more are left for the caller to drop. Bodies of control flow are left as they are.

    Args:
        model: is changed.
        add: stores a new constant in the model.
    """
    reader = _Reader(model, add)
    if not any("Sequence" in node.op_type for node in model.graph.node):
        return
    for node in list(model.graph.node):
        if node.domain in ("", "ai.onnx"):
            reader.read(node)
        reader.nodes.append(node)
    copies = list(reader.nodes)
    del model.graph.node[:]
    model.graph.node.extend(copies)


class _Reader:
    """Goes through the nodes in order, and knows the lists made so far."""

    def __init__(self, model: onnx.ModelProto, add: Add) -> None:
        self.add = add
        self.nodes: list[onnx.NodeProto] = []
        self.lists: dict[str, tuple[_Element, ...] | _Parts] = {}
        self.stored = {t.name: t for t in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant":
                self.stored.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
        self.taken = {*self.stored, *(value.name for value in model.graph.input)}
        self.taken |= {name for graph in graphs(model) for node in graph.node for name in node.output}
        self.version = next((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), 0)

    def read(self, node: onnx.NodeProto) -> None:
        """Note the list that a node makes, or replace the node by what it does with one."""
        attributes = {a.name: int(a.i) for a in node.attribute}
        given = self.lists.get(node.input[0]) if node.input else None
        made: tuple[_Element, ...] | _Parts | None = None
        if node.op_type == "SequenceConstruct":
            made = tuple(node.input)
        elif node.op_type == "SequenceEmpty":
            made = ()
        elif node.op_type == "SplitToSequence" and attributes.get("keepdims", 1):
            made = self._split(node, attributes.get("axis", 0))
        elif isinstance(given, tuple) and node.op_type == "SequenceInsert":
            place = self._position(node, 2, len(given), len(given))
            made = None if place is None else (*given[:place], node.input[1], *given[place:])
        elif isinstance(given, tuple) and node.op_type == "SequenceErase":
            place = self._position(node, 1, len(given) - 1, len(given))
            made = None if place is None else (*given[:place], *given[place + 1 :])
        elif isinstance(given, tuple) and node.op_type == "SequenceLength":
            _become(node, "Constant", [], value=numpy_helper.from_array(np.array(len(given))))
        elif isinstance(given, tuple) and given and node.op_type == "ConcatFromSequence":
            self._concat(node, given, attributes["axis"], bool(attributes.get("new_axis", 0)))
        elif given is not None and node.op_type == "SequenceAt":
            self._at(node, given)
        if made is not None:
            self.lists[node.output[0]] = made

    def _value(self, node: onnx.NodeProto, k: int) -> np.ndarray | None:
        name = node.input[k] if k < len(node.input) else ""
        return numpy_helper.to_array(self.stored[name]) if name in self.stored else None

    def _position(self, node: onnx.NodeProto, k: int, absent: int, count: int) -> int | None:
        """A position from the front; None where it is not stored."""
        if k >= len(node.input) or not node.input[k]:
            return absent
        value = self._value(node, k)
        place = None if value is None else int(value)
        return place if place is None or place >= 0 else count + place

    def _split(self, node: onnx.NodeProto, axis: int) -> tuple[_Element, ...] | _Parts | None:
        sizes = self._value(node, 1)
        if sizes is None:
            return None
        if not sizes.ndim:
            return _Parts(node.input[0], axis, int(sizes))
        ends = np.cumsum(sizes.astype(np.int64))
        return tuple(_Part(node.input[0], axis, int(e - s), int(e)) for s, e in zip(sizes, ends, strict=True))

    def _at(self, node: onnx.NodeProto, given: tuple[_Element, ...] | _Parts) -> None:
        value = self._value(node, 1)
        if value is None:
            return
        place = int(value)
        if isinstance(given, tuple):
            if not -len(given) <= place < len(given):
                return
            element: _Element = given[place]
        elif place >= 0:  # the last part may be shorter: Slice stops there too
            element = _Part(given.tensor, given.axis, given.size * place, given.size * (place + 1))
        else:
            return
        if isinstance(element, str):
            _become(node, "Identity", [element])
        else:
            _become(node, "Slice", self._slice(element, node.output[0]))

    def _slice(self, part: _Part, name: str) -> list[str]:
        """The inputs of a Slice that takes a part."""
        bounds = zip(("starts", "ends", "axes"), (part.start, part.end, part.axis), strict=True)
        return [part.tensor, *(self._store(value, f"{name}_{what}") for what, value in bounds)]

    def _concat(self, node: onnx.NodeProto, given: Sequence[_Element], axis: int, stacks: bool) -> None:
        tensors = []
        for k, element in enumerate(given):
            name = f"{node.output[0]}_{k}"
            if isinstance(element, _Part):
                element = self._make("Slice", self._slice(element, name), name)
            if stacks and self.version < 13:
                element = self._make("Unsqueeze", [element], f"{name}_stacked", axes=[axis])
            elif stacks:
                element = self._make("Unsqueeze", [element, self._store(axis, f"{name}_axes")], f"{name}_stacked")
            tensors.append(element)
        _become(node, "Concat", tensors, axis=axis)

    def _make(self, op: str, inputs: list[str], name: str, **attributes: list[int]) -> str:
        """One more node in front; returns what it gives."""
        node = onnx.NodeProto(name=self._fresh(name))
        node.output.append(node.name)
        _become(node, op, inputs, **attributes)
        self.nodes.append(node)
        return node.name

    def _store(self, value: int, name: str) -> str:
        name = self._fresh(name)
        self.add(numpy_helper.from_array(np.array([value], np.int64), name))
        return name

    def _fresh(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


def _become(node: onnx.NodeProto, op: str, inputs: list[str], **attributes: int | list[int] | onnx.TensorProto) -> None:
    """Another operator under the same name, with the same output."""
    node.CopyFrom(helper.make_node(op, inputs, list(node.output), name=node.name))
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
