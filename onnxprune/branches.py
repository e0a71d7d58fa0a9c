"""`If` nodes whose condition is known before the model runs: the chosen branch takes the node's place.

A condition is known where it is stored, or where it follows from sizes that shape inference proves to be static
(exporters write ``If(size == 1) Squeeze else Identity``).
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune.bodies import all_names, lay_out, names_of, rename
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
            _replace(model, index, next(a for a in model.graph.node[index].attribute if a.name == name))
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


def _replace(model: onnx.ModelProto, index: int, attribute: onnx.AttributeProto) -> None:
    """Put a branch in the place of its `If`; what its nodes make for the If gets the If's names."""
    outputs = list(model.graph.node[index].output)
    alone = onnx.AttributeProto()
    alone.CopyFrom(attribute)
    del model.graph.node[index]
    declared = len(model.graph.value_info)
    defined = all_names(model) + names_of(alone.g)
    defined.update(outputs)
    body = lay_out(model, alone, defined, set())
    made = {name for node in alone.g.node for name in node.output}
    new: dict[str, str] = {}
    for name, output in zip(body.results, outputs, strict=False):
        if output and name in made:
            new.setdefault(name, output)
    rename(alone.g, new)
    nodes = list(alone.g.node)
    for name, output in zip(body.results, outputs, strict=False):
        if output and new.get(name) != output:  # an outer tensor, a stored one, or one that is given twice
            nodes.append(helper.make_node("Identity", [new.get(name, name)], [output], name=f"{output}_branch"))
    del model.graph.value_info[declared:]  # what the branch declared; shapes are inferred again
    for k, node in enumerate(nodes):
        model.graph.node.insert(index + k, node)
