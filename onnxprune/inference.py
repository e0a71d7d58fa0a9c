"""Types and shapes that onnx infers, whatever the model's size."""

from __future__ import annotations

import numpy as np
import onnx

_SMALL = 1024  # elements of a stored tensor whose values may matter to a shape


def infer(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Element type and shape of every tensor of the main graph for which onnx finds them; nothing where it fails."""
    slim = onnx.ModelProto()
    slim.CopyFrom(model)
    for tensor in slim.graph.initializer:  # shapes are enough, and the model may be larger than a message
        if int(np.prod(tensor.dims)) > _SMALL:
            slim.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    rest = [t for t in slim.graph.initializer if int(np.prod(t.dims)) <= _SMALL]
    listed = [v for k, v in enumerate(slim.graph.input) if v.name not in {o.name for o in slim.graph.input[:k]}]
    del slim.graph.initializer[:], slim.graph.input[:], slim.graph.value_info[:]
    slim.graph.initializer.extend(rest)
    slim.graph.input.extend(listed)
    try:
        graph = onnx.shape_inference.infer_shapes(slim, data_prop=True).graph
    except Exception:  # no proof of anything
        return {}
    found = {t.name: _stored(t) for t in model.graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.type.HasField("tensor_type"):
            found[value.name] = value.type.tensor_type
    return found


def _stored(tensor: onnx.TensorProto) -> onnx.TypeProto.Tensor:
    return onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims)).tensor_type
