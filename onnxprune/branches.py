"""`If` nodes whose condition is known before the model runs: the chosen branch takes the node's place.

A condition is known where it is stored, or where it follows from sizes that shape inference proves to be static
(exporters write ``If(size == 1) Squeeze else Identity``).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from onnxprune.inference import infer
from onnxprune.tensors import array_of

Known = np.ndarray | None
_COMPARISONS = {
    "Equal": np.equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "And": np.logical_and,
    "Or": np.logical_or,
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
}


def inline_branch(model: onnx.ModelProto) -> bool:
    """Put the branch of one `If` with a known condition in its place; whether there was one."""
    candidates = [k for k, node in enumerate(model.graph.node) if node.op_type == "If" and not node.domain]
    if not candidates:
        return False
    sizes = _Sizes(model)
    for index in candidates:
        condition = sizes.value(model.graph.node[index].input[0])
        if condition is not None and condition.size == 1:
            name = "then_branch" if bool(condition.ravel()[0]) else "else_branch"
            body = next(a.g for a in model.graph.node[index].attribute if a.name == name)
            _replace(model, index, body)
            return True
    return False


class _Sizes:
    """Values that follow from stored tensors and from static sizes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.stored = {t.name: t for t in model.graph.initializer}
        self.producer = {name: node for node in model.graph.node for name in node.output if name}
        self.fed = {value.name for value in model.graph.input}
        self._dims: dict[str, list[int | None]] | None = None

    def value(self, name: str) -> Known:
        """The tensor's value; None where it is not known before the model runs."""
        if name in self.stored:
            return None if name in self.fed else array_of(self.stored[name])
        node = self.producer.get(name)
        if node is None or node.domain:
            return None
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant":
            return numpy_helper.to_array(attributes["value"]) if "value" in attributes else None
        if node.op_type == "Gather" and self._is_shape(node.input[0]):
            return self._size_at(node)
        if node.op_type in ("Shape", "Size"):
            dims = self.dims(node.input[0])
            if dims is None or any(d is None for d in dims):
                return None
            shape = np.array(dims, dtype=np.int64)
            return (
                np.array(shape.prod())
                if node.op_type == "Size"
                else shape[attributes.get("start", 0) : attributes.get("end")]
            )
        inputs = [self.value(n) for n in node.input if n]
        if any(v is None for v in inputs):
            return None
        return _compute(node.op_type, attributes, [v for v in inputs if v is not None])

    def _is_shape(self, name: str) -> bool:
        return name in self.producer and self.producer[name].op_type == "Shape" and not self.producer[name].attribute

    def _size_at(self, node: onnx.NodeProto) -> Known:
        """Some elements of a shape, of which the others may be dynamic."""
        dims, index = self.dims(self.producer[node.input[0]].input[0]), self.value(node.input[1])
        if dims is None or index is None:
            return None
        found = [dims[int(k)] if -len(dims) <= int(k) < len(dims) else None for k in index.ravel()]
        return None if any(f is None for f in found) else np.array(found, dtype=np.int64).reshape(index.shape)

    def dims(self, name: str) -> list[int | None] | None:
        """The tensor's sizes, None where they are dynamic; None where the rank is not known."""
        if self._dims is None:
            self._dims = _inferred(self.model)
        return self._dims.get(name)


def _compute(op: str, attributes: dict[str, object], inputs: list[np.ndarray]) -> Known:
    first = inputs[0]
    if op in _COMPARISONS:
        result: np.ndarray = np.asarray(_COMPARISONS[op](first, inputs[1]))
        return result
    if op == "Gather":
        return np.take(first, inputs[1], axis=int(str(attributes.get("axis", 0))))
    if op == "Not":
        return np.asarray(np.logical_not(first))
    if op in ("Identity", "Cast"):
        return first.astype(bool) if attributes.get("to") == onnx.TensorProto.BOOL else first
    if op in ("Squeeze", "Unsqueeze", "Reshape"):  # of one element
        return first.reshape(-1) if first.size == 1 else None
    return None


def _inferred(model: onnx.ModelProto) -> dict[str, list[int | None]]:
    return {
        name: [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in found.shape.dim]
        for name, found in infer(model).items()
        if found.HasField("shape")
    }


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
                yield from _graphs(body)


def _replace(model: onnx.ModelProto, index: int, body: onnx.GraphProto) -> None:
    node = model.graph.node[index]
    branch = onnx.GraphProto()
    branch.CopyFrom(body)
    outputs = list(node.output)
    del model.graph.node[index]
    taken = {v.name for v in model.graph.input} | {v.name for v in model.graph.output} | set(outputs)
    for graph in _graphs(model.graph):
        taken.update(t.name for t in graph.initializer)
        taken.update(name for n in graph.node for name in n.output)
    made = {name for n in branch.node for name in n.output if name}
    inner = made | {t.name for t in branch.initializer}
    new: dict[str, str] = {}
    for value, output in zip(
        branch.output, outputs, strict=False
    ):  # what a node of the branch makes gets the If's name
        if output and value.name in made and value.name not in new:
            new[value.name] = output
    for name in sorted(inner - set(new)):
        fresh, count = name, 1
        while fresh in taken:
            fresh, count = f"{name}_{count}", count + 1
        taken.add(fresh)
        new[name] = fresh
    for graph in _graphs(branch):
        for n in graph.node:
            for k, name in enumerate(n.input):
                n.input[k] = new.get(name, name)
            if graph is branch:
                for k, name in enumerate(n.output):
                    n.output[k] = new.get(name, name)
        for value in graph.output:
            value.name = new.get(value.name, value.name)
    for tensor in branch.initializer:
        tensor.name = new[tensor.name]
    model.graph.initializer.extend(branch.initializer)
    nodes = list(branch.node)
    for value, output in zip(branch.output, outputs, strict=False):
        if output and value.name != output:  # an outer tensor, a stored one, or one that is given twice
            nodes.append(onnx.helper.make_node("Identity", [value.name], [output], name=f"{output}_branch"))
    for k, n in enumerate(nodes):
        model.graph.node.insert(index + k, n)
