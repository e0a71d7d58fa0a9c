"""A place for the intercept: layers without a bias get zeros, which go again where nothing was fitted."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import numpy_helper


def add_biases(model: onnx.ModelProto) -> list[str]:
    """Give every Conv, ConvTranspose and Gemm with stored weights a bias, in place; returns the new tensors' names."""
    stored = {t.name: t for t in model.graph.initializer}
    taken = set(stored) | {o for node in model.graph.node for o in node.output}
    added = []
    for index, node in enumerate(model.graph.node):
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
            continue
        weight = stored.get(node.input[1])
        if weight is None or (len(node.input) > 2 and node.input[2]):
            continue
        attributes = {a.name: a.i for a in node.attribute}
        axis = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1 - attributes.get("transB", 0)}[node.op_type]
        count = weight.dims[axis] * (attributes.get("group", 1) if node.op_type == "ConvTranspose" else 1)
        name = f"{node.name or node.output[0] or index}.bias"
        while name in taken:
            name += "_"
        taken.add(name)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(weight.data_type)
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(count, dtype), name))
        del node.input[2:]
        node.input.append(name)
        added.append(name)
    return added


def drop_biases(model: onnx.ModelProto, names: Collection[str]) -> None:
    """Take the named biases out again, in place."""
    gone = set(names)
    for node in model.graph.node:
        if len(node.input) > 2 and node.input[2] in gone:
            del node.input[2:]
    rest = [t for t in model.graph.initializer if t.name not in gone]
    del model.graph.initializer[:]
    model.graph.initializer.extend(rest)
