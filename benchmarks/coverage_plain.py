"""A model in standard operators of the main graph alone, which an outside script can silence channels in."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.inliner import inline_local_functions

_MS = "com.microsoft"
_ACTIVATIONS = {"LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta")}
_NARROW = {TensorProto.FLOAT16, TensorProto.BFLOAT16}


def rounding(model: onnx.ModelProto) -> float:
    """How far sums in another order may go, in parts of the largest value, where numbers have few bits; else 0."""
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return 5e-2  # a sum that lies between two steps may fall either way, and what follows goes on from there
    return 5e-3 if any(tensor.data_type in _NARROW for tensor in model.graph.initializer) else 0.0


def plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with functions inlined, and layers apart from what was fused with them."""
    model = inline_local_functions(model) if model.functions else model
    nodes = []
    for node in model.graph.node:
        nodes += _apart(node) if node.domain == _MS else [node]
    found = onnx.ModelProto()
    found.CopyFrom(model)
    del found.graph.node[:]
    found.graph.node.extend(nodes)
    return found


def _apart(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    out, inputs = node.output[0], list(node.input)
    if node.op_type == "FusedConv":
        activation, numbers = given.pop("activation", b"").decode(), given.pop("activation_params", [])
        made = [helper.make_node("Conv", inputs[:3], [f"{out}__conv"], **given)]
        if len(inputs) > 3 and inputs[3]:
            made.append(helper.make_node("Add", [made[-1].output[0], inputs[3]], [f"{out}__sum"]))
        return [*made, *_activated(activation, numbers, made[-1].output[0], out)]
    if node.op_type == "FusedGemm":
        activation = given.pop("activation", b"").decode()
        numbers = [given.pop(k) for k in ("activation_alpha", "activation_beta") if k in given]
        made = [helper.make_node("Gemm", inputs, [f"{out}__gemm"], **given)]
        return [*made, *_activated(activation, numbers, made[-1].output[0], out)]
    if node.op_type == "BiasGelu":
        total = helper.make_node("Add", inputs, [f"{out}__sum"])
        return [total, helper.make_node("Gelu", [f"{out}__sum"], [out], domain=_MS)]
    return [node]


def _activated(name: str, numbers: list[float], source: str, out: str) -> list[onnx.NodeProto]:
    if not name:
        return [helper.make_node("Identity", [source], [out])]
    if name == "Clip":
        bounds = [f"{out}__low", f"{out}__high"]
        constants = [
            helper.make_node("Constant", [], [n], value=numpy_helper.from_array(np.float32(v), n))
            for n, v in zip(bounds, numbers, strict=True)
        ]
        return [*constants, helper.make_node("Clip", [source, *bounds], [out])]
    return [helper.make_node(name, [source], [out], **dict(zip(_ACTIVATIONS.get(name, ()), numbers, strict=False)))]
