"""Types of numbers: what the runtime cannot compute in, and copies of models in which rounding hides nothing.

onnxruntime has hardly any kernels for bfloat16 on CPUs, and few for float64 beside matrix products. Such a model is run
as a copy in float32, which holds every bfloat16 exactly; what is written keeps the model's own types.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxprune.tensors import array_of, graphs, stored, tensors_of

NARROW = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})
_OTHERS = frozenset({*NARROW, TensorProto.DOUBLE})  # what a copy has in float32
_MOVING = frozenset(
    {"Concat", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
)


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in another type; what that cannot hold becomes infinite, without a warning."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype)


def types(model: onnx.ModelProto) -> set[int]:
    """Types of the stored tensors, of the inputs, and of what Casts give."""
    found = {value.type.tensor_type.elem_type for value in model.graph.input}
    for graph in graphs(model):
        found.update(tensor.data_type for tensor in graph.initializer)
        for node in graph.node:
            found.update(tensor.data_type for tensor in tensors_of(node))
            found.update(a.i for a in node.attribute if a.name == "to" and node.op_type == "Cast")
    return found


def float32_copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with float32 in place of float16, bfloat16 and float64, wherever a type is stated."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for graph in graphs(copy):
        for tensor in graph.initializer:
            _widen(tensor)
        for value in (*graph.input, *graph.output, *graph.value_info):
            _declare(value.type)
        _widen_nodes(graph.node)
    for function in copy.functions:
        for value in function.value_info:
            _declare(value.type)
        _widen_nodes(function.node)
    return copy


def _widen_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        for tensor in tensors_of(node):
            _widen(tensor)
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in _OTHERS:
                attribute.i = TensorProto.FLOAT


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in _OTHERS:
        tensor.CopyFrom(stored(cast(array_of(tensor), np.dtype(np.float32)), tensor))


def _declare(kind: onnx.TypeProto) -> None:
    if kind.HasField("tensor_type") and kind.tensor_type.elem_type in _OTHERS:
        kind.tensor_type.elem_type = TensorProto.FLOAT
    elif kind.HasField("sequence_type"):
        _declare(kind.sequence_type.elem_type)
    elif kind.HasField("optional_type"):
        _declare(kind.optional_type.elem_type)


def without_rounding(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    """The model with activations scaled where QuantizeLinear rounds and clips them, and scaled back where they return.

    Sums in another order differ in their last bits, and a value between two steps may then be rounded either way: such
    differences say nothing about a cut. Where integers are computed with, the model is returned as it is.

    Args:
        model: not changed.
        shapes: of its tensors; only ranks matter.
    """
    integers = _integers(model)
    if not integers:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    for node in model.graph.node:
        back = node.op_type == "DequantizeLinear" and node.input[0] in integers
        if node.op_type != "QuantizeLinear" and not back:
            copy.graph.node.append(node)
            continue
        scale = node.input[1]
        rank, whole = (len(shapes.get(name, ())) for name in (scale, node.input[0]))
        attributes = {a.name: a.i for a in node.attribute}
        if rank > 1 or attributes.get("block_size", 0):
            return model
        if rank == 1:  # along one axis: broadcast to those behind it
            axis = attributes.get("axis", 1)
            behind = whole - 1 - axis if axis >= 0 else -1 - axis
            scale, shape = f"{node.output[0]}__scale", f"{node.output[0]}__shape"
            copy.graph.initializer.append(numpy_helper.from_array(np.array([-1] + [1] * behind), shape))
            copy.graph.node.append(onnx.helper.make_node("Reshape", [node.input[1], shape], [scale]))
        operation = "Mul" if back else "Div"
        copy.graph.node.append(onnx.helper.make_node(operation, [node.input[0], scale], node.output, name=node.name))
    return copy


def _integers(model: onnx.ModelProto) -> set[str]:
    """Tensors between QuantizeLinear and DequantizeLinear; none where something else computes with them."""
    found: set[str] = set()
    for node in model.graph.node:
        reads = found & set(node.input)
        if node.op_type == "QuantizeLinear" or (reads and node.op_type in _MOVING):
            found.update(node.output)
            if node.op_type == "Concat" and not set(node.input) <= found:
                return set()
        elif reads and node.op_type != "DequantizeLinear":
            return set()
    return set() if found & {output.name for output in model.graph.output} else found
