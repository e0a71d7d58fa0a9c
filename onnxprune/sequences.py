"""Parts of a list that are known beforehand are ordinary tensors: a part of a split, an element of a written list."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import numpy_helper

Add = Callable[[onnx.TensorProto], None]


def unpack_sequences(model: onnx.ModelProto, add: Add) -> None:
    """Write Slice, Identity and Concat where a list of tensors is only a detour, in place.

    SequenceAt of SplitToSequence becomes a Slice, SequenceAt of SequenceConstruct an Identity, and ConcatFromSequence
    of SequenceConstruct a Concat, where positions and sizes are stored. Lists that nothing reads any more are left for
    the caller to drop. Bodies of control flow are left as they are.

    Args:
        model: is changed.
        add: stores a new constant in the model.
    """
    stored = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            stored.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    lists = ("SplitToSequence", "SequenceConstruct")
    made = {node.output[0]: node for node in model.graph.node if node.op_type in lists}
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or not node.input or node.input[0] not in made:
            continue
        source = made[node.input[0]]
        if node.op_type == "SequenceAt" and node.input[1] in stored:
            position = int(numpy_helper.to_array(stored[node.input[1]]))
            if source.op_type == "SplitToSequence":
                _as_slice(node, source, position, stored, add)
            elif -len(source.input) <= position < len(source.input):
                _become(node, "Identity", [source.input[position]])
        elif node.op_type == "ConcatFromSequence" and source.op_type == "SequenceConstruct":
            given = {a.name: a.i for a in node.attribute}
            if not given.get("new_axis", 0):
                _become(node, "Concat", list(source.input), axis=given["axis"])


def _as_slice(
    node: onnx.NodeProto, source: onnx.NodeProto, position: int, stored: Mapping[str, onnx.TensorProto], add: Add
) -> None:
    if len(source.input) < 2 or source.input[1] not in stored or position < 0:
        return
    axis = next((a.i for a in source.attribute if a.name == "axis"), 0)
    sizes = numpy_helper.to_array(stored[source.input[1]]).astype(np.int64)
    if sizes.ndim and position >= len(sizes):
        return
    start = int(sizes[:position].sum()) if sizes.ndim else int(sizes) * position
    end = start + int(sizes[position] if sizes.ndim else sizes)  # the last part may be shorter: Slice stops there too
    names = [f"{node.output[0]}_{what}" for what in ("starts", "ends", "axes")]
    for name, value in zip(names, (start, end, axis), strict=True):
        add(numpy_helper.from_array(np.array([value], np.int64), name))
    _become(node, "Slice", [source.input[0], *names])


def _become(node: onnx.NodeProto, op: str, inputs: list[str], **attributes: int) -> None:
    """Another operator under the same name, with the same output."""
    node.CopyFrom(onnx.helper.make_node(op, inputs, list(node.output), name=node.name))
    node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.items())
